"""Checkpoints from other tools and other people: loaded, or refused in one line."""

import gzip
import json
import os
import pickle
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from model import GPT2
from tests.weights.official_file import SMALL, assert_equal, parameters_of, write_official
from weights import WeightsError, layout_of, load_weights, save_weights
from weights.layout import printable

FILE = "model.safetensors"
INDEX = f"{FILE}.index.json"


@pytest.fixture
def parameters(tmp_path):
    """Name -> float32 array of a valid file."""
    path = tmp_path / "official"
    write_official(path, **SMALL)
    arrays = parameters_of(path)
    path.unlink()
    return arrays


@pytest.fixture
def folder(parameters, tmp_path):
    save_file(parameters, tmp_path / FILE)
    return tmp_path


def tensors(arrays):
    return {k: torch.from_numpy(v) for k, v in arrays.items()}


def refusal(path):
    """Return the one-line message of load_weights for `path`; layout_of must give the same."""
    with pytest.raises(WeightsError) as caught:
        load_weights(path)
    message = str(caught.value)
    assert message.isprintable()
    with pytest.raises(WeightsError) as caught:
        layout_of(path)
    assert str(caught.value) == message
    return message


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
    """With each of these, transformers computes something else from the same tensors, or fails."""
    (folder / "config.json").write_text(json.dumps(layout_of(folder).config() | {key: value}))
    message = refusal(folder)
    assert f"{folder}/config.json describes another model: {key}: got {value!r}, exp" in message


def test_a_config_of_the_same_model_loads_whatever_else_it_says(folder, parameters):
    """Keys that do not affect the function, synonyms of the values, missing keys."""
    same = {"attn_pdrop": 0.1, "n_inner": None, "activation_function": "gelu_pytorch_tanh"}
    for config in (layout_of(folder).config() | same | {"xfactor": {"lr": 1.0}}, {"n_embd": 128}):
        (folder / "config.json").write_text(json.dumps(config))
        assert_equal(load_weights(folder), parameters)
        assert_equal(load_weights(folder / FILE), parameters)


@pytest.mark.parametrize(
    "text", ["{", "[]", "[" * 20_000, '{"n_head": ' + "9" * 5000 + "}", "\xff"]
)
def test_a_config_that_is_not_json_is_one_line(text, folder):
    """Cut short, not an object, nested 20,000 deep, a number of 5,000 digits, not UTF-8."""
    (folder / "config.json").write_text(text, encoding="latin-1")
    assert f"{folder}/config.json cannot be read" in refusal(folder)


@pytest.mark.parametrize(
    "prefix",
    [
        "transformer.",
        "_orig_mod.",  # torch.compile
        "module.",  # DistributedDataParallel
        "model.",  # Lightning
        "module._orig_mod.transformer.",
    ],
)
def test_prefixes_of_wrappers_are_stripped(prefix, parameters, tmp_path):
    """Parameters, tied head and both kinds of mask with the prefix, against the parameters without
    it: loaded from a file, made into a model, and saved."""
    one = np.ones(1, np.float32)
    masks = {"h.0.attn.bias": np.tri(24, dtype=np.uint8), "h.1.attn.masked_bias": one}
    head = {"lm_head.weight": parameters["wte.weight"].copy()}
    stored = {prefix + k: v for k, v in (parameters | masks | head).items()}
    save_file(stored, tmp_path / FILE)
    assert_equal(load_weights(tmp_path), parameters)
    assert_equal(GPT2.from_state_dict(tensors(stored)).state_dict(), parameters)
    save_weights(tensors(stored), tmp_path / "saved")
    assert_equal(load_weights(tmp_path / "saved"), parameters)


def write_shards(parameters, folder):
    """Write two files and their index, as transformers does."""
    names = [*parameters]
    parts = {f"model-0000{n}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    for file, part in parts.items():
        save_file({f"transformer.{k}": parameters[k] for k in part}, folder / file)
    where = {f"transformer.{k}": file for file, part in parts.items() for k in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return [*parts]


def test_sharded_files_load_as_one(parameters, tmp_path):
    """By folder and by index; a config.json is checked, and a missing shard is named."""
    shards = write_shards(parameters, tmp_path)
    assert_equal(load_weights(tmp_path), parameters)
    assert_equal(load_weights(tmp_path / INDEX), parameters)
    (tmp_path / "config.json").write_text('{"n_head": 1}')
    assert "n_head: got 1, expected 2" in refusal(tmp_path)
    (tmp_path / shards[1]).unlink()
    assert shards[1] in refusal(tmp_path)


SHARDS = ["../b", "", "a\0b", "\udc80", "..", "x" * 5000, "\u202egnp.safetensors", 3, None]


@pytest.mark.parametrize("index", [[], {}, {"weight_map": 3}, *SHARDS], ids=lambda i: str(i)[:9])
def test_an_index_that_lists_no_files_beside_it_is_refused(index, tmp_path):
    """In a message of less than 400 characters beside the path."""
    if index in SHARDS:
        index = {"weight_map": {"wte.weight": index}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    message = refusal(tmp_path)
    assert "is not an index of shards" in message
    assert len(message) < len(str(tmp_path)) + 400


def test_an_index_or_a_header_of_100_000_entries_is_refused_quickly(tmp_path):
    """In less than four CPU seconds, each twice: shards that exist, and a tensor per block."""
    header = {
        f"h.{n}.ln_1.bias": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        for n in range(100_000)
    }
    text = json.dumps(header).encode()
    (tmp_path / FILE).write_bytes(len(text).to_bytes(8, "little") + text)
    where = {name: f"{name}.safetensors" for name in header}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": where}))
    start = time.process_time()
    assert "got more than 20,000 tensors" in refusal(tmp_path / FILE)
    assert "got 100,000 file names" in refusal(tmp_path / INDEX)
    assert time.process_time() - start < 4


def test_a_pickle_is_refused_with_a_command_that_converts_it(parameters, tmp_path):
    """Running the command in the message makes the folder loadable."""
    state_dict = tensors(parameters)
    state_dict["lm_head.weight"] = state_dict["wte.weight"]  # one tensor under two names
    torch.save(state_dict, tmp_path / FILE)
    assert "is a pickle, not safetensors. Rename it to pytorch_model.bin" in refusal(tmp_path)
    (tmp_path / FILE).rename(tmp_path / "pytorch_model.bin")
    message = refusal(tmp_path)
    assert message == refusal(tmp_path / "pytorch_model.bin")
    [_, *arguments] = shlex.split(message.split("Convert it: ")[1])
    subprocess.run([sys.executable, *arguments], check=True, cwd=tmp_path)
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


def test_tensors_of_another_model_are_shown_beside_what_was_expected(tmp_path):
    """The first four of forty names, in a message of less than 400 characters."""
    names = [f"model.layers.{n}.self_attn.q_proj.weight" for n in range(40)]
    save_file({name: np.ones(3, np.float32) for name in names}, tmp_path / FILE)
    message = refusal(tmp_path)
    assert "got 40 tensors ('layers.0.self_attn.q_proj.weight'," in message
    assert "expected wte.weight, wpe.weight, h.0.ln_1.weight" in message
    assert len(message) < len(str(tmp_path)) + 400


def test_hostile_names_are_escaped_in_messages(folder, parameters):
    """A terminal escape sequence, a newline and a direction mark, in names, dtypes and paths; and
    every character without ink that Unicode ignores by default, also those Python would print."""
    name = "\x1b[31m\n\u202egnp"
    save_file(parameters | {name: np.ones(1, np.float32)}, folder / FILE)
    assert r"\x1b[31m\n\u202egnp" in refusal(folder)
    assert r"\x1b[31m\n\u202egnp" in refusal(str(folder / name))
    header = {name: {"dtype": name, "shape": [0], "data_offsets": [0, 0]}}
    text = json.dumps(header).encode()
    (folder / FILE).write_bytes(len(text).to_bytes(8, "little") + text)
    assert r"\u202e" in refusal(folder)
    for hidden in "\u2066\u200b\ufeff\u3164\u115f\ufe0f\U000e0100\u2800\x9b\udc80":
        assert printable(f"a{hidden}é 日") == f"a{ascii(hidden)[1:-1]}é 日"


def test_a_leading_tilde_is_the_home_folder(folder, parameters, monkeypatch):
    """In every function that takes a path; an unknown user is refused in one line."""
    monkeypatch.setenv("HOME", str(folder))
    save_weights(tensors(parameters), "~/saved")
    assert (folder / "saved" / FILE).exists()
    assert_equal(load_weights("~/saved"), parameters)
    assert "~nobody-of-this-name/x" in refusal("~nobody-of-this-name/x")
    with pytest.raises(WeightsError, match="~nobody-of-this-name/x"):
        save_weights(tensors(parameters), "~nobody-of-this-name/x")


def test_paths_that_the_system_refuses_are_one_line(folder, parameters):
    """A name of 300 characters, a null byte, a folder without permission; read and written."""
    assert "File name too long" in refusal(folder / ("x" * 300))
    assert "gpt2, gpt2-medium, gpt2-xl, tiny" in refusal("gpt2-medum")
    (folder / "closed").mkdir(mode=0)
    for path in (folder / ("x" * 300), folder / "a\0b", folder / "closed" / "x"):
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # root may go anywhere
        try:
            refusal(path)
            with pytest.raises(WeightsError, match="cannot write weights to"):
                save_weights(tensors(parameters), path)
        finally:
            os.seteuid(user)
