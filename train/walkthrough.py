"""Follow one batch from token ids to the loss: one line per stage, with a number to check by hand.

    python -m train.walkthrough                        the embedded checkpoint
    python -m train.walkthrough --model gpt2-medium    OpenAI's, or the path of another checkpoint

It shows the first block step by step, with the names of `gpt2.py`; the others repeat it. Attention,
one fused call there, is written out here, so this is also an independent check: the logits must
equal `model(tokens)`.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from kernels import TwoLevelTarget, fused_kl_div, fused_linear_kl_div, reference
from kernels.fused_linear_kl_div import CHUNK_ROWS
from model import GPT2
from model.gpt2 import Attention, Block
from model.tokenizer import load_tokenizer
from train.command import command, say
from train.target_tokens import LETTER_X, matching
from weights import load_weights

BATCH, LENGTH = 4, 64
LINE = "{:11} {:23} {:15} {:26} {}"


class Walk:
    """Computes the logits stage by stage, and prints a line for each."""

    def __init__(self) -> None:
        say(LINE.format("stage", "formula", "shape", "parameters", "check by hand"))
        self.used = 0  # parameters of the stages shown so far

    def show(
        self, name: str, formula: str, x: Tensor, check: str = "", module: nn.Module | None = None
    ) -> Tensor:
        """Print a stage and return its result x; without a check, the mean length of vectors."""
        shapes = [p.shape for p in module.parameters()] if module else []
        count = sum(map(math.prod, shapes))
        product = "+".join("*".join(map(str, shape)) for shape in shapes)
        if isinstance(module, Block):
            product = "12C^2+13C"  # matrices of 3, 1, 4 and 4 C^2; the first block lists them all
        cost = f"{product} = {count:,}" if module else ""
        check = check or f"mean norm {x.norm(dim=-1).mean():.3f}"
        say(LINE.format(name, formula, str([*x.shape]), cost, check))
        self.used += count
        return x

    def model(self, model: GPT2, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the hidden states, (B, T, C), and the logits, (B, T, V), of token ids (B, T)."""
        T, corner = tokens.shape[1], int(tokens[0, 0])
        self.show("tokens", "random ids", tokens, f"[0, 0] is {corner}")
        x = model.wte(tokens)  # (B, T, C)
        assert torch.equal(x[0, 0], model.wte.weight[corner])
        self.show("wte", "x = wte[tokens]", x, f"[0, 0] is wte[{corner}]", model.wte)
        x = x + model.wpe(torch.arange(T))
        self.show("wpe", f"x = x + wpe[0..{T - 1}]", x, module=model.wpe)
        first, *others = model.h
        x = self.block(first, x)
        for n, block in enumerate(others, start=1):
            x = self.show(f"h.{n}", "x = block(x), as h.0", block(x), module=block)
        hidden = self.layer_norm("ln_f", model.ln_f, x)
        z = hidden @ model.wte.weight.T  # (B, T, V)
        size = f"{z.nbytes / 1e6:.1f} MB, {z.itemsize} B each"
        return hidden, self.show("logits", "z = h wte^T: no bias", z, size)

    def block(self, block: Any, x: Tensor) -> Tensor:
        """Show h.0: each half adds to the residual stream x, (B, T, C)."""
        y = self.attention(block.attn, self.layer_norm("h.0.ln_1", block.ln_1, x))
        x = self.show("", "x = x + attn(ln_1(x))", x + y)
        mlp, y = block.mlp, self.layer_norm("h.0.ln_2", block.ln_2, x)
        y = mlp.c_fc(y)  # (B, T, 4C)
        before = f"{y[0, 0, 0]:.3f}"
        self.show("mlp.c_fc", "y W + b", y, f"[0, 0, 0] is {before}", mlp.c_fc)
        y = F.gelu(y, approximate="tanh")
        self.show("", "gelu(y)", y, f"gelu({before}) = {y[0, 0, 0]:.3f}")
        y = self.show("mlp.c_proj", "y W + b", mlp.c_proj(y), module=mlp.c_proj)
        return self.show("", "x = x + mlp(ln_2(x))", x + y)

    def layer_norm(self, name: str, ln: nn.LayerNorm, x: Tensor) -> Tensor:
        """Show ln(x); before gain and bias each position has mean 0 and variance 1."""
        bare = F.layer_norm(x, x.shape[-1:], eps=ln.eps)
        mean, variance = bare.mean(-1).abs().max(), bare.var(-1, correction=0).mean()
        check = f"mean {mean:.3f}, var {variance:.3f}"
        return self.show(name, "g (x-m)/sqrt(v+eps) + b", ln(x), check, ln)

    def attention(self, attn: Attention, y: Tensor) -> Tensor:
        """Show softmax(q k^T / sqrt(D) + mask) v, (B, T, C) -> (B, T, C)."""
        B, T, C = y.shape
        H, D = attn.n_head, C // attn.n_head
        y = attn.c_attn(y)  # (B, T, 3C)
        self.show("attn.c_attn", "y W + b: q, k, v", y, f"{3 * C} = 3 * {C}", attn.c_attn)
        q, k, v = (part.view(B, T, H, D).transpose(1, 2) for part in y.split(C, dim=2))
        self.show("", "q, k, v in H heads each", q, f"{H} * {D} = {C}")
        s = q @ k.transpose(2, 3) / math.sqrt(D)  # (B, H, T, T)
        s = s.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        masked = int((s[0, 0] == -math.inf).sum())
        self.show("", "s = q k^T/sqrt(D), j<=i", s, f"{masked} = {T}*{T - 1}/2 -inf")
        a = s.softmax(-1)
        sums = f"sum_j {a.sum(-1).min():.4f}, j>i {a.triu(1).sum():g}"
        self.show("", "a = softmax over j", a, sums)
        y = a @ v  # (B, H, T, D)
        difference = (y[:, :, 0] - v[:, :, 0]).abs().max()
        self.show("", "y = a v; 0 sees itself", y, f"y[0] - v[0] = {difference:g}")
        y = attn.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return self.show("attn.c_proj", "y W + b, heads joined", y, module=attn.c_proj)


def divergences(h: Tensor, weight: Tensor, z: Tensor, target: TwoLevelTarget) -> dict[str, Tensor]:
    """Return KL(P || softmax(z)) in nats, mean over all positions, in four ways; z = h weight^T."""
    log_q = z.double().log_softmax(-1)[..., target.index]  # elsewhere P = 0, and the term is 0
    terms = target.alpha * (math.log(target.alpha) - log_q)
    return {
        "definition: sum over S of alpha (log alpha - log q)": terms.sum(-1).mean(),
        "kernels.reference: F.log_softmax, then F.kl_div": reference.kl_div(z, target),
        "fused_kl_div: one pass over z": fused_kl_div(z, target),
        "fused_linear_kl_div: from h and wte": fused_linear_kl_div(h, weight, target),
    }


def traffic(rows: int) -> dict[str, tuple[int, int]]:
    """Count how often loss and gradients read or write N V elements, and V C elements.

    kernels/triton_kl_div.py counts the loss alone. The LM head adds a write of the logits, two
    reads of their gradient, two reads of its weight and a write of the weight's gradient.
    fused_linear_kl_div reads the weight twice per chunk; the first chunk writes the weight's
    gradient, and every later chunk reads and writes it.
    """
    chunks = math.ceil(rows / CHUNK_ROWS)
    return {
        "unfused": (13, 0),
        "fused_kl_div": (3, 0),
        "LM head, unfused": (13 + 3, 3),
        "LM head, fused_kl_div": (3 + 3, 3),
        "fused_linear_kl_div": (3 + 3, 4 * chunks - 1),
    }


def explain_loss(hidden: Tensor, weight: Tensor, logits: Tensor) -> None:
    """Print the target, its divergence from the model in four ways, and the traffic of each."""
    target = TwoLevelTarget(matching(load_tokenizer(), LETTER_X))
    size, total = target.size, target.dense(torch.float64).sum()
    say(f"\nThe target P: alpha on each of S, the {size} tokens with an x or X, beta on the others")
    fact(f"alpha = 1 / {size}, beta = 0", f"{target.alpha:.9f}")
    fact(f"sum of P = {size} alpha + {target.vocab_size - size} beta", f"{total:.7f}")
    say("\nKL(P || q) in nats, q = softmax(z), mean over rows; distance from the first line")
    kls = divergences(hidden, weight, logits, target)
    exact, *_ = kls.values()
    for name, kl in kls.items():
        fact(name, f"{kl:.6f}  {kl - exact:+.1e}")
    N, (V, C) = logits[..., 0].numel(), weight.shape
    say(f"\nMemory traffic of loss and gradients, float32: N = {N}, V = {V}, C = {C}")
    for name, (nv, vc) in traffic(N).items():
        formula = f"4 B * ({nv} N V + {vc} V C)" if vc else f"4 B * {nv} N V"
        megabytes = f"{4e-6 * (nv * N * V + vc * V * C):.1f} MB"
        fact(f"{name:26} {formula}", f"{nv * chr(0x2588)} {megabytes:>9}")
    say("  Counted, not timed; terms in N C are left out. fused_linear_kl_div saves memory, not")
    say(f"  traffic: it holds the logits of {CHUNK_ROWS} rows at most; the others hold all N rows.")


def fact(name: str, value: str) -> None:
    """Print a quantity and, on the right, its value."""
    say(f"  {name:56} {value:>28}")


@torch.no_grad()
def walkthrough(model: str = "tiny") -> None:
    """Print everything. Raises ValueError for weights that cannot be loaded or shown.

    Args:
        model: follow the batch through tiny, gpt2, gpt2-medium, gpt2-xl or a path
    """
    gpt2 = GPT2.from_state_dict(load_weights(model), assign=True)
    config, n_vocab = gpt2.config, load_tokenizer().n_vocab
    V, C, H = config.vocab_size, config.n_embd, config.n_head
    if n_vocab != V or config.n_positions < LENGTH:
        got = f"{V} tokens and {config.n_positions} positions"
        raise ValueError(f"{model}: got {got}, expected {n_vocab} and {LENGTH} or more")
    say(f"GPT-2 {model}: {config.n_layer} blocks, C = {C} wide, H = {H} heads of D = {C // H}")
    say(f"{BATCH} sequences of {LENGTH} tokens, V = {V}; position i attends to j <= i\n")
    tokens = torch.randint(V, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    walk = Walk()
    hidden, logits = walk.model(gpt2, tokens)
    difference = (logits - gpt2(tokens)).abs().max() / logits.abs().max()
    say("")
    fact("parameters used above", f"{walk.used:,}")
    fact("parameters of the model", f"{sum(p.numel() for p in gpt2.parameters()):,}")
    fact("largest difference from model(tokens), relative", f"{difference:.1e}")
    say(f"\nFrom logits to probabilities: the {V} logits z at [{BATCH - 1}, {LENGTH - 1}]")
    z = logits[-1, -1].double()  # neither z nor exp(z) is normalised, log-softmax is
    fact("sum of z", f"{z.sum():.1f}")
    fact("sum of exp(z)", f"{z.exp().sum():.4g}")
    fact("sum of exp(z - lse(z))", f"{(z - z.logsumexp(-1)).exp().sum():.7f}")
    fact("sum of exp(F.log_softmax(z)) in float64", f"{z.log_softmax(-1).exp().sum():.7f}")
    fact("one row per position", f"{[*logits.shape]} -> {[*logits.flatten(0, 1).shape]}")
    explain_loss(hidden, gpt2.wte.weight, logits)


if __name__ == "__main__":
    with command():
        tyro.cli(walkthrough, prog="python -m train.walkthrough", description=__doc__)
