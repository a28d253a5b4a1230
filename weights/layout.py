"""A GPT-2 checkpoint: its files, the official names and shapes, and the checks against them.

Shapes determine everything about a GPT-2 except its number of heads, and in every official size a
head is 64 wide. Functions here raise WeightsError.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TINY = Path(__file__).parent / "tiny"
FILE_NAME, INDEX_SUFFIX = "model.safetensors", ".index.json"
HEAD_DIM = 64
HEAD = "lm_head.weight"  # a copy of wte.weight in some files
MASK = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # causal masks: constants in some files
PREFIX = re.compile(r"((_orig_mod|module|model|transformer)\.)*")  # compile, DDP, Lightning, HF
SHARD = re.compile(r"\w[\w.-]{0,200}\.safetensors")
MOST_SHARDS = 1000
INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
UNCHECKED = ("architectures", "bos_token_id", "eos_token_id")  # they change no logit

Shape = tuple[int, ...]


def official_name(stored: str) -> str:
    """Strip the prefixes of transformers, torch.compile, DDP and Lightning from a tensor's name."""
    return PREFIX.sub("", stored, count=1)


def printable(text: str) -> str:
    """Escape what steers a terminal or cannot be seen: controls, direction marks, surrogates."""
    return "".join(
        c if c.isprintable() and not INVISIBLE.match(c) else ascii(c)[1:-1] for c in text
    )


class WeightsError(ValueError):
    """Weights that cannot be used. The message says what is wrong, what is expected, what to do."""

    def __init__(self, *lines: str) -> None:  # they quote names and paths that strangers chose
        super().__init__("\n".join(map(printable, lines)))


def expand(path: str | os.PathLike[str]) -> Path:
    """Replace `~` by the home folder; raise WeightsError if there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise WeightsError(f"{os.fspath(path)}: {error}") from error


def find_files(name_or_path: str | os.PathLike[str]) -> list[Path]:
    """Return a checkpoint's files: "tiny", a file, a folder's model.safetensors or its shards."""
    path = TINY if name_or_path == "tiny" else expand(name_or_path)
    try:
        if path.is_dir():
            names = FILE_NAME, FILE_NAME + INDEX_SUFFIX, "pytorch_model.bin"
            path = next((path / name for name in names if (path / name).exists()), path)
        found = path.is_file()
    except OSError as error:
        raise WeightsError(f"no weights at {path!s:.200}: {error.strerror}") from error
    if not found:
        raise WeightsError(
            f"no weights at {path}: expected gpt2, gpt2-medium, gpt2-xl, tiny, a .safetensors "
            f"file or a folder that holds a {FILE_NAME}"
        )
    if path.suffix in (".bin", ".pt", ".pth"):
        raise WeightsError(
            f"{path} is a pickle, expected safetensors. Convert it: "
            f'python -c "import torch, safetensors.torch as s; s.save_file({{k: v.clone() for k, v '
            f"in torch.load({str(path)!r}, weights_only=True).items()}}, "
            f'{str(path.with_name(FILE_NAME))!r})"'
        )
    if not path.name.endswith(INDEX_SUFFIX):
        return [path]
    try:
        shards = set(json.loads(path.read_bytes())["weight_map"].values())
        if not 0 < len(shards) <= MOST_SHARDS:
            raise ValueError(f"got {len(shards):,} file names, expected 1 to {MOST_SHARDS:,}")
        if wrong := [name for name in shards if not SHARD.fullmatch(name)]:
            example = "model-00001-of-00002.safetensors"
            raise ValueError(f"got the file name {wrong[0][:40]!r}, expected one such as {example}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{path} is not an index of shards: {error!r:.200}") from error
    return [path.with_name(shard) for shard in sorted(shards)]


@dataclass(frozen=True)
class Layout:
    """The sizes of a GPT-2, which determine every name and shape in its checkpoint."""

    n_layer: int
    n_embd: int  # C: width of the residual stream, 64 times the number of heads
    vocab_size: int  # V
    n_positions: int  # P: longest context

    def shapes(self) -> dict[str, Shape]:
        """Return every parameter's shape by name; the head is `wte.weight`, so it has no entry."""
        V, P, C, n_layer = self.vocab_size, self.n_positions, self.n_embd, self.n_layer
        block: dict[str, Shape] = {"ln_1": (C,), "ln_2": (C,)}
        block |= {"attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C)}  # q, k, v in that order
        block |= {"mlp.c_fc": (C, 4 * C), "mlp.c_proj": (4 * C, C)}
        layers = {f"h.{n}.{name}": shape for n in range(n_layer) for name, shape in block.items()}
        shapes: dict[str, Shape] = {"wte.weight": (V, C), "wpe.weight": (P, C)}
        for name, shape in {"ln_f": (C,), **layers}.items():
            shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[-1:]}
        return shapes

    def config(self) -> dict[str, Any]:
        """Return the `config.json` from which transformers builds the same model."""
        end_of_text = 50256 if self.vocab_size == 50257 else None
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "n_layer": self.n_layer,
            "n_head": self.n_embd // HEAD_DIM,
            "n_embd": self.n_embd,
            "n_positions": self.n_positions,
            "vocab_size": self.vocab_size,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "bos_token_id": end_of_text,
            "eos_token_id": end_of_text,
        }


def check_layout(found: dict[str, Shape], source: str) -> Layout:
    """Read the sizes off the shapes in `found` and check every name and shape against them."""
    # Count the blocks: the largest index could be a hostile h.999999999.
    n_layer = len({m[1] for name in found if (m := re.match(r"h\.(\d+)\.", name))})
    wte, wpe = found.get("wte.weight", ()), found.get("wpe.weight", ())
    if not n_layer or len(wte) != 2 or not wpe or 0 in wte + wpe or wte[1] % HEAD_DIM:
        names = ", ".join(repr(name[:40]) for name in list(found)[:4])
        raise WeightsError(
            f"{source} is not a GPT-2: got {len(found)} tensors ({names}, ...), wte.weight {wte} "
            f"and wpe.weight {wpe}, expected wte.weight, wpe.weight, h.0.ln_1.weight, ..., their "
            f"width a multiple of {HEAD_DIM}"
        )
    layout = Layout(n_layer, n_embd=wte[1], vocab_size=wte[0], n_positions=wpe[0])
    expected = layout.shapes()
    problems = [
        f"{name[:80]!r}: got {found.get(name, 'nothing')}, expected "
        f"{expected.get(name, 'no such tensor')}"
        for name in expected | found
        if found.get(name) != expected.get(name)
    ]
    if problems:
        shown = problems[:5] + [f"and {len(problems) - 5} more"] * (len(problems) > 5)
        raise WeightsError(
            f"{source} is not a complete GPT-2. Read as {layout}: {'; '.join(shown)}"
        )
    return layout


def check_config(path: Path, layout: Layout) -> None:
    """Refuse a config.json that describes another function than the GPT-2 of these sizes."""
    try:
        config = {**json.loads(path.read_bytes())}
    except FileNotFoundError:  # there is nothing to check
        return
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} cannot be read: {error}. Repair or remove it") from error
    C = layout.n_embd
    allowed = {key: (value,) for key, value in layout.config().items()} | {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),  # all the same
        "n_inner": (4 * C, None),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
        "num_hidden_layers": (layout.n_layer,),  # transformers accepts these four names as well
        "num_attention_heads": (C // HEAD_DIM,),
        "hidden_size": (C,),
        "max_position_embeddings": (layout.n_positions,),
    }
    wrong = [
        f"{key}: got {config[key]!r:.80}, expected {values[0]!r}"
        for key, values in allowed.items()
        if key in config and key not in UNCHECKED and config[key] not in values
    ]
    if wrong:
        raise WeightsError(
            f"{path} describes another model: {'; '.join(wrong)}. By its shapes this is a GPT-2, "
            f"{layout.n_layer} blocks, {C} wide, with heads {HEAD_DIM} wide, gelu_new, epsilon "
            "1e-5, scores scaled by 1/sqrt(64), a tied head and an inner width of 4 C"
        )
