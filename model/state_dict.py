"""Names of a GPT-2's parameters: what other programs call them, and what this model does."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

PREFIX = re.compile(r"((_orig_mod|module|model|transformer)\.)*")  # compile, DDP, Lightning, HF
MASK = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # causal masks: constants in some checkpoints
HEAD = "lm_head.weight"  # a copy of wte.weight in some checkpoints


def official_parameters(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters by official name, without prefixes, masks and tied head.

    Raises ValueError: a value is not a floating-point tensor, two tensors have the same name, the
    head is not tied, or an embedding is missing.
    """
    named: dict[str, Tensor] = {}
    for stored, tensor in state_dict.items():
        name = PREFIX.sub("", stored, count=1)
        if MASK.fullmatch(name):
            continue
        if not isinstance(tensor, Tensor):
            got = f"got {type(tensor).__name__}, expected a tensor"
            raise ValueError(f"{stored}: {got}; if it holds the weights, pass only that")
        if not tensor.is_floating_point():
            raise ValueError(f"{stored}: got {tensor.dtype}, expected a floating-point dtype")
        if name in named:
            raise ValueError(f"{stored}: got {name} twice, with different prefixes")
        named[name] = tensor.detach()
    for name in ("wte.weight", "wpe.weight"):
        if name not in named or named[name].dim() != 2:
            raise ValueError(f"{name}: missing or not a matrix, expected GPT-2's embedding")
    head, wte = named.pop(HEAD, None), named["wte.weight"]
    if head is None or head.is_meta or wte.is_meta:  # there are no values to compare
        return named
    if head.dtype != wte.dtype or not torch.equal(head, wte):
        raise ValueError(f"{HEAD}: got values that differ from wte.weight, expected the tied head")
    return named
