"""transformers' GPT-2 as the reference for parity tests, with weights that exercise every term."""

import sys

import torch

import kernels
from model import GPT2Config

# Where Hugging Face's package `kernels` is installed, transformers would import our folder of that
# name in its place. None makes it "not installed"; transformers remembers the answer.
sys.modules["kernels"] = None
try:
    from transformers import GPT2Config as HFConfig
    from transformers import GPT2LMHeadModel
finally:
    sys.modules["kernels"] = kernels


def oracle(config: GPT2Config, seed: int = 0) -> GPT2LMHeadModel:
    """transformers' model with this configuration, no dropout, and weights drawn by `shake`."""
    sizes = {k: v for k, v in vars(config).items() if not k.endswith("_pdrop")}
    no_dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    hf = GPT2LMHeadModel(HFConfig(**sizes, **no_dropout, bos_token_id=None, eos_token_id=None))
    shake(hf, seed)
    return hf.eval()


@torch.no_grad()
def shake(module: torch.nn.Module, seed: int) -> None:
    """Randomise every parameter: a zero bias, a unit gain or flat attention would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        noise = torch.empty_like(p).normal_(generator=generator)
        if p.dim() == 1:
            p.copy_(0.3 * noise + (1.0 if "ln_" in name and name.endswith("weight") else 0.0))
        else:
            p.copy_(noise * (p.shape[0] ** -0.5 if "h." in name else 0.2))
