"""Official weights are found in either cache or downloaded, verified, or refused with advice."""

import dataclasses
import functools
import hashlib
import json
import math
import os
import socket
import ssl
import subprocess
import sys
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub
import pytest

from tests.weights.conftest import assert_equal, join, split
from weights import WeightsError, load_weights
from weights.official import OFFICIAL, main

MEDIUM, REPO = OFFICIAL["gpt2-medium"], "openai-community/gpt2-medium"
FILE = "model.safetensors"
ROOT = Path(__file__).parents[2]


class Hub:
    """A stand-in for the Hugging Face hub, on this machine.

    It serves a small file, which takes the place of gpt2-medium's in the registry. The library
    has an empty cache.
    """

    def __init__(self, folder, official, monkeypatch):
        self.monkeypatch = monkeypatch
        self.content = official.read_bytes()
        self.sha256 = hashlib.sha256(self.content).hexdigest()
        small = dataclasses.replace(MEDIUM, sha256=self.sha256, size=len(self.content))
        monkeypatch.setitem(OFFICIAL, "gpt2-medium", small)
        self.file = folder / "served" / REPO / "resolve" / MEDIUM.revision / FILE
        self.file.parent.mkdir(parents=True)
        self.file.write_bytes(self.content)
        self.cache = folder / "cache"
        self.set_constant("HF_HUB_CACHE", str(self.cache))
        self.answers = []

    def set_constant(self, name, value):
        """What the library read from the environment when it was imported."""
        self.monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        huggingface_hub.close_session()

    def use(self, port):
        """Let the library look for the hub at this port."""
        template = "{repo_id}/resolve/{revision}/{filename}"
        self.set_constant("ENDPOINT", f"http://127.0.0.1:{port}")
        self.set_constant("HUGGINGFACE_CO_URL_TEMPLATE", f"http://127.0.0.1:{port}/{template}")

    def put_in_cache(self, content, repo=REPO):
        folder = self.cache / f"models--{repo.replace('/', '--')}" / "snapshots" / MEDIUM.revision
        folder.mkdir(parents=True)
        (folder / FILE).write_bytes(content)
        return folder / FILE


@pytest.fixture
def hub(official, monkeypatch, tmp_path):
    hub = Hub(tmp_path, official, monkeypatch)

    class Handler(SimpleHTTPRequestHandler):
        def end_headers(self) -> None:
            self.send_header("ETag", f'"{hub.sha256}"')
            self.send_header("X-Repo-Commit", MEDIUM.revision)
            super().end_headers()

        def log_request(self, code, *_: object) -> None:
            hub.answers.append((self.command, int(code)))

        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Handler, directory=tmp_path / "served")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        hub.use(server.server_port)
        yield hub
        server.shutdown()
    huggingface_hub.close_session()


def test_a_download_is_verified_and_kept(hub, parameters, monkeypatch, capsys):
    """The server's file loads; the second command does not use the network."""
    monkeypatch.setattr("sys.argv", ["official", "gpt2-medium"])
    for expected in ([("HEAD", 200), ("HEAD", 200), ("GET", 200)], []):
        main()
        path = capsys.readouterr().out.removeprefix("gpt2-medium verified: ").strip()
        assert_equal(load_weights(path), parameters)
        assert [answer for answer in hub.answers if answer[1] == 200] == expected
        hub.answers.clear()


@pytest.mark.parametrize("repo", ["gpt2-medium", REPO])
def test_a_file_cached_under_either_name_is_found(repo, hub, parameters):
    """Without asking the hub."""
    hub.put_in_cache(hub.content, repo)
    assert_equal(load_weights("gpt2-medium"), parameters)
    assert not hub.answers


@pytest.mark.parametrize("place", ["header", "h.1.attn.bias", "ln_f.bias"])
def test_every_byte_of_the_official_file_counts(place, hub):
    """One space more in the header, one bit of a mask, which is not loaded, and of a tensor. The
    message has both hashes, and the file is left as it is."""
    header, body = split(hub.content)
    if place == "header":
        header += b" "
    else:
        at = json.loads(header)[place]["data_offsets"][0]
        body = body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
    path = hub.put_in_cache(changed := join(header, body))
    got = hashlib.sha256(changed).hexdigest()
    message = f"got sha256 {got}, expected {hub.sha256}: it is not the official file"
    with pytest.raises(WeightsError, match=message):
        load_weights("gpt2-medium")
    assert path.read_bytes() == changed


def test_what_was_verified_is_what_is_loaded(hub, monkeypatch):
    """A file that another replaces once its header is read: the hash is that of what is loaded."""
    path = hub.put_in_cache(hub.content)

    def replace(*_: object) -> None:
        path.write_bytes(hub.content[:-1] + bytes([hub.content[-1] ^ 1]))

    monkeypatch.setattr("weights.checkpoint.check_config", replace)
    with pytest.raises(WeightsError, match="it is not the official file"):
        load_weights("gpt2-medium")


@pytest.mark.parametrize("case", ["lacks the file", "refuses", "silent"])
def test_a_hub_that_has_no_answer_is_given_up_soon(case, hub, monkeypatch):
    """It answers 404, refuses connections, or accepts them and stays silent. A retry would take
    a minute."""
    hub.file.unlink()
    monkeypatch.setattr("weights.official.TIMEOUT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        if case != "lacks the file":
            hub.use(9 if case == "refuses" else silent.getsockname()[1])  # nothing listens at 9
        start = time.monotonic()
        with pytest.raises(WeightsError, match="is not cached and cannot be downloaded") as caught:
            load_weights("gpt2-medium")
    assert time.monotonic() - start < 15
    assert ("404" in str(caught.value)) == (case == "lacks the file")


HANGING_LOOK_UP = """
import runpy, socket, sys, time, weights
from huggingface_hub import get_session, hf_hub_download  # not timed: it depends on the machine
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
    start, _, reason, *_ = done.stderr.splitlines()
    assert done.returncode == 1
    assert end - float(start) < 15
    assert reason.startswith("error: gpt2-medium is not cached and cannot be downloaded: no answer")


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


def test_offline_and_not_cached_says_what_to_fetch_where_to_put_it_and_what_else(hub):
    """The advice works: a file put in the given place is found."""
    hub.set_constant("HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError) as caught:
        load_weights("gpt2-medium")
    for advice in (
        "HF_HUB_OFFLINE",  # the cause
        f"{REPO}/resolve/{MEDIUM.revision}/{FILE} ({len(hub.content):,} bytes)",
        f"hf download {REPO} {FILE} --revision {MEDIUM.revision} --local-dir gpt2-medium",
        f"put it at:  {hub.put_in_cache(hub.content)}\n",
        '"tiny"',
    ):
        assert advice in str(caught.value)
    assert len(load_weights("gpt2-medium")) == 28


def test_the_registry_agrees_with_the_known_sizes():
    """File size minus published parameter counts and masks in float32 leaves the header, which
    has 28,986 bytes in gpt2-medium, and its length."""
    for name, parameters in (("gpt2", 124_439_808), ("gpt2-medium", 354_823_168)):
        layout = OFFICIAL[name].layout
        assert sum(map(math.prod, layout.shapes().values())) == parameters
        header = OFFICIAL[name].size - 4 * (parameters + layout.n_layer * 1024 * 1024) - 8
        assert 10_000 < header < 30_000
    assert header == 28_986
