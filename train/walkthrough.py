"""One batch followed from token ids to the loss: a line a stage, a number to check by hand.

    python -m train.walkthrough                        the embedded checkpoint
    python -m train.walkthrough --model gpt2-medium    or any file that load_weights takes

The first block is taken step by step, by the names of `gpt2.py`; the others repeat it. Attention,
one fused call there, is written out here, so the walk is a second opinion: its logits must equal
`model(tokens)`.
"""

import argparse
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import TwoLevelTarget, fused_kl_div, fused_linear_kl_div, reference
from kernels.fused_linear_kl_div import CHUNK_ROWS
from model import GPT2
from model.gpt2 import Attention, Block
from model.tokenizer import load_tokenizer
from train.target_tokens import containing
from weights import WeightsError, load_weights

BATCH, LENGTH = 4, 64
LINE = "{:11} {:23} {:15} {:26} {}"


class Table:
    """Prints each stage as the walk reaches it, and adds up the parameters used so far."""

    def __init__(self) -> None:
        self.parameters = 0
        print(LINE.format("stage", "formula", "shape", "parameters", "check by hand"))

    def add(self, name: str, formula: str, x: Tensor, check: str, *made_by: nn.Module) -> None:
        """A line for the tensor x; its parameters are those of the module that made it, if any."""
        used = [p for module in made_by for p in module.parameters()]
        count = sum(p.numel() for p in used)
        self.parameters += count
        product = "+".join("*".join(map(str, p.shape)) for p in used)
        if any(isinstance(module, Block) for module in made_by):
            product = "12C^2+13C"  # matrices of 3, 1, 4 and 4 C^2; the first block lists them all
        cost = f"{product} = {count:,}" if used else ""
        print(LINE.format(name, formula, str([*x.shape]), cost, check).rstrip())


def walk(model: GPT2, tokens: Tensor) -> tuple[Tensor, Tensor, int]:
    """Print every stage; returns hidden states (B, T, C), logits (B, T, V), parameters used."""
    table = Table()
    T, corner = tokens.shape[1], int(tokens[0, 0])
    table.add("tokens", "ids drawn at random", tokens, f"[0, 0] is {corner}")
    x = model.wte(tokens)
    assert torch.equal(x[0, 0], model.wte.weight[corner])
    table.add("wte", "x = wte[tokens]", x, f"[0, 0] is wte[{corner}]", model.wte)
    x = x + model.wpe(torch.arange(T))
    table.add("wpe", f"x = x + wpe[0..{T - 1}]", x, norm(x), model.wpe)
    first = model.h[0]
    assert isinstance(first, Block)
    x = walk_block(first, x, table)
    for n, block in enumerate(model.h[1:], start=1):
        x = block(x)
        table.add(f"h.{n}", "x = block(x), as h.0", x, norm(x), block)
    hidden = walk_layer_norm("ln_f", model.ln_f, x, table)
    z = hidden @ model.wte.weight.T
    size = f"{z.nbytes / 1e6:.1f} MB, {z.itemsize} B each"
    table.add("logits", "z = h wte^T: no bias", z, size)
    return hidden, z, table.parameters


def walk_block(block: Block, x: Tensor, table: Table) -> Tensor:
    """What each half of h.0 adds to the residual stream x (B, T, C)."""
    x = x + walk_attention(block.attn, walk_layer_norm("h.0.ln_1", block.ln_1, x, table), table)
    table.add("", "x = x + attn(ln_1(x))", x, norm(x))
    y = block.mlp.c_fc(walk_layer_norm("h.0.ln_2", block.ln_2, x, table))
    before = y[0, 0, 0].item()
    table.add("mlp.c_fc", "y W + b", y, f"[0, 0, 0] is {before:.3f}", block.mlp.c_fc)
    y = F.gelu(y, approximate="tanh")
    table.add("", "gelu(y)", y, f"gelu({before:.3f}) = {y[0, 0, 0]:.3f}")
    y = block.mlp.c_proj(y)
    table.add("mlp.c_proj", "y W + b", y, norm(y), block.mlp.c_proj)
    x = x + y
    table.add("", "x = x + mlp(ln_2(x))", x, norm(x))
    return x


def walk_layer_norm(name: str, ln: nn.LayerNorm, x: Tensor, table: Table) -> Tensor:
    """ln(x), (B, T, C); to check: mean 0 and variance 1 at each position before gain and bias."""
    bare = F.layer_norm(x, x.shape[-1:], eps=ln.eps)
    mean, variance = bare.mean(-1).abs().max(), bare.var(-1, correction=0).mean()
    y = ln(x)
    table.add(name, "g (x-m)/sqrt(v+eps) + b", y, f"mean {mean:.3f}, var {variance:.3f}", ln)
    return y


def walk_attention(attn: Attention, y: Tensor, table: Table) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask) v, spelled out: (B, T, C) -> (B, T, C)."""
    B, T, C = y.shape
    H, D = attn.n_head, C // attn.n_head
    y = attn.c_attn(y)
    table.add("attn.c_attn", "y W + b: q, k, v", y, f"{3 * C} = 3 * {C}", attn.c_attn)
    q, k, v = (part.view(B, T, H, D).transpose(1, 2) for part in y.split(C, dim=2))
    table.add("", "q, k, v each in H heads", q, f"{H} * {D} = {C}")
    s = q @ k.transpose(2, 3) / math.sqrt(D)
    s = s.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
    masked = int((s[0, 0] == -math.inf).sum())
    table.add("", "s = q k^T/sqrt(D), j<=i", s, f"{masked} = {T}*{T - 1}/2 -inf")
    a = s.softmax(-1)
    sums, above = a.sum(-1).min(), a.triu(1).sum()
    table.add("", "a = softmax of rows", a, f"sum_j {sums:.4f}, j>i {above:g}")
    y = a @ v
    off = (y[:, :, 0] - v[:, :, 0]).abs().max()
    table.add("", "a v; row 0 sees itself", y, f"row 0 - v[0] = {off:g}")
    y = attn.c_proj(y.transpose(1, 2).reshape(B, T, C))
    table.add("attn.c_proj", "y W + b, heads joined", y, norm(y), attn.c_proj)
    return y


def norm(x: Tensor) -> str:
    """The length of a position's vector, mean over positions, in words."""
    return f"mean norm {x.norm(dim=-1).mean():.3f}"


def divergences(h: Tensor, weight: Tensor, z: Tensor, target: TwoLevelTarget) -> dict[str, Tensor]:
    """KL(P || softmax(z)) in nats, mean over all positions, in four ways; z = h weight^T."""
    log_q = z.double().log_softmax(-1)[..., target.index]  # off S, P = 0 and the term is 0
    terms = target.alpha * (math.log(target.alpha) - log_q)
    return {
        "definition: sum over S of alpha (log alpha - log q)": terms.sum(-1).mean(),
        "kernels.reference: log_softmax, then kl_div": reference.kl_div(z, target),
        "fused_kl_div: one pass over z, by kernels.torch_kl_div": fused_kl_div(z, target),
        "fused_linear_kl_div: from h and wte, likewise": fused_linear_kl_div(h, weight, target),
    }


def traffic(rows: int) -> dict[str, tuple[int, int]]:
    """How often loss and gradients read or write a tensor of N V elements, and one of V C.

    The loss alone as kernels/triton_kl_div.py counts it. The LM head adds a write of the logits and
    two reads of their gradient; two reads of its weight and a write of that one's gradient.
    fused_linear_kl_div reads the weight twice a chunk; the weight's gradient is written by the
    first chunk, read and written by every other, and once more to scale it at the end.
    """
    chunks = math.ceil(rows / CHUNK_ROWS)
    return {
        "unfused": (13, 0),
        "fused_kl_div": (3, 0),
        "LM head, unfused": (13 + 3, 3),
        "LM head, fused_kl_div": (3 + 3, 3),
        "fused_linear_kl_div": (3 + 3, 4 * chunks + 1),
    }


def explain_probabilities(logits: Tensor) -> None:
    """Logits are no distribution, their exponentials neither; log-softmax makes one of them."""
    B, T, V = logits.shape
    z, lse = logits[-1, -1], logits[-1, -1].logsumexp(-1)
    print(f"\nFrom logits to probabilities: the {V} logits z at [{B - 1}, {T - 1}]")
    fact("sum of z", f"{z.sum():.1f}")
    fact("sum of exp(z)", f"{z.double().exp().sum():.4g}")
    fact("lse(z), the logarithm of that", f"{lse:.6f}")
    fact("sum of exp(z - lse(z))", f"{(z - lse).exp().sum():.7f}")
    fact("sum of exp(F.log_softmax(z)), float64", f"{z.double().log_softmax(-1).exp().sum():.7f}")
    fact(
        "  in float32, which ATen adds in few accumulators", f"{z.log_softmax(-1).exp().sum():.7f}"
    )
    fact("each position is a row", f"{[B, T, V]} -> {[*logits.flatten(0, 1).shape]}")


def explain_loss(hidden: Tensor, weight: Tensor, logits: Tensor) -> None:
    """The target, its divergence from the model in four ways, and the traffic of each."""
    target = TwoLevelTarget(containing(load_tokenizer(), "X"))
    size, total = target.size, target.dense(torch.float64).sum()
    print(f"\nThe target P: alpha on S, the {size} tokens with an x or X, beta elsewhere")
    fact(f"alpha = 1 / {size}, beta = 0", f"{target.alpha:.9f}")
    fact(f"sum of P = {size} alpha + {target.vocab_size - size} beta", f"{total:.7f}")
    print(
        "\nKL(P || q) in nats, q = softmax(z), mean over rows; distance from the first; on the CPU"
    )
    kls = divergences(hidden, weight, logits, target)
    exact, *_ = kls.values()
    for name, kl in kls.items():
        fact(name, f"{kl:.6f}  {kl - exact:+.1e}")
    N, (V, C) = logits[..., 0].numel(), weight.shape
    print(f"\nMemory traffic of loss and gradients, float32: N = {N}, V = {V}, C = {C}")
    for name, (nv, vc) in traffic(N).items():
        formula = f"4 B * ({nv} N V + {vc} V C)" if vc else f"4 B * {nv} N V"
        fact(f"{name:26} {formula}", f"{4e-6 * (nv * N * V + vc * V * C):.1f} MB")
    print(
        "  Counts by formula, not timings; N C left out. What fused_linear_kl_div saves is memory:"
    )
    print(
        f"  logits of {CHUNK_ROWS} rows at most, where the others keep N rows and their gradient."
    )


def fact(name: str, value: str) -> None:
    """Print a line of the analysis: what it is, and its value at the right."""
    print(f"  {name:56} {value:>28}")


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    """The command line: weights that cannot be had or walked end with status 1 and why."""
    parser = argparse.ArgumentParser(
        prog="python -m train.walkthrough", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--model", default="tiny", help="tiny, gpt2-medium or a path")
    name = parser.parse_args(arguments).model
    try:
        model = GPT2.from_state_dict(load_weights(name), assign=True)
    except WeightsError as error:
        parser.exit(1, f"error: {error}\n")
    config, n_vocab = model.config, load_tokenizer().n_vocab
    V, C, H = config.vocab_size, config.n_embd, config.n_head
    if n_vocab != V or config.n_positions < LENGTH:
        got = f"{V} tokens and {config.n_positions} positions"
        parser.exit(1, f"error: {name}: got {got}, expected {n_vocab} and {LENGTH} or more\n")
    print(f"GPT-2 {name}: {config.n_layer} blocks, C = {C} wide, H = {H} heads of D = {C // H}")
    print(f"{BATCH} sequences of {LENGTH} tokens out of V = {V}; position i attends to j <= i\n")
    tokens = torch.randint(V, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    hidden, logits, used = walk(model, tokens)
    distance = (logits - model(tokens)).abs().max() / logits.abs().max()
    print()
    fact("parameters used above", f"{used:,}")
    fact("parameters of the model", f"{sum(p.numel() for p in model.parameters()):,}")
    fact("distance from model(tokens), over the largest logit", f"{distance:.1e}")
    explain_probabilities(logits)
    explain_loss(hidden, model.wte.weight, logits)


if __name__ == "__main__":
    main()
