"""Names of parameters that other programs gave."""

import torch

from model import GPT2, GPT2Config


def test_a_tied_head_on_the_meta_device_is_dropped() -> None:
    """It has no values that could differ; the model has none either, and all its shapes."""
    with torch.device("meta"):
        named = GPT2(GPT2Config(100, 32, 64, 1, 1)).state_dict()
    model = GPT2.from_state_dict({**named, "lm_head.weight": named["wte.weight"]})
    assert {name: p.shape for name, p in model.named_parameters()} == {
        name: p.shape for name, p in named.items()
    }
    assert model.wte.weight.is_meta
