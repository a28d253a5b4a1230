"""OpenAI's official GPT-2 files: where they are, what they hash to, how to get and check them.

    python -m weights.official gpt2-medium      fetch and verify ahead of time
    python -m weights.official --check PATH     tensors, shapes, dtypes and hash of any file, and
                                                which official file it is

A file is looked for in the local cache of huggingface_hub under both of its names, and else
downloaded at the pinned revision. The hub's library checks a download's size only, so the file is
hashed here, once: its hash is kept in the model's folder of the cache, and holds until the file's
size or time changes.
"""

import argparse
import hashlib
import json
import math
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from .checkpoint import (
    FILE_NAME,
    atomic_write,
    parameter_entries,
    read_header,
    read_tensors,
)
from .layout import HEAD_DIM, Layout, WeightsError

HASHES_NAME = "sha256.json"


@dataclass(frozen=True)
class Official:
    """One `model.safetensors` on the Hugging Face hub."""

    repo: str
    revision: str  # the full commit: with it, a cached file costs no network call
    sha256: str
    layout: Layout
    size: int | None = None  # bytes; None where no source for it was found

    @property
    def size_text(self) -> str:
        """The size in words."""
        return f"{self.size:,} bytes" if self.size else "size not on record"


OFFICIAL = {
    "gpt2": Official(
        repo="openai-community/gpt2",
        revision="607a30d783dfa663caf39e06633721c8d4cfcd7e",
        sha256="248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
        layout=Layout(12, 768, vocab_size=50257, n_positions=1024),
        size=548_105_171,
    ),
    "gpt2-medium": Official(
        repo="openai-community/gpt2-medium",
        revision="6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
        sha256="fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd",
        layout=Layout(24, 1024, vocab_size=50257, n_positions=1024),
        size=1_519_984_962,
    ),
    "gpt2-xl": Official(
        repo="openai-community/gpt2-xl",
        revision="15ea56dee5df4983c59b2538573817e1667135e2",
        sha256="0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
        layout=Layout(48, 1600, vocab_size=50257, n_positions=1024),
    ),
}


def fetch(name: str) -> Path:
    """The verified local file of an official model, downloaded with a progress bar if need be.

    Raises WeightsError if the file is not cached and cannot be downloaded, or if its hash is wrong;
    the file then stays where it is.
    """
    official = OFFICIAL[name]
    path = cached(official) or _download(name, official)
    got = _remembered_sha256(path)
    if got != official.sha256:
        raise WeightsError(
            f"{path} ({path.stat().st_size:,} bytes) is not the official {name}: got sha256 {got}, "
            f"expected {official.sha256} ({official.size_text}). Remove the file to have it "
            "downloaded again, or pass its path to load it as it is"
        )
    return path


def cached(official: Official) -> Path | None:
    """The file in the hub's local cache, unverified, or None; never looks at the network."""
    from huggingface_hub import try_to_load_from_cache  # here: a third of a second, seldom needed

    # Files cached before 2024 lie under the repository's old name, without the organisation.
    for repo in (official.repo, official.repo.split("/")[1]):
        path = try_to_load_from_cache(repo, FILE_NAME, revision=official.revision)
        if isinstance(path, str):
            return Path(path)
    return None


def _download(name: str, official: Official) -> Path:
    from huggingface_hub import hf_hub_download, hf_hub_url
    from huggingface_hub.constants import HF_HUB_CACHE

    repo, revision = official.repo, official.revision
    print(f"downloading {repo}, {FILE_NAME} ({official.size_text})", file=sys.stderr)
    try:
        return Path(hf_hub_download(repo, FILE_NAME, revision=revision))
    except Exception as error:  # the hub's, HTTP's and Xet's errors share no narrower class
        folder = Path(HF_HUB_CACHE, "models--" + repo.replace("/", "--"), "snapshots", revision)
        raise WeightsError(
            f"{name} is not cached and cannot be downloaded: {error.__cause__ or error}\n"
            f"  file:  {hf_hub_url(repo, FILE_NAME, revision=revision)} ({official.size_text})\n"
            f"  fetch, on a machine with internet:  "
            f"hf download {repo} {FILE_NAME} --revision {revision} --local-dir {name}\n"
            f"  put it at:  {folder / FILE_NAME}\n"
            f"  or pass its path in place of {name!r}\n"
            '  or use "tiny", the small checkpoint embedded in this repository, which needs no '
            "download"
        ) from error


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remembered_sha256(path: Path) -> str:
    """`sha256` of a file in the hub's cache, taken once for a path, size and modification time."""
    record = path.parents[2] / HASHES_NAME  # <cache>/models--X/snapshots/<revision>/<file>
    try:
        known = json.loads(record.read_text())
    except (OSError, ValueError):  # none yet, or damaged: the file is hashed again
        known = {}
    stat = path.stat()
    key = f"{path} {stat.st_size} {stat.st_mtime_ns}"
    if key in known:
        return str(known[key])
    print(f"hashing {path}, once", file=sys.stderr)
    digest = sha256(path)
    try:
        with atomic_write(record) as temporary:
            temporary.write_text(json.dumps({key: digest}) + "\n")
    except OSError as error:
        print(
            f"the hash cannot be remembered, so every load takes it anew: {error}", file=sys.stderr
        )
    return digest


def describe(path: Path) -> str:
    """What `--check` prints: every tensor read and checked, the sizes, the hash, the official name.

    Raises WeightsError as `load_weights` does.
    """
    stored = read_header(path)
    _, layout = parameter_entries(path)
    n_parameters = sum(tensor.numel() for _, tensor in read_tensors(path))
    digest = sha256(path)
    names = [name for name, official in OFFICIAL.items() if official.sha256 == digest]
    dtypes = Counter(entry.dtype for entry in stored.values())
    lines = [f"{entry.dtype:5} {list(entry.shape)!s:20} {name}" for name, entry in stored.items()]
    ignored = sum(math.prod(entry.shape) for entry in stored.values()) - n_parameters
    return "\n".join(
        [
            *lines,
            f"file:        {path}, {path.stat().st_size:,} bytes",
            f"tensors:     {len(stored)} ({', '.join(f'{n} {k}' for k, n in dtypes.items())})",
            f"model:       GPT-2, {layout.n_layer} blocks, {layout.n_embd} wide, "
            f"{layout.n_embd // HEAD_DIM} heads, {layout.n_positions:,} positions, "
            f"{layout.vocab_size:,} tokens",
            f"parameters:  {n_parameters:,}, all finite",
            f"ignored:     {ignored:,} values of masks and a repeated head",
            f"sha256:      {digest}",
            f"official:    {names[0] if names else 'none of ' + ', '.join(OFFICIAL)}",
        ]
    )


def main() -> None:
    """The command line: a file that cannot be had or is not whole ends with status 1 and why."""
    parser = argparse.ArgumentParser(
        prog="python -m weights.official",
        description="Fetch and verify an official GPT-2, or check any GPT-2 safetensors file.",
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("name", nargs="?", choices=list(OFFICIAL), help="fetch and verify this one")
    action.add_argument("--check", type=Path, metavar="PATH", help="inspect this file")
    options = parser.parse_args()
    try:
        if options.check:
            print(describe(options.check))
        else:
            print(f"{options.name} verified: {fetch(options.name)}")
    except WeightsError as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
