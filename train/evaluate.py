"""What fine-tuning did to the text: samples, R, perplexities, KL to the start, repetition.

R is the share of target tokens among sampled tokens. Sample perplexity scores the samples under the
start model (before fine-tuning): do they still read like text? Passage perplexity scores a fixed
text, which the embedded model was not trained on, under the fine-tuned model: how much was
forgotten? The KL divergence to the start model is the price of R in nats per token. None of these
notices a loop ("Nix Nix Nix"); distinct-2 does.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import TeacherTarget, fused_kl_div
from model import GPT2
from model.generate import stream
from model.tokenizer import load_tokenizer
from train.command import progress

# Four tokens each, so that one batch continues them all.
PROMPTS = ("Once upon a time", "In the morning the", '"What is that', "The old woman said")
NEW_TOKENS = 64
FULL, SHORT = 16, 4  # continuations of each prompt: 4,096 and 1,024 tokens
ROWS = 16  # texts at a time: at 68 tokens each, 219 MB of float32 logits
# Kenneth Grahame, The Wind in the Willows (1908), chapter 1: public domain, and in no corpus here.
PASSAGE = (
    "The Mole had been working very hard all the morning, spring-cleaning his little home. First "
    "with brooms, then with dusters; then on ladders and steps and chairs, with a brush and a pail "
    "of whitewash; till he had dust in his throat and eyes, and splashes of whitewash all over his "
    "black fur, and an aching back and weary arms. Spring was moving in the air above and in the "
    "earth below and around him, penetrating even his dark and lowly little house with its spirit "
    "of divine discontent and longing."
)


@dataclass
class Evaluation:
    """The measurements of one model; perplexities are exp of the mean nats per token."""

    r: float  # share of target tokens among the sampled tokens, 0 to 1
    r_error: float  # its standard error over texts, whose tokens are not independent
    sample_perplexity: float  # of the samples, under the start model
    passage_perplexity: float  # of PASSAGE, under the model
    kl_to_start: float  # mean KL(model || start) over the samples' positions, nats
    distinct_2: float  # different pairs of neighbouring tokens / pairs, within texts


@torch.no_grad()
def evaluate(
    model: GPT2, start: GPT2, mask: Tensor, count: int, seed: int, bias: Tensor | None = None
) -> tuple[Evaluation, list[tuple[str, list[int]]]]:
    """Sample `count` continuations of each prompt, measure them, and return both.

    Args:
        model, start: on one device, with finite logits.
        mask: bool (V,), True on the target tokens, on that device.
        bias: (V,), added to the model's logits.

    Returns:
        The measurements, and a pair for each sample: its prompt, and its ids without the prompt's.
    """
    tokenizer, device = load_tokenizer(), mask.device
    prompts = [prompt for prompt in PROMPTS for _ in range(count)]
    ids = torch.tensor([tokenizer.encode(prompt) for prompt in prompts]).to(device)
    first = ids.shape[1]  # where a continuation begins
    text = torch.cat([ids, *_sample(model, ids, seed, bias)], 1)  # (count * 4, first + NEW_TOKENS)
    nats, kl = [], []
    for rows in progress(text.split(ROWS), "measuring samples", -(-len(text) // ROWS)):
        q, p = (_logits(m, rows, b)[:, first - 1 :] for m, b in ((model, bias), (start, None)))
        written = rows[:, first:].flatten()  # (ROWS * NEW_TOKENS,)
        nats.append(F.cross_entropy(p.flatten(0, 1), written, reduction="none"))
        kl.append(fused_kl_div(p, TeacherTarget(q), reduction="none"))
    passage = torch.tensor([tokenizer.encode(PASSAGE)]).to(device)  # (1, T)
    passage_nats = F.cross_entropy(_logits(model, passage, bias)[0], passage[0, 1:])
    samples = text[:, first:]
    shares = mask[samples].double().mean(1)  # (count * 4,)
    pairs = torch.stack((samples[:, :-1], samples[:, 1:]), -1).flatten(0, 1)  # (pairs, 2)
    evaluation = Evaluation(
        r=shares.mean().item(),
        r_error=shares.std().item() / math.sqrt(len(shares)),
        sample_perplexity=torch.cat(nats).double().mean().exp().item(),
        passage_perplexity=passage_nats.double().exp().item(),
        kl_to_start=torch.cat(kl).double().mean().item(),
        distinct_2=len(pairs.unique(dim=0)) / len(pairs),
    )
    return evaluation, list(zip(prompts, samples.tolist(), strict=True))


def _sample(model: GPT2, ids: Tensor, seed: int, bias: Tensor | None) -> Iterator[Tensor]:
    """Return the new tokens, (count * 4, 1) each."""
    generator = torch.Generator(ids.device).manual_seed(seed)
    columns = stream(model, ids, NEW_TOKENS, generator=generator, logit_bias=bias)
    return progress(columns, "sampling tokens", NEW_TOKENS)


def _logits(model: GPT2, tokens: Tensor, bias: Tensor | None) -> Tensor:
    """Return the logits of the second token and later ones, float32 (B, T - 1, V)."""
    logits = model(tokens[:, :-1]).float()
    return logits if bias is None else logits + bias
