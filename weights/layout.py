"""The tensors of a GPT-2 checkpoint: their official names and shapes, and the check against both.

    C  n_embd       width of the residual stream, 64 times the number of heads
    V  vocab_size   tokens
    P  n_positions  longest context

Affine weights are (in, out), as GPT-2 stores them. The shapes say everything about a GPT-2 but the
number of heads, and a head is 64 wide in every official size.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

HEAD_DIM = 64
MASK = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # causal masks: constants that some files carry
MOST_PROBLEMS_SHOWN = 5

Shape = tuple[int, ...]


class WeightsError(ValueError):
    """Weights that cannot be used; the message says which, what was got and what was expected."""


@dataclass(frozen=True)
class Layout:
    """The sizes of one GPT-2, from which every name and shape of its checkpoint follows."""

    n_layer: int
    n_embd: int
    vocab_size: int
    n_positions: int

    def shapes(self) -> dict[str, Shape]:
        """Name -> shape of every parameter; the head is `wte.weight`, so it has no entry."""
        C = self.n_embd
        block: dict[str, Shape] = {
            "ln_1.weight": (C,),
            "ln_1.bias": (C,),
            "attn.c_attn.weight": (C, 3 * C),  # q, k, v in that order
            "attn.c_attn.bias": (3 * C,),
            "attn.c_proj.weight": (C, C),
            "attn.c_proj.bias": (C,),
            "ln_2.weight": (C,),
            "ln_2.bias": (C,),
            "mlp.c_fc.weight": (C, 4 * C),
            "mlp.c_fc.bias": (4 * C,),
            "mlp.c_proj.weight": (4 * C, C),
            "mlp.c_proj.bias": (C,),
        }
        return {
            "wte.weight": (self.vocab_size, C),
            "wpe.weight": (self.n_positions, C),
            **{f"h.{n}.{k}": shape for n in range(self.n_layer) for k, shape in block.items()},
            "ln_f.weight": (C,),
            "ln_f.bias": (C,),
        }

    def config(self) -> dict[str, Any]:
        """The `config.json` under which transformers builds the same model."""
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


def check_layout(found: Mapping[str, Shape], source: str) -> Layout:
    """Reads the sizes off the shapes in `found` and holds every name and shape against them.

    Raises WeightsError, which names `source` and the first few tensors that are missing, misshapen
    or none of GPT-2's.
    """
    layout = _sizes(found, source)
    expected = layout.shapes()
    problems = [f"{k}: missing, expected {v}" for k, v in expected.items() if k not in found]
    for name, shape in found.items():
        if name not in expected:
            problems.append(f"{name[:80]!r}: got {shape}, expected no such tensor")
        elif shape != expected[name]:
            problems.append(f"{name}: got {shape}, expected {expected[name]}")
    if problems:
        hidden = len(problems) - MOST_PROBLEMS_SHOWN
        shown = "; ".join(problems[:MOST_PROBLEMS_SHOWN] + [f"and {hidden} more"] * (hidden > 0))
        raise WeightsError(f"{source} is no whole GPT-2. Read as {layout}: {shown}")
    return layout


def _sizes(found: Mapping[str, Shape], source: str) -> Layout:
    for name in "wte.weight", "wpe.weight":
        shape = found.get(name)
        if shape is None or len(shape) != 2 or 0 in shape:
            got = "no such tensor" if shape is None else shape
            raise WeightsError(f"{source} is no GPT-2: {name}: got {got}, expected two dimensions")
    vocab_size, n_embd = found["wte.weight"]
    if n_embd % HEAD_DIM:
        raise WeightsError(
            f"{source} is no GPT-2: wte.weight: got width {n_embd}, expected a multiple of "
            f"{HEAD_DIM}, the width of a head"
        )
    # Counted, not the largest index: a hostile h.999999999 must not size anything.
    n_layer = len({m[1] for name in found if (m := re.match(r"h\.(\d+)\.", name))})
    if n_layer == 0:
        raise WeightsError(f"{source} is no GPT-2: got no block, expected tensors named h.0.*")
    return Layout(n_layer, n_embd, vocab_size, n_positions=found["wpe.weight"][0])
