"""A GPT-2 file is read correctly, or refused with the name of the faulty tensor; saved files have
official names and layouts, and a write happens completely or not at all.
"""

import errno
import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model import GPT2Config
from tests.model.oracle import GPT2LMHeadModel, oracle
from tests.weights.conftest import SMALL, assert_equal, join, split
from weights import WeightsError, load_weights, save_weights
from weights.checkpoint import atomic_write, read_tensors

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
        ({"h.999999999.ln_1.weight": (128,)}, r"n_layer=3[^;]*(; '[^;]*){4}; and 8 more"),
        ({"transformer.ln_f.bias": (128,)}, r"'ln_f\.bias': got it twice"),
        ({"lm_head.weight": (301, 128)}, r"lm_head\.weight: got values that differ"),
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


@torch.no_grad()
def test_transformers_computes_the_same_logits_from_what_is_saved(tmp_path):
    """from_pretrained on the saved folder, against the model that it was saved from."""
    filled = oracle(GPT2Config(301, n_positions=24, n_embd=128, n_layer=2, n_head=2))
    save_weights(filled.state_dict(), tmp_path)
    loaded, info = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    tokens = torch.randint(301, (3, 24), generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.eval()(tokens).logits, filled(tokens).logits)


def test_what_is_saved_loads_back_equal_with_its_strides_and_views_undone(
    parameters, tmp_path, monkeypatch
):
    """Transposed, strided and Parameter tensors, in a folder that is made below the home folder;
    and the names and metadata of the file."""
    monkeypatch.setenv("HOME", str(tmp_path))
    awkward = {k: v.t().contiguous().t() if v.dim() == 2 else v for k, v in parameters.items()}
    awkward["ln_f.bias"] = torch.nn.Parameter(torch.stack([awkward["ln_f.bias"]] * 2, 1)[:, 1])
    save_weights(awkward, "~/new/folder")
    assert_equal(load_weights("~/new/folder"), parameters)
    header, _ = split((tmp_path / "new" / "folder" / "model.safetensors").read_bytes())
    header = json.loads(header)
    assert header.pop("__metadata__") == {"format": "pt"}
    assert header.keys() == parameters.keys()


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("ln_f.bias", torch.full((128,), torch.nan), r"ln_f\.bias: got nan at flat index 0"),
        ("ln_f.bias", torch.zeros(128, dtype=torch.float64), r"ln_f\.bias: got torch\.float64"),
        ("ln_f.bias", torch.zeros(127), r"'ln_f\.bias': got \(127,\), expected \(128,\)"),
        ("lm_head.weight", torch.zeros(301, 128), r"lm_head\.weight: got values that differ"),
        ("module.ln_f.bias", torch.zeros(128), r"'module\.ln_f\.bias': got it twice"),
        ("ln_f.bias", torch.zeros(128, device="meta"), r"'ln_f\.bias': got a meta tensor"),
        ("state_dict", {}, "'state_dict': got dict, expected a tensor; if it holds the weights"),
    ],
)
def test_invalid_weights_are_not_saved(name, tensor, message, parameters, tmp_path):
    """Refused in one line, before the folder is created."""
    with pytest.raises(WeightsError, match=message) as caught:
        save_weights(parameters | {name: tensor}, tmp_path / "saved")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "saved").exists()


def test_two_names_of_one_tensor_are_refused(parameters, tmp_path):
    """The format has no views: loaded again, the pair would no longer be tied."""
    parameters["h.1.ln_1.bias"] = parameters["h.0.ln_1.bias"]
    with pytest.raises(WeightsError, match=r"share memory.*ln_1\.bias"):
        save_weights(parameters, tmp_path)


@pytest.mark.parametrize("case", ["disk full", "Ctrl-C", "Ctrl-C, cleaned"])
def test_a_write_that_fails_leaves_the_old_files_and_nothing_else(
    case, parameters, tmp_path, monkeypatch
):
    """Halfway, also where another program has removed the temporary file."""
    save_weights(parameters, folder := tmp_path / "saved")
    before = {path: path.read_bytes() for path in folder.iterdir()}

    def save_half(_, path, **__):
        Path(path).write_bytes(b"half")
        if case == "disk full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if case == "Ctrl-C, cleaned":
            Path(path).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr("weights.checkpoint.save_file", save_half)
    with pytest.raises((WeightsError, KeyboardInterrupt), match=r"No space left|^$"):
        save_weights(parameters, folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_two_writes_of_one_path_use_different_files(tmp_path):
    """Two processes, or threads, that save at once. Until a write ends, the old content stays."""
    path = tmp_path / "kept"
    path.write_text("old")
    with atomic_write(path) as one, atomic_write(path) as two:
        one.write_text("one")
        two.write_text("two")
        assert path.read_text() == "old"
    assert path.read_text() == "one"


def test_saved_files_have_the_mode_that_the_umask_gives(parameters, tmp_path, monkeypatch):
    """The mode of any new file; the safetensors library would make it 0600. Where modes cannot be
    set, as on some mounted drives, the files are written all the same."""
    save_weights(parameters, tmp_path / "saved")
    (tmp_path / "any").touch()
    modes = {path.stat().st_mode for path in [*(tmp_path / "saved").iterdir(), tmp_path / "any"]}
    assert len(modes) == 1

    def refuse(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.chmod", refuse)
    save_weights(parameters, tmp_path / "drive")
    assert load_weights(tmp_path / "drive").keys() == parameters.keys()
