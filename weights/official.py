"""OpenAI's official GPT-2 files: where they are, their hashes, how to download and check them.

    python -m weights.official gpt2-medium      # download and verify ahead of time

A file comes from the local cache of huggingface_hub, under either of its two names, or is
downloaded at the pinned revision. huggingface_hub checks only a download's size, so every load
hashes what it reads.
"""

import argparse
import hashlib
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

from torch import Tensor

from .checkpoint import read_tensors
from .layout import FILE_NAME, Layout, WeightsError

TIMEOUT = 3  # seconds that the hub has to answer


@dataclass(frozen=True)
class Official:
    """The file of one model, `model.safetensors` in openai-community/NAME on the hub."""

    revision: str  # the full commit: with it, a cached file costs no network call
    sha256: str
    layout: Layout
    size: int | None = None  # bytes; None where no source for it was found


OFFICIAL = {
    "gpt2": Official(
        revision="607a30d783dfa663caf39e06633721c8d4cfcd7e",
        sha256="248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
        layout=Layout(12, 768, vocab_size=50257, n_positions=1024),
        size=548_105_171,
    ),
    "gpt2-medium": Official(
        revision="6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
        sha256="fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd",
        layout=Layout(24, 1024, vocab_size=50257, n_positions=1024),
        size=1_519_984_962,
    ),
    "gpt2-xl": Official(
        revision="15ea56dee5df4983c59b2538573817e1667135e2",
        sha256="0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
        layout=Layout(48, 1600, vocab_size=50257, n_positions=1024),
    ),
}


def read_official(name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of an official model, downloaded if need be; check the file's hash last."""
    path, digest = cached(name) or _download(name), hashlib.sha256()
    yield from read_tensors(path, digest)
    if (got := digest.hexdigest()) != (expected := OFFICIAL[name].sha256):
        raise WeightsError(
            f"{path}: got sha256 {got}, expected {expected}: it is not the official file. Remove "
            "it to download it again, or pass its path to load it anyway"
        )


def cached(name: str) -> Path | None:
    """Return the file in the hub's local cache, unverified, or None; never use the network."""
    from huggingface_hub import try_to_load_from_cache  # here: a third of a second, seldom needed

    # Files cached before 2024 are under the repository's old name, without the organisation.
    for repo in (f"openai-community/{name}", name):
        path = try_to_load_from_cache(repo, FILE_NAME, revision=OFFICIAL[name].revision)
        if isinstance(path, str):
            return Path(path)
    return None


def _download(name: str) -> Path:
    from huggingface_hub import get_session, hf_hub_download, hf_hub_url
    from huggingface_hub.constants import HF_HUB_CACHE

    repo, revision, size = f"openai-community/{name}", OFFICIAL[name].revision, OFFICIAL[name].size
    url = hf_hub_url(repo, FILE_NAME, revision=revision)
    length = f"{size:,} bytes" if size else "size not on record"
    try:
        _wait_for_an_answer(get_session(), url)  # downloading would retry for a minute
        print(f"downloading {repo}, {FILE_NAME} ({length})", file=sys.stderr)
        return Path(hf_hub_download(repo, FILE_NAME, revision=revision))
    except Exception as error:  # the hub's, HTTP's and Xet's errors share no narrower class
        folder = Path(HF_HUB_CACHE, "models--" + repo.replace("/", "--"), "snapshots", revision)
        reason = str(error.__cause__ or error) or f"no answer within {TIMEOUT} seconds"
        raise WeightsError(
            f"{name} is not cached and cannot be downloaded: {reason}",
            f"  file:  {url} ({length})",
            f"  download, on a machine with internet:  "
            f"hf download {repo} {FILE_NAME} --revision {revision} --local-dir {name}",
            f"  put it at:  {folder / FILE_NAME}",
            f"  or pass its path instead of {name!r}",
            '  or use "tiny", the small checkpoint embedded in this repository, which needs no '
            "download",
        ) from error


def _wait_for_an_answer(client: Any, url: str) -> None:
    """Raise the client's error, or TimeoutError if the network is silent.

    A daemon thread asks: looking up a name has no timeout, and the process can end meanwhile.
    """
    answer: Future[None] = Future()

    def ask() -> None:
        try:
            client.head(url, timeout=TIMEOUT)
            answer.set_result(None)
        except Exception as error:
            answer.set_exception(error)

    Thread(target=ask, daemon=True).start()
    answer.result(TIMEOUT)


def main() -> None:
    """Download and verify the model that the command line names, or exit with the reason."""
    text = "Download an official GPT-2 to the hub's local cache and verify it."
    parser = argparse.ArgumentParser("python -m weights.official", description=text)
    parser.add_argument("name", choices=OFFICIAL)
    name = parser.parse_args().name
    print(f"verifying {name}", file=sys.stderr)
    try:
        for _ in read_official(name):
            pass
    except WeightsError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:  # the download continues where it was
        sys.exit(130)
    print(f"{name} verified: {cached(name)}")


if __name__ == "__main__":
    main()
