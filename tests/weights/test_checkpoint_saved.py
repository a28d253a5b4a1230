"""Saved files have official names and layouts, and a write happens completely or not at all."""

import errno
import json
import os
import stat

import pytest
import torch

from model import GPT2Config
from tests.weights.official_file import SMALL, assert_equal, write_official
from weights import WeightsError, load_weights, save_weights
from weights.checkpoint import atomic_write


@pytest.fixture
def official(tmp_path):
    path = tmp_path / "official.safetensors"
    write_official(path, **SMALL)
    return path


def test_transformers_computes_the_same_logits_from_what_is_saved(tmp_path):
    """from_pretrained on the saved folder, against the model that it was saved from."""
    from tests.model.oracle import GPT2LMHeadModel, oracle

    filled = oracle(GPT2Config(301, n_positions=24, n_embd=128, n_layer=2, n_head=2))
    save_weights(filled.state_dict(), tmp_path)
    loaded, info = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokens = torch.randint(301, (3, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = filled(tokens).logits
        torch.testing.assert_close(loaded.eval()(tokens).logits, expected, rtol=0, atol=0)


def test_what_is_saved_loads_back_equal_with_its_strides_and_views_undone(official, tmp_path):
    """Transposed, strided and Parameter tensors, and the names and metadata of the file."""
    state_dict = load_weights(official)
    awkward = {k: v.t().contiguous().t() if v.dim() == 2 else v for k, v in state_dict.items()}
    awkward["ln_f.bias"] = torch.nn.Parameter(torch.stack([awkward["ln_f.bias"]] * 2, 1)[:, 1])
    save_weights(awkward, tmp_path / "new" / "folder")
    assert_equal(
        load_weights(tmp_path / "new" / "folder"), {k: v.numpy() for k, v in state_dict.items()}
    )
    saved = (tmp_path / "new" / "folder" / "model.safetensors").read_bytes()
    header = json.loads(saved[8 : 8 + int.from_bytes(saved[:8], "little")])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert header.keys() == state_dict.keys()


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
def test_invalid_weights_are_not_saved(name, tensor, message, official, tmp_path):
    """Refused in one line, before the folder is created."""
    state_dict = load_weights(official) | {name: tensor}
    with pytest.raises(WeightsError, match=message) as caught:
        save_weights(state_dict, tmp_path / "saved")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "saved").exists()


def test_two_names_of_one_tensor_are_refused(official, tmp_path):
    """The format has no views: loaded again, the pair would no longer be tied."""
    state_dict = load_weights(official)
    state_dict["h.1.ln_1.bias"] = state_dict["h.0.ln_1.bias"]
    with pytest.raises(WeightsError, match=r"share memory.*ln_1\.bias"):
        save_weights(state_dict, tmp_path)


@pytest.mark.parametrize("cleaned", [False, True])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(cleaned, tmp_path):
    """Ctrl-C halfway, also where another program has removed the temporary file; then a complete
    write, until whose end the old content stays."""
    path = tmp_path / "kept"
    path.write_text("old")

    def write_and_stop():
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            if cleaned:
                temporary.unlink()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_stop()
    assert os.listdir(tmp_path) == ["kept"]
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_a_write_replaces_a_link_and_leaves_the_file_it_points_to(tmp_path):
    """A link planted at the path must not redirect the write."""
    (tmp_path / "other").write_text("untouched")
    (tmp_path / "link").symlink_to(tmp_path / "other")
    with atomic_write(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "other").read_text() == "untouched"
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "link").read_text() == "new"


def test_two_writes_of_one_path_use_different_files(tmp_path):
    """Two processes, or threads, that save at once."""
    with atomic_write(tmp_path / "x") as one, atomic_write(tmp_path / "x") as two:
        assert one != two


def fsync_failing_on_folders(monkeypatch, code):
    """Replace os.fsync by one that fails with `code` on folders and works on files."""
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_folder_that_cannot_be_fsynced_is_a_warning_and_a_disk_failure_an_error(
    tmp_path, monkeypatch
):
    """EINVAL, as some file systems return it for folders, and EIO; the file is written."""
    fsync_failing_on_folders(monkeypatch, errno.EINVAL)
    with pytest.warns(UserWarning, match="folders cannot be fsynced"):  # noqa: SIM117
        with atomic_write(tmp_path / "x") as temporary:
            temporary.write_text("new")
    assert (tmp_path / "x").read_text() == "new"
    fsync_failing_on_folders(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output"), atomic_write(tmp_path / "x"):
        pass


def test_saved_files_have_the_mode_that_the_umask_gives(official, tmp_path, monkeypatch):
    """The mode of any new file; the safetensors library would make it 0600. Where modes cannot be
    set, as on some mounted drives, the files are written all the same."""
    state_dict = load_weights(official)
    save_weights(state_dict, tmp_path / "saved")
    (tmp_path / "any").touch()
    modes = {path.stat().st_mode for path in [*(tmp_path / "saved").iterdir(), tmp_path / "any"]}
    assert len(modes) == 1

    def refuse(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.chmod", refuse)
    save_weights(state_dict, tmp_path / "drive")
    assert load_weights(tmp_path / "drive").keys() == state_dict.keys()
