"""Official weights are found in either cache or downloaded, verified, or refused with advice.

The hub is a local server, and a small file takes the place of gpt2-medium's in the registry.
"""

import dataclasses
import hashlib
import json
import os
import socket
import ssl
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import huggingface_hub
import pytest

from tests.weights.official_file import assert_equal, join, split
from weights import WeightsError, load_weights
from weights.official import OFFICIAL, command, describe, main

MEDIUM, REPO = OFFICIAL["gpt2-medium"], "openai-community/gpt2-medium"
FILE = "model.safetensors"
ROOT = Path(__file__).parents[2]
DEAD = "http://127.0.0.1:9"  # nothing listens there


@pytest.fixture
def content(official, monkeypatch):
    """The bytes of the small file, which is gpt2-medium's in the registry."""
    content = official.read_bytes()
    small = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    monkeypatch.setitem(OFFICIAL, "gpt2-medium", dataclasses.replace(MEDIUM, **small))
    return content


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache of the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def use_hub(cache, monkeypatch):
    """A function that sets the hub's address, for the library's next session."""

    def use_hub(address):
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        huggingface_hub.close_session()

    use_hub(DEAD)
    yield use_hub
    huggingface_hub.close_session()


@pytest.fixture
def hub(content, use_hub):
    """A stand-in for the Hugging Face hub that serves the small file."""
    hub = SimpleNamespace(path=f"/{REPO}/resolve/{MEDIUM.revision}/{FILE}", requests=[])

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            if self.path != hub.path:  # the library also asks for pages of its own
                self.send_error(404)
                return
            hub.requests.append(self.command)
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", MEDIUM.revision)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def do_GET(self) -> None:
            self.do_HEAD()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        use_hub(f"http://127.0.0.1:{server.server_port}")
        yield hub
        server.shutdown()


def put_in_cache(cache, content, repo=REPO):
    folder = cache / f"models--{repo.replace('/', '--')}" / "snapshots" / MEDIUM.revision
    folder.mkdir(parents=True)
    (folder / FILE).write_bytes(content)
    return folder / FILE


def test_a_download_is_verified_and_kept(hub, parameters, capsys):
    """The server's file loads; the second command does not use the network."""
    for _ in range(2):
        command("gpt2-medium")
        said = capsys.readouterr()
        assert_equal(load_weights(said.out.strip().split("verified: ")[1]), parameters)
        assert hub.requests == ["HEAD", "HEAD", "GET"]
    assert "downloading" not in said.err


@pytest.mark.parametrize("repo", ["gpt2-medium", REPO])
def test_a_file_cached_under_either_name_is_found(repo, content, parameters, cache, use_hub):
    """Without a network."""
    put_in_cache(cache, content, repo)
    assert_equal(load_weights("gpt2-medium"), parameters)


@pytest.mark.parametrize("place", ["header", "h.1.attn.bias", "ln_f.bias"])
def test_every_byte_of_the_official_file_counts(place, content, cache):
    """One space more in the header, one bit of a mask, which is not loaded, and of a tensor. The
    message has both hashes, and the file is left as it is."""
    header, body = split(content)
    if place == "header":
        header += b" "
    else:
        at = json.loads(header)[place]["data_offsets"][0]
        body = body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
    path = put_in_cache(cache, changed := join(header, body))
    got, expected = (hashlib.sha256(c).hexdigest() for c in (changed, content))
    message = f"got sha256 {got}, expected {expected}: it is not the official file"
    with pytest.raises(WeightsError, match=message):
        load_weights("gpt2-medium")
    assert path.read_bytes() == changed


def test_what_was_verified_is_what_is_loaded(content, cache, monkeypatch):
    """A file that another replaces once its header is read: the hash is that of what is loaded."""
    path = put_in_cache(cache, content)

    def replace(*_: object) -> None:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    monkeypatch.setattr("weights.checkpoint.check_config", replace)
    with pytest.raises(WeightsError, match="it is not the official file"):
        load_weights("gpt2-medium")


@pytest.mark.parametrize("case", ["lacks the file", "refuses", "silent"])
def test_a_hub_that_has_no_answer_is_given_up_soon(case, hub, use_hub, monkeypatch):
    """It answers 404, refuses connections, or accepts them and stays silent. A retry would take
    a minute."""
    hub.path = "/elsewhere"
    monkeypatch.setattr("weights.official.TIMEOUT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        if case != "lacks the file":
            silence = f"http://127.0.0.1:{silent.getsockname()[1]}"
            use_hub(DEAD if case == "refuses" else silence)
        start = time.monotonic()
        with pytest.raises(WeightsError, match="is not cached and cannot be downloaded") as caught:
            load_weights("gpt2-medium")
    assert time.monotonic() - start < 15
    assert ("404" in str(caught.value)) == (case == "lacks the file")


HANGING_LOOK_UP = """
import runpy, socket, sys, time
import huggingface_hub, tyro  # imported first, for their time depends on the machine
socket.getaddrinfo = lambda *_, **__: time.sleep(60)
print(time.monotonic(), file=sys.stderr, flush=True)
runpy.run_module("weights.official", run_name="__main__")
"""


def test_a_name_that_cannot_be_looked_up_ends_the_command_soon(tmp_path):
    """A look-up has no time limit of its own. Measured up to the end of the process, which the
    thread that waits would delay by a minute."""
    done = subprocess.run(
        [sys.executable, "-c", HANGING_LOOK_UP, "gpt2-medium"],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    end = time.monotonic()
    start, *lines = done.stderr.splitlines()
    assert done.returncode == 1
    assert end - float(start) < 15
    reason = "error: gpt2-medium is not cached and cannot be downloaded: no answer within 3 seconds"
    assert lines[0] == reason


def test_only_the_network_is_given_three_seconds(hub, monkeypatch):
    """On a busy machine preparing the client alone can take longer. Here it is 2 against 1.5."""
    real, calls = ssl.create_default_context, []

    def slow(*args, **kwargs):
        calls.append(time.sleep(2))
        return real(*args, **kwargs)

    monkeypatch.setattr(ssl, "create_default_context", slow)
    monkeypatch.setattr("weights.official.TIMEOUT", 1.5)
    assert len(load_weights("gpt2-medium")) == 28
    assert calls


def test_offline_and_not_cached_says_what_to_fetch_where_to_put_it_and_what_else(
    content, cache, use_hub, monkeypatch
):
    """The advice works: a file put in the given place is found."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError) as caught:
        load_weights("gpt2-medium")
    for advice in (
        "HF_HUB_OFFLINE",  # the cause
        f"{REPO}/resolve/{MEDIUM.revision}/{FILE} ({len(content):,} bytes)",
        f"hf download {REPO} {FILE} --revision {MEDIUM.revision} --local-dir gpt2-medium",
        f"put it at:  {put_in_cache(cache, content)}\n",
        '"tiny"',
    ):
        assert advice in str(caught.value)
    assert len(load_weights("gpt2-medium")) == 28


def test_the_registry_agrees_with_the_known_sizes():
    """File size minus published parameter counts and masks in float32 leaves the header."""
    for name, parameters in (("gpt2", 124_439_808), ("gpt2-medium", 354_823_168)):
        total = 4 * (parameters + OFFICIAL[name].layout.n_layer * 1024 * 1024)
        assert 10_000 < OFFICIAL[name].size - total < 30_000
    for official in OFFICIAL.values():
        assert len(bytes.fromhex(official.revision)) == 20
        assert len(bytes.fromhex(official.sha256)) == 32


def test_check_prints_the_sizes_and_the_official_name(content, cache, monkeypatch, capsys):
    """Against the sizes it was written with. An official name stands for the cached file, as for
    load_weights."""
    path = put_in_cache(cache, content)
    command("gpt2-medium", check=True)
    text = capsys.readouterr().out
    assert text.startswith("model:       GPT-2, 2 blocks, 128 wide, 2 heads, 24 positions, 301 tok")
    assert "tensors:     30 (30 F32)" in text
    assert f"sha256:      {hashlib.sha256(content).hexdigest()}" in text
    assert "official:    gpt2-medium" in text
    monkeypatch.setitem(OFFICIAL, "gpt2-medium", MEDIUM)
    assert describe(path).endswith("official:    none of gpt2, gpt2-medium, gpt2-xl")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--check", FILE], f"error: {FILE} cannot be read as a complete safetensors file"),
        (["--check", "gpt2-medium"], "error: gpt2-medium is not downloaded. Run python -m weights"),
        (["gpt2-medum"], "error: gpt2-medum: expected one of gpt2, gpt2-medium"),
    ],
)
def test_the_command_ends_in_one_line(arguments, message, cache, tmp_path, monkeypatch, capsys):
    """On a bad file, an official one that is not in the cache, and a name that is misspelt."""
    monkeypatch.chdir(tmp_path)
    Path(FILE).write_bytes(b"no weights")
    monkeypatch.setattr("sys.argv", ["official", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""
