"""Checkpoints from other tools and other people: loaded, or refused in one line."""

import gzip
import json
import os
import pickle
import shlex
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model import GPT2
from tests.weights.conftest import assert_equal, join
from weights import WeightsError, layout_of, load_weights, save_weights
from weights.layout import printable

FILE = "model.safetensors"
INDEX = f"{FILE}.index.json"


@pytest.fixture
def folder(official):
    return official.parent


def refusal(path):
    """Return the message of load_weights for `path`, which is one line."""
    with pytest.raises(WeightsError) as caught:
        load_weights(path)
    assert str(caught.value).isprintable()
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("n_head", 1),
        ("num_attention_heads", 4),
        ("activation_function", "gelu"),
        ("scale_attn_by_inverse_layer_idx", True),
        ("scale_attn_weights", False),
        ("layer_norm_epsilon", float("inf")),
        ("tie_word_embeddings", False),
        ("add_cross_attention", True),
        ("n_inner", 256),
        ("vocab_size", [301]),
        ("model_type", "gpt_neo"),
    ],
)
def test_a_config_of_another_model_is_refused_by_key(key, value, folder):
    """With each of these, transformers computes something else from the same tensors, or fails.
    Sizes are refused without loading too."""
    (folder / "config.json").write_text(json.dumps(layout_of(folder).config() | {key: value}))
    message = refusal(folder)
    assert f"{folder}/config.json describes another model: {key}: got {value!r}, exp" in message
    with pytest.raises(WeightsError, match="describes another model"):
        layout_of(folder)


def test_a_config_of_the_same_model_loads_whatever_else_it_says(folder, parameters):
    """Keys that do not affect the function, synonyms of the values, missing keys."""
    same = {"attn_pdrop": 0.1, "n_inner": None, "activation_function": "gelu_pytorch_tanh"}
    for config in (layout_of(folder).config() | same | {"xfactor": {"lr": 1.0}}, {"n_embd": 128}):
        (folder / "config.json").write_text(json.dumps(config))
        assert_equal(load_weights(folder), parameters)
        assert_equal(load_weights(folder / FILE), parameters)


BROKEN = ["{", "[]", "[" * 20_000, '{"n_head": ' + "9" * 5000 + "}", "\xff"]


@pytest.mark.parametrize("text", BROKEN, ids=lambda text: text[:9])
def test_a_config_that_is_not_json_is_one_line(text, folder):
    """Cut short, not an object, nested 20,000 deep, a number of 5,000 digits, not UTF-8."""
    (folder / "config.json").write_text(text, encoding="latin-1")
    assert f"{folder}/config.json cannot be read" in refusal(folder)


# transformers, torch.compile, DistributedDataParallel, Lightning, and some of them at once
PREFIXES = ["transformer.", "_orig_mod.", "module.", "model.", "module._orig_mod.transformer."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_wrappers_are_stripped(prefix, parameters, tmp_path):
    """Parameters, tied head and both kinds of mask with the prefix, against the parameters without
    it: loaded from a file, made into a model, and saved."""
    masks = {"h.0.attn.bias": torch.ones(24, 24).byte(), "h.1.attn.masked_bias": torch.ones(1)}
    head = {"lm_head.weight": parameters["wte.weight"].clone()}
    stored = {prefix + k: v for k, v in (parameters | masks | head).items()}
    save_file(stored, tmp_path / FILE)
    assert_equal(load_weights(tmp_path), parameters)
    assert_equal(GPT2.from_state_dict(stored).state_dict(), parameters)
    save_weights(stored, tmp_path / "saved")
    assert_equal(load_weights(tmp_path / "saved"), parameters)


def test_sharded_files_load_as_one(parameters, tmp_path):
    """Two files and their index, as transformers writes them, by folder and by index; a
    config.json is checked, and a missing shard is named."""
    where = {}
    for n in (0, 1):
        part = {f"transformer.{name}": parameters[name] for name in [*parameters][n::2]}
        save_file(part, tmp_path / f"model-{n}.safetensors")
        where |= dict.fromkeys(part, f"model-{n}.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert_equal(load_weights(tmp_path), parameters)
    assert_equal(load_weights(tmp_path / INDEX), parameters)
    (tmp_path / "config.json").write_text('{"n_head": 1}')
    assert "n_head: got 1, expected 2" in refusal(tmp_path)
    (tmp_path / "model-1.safetensors").unlink()
    assert "model-1.safetensors" in refusal(tmp_path)


SHARDS = ["../b.safetensors", "", "a\0b", "\udc80", "..", "\u202egnp.safetensors", 3, None]
SHARDS += ["x" * 5000 + ".safetensors"]


@pytest.mark.parametrize(
    "index", [[], {}, {"weight_map": 3}, b"\xff" * 999, *SHARDS], ids=lambda i: str(i)[:9]
)
def test_an_index_that_lists_no_files_beside_it_is_refused(index, tmp_path):
    """In a message of less than 400 characters beside the path."""
    if index in SHARDS:
        index = {"weight_map": {"wte.weight": index}}
    content = index if isinstance(index, bytes) else json.dumps(index).encode()
    (tmp_path / INDEX).write_bytes(content)
    message = refusal(tmp_path)
    assert "is not an index of shards" in message
    assert len(message) < len(str(tmp_path)) + 400


def test_an_index_or_a_header_of_100_000_entries_is_refused_quickly(tmp_path):
    """In less than two CPU seconds: shards that exist, and a tensor per block."""
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = {f"h.{n}.ln_1.bias": empty for n in range(100_000)}
    (tmp_path / FILE).write_bytes(join(json.dumps(header).encode(), b""))
    where = {name: f"{name}.safetensors" for name in header}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": where}))
    start = time.process_time()
    assert "got more than 20,000 tensors" in refusal(tmp_path / FILE)
    assert "got 100,000 file names" in refusal(tmp_path / INDEX)
    assert time.process_time() - start < 2


def test_a_pickle_is_refused_with_a_command_that_converts_it(parameters, tmp_path):
    """Running the command's code makes the folder loadable."""
    tied = parameters | {"lm_head.weight": parameters["wte.weight"]}  # one tensor, two names
    torch.save(tied, tmp_path / FILE)
    assert "is a pickle, not safetensors. Rename it to pytorch_model.bin" in refusal(tmp_path)
    (tmp_path / FILE).rename(tmp_path / "pytorch_model.bin")
    message = refusal(tmp_path)
    assert message == refusal(tmp_path / "pytorch_model.bin")
    python, option, code = shlex.split(message.split("Convert it: ")[1])
    assert (python, option) == ("python", "-c")
    exec(code, {})
    assert_equal(load_weights(tmp_path), parameters)


class Trap:
    """Unpickling it creates a file in the working folder."""

    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:fc5a\nsize 1", "Git LFS pointer"),
        (b"\n<!DOCTYPE html><html><head><title>openai-community/gpt2-medium", "an HTML page"),
        (pickle.dumps(Trap()), "a pickle"),
        (gzip.compress(b"x" * 99), "compressed by gzip"),
        (b"GGUF\3\0\0\0" + bytes(99), "a GGUF file"),
        (b'\n{"weight_map": {}}', "JSON"),
        ((640).to_bytes(8, "little") + b"{", "a complete safetensors file: .*Remove it and down"),
        (b"", "a complete safetensors file"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_another_kind_of_file_under_the_usual_name_is_recognised(
    content, kind, tmp_path, monkeypatch
):
    """And never unpickled. The length of a header that is cut short begins as a pickle does."""
    monkeypatch.chdir(tmp_path)
    Path(FILE).write_bytes(content)
    with pytest.raises(WeightsError, match=rf"{FILE} (is|cannot be read as) .*{kind}"):
        load_weights(FILE)
    assert not Path("ran").exists()


def test_hostile_names_are_escaped_in_messages(folder, parameters):
    """A terminal escape sequence, a newline and a direction mark, in names, dtypes and paths; and
    every character without ink that Unicode ignores by default, also those Python would print."""
    name = "\x1b[31m\n\u202egnp"
    save_file(parameters | {name: torch.ones(1)}, folder / FILE)
    assert r"\x1b[31m\n\u202egnp" in refusal(folder)
    assert r"\x1b[31m\n\u202egnp" in refusal(str(folder / name))
    header = {name: {"dtype": name, "shape": [0], "data_offsets": [0, 0]}}
    (folder / FILE).write_bytes(join(json.dumps(header).encode(), b""))
    assert r"\u202e" in refusal(folder)
    for hidden in "\u2066\u200b\ufeff\u3164\u115f\ufe0f\U000e0100\u2800\x9b\udc80":
        assert printable(f"a{hidden}é 日") == f"a{ascii(hidden)[1:-1]}é 日"


def test_paths_that_the_system_refuses_are_one_line(folder, parameters):
    """A name of 300 characters, a null byte, a folder without permission, one of an unknown user;
    read and written."""
    assert "File name too long" in refusal(folder / ("x" * 300))
    assert "gpt2, gpt2-medium, gpt2-xl, tiny" in refusal("gpt2-medum")
    (folder / "closed").mkdir(mode=0)
    for path in (folder / ("x" * 300), folder / "a\0b", folder / "closed" / "x", "~nobody-known/x"):
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # root may go anywhere
        try:
            refusal(path)
            with pytest.raises(WeightsError, match="cannot write weights to"):
                save_weights(parameters, path)
        finally:
            os.seteuid(user)
