"""transformers' GPT-2 as the reference for parity tests, with weights that exercise every term."""

import torch
from torch import Tensor
from transformers import GPT2Config as HFConfig
from transformers import GPT2LMHeadModel

from model import GPT2Config


def oracle(config: GPT2Config, seed: int = 0) -> GPT2LMHeadModel:
    """transformers' model with this configuration, no dropout, and weights drawn by `shake`."""
    hf = GPT2LMHeadModel(
        HFConfig(
            vocab_size=config.vocab_size,
            n_positions=config.n_positions,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
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


def official_names(hf: GPT2LMHeadModel) -> dict[str, Tensor]:
    """transformers' state dict under the names of the official files."""
    return {
        name.removeprefix("transformer."): tensor
        for name, tensor in hf.state_dict().items()
        if name != "lm_head.weight"
    }
