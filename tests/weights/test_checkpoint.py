"""A GPT-2 file is read correctly, or refused with the name of the faulty tensor."""

import math
import os

import pytest
import torch
from safetensors.torch import save_file

from tests.weights.official_file import SMALL, assert_equal, join, split
from weights import WeightsError, load_weights
from weights.checkpoint import read_tensors

NO_BLOCKS = {name: None for name in SMALL.shapes() if name.startswith("h.")}


def load(tensors, folder):
    """Write `tensors` with the safetensors library and load the file."""
    path = folder / "given.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    return load_weights(path)


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_loads_as_the_exact_float32(dtype, parameters, tmp_path):
    """float32 represents both exactly."""
    half = {name: tensor.to(dtype) for name, tensor in parameters.items()}
    assert_equal(load(half, tmp_path), {name: tensor.float() for name, tensor in half.items()})


def test_an_untied_head_is_refused(parameters, tmp_path):
    """One value is changed."""
    head = parameters["wte.weight"].clone()
    head[300, 127] += 1
    with pytest.raises(WeightsError, match=r"lm_head\.weight: got values that differ"):
        load(parameters | {"lm_head.weight": head}, tmp_path)


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
        ({"lm_head.weight": (300, 128)}, r"lm_head\.weight: got \(300, 128\), expected \(301, "),
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


DAMAGES = {  # from the header and the body of a file to the bytes of a damaged one
    "cut short": lambda header, body: join(header, body[:-1]),
    "too long": lambda header, body: join(header, body + b"0"),
    "header cut short": lambda header, body: join(header[:-1], body),
    "another size": lambda header, body: join(header.replace(b"[128]", b"[127]", 1), body),
    "another dtype": lambda header, body: join(header.replace(b"F32", b"F16", 1), body),
    "a gap": lambda header, body: join(header.replace(b"[0,", b"[4,", 1), body),
    "shared bytes": lambda header, body: join(header.replace(b"[2304,", b"[0,", 1), body),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused(damage, official):
    """Nothing is guessed; the message names the file."""
    official.write_bytes(DAMAGES[damage](*split(official.read_bytes())))
    with pytest.raises(WeightsError) as caught:
        load_weights(official)
    assert str(official) in str(caught.value)
