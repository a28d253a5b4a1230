"""Saved files have official names and layouts, and a write happens completely or not at all."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from model import GPT2Config
from tests.weights.official_file import assert_equal, split
from weights import WeightsError, load_weights, save_weights
from weights.checkpoint import atomic_write


@torch.no_grad()
def test_transformers_computes_the_same_logits_from_what_is_saved(tmp_path):
    """from_pretrained on the saved folder, against the model that it was saved from."""
    from tests.model.oracle import GPT2LMHeadModel, oracle

    filled = oracle(GPT2Config(301, n_positions=24, n_embd=128, n_layer=2, n_head=2))
    save_weights(filled.state_dict(), tmp_path)
    loaded, info = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    tokens = torch.randint(301, (3, 24), generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.eval()(tokens).logits, filled(tokens).logits)


def test_what_is_saved_loads_back_equal_with_its_strides_and_views_undone(parameters, tmp_path):
    """Transposed, strided and Parameter tensors, and the names and metadata of the file."""
    awkward = {k: v.t().contiguous().t() if v.dim() == 2 else v for k, v in parameters.items()}
    awkward["ln_f.bias"] = torch.nn.Parameter(torch.stack([awkward["ln_f.bias"]] * 2, 1)[:, 1])
    save_weights(awkward, tmp_path / "new" / "folder")
    assert_equal(load_weights(tmp_path / "new" / "folder"), parameters)
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
