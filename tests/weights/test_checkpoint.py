"""A GPT-2 file is read correctly, or refused with the name of the faulty tensor.

The reference is `read_tensorwise`, which shares nothing with the code under test.
"""

import math
import os

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from tests.weights.official_file import (
    SMALL,
    assert_equal,
    header_of,
    parameters_of,
    stored_shapes,
    write_official,
)
from weights import WeightsError, load_weights, save_weights
from weights.checkpoint import read_tensors

HEAD = "lm_head.weight"
NO_BLOCKS = {name: None for name in stored_shapes(**SMALL) if name.startswith("h.")}


@pytest.fixture
def official(tmp_path):
    path = tmp_path / "official.safetensors"
    write_official(path, **SMALL)
    return path


@pytest.fixture
def parameters(official):
    """Name -> float32 array of a valid file, for tests to damage."""
    return parameters_of(official)


def load_arrays(arrays, folder, **more):
    """Write `arrays` and `more` with the safetensors library and load the file."""
    path = folder / "given.safetensors"
    save_file({**arrays, **more}, path, metadata={"format": "pt"})
    return load_weights(path)


def test_the_medium_file_of_these_tests_has_the_official_header_size_and_misalignment():
    """Against the published facts about the official gpt2-medium file."""
    shapes = stored_shapes(n_layer=24, n_embd=1024, vocab_size=50257, n_positions=1024)
    header = header_of(shapes)
    n_parameters = sum(math.prod(s) for k, s in shapes.items() if not k.endswith(".attn.bias"))
    assert (len(shapes), len(header), n_parameters) == (316, 28_986, 354_823_168)
    assert 8 + len(header) + 4 * sum(map(math.prod, shapes.values())) == 1_519_984_962
    assert (8 + len(header)) % 4 == 2


@pytest.mark.parametrize("misalignment", [0, 1, 2, 3])
def test_every_alignment_of_the_file_loads_bit_for_bit_into_aligned_memory(official, misalignment):
    """The header is padded with 0 to 3 spaces; values against the plain reader's. The memory is
    the CPU's, whatever the default device."""
    raw = official.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    spaces = (misalignment - length) % 4
    header = raw[8 : 8 + length] + b" " * spaces
    official.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    with torch.device("meta"):
        state_dict = load_weights(official)
    assert_equal(state_dict, parameters_of(official))
    for tensor in state_dict.values():
        assert tensor.data_ptr() % 64 == 0
        assert tensor.untyped_storage().nbytes() == tensor.nbytes  # shares memory with nothing


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_loads_as_the_exact_float32(dtype, parameters, tmp_path):
    """Against the plain reader, which widens the stored values independently."""
    save_weights({k: torch.from_numpy(v).to(dtype) for k, v in parameters.items()}, tmp_path)
    assert_equal(load_weights(tmp_path), parameters_of(tmp_path / "model.safetensors"))


def test_an_untied_or_misshapen_head_is_refused(parameters, tmp_path):
    """A head with one value changed, and one with a row missing."""
    head = parameters["wte.weight"].copy()
    head[300, 127] += 1
    with pytest.raises(WeightsError, match=r"lm_head\.weight: got values that differ"):
        load_arrays(parameters, tmp_path, **{HEAD: head})
    with pytest.raises(WeightsError, match=r"lm_head\.weight: got \(300, 128\), expected \(301, "):
        load_arrays(parameters, tmp_path, **{HEAD: head[:300].copy()})


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_value_that_is_not_finite_is_refused_and_located(value, dtype, parameters, tmp_path):
    """Row 5, column 7 of (128, 512) is flat index 5 * 512 + 7."""
    spoilt = {k: v.astype(dtype) for k, v in parameters.items()}
    spoilt["h.1.mlp.c_fc.weight"][5, 7] = value
    with pytest.raises(
        WeightsError, match=rf"h\.1\.mlp\.c_fc\.weight: got {value} at flat index 2567"
    ):
        load_arrays(spoilt, tmp_path)


def test_finite_values_whose_sum_overflows_are_accepted(parameters, tmp_path):
    """The quick check is a sum: finite values with an infinite sum must not be refused."""
    parameters["wpe.weight"][:] = np.finfo(np.float32).max
    assert_equal(load_arrays(parameters, tmp_path), parameters)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ln_f.bias": None}, r"'ln_f\.bias': got nothing, expected \(128,\)"),
        ({"wte.weight": None}, r"got 27 tensors \('h\.0\.attn\..*expected wte\.weight, wpe\.w"),
        ({"wpe.weight": (24,)}, r"wpe\.weight': got \(24,\), expected \(24, 128\)"),
        ({"wpe.weight": (0, 128)}, r"got 28 tensors .* wpe\.weight \(0, 128\)"),
        ({"h.0.attn.c_attn.weight": (384, 128)}, r"got \(384, 128\), expected \(128, 384\)"),
        ({"h.0.attn.c_proj.bias": (128, 1)}, r"got \(128, 1\), expected \(128,\)"),
        ({"h.0.attn.rotary.bias": (3,)}, r"'h\.0\.attn\.rotary\.bias': got \(3,\), expected no"),
        ({"h.999999999.ln_1.weight": (128,)}, "n_layer=3"),
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
            parameters[name] = np.ones(shape, np.float32)
    with pytest.raises(WeightsError, match=message) as caught:
        load_arrays(parameters, tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("dtype", [np.float64, np.uint8])
def test_other_dtypes_are_refused_by_name(dtype, parameters, tmp_path):
    """One tensor in a dtype that no GPT-2 file has, lossless or not."""
    parameters["ln_f.bias"] = parameters["ln_f.bias"].astype(dtype)
    with pytest.raises(WeightsError, match=r"ln_f\.bias'?: got [FIU]\d+, expected one of"):
        load_arrays(parameters, tmp_path)


def test_a_file_that_is_cut_short_while_it_is_read_raises_and_does_not_crash(official):
    """Reading through a memory map would kill the process with SIGBUS here."""
    tensors = read_tensors(official)
    next(tensors)
    os.truncate(official, 200_000)
    with pytest.raises(WeightsError, match="the file ended"):
        list(tensors)
