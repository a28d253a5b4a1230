"""Print how far the logits of one model differ between ways to compute them: docs/logits.md.

python -m tests.model.logit_differences
"""

import copy

import torch
from torch import Tensor

from model import GPT2
from model.generate import generate
from tests.model.oracle import GPT2LMHeadModel
from weights import load_weights
from weights.layout import TINY

B, T, PADDING = 8, 128, 100


def cached(model: GPT2, tokens: Tensor) -> Tensor:
    """One token at a time: (B, T) -> (B, T, V)."""
    cache = model.new_cache(T)
    return torch.cat([model(token, cache) for token in tokens.split(1, dim=1)], dim=1)


def padded(model: GPT2, tokens: Tensor) -> Tensor:
    """Beside a longer prompt, so with padding before it."""
    rows = torch.nn.functional.pad(tokens, (PADDING, 0))
    widths = tokens.new_full((len(tokens),), PADDING)  # (B,)
    return model.hidden_states(rows, padding=widths)[:, PADDING:] @ model.wte.weight.T


@torch.no_grad()
def main() -> None:
    """Compute row by row in float32, then otherwise, and compare."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = GPT2.from_state_dict(load_weights("tiny")).eval().to(device)
    hf = GPT2LMHeadModel.from_pretrained(TINY).eval().to(device)  # float16, as the file
    start = torch.full((B, 1), 50256, device=device)  # <|endoftext|>
    tokens = generate(model, start, T - 1, generator=torch.Generator(device).manual_seed(0))

    def alone(compute) -> Tensor:
        return torch.cat([compute(row) for row in tokens.split(1)]).double()

    base = alone(model)

    def report(name: str, logits: Tensor) -> None:
        error = (logits.double() - base).abs().max().item()
        changed = int((logits.argmax(-1) != base.argmax(-1)).sum())
        print(f"| {name} | {error:.1e} | {changed} of {B * T:,} |")

    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"largest logit {base.abs().max():.0f}, standard deviation {base.std():.1f}")
    print("| computed | largest difference | likeliest token differs |\n|---|---|---|")
    report("in a batch of 8", model(tokens))
    report("with the cache, token by token", alone(lambda row: cached(model, row)))
    report(f"after {PADDING} padding tokens", alone(lambda row: padded(model, row)))
    report("torch.compile", alone(torch.compile(model)))
    report("float64", alone(copy.deepcopy(model).double()))
    report("transformers", alone(lambda row: hf(row).logits))
    hf.float()
    report("transformers, dtype=torch.float32", alone(lambda row: hf(row).logits))
    with torch.autocast(device.type, torch.bfloat16):
        report("bfloat16 autocast", alone(model))
    report("bfloat16 weights", alone(copy.deepcopy(model).bfloat16()))


if __name__ == "__main__":
    main()
