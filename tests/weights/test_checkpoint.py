"""A GPT-2 file is read correctly, or refused with the name of the faulty tensor."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.weights.official_file import (
    SMALL,
    assert_equal,
    header_of,
    join,
    split,
    stored_shapes,
    write_official,
)
from weights import WeightsError, load_weights
from weights.checkpoint import read_tensors

ROOT = Path(__file__).parents[2]
NO_BLOCKS = {name: None for name in stored_shapes(**SMALL) if name.startswith("h.")}


def load(tensors, folder):
    """Write `tensors` with the safetensors library and load the file."""
    path = folder / "given.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    return load_weights(path)


def test_the_files_of_these_tests_have_the_official_header_and_misalignment():
    """Against the published facts about the official gpt2-medium file."""
    shapes = stored_shapes(n_layer=24, n_embd=1024, vocab_size=50257, n_positions=1024)
    header = header_of(shapes)
    n_parameters = sum(math.prod(s) for k, s in shapes.items() if not k.endswith(".attn.bias"))
    assert (len(shapes), len(header), n_parameters) == (316, 28_986, 354_823_168)
    assert 8 + len(header) + 4 * sum(map(math.prod, shapes.values())) == 1_519_984_962
    assert (8 + len(header)) % 4 == 2


@pytest.mark.parametrize("misalignment", [0, 1, 2, 3])
def test_every_alignment_of_the_file_loads_bit_for_bit_into_aligned_memory(
    official, parameters, misalignment
):
    """The header is padded with 0 to 3 spaces. The memory is the CPU's, whatever the default
    device."""
    header, body = split(official.read_bytes())
    header += b" " * ((misalignment - len(header)) % 4)
    official.write_bytes(join(header, body))
    with torch.device("meta"):
        state_dict = load_weights(official)
    assert_equal(state_dict, parameters)
    for tensor in state_dict.values():
        assert tensor.data_ptr() % 64 == 0
        assert tensor.untyped_storage().nbytes() == tensor.nbytes  # shares memory with nothing


PEAK = """
import pathlib, sys
from model import GPT2
from weights import load_weights

def peak():
    # Not getrusage's ru_maxrss, which a process inherits from the one that starts it.
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])

before = peak()
model = GPT2.from_state_dict(load_weights(sys.argv[1]), assign=True)
print(peak() - before - sum(p.nbytes for p in model.parameters()))
"""


def test_a_file_becomes_a_model_without_a_second_copy(tmp_path):
    """The peak memory of a separate process exceeds the model's 67 MB by at most its largest
    tensor, the embedding of 16 MB."""
    path = tmp_path / "large.safetensors"
    write_official(path, n_layer=4, n_embd=512, vocab_size=8000, n_positions=64)
    command = [sys.executable, "-c", PEAK, path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 8000 * 512 * 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_loads_as_the_exact_float32(dtype, parameters, tmp_path):
    """float32 represents both exactly."""
    half = {name: tensor.to(dtype) for name, tensor in parameters.items()}
    assert_equal(load(half, tmp_path), {name: tensor.float() for name, tensor in half.items()})


def test_an_untied_or_misshapen_head_is_refused(parameters, tmp_path):
    """A head with one value changed, and one with a row missing."""
    head = parameters["wte.weight"].clone()
    head[300, 127] += 1
    with pytest.raises(WeightsError, match=r"lm_head\.weight: got values that differ"):
        load(parameters | {"lm_head.weight": head}, tmp_path)
    with pytest.raises(WeightsError, match=r"lm_head\.weight: got \(300, 128\), expected \(301, "):
        load(parameters | {"lm_head.weight": head[:300].clone()}, tmp_path)


@pytest.mark.parametrize(
    ("value", "dtype"), [(math.nan, torch.float32), (-math.inf, torch.float16)]
)
def test_a_value_that_is_not_finite_is_refused_and_located(value, dtype, parameters, tmp_path):
    """Row 5, column 7 of (128, 512) is flat index 5 * 512 + 7."""
    parameters["h.1.mlp.c_fc.weight"][5, 7] = value
    message = rf"h\.1\.mlp\.c_fc\.weight: got {value} at flat index 2567"
    with pytest.raises(WeightsError, match=message):
        load({name: tensor.to(dtype) for name, tensor in parameters.items()}, tmp_path)


def test_finite_values_whose_sum_overflows_are_accepted(parameters, tmp_path):
    """The quick check is a sum: finite values with an infinite sum must not be refused."""
    parameters["wpe.weight"].fill_(torch.finfo(torch.float32).max)
    assert_equal(load(parameters, tmp_path), parameters)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ln_f.bias": None}, r"'ln_f\.bias': got nothing, expected \(128,\)"),
        ({"wte.weight": None}, r"got 27 tensors \('h\.0\.a[^)]{,150}\.{3}\), .*expected wte\.we"),
        ({"wpe.weight": (24,)}, r"wpe\.weight': got \(24,\), expected \(24, 128\)"),
        ({"wpe.weight": (0, 128)}, r"got 28 tensors .* wpe\.weight \(0, 128\)"),
        ({"h.0.attn.c_attn.weight": (384, 128)}, r"got \(384, 128\), expected \(128, 384\)"),
        ({"h.0.attn.rotary.bias": (3,)}, r"'h\.0\.attn\.rotary\.bias': got \(3,\), expected no"),
        ({"h.999999999.ln_1.weight": (128,)}, "n_layer=3.* and 8 more"),
        ({"transformer.ln_f.bias": (128,)}, r"'ln_f\.bias': got it twice"),
        ({"wte.weight": (301, 100)}, r"wte\.weight \(301, 100\) .* width a multiple of 64"),
        (NO_BLOCKS, r"got 4 tensors .*expected .*h\.0\."),
    ],
)
def test_tensors_that_are_not_those_of_a_gpt2_are_refused_by_name(
    change, message, parameters, tmp_path
):
    """Tensors are dropped (None) or reshaped; the message names one and the file."""
    for name, shape in change.items():
        parameters.pop(name, None)
        if shape is not None:
            parameters[name] = torch.ones(shape)
    with pytest.raises(WeightsError, match=message) as caught:
        load(parameters, tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.uint8])
def test_other_dtypes_are_refused_by_name(dtype, parameters, tmp_path):
    """One tensor in a dtype that no GPT-2 file has, lossless or not."""
    parameters["ln_f.bias"] = parameters["ln_f.bias"].to(dtype)
    with pytest.raises(WeightsError, match=r"ln_f\.bias': got (F64|F8_E4M3|U8), expected one of"):
        load(parameters, tmp_path)


def test_a_file_that_is_cut_short_while_it_is_read_raises_and_does_not_crash(official):
    """Reading through a memory map would kill the process with SIGBUS here."""
    tensors = read_tensors(official)
    next(tensors)
    os.truncate(official, 200_000)
    with pytest.raises(WeightsError, match="the file ended"):
        list(tensors)


CHANGES = {
    "dtype": st.sampled_from(["F16", "BF16", "F64", "I32", "F8_E4M3", "F4", "BOOL", "f32"]),
    "shape": st.lists(st.integers(-1, 2**40) | st.sampled_from([0, 1, 64, 192]), max_size=4),
    "data_offsets": st.lists(
        st.integers(-2, 2**64) | st.integers(0, 60_000).map(lambda n: 4 * n), max_size=3
    ),
}


@settings(
    max_examples=250,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_a_damaged_header_is_refused_or_means_the_same(tmp_path, data):
    """A few bytes overwritten, its length's among them; or fields of one tensor replaced, or those
    of another given to it. There is nothing in between: the content is float32, no other dtype of
    four bytes is accepted, and offsets may leave no gap."""
    path = tmp_path / "damaged.safetensors"
    parameters = write_official(path, n_layer=1, n_embd=64, vocab_size=7, n_positions=3)
    header, body = split(raw := path.read_bytes())
    if data.draw(st.booleans()):
        damaged = bytearray(raw)
        for at in data.draw(st.lists(st.integers(0, 7 + len(header)), min_size=1, max_size=4)):
            damaged[at] = data.draw(st.integers(0, 255))
    else:
        entries = json.loads(header)
        one, other = (data.draw(st.sampled_from([*entries][1:])) for _ in range(2))
        for field in data.draw(st.sets(st.sampled_from(sorted(CHANGES)), min_size=1)):
            entries[one][field] = data.draw(CHANGES[field] | st.just(entries[other][field]))
        damaged = join(json.dumps(entries).encode(), body)
    path.write_bytes(damaged)
    try:
        state_dict = load_weights(path)
    except WeightsError as error:
        assert str(path) in str(error)  # noqa: PT017, a refusal is fine, a message without the path is not
    else:
        assert_equal(state_dict, parameters)
