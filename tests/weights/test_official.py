"""Official weights are found in either cache or downloaded, verified, or refused with advice.

The hub is a local server, and a small file takes the place of gpt2-medium's in the registry.
huggingface_hub reads its environment when imported, so commands run in their own processes.
"""

import dataclasses
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest

from tests.weights.official_file import SMALL, assert_equal, parameters_of, write_official
from weights import WeightsError, load_weights
from weights.official import OFFICIAL, cached, command, describe

MEDIUM, REPO = OFFICIAL["gpt2-medium"], "openai-community/gpt2-medium"
FILE = "model.safetensors"
ROOT = Path(__file__).parents[2]
DEAD = "http://127.0.0.1:9"  # nothing listens there

WITH_A_SMALL_MEDIUM = """
import dataclasses, sys, time
import huggingface_hub, tyro  # imported first, for their time depends on the machine
from weights import official
sha256, size, *sys.argv[1:] = sys.argv[1:]
medium = official.OFFICIAL["gpt2-medium"]
official.OFFICIAL["gpt2-medium"] = dataclasses.replace(medium, sha256=sha256, size=int(size))
print(f"started at {time.monotonic()}", file=sys.stderr)
official.main()
"""


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    path = tmp_path_factory.mktemp("hub") / FILE
    write_official(path, **SMALL)
    return path.read_bytes()


@pytest.fixture
def cached_file(content, monkeypatch, tmp_path):
    """The small file, in the registry as gpt2-medium and found in the cache."""
    (tmp_path / FILE).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    monkeypatch.setitem(OFFICIAL, "gpt2-medium", dataclasses.replace(MEDIUM, sha256=digest))
    monkeypatch.setattr("weights.official.cached", lambda _: tmp_path / FILE)
    return tmp_path / FILE


@pytest.fixture
def hub(content):
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
        Thread(target=server.serve_forever, daemon=True).start()
        hub.url = f"http://127.0.0.1:{server.server_port}"
        yield hub
        server.shutdown()


def fetch(cache, content, endpoint=DEAD, before="", **environment):
    """`python -m weights.official gpt2-medium`, with `content` as the official file; `before` is
    code that runs first."""
    expected = [hashlib.sha256(content).hexdigest(), str(len(content))]
    return subprocess.run(
        [sys.executable, "-c", before + WITH_A_SMALL_MEDIUM, *expected, "gpt2-medium"],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_CACHE": str(cache), "HF_ENDPOINT": endpoint} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def put_in_cache(cache, content, repo=REPO):
    folder = cache / f"models--{repo.replace('/', '--')}" / "snapshots" / MEDIUM.revision
    folder.mkdir(parents=True)
    (folder / FILE).write_bytes(content)
    return folder / FILE


def fetched_path(done):
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().removeprefix("gpt2-medium verified: ")


def test_a_download_is_verified_and_kept(hub, content, tmp_path):
    """The server's file loads; the second command does not use the network."""
    first = fetch(tmp_path, content, hub.url, TQDM_POSITION="-1")  # a bar without a terminal
    path = fetched_path(first)
    assert hub.requests == ["HEAD", "HEAD", "GET"]
    assert "100%" in first.stderr
    assert_equal(load_weights(path), parameters_of(path))
    assert fetched_path(fetch(tmp_path, content, hub.url)) == path
    assert len(hub.requests) == 3


@pytest.mark.parametrize("repo", ["gpt2-medium", REPO])
def test_a_file_cached_under_either_name_is_found(repo, content, monkeypatch, tmp_path):
    """By what load_weights asks before it would download."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert cached("gpt2-medium") is None
    path = put_in_cache(tmp_path, content, repo)
    assert cached("gpt2-medium") == path


@pytest.mark.parametrize("place", ["header", "h.1.attn.bias", "ln_f.bias"])
def test_every_byte_of_the_official_file_counts(place, content, cached_file):
    """One space more in the header, one bit of a mask, which is not loaded, and of a tensor. The
    message has both hashes, and the file is left as it is."""
    assert len(load_weights("gpt2-medium")) == 28
    length = int.from_bytes(content[:8], "little")
    header, body = content[8 : 8 + length], bytearray(content[8 + length :])
    if place == "header":
        header += b" "
    else:
        body[json.loads(header)[place]["data_offsets"][0]] ^= 1
    changed = len(header).to_bytes(8, "little") + header + body
    cached_file.write_bytes(changed)
    got, expected = (hashlib.sha256(c).hexdigest() for c in (changed, content))
    message = f"got sha256 {got}, expected {expected}: it is not the official file"
    with pytest.raises(WeightsError, match=message):
        load_weights("gpt2-medium")
    assert cached_file.read_bytes() == changed


def test_what_was_verified_is_what_is_loaded(content, monkeypatch, cached_file):
    """A file that another replaces once its header is read: the hash is that of what is loaded."""

    def replaced(*_: object) -> None:
        cached_file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    monkeypatch.setattr("weights.checkpoint.check_config", replaced)
    with pytest.raises(WeightsError, match="it is not the official file"):
        load_weights("gpt2-medium")


SLOW_LOOK_UP = """
import socket, time
socket.getaddrinfo = lambda *_, **__: time.sleep(60)
"""


@pytest.mark.parametrize("case", ["lacks the file", "refuses", "silent", "no name server"])
def test_a_hub_that_has_no_answer_ends_the_command_soon(case, hub, content, tmp_path):
    """It answers 404, refuses connections, accepts them and stays silent, or its name cannot be
    looked up, which has no time limit of its own. Measured up to the end of the process, which a
    retry or the thread that waits would delay by a minute."""
    hub.path = "/elsewhere"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoints = {"lacks the file": hub.url, "refuses": DEAD}
        endpoint = endpoints.get(case, f"http://127.0.0.1:{silent.getsockname()[1]}")
        done = fetch(tmp_path, content, endpoint, SLOW_LOOK_UP * (case == "no name server"))
        end = time.monotonic()
    assert done.returncode == 1
    assert end - float(re.search(r"started at (\S+)", done.stderr)[1]) < 15
    assert "gpt2-medium is not cached and cannot be downloaded" in done.stderr
    assert ("404" in done.stderr) == (case == "lacks the file")
    assert "Retrying" not in done.stderr


SLOW_PREPARATION = """
import ssl, time
context = ssl.create_default_context
ssl.create_default_context = lambda *a, **k: time.sleep(4) or context(*a, **k)
"""


def test_only_the_network_is_given_three_seconds(hub, content, tmp_path):
    """On a busy machine preparing the client alone can take longer: 4 seconds here."""
    assert fetched_path(fetch(tmp_path, content, hub.url, SLOW_PREPARATION))


def test_offline_and_not_cached_says_what_to_fetch_where_to_put_it_and_what_else(content, tmp_path):
    """The advice works: a file put in the given place is found."""
    done = fetch(tmp_path, content, HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for advice in (
        "HF_HUB_OFFLINE",  # the cause
        f"{REPO}/resolve/{MEDIUM.revision}/{FILE} ({len(content):,} bytes)",
        f"hf download {REPO} {FILE} --revision {MEDIUM.revision} --local-dir gpt2-medium",
        '"tiny"',
    ):
        assert advice in done.stderr
    [line] = [line for line in done.stderr.splitlines() if "put it at:" in line]
    expected = put_in_cache(tmp_path, content)
    assert line.split()[-1] == str(expected)
    assert fetched_path(fetch(tmp_path, content, HF_HUB_OFFLINE="1")) == str(expected)


def test_the_registry_agrees_with_the_known_sizes():
    """File size minus published parameter counts and masks in float32 leaves the header."""
    for name, parameters in (("gpt2", 124_439_808), ("gpt2-medium", 354_823_168)):
        total = 4 * (parameters + OFFICIAL[name].layout.n_layer * 1024 * 1024)
        assert 10_000 < OFFICIAL[name].size - total < 30_000
    for official in OFFICIAL.values():
        assert len(bytes.fromhex(official.revision)) == 20
        assert len(bytes.fromhex(official.sha256)) == 32


def test_check_prints_the_sizes_and_the_official_name_and_on_request_every_tensor(
    cached_file, monkeypatch, capsys
):
    """Against the sizes it was written with. An official name stands for the cached file, as for
    load_weights."""
    command("gpt2-medium", list=True)
    text = capsys.readouterr().out
    assert text.startswith("model:       GPT-2, 2 blocks, 128 wide, 2 heads, 24 positions, 301 tok")
    assert "tensors:     30 (30 F32)" in text
    assert f"sha256:      {hashlib.sha256(cached_file.read_bytes()).hexdigest()}" in text
    assert "official:    gpt2-medium" in text
    assert "F32   [128, 384]           h.1.attn.c_attn.weight" in text
    monkeypatch.setitem(OFFICIAL, "gpt2-medium", MEDIUM)
    assert describe(cached_file).endswith("official:    none of gpt2, gpt2-medium, gpt2-xl")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (FILE, f"error: {FILE} cannot be read as a complete safetensors file"),
        ("gpt2-medium", "error: gpt2-medium is not downloaded. Run python -m weights.official gpt"),
    ],
)
def test_check_as_a_command_ends_in_one_line(argument, message, tmp_path):
    """On a bad file and on an official one that is not in the cache: no traceback, nothing on
    stdout, status 1."""
    (tmp_path / FILE).write_bytes(b"no weights")
    done = subprocess.run(
        [sys.executable, "-m", "weights.official", "--check", argument],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    *_, line = done.stderr.splitlines()  # after what the hub's library may say at its import
    assert line.startswith(message)


@pytest.mark.parametrize(("arguments", "unbuffered"), [("--help", ""), ("--list tiny", "1")])
def test_printing_to_nobody_is_not_an_error(arguments, unbuffered):
    """A pipe that is closed before anything is printed: status 0 without a word on stderr."""
    command = f"set -o pipefail; {sys.executable} -m weights.official {arguments} | true"
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    bash = ["bash", "-c", command]
    done = subprocess.run(bash, cwd=ROOT, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
