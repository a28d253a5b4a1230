"""How fine-tuning changed the text: samples, R, two perplexities, probability on the target tokens.

Passage perplexity is that of a fixed text, which no model here was trained on, under the fine-tuned
model: how much was forgotten? Sample perplexity is that of the model's own samples under the start
model: do they still read as text?
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model import GPT2
from model.generate import generate
from model.tokenizer import Tokenizer
from train.cpu import few_row_products

# Four tokens each: one batch continues them all, and each new token reads the weights once.
PROMPTS = ("Once upon a time", "In the morning the", '"What is that', "The old woman said")
SAMPLES = 4  # continuations of each prompt
NEW_TOKENS = 64
TOP_K = 50
ROWS = 4096  # rows at a time in target_probability: 16 MB of float32 logits of 984 tokens
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

    r: float  # share of target tokens, 0 to 1, among tokens sampled from the whole softmax
    r_top_k: float  # the same, sampled from the 50 likeliest tokens
    passage_perplexity: float
    sample_perplexity: float  # of the samples that r counts
    samples: list[tuple[str, list[int]]]  # these samples: prompt, and ids without the prompt's


def positions_needed(tokenizer: Tokenizer) -> int:
    """Return how many positions an evaluation needs: for a continued prompt, and the passage."""
    longest = max(len(tokenizer.encode(prompt)) for prompt in PROMPTS)
    return max(longest + NEW_TOKENS, len(tokenizer.encode(PASSAGE)))


def evaluate(model: GPT2, start: GPT2, tokenizer: Tokenizer, mask: Tensor, seed: int) -> Evaluation:
    """Sample from `model`, on the device of the target mask, bool (V,), and measure the samples.

    start: the model before fine-tuning, on any device; moved to that of the mask and back.
    If the logits are NaN or infinite, every number is NaN and there are no samples.
    """
    device, home = mask.device, start.wte.weight.device
    passage = torch.tensor([tokenizer.encode(PASSAGE)], device=device)  # (1, T)
    passage_nats = nats_per_token(model, passage)
    if not passage_nats.isfinite():
        return Evaluation(math.nan, math.nan, math.nan, math.nan, [])
    prompts = [prompt for prompt in PROMPTS for _ in range(SAMPLES)]
    ids = torch.tensor([tokenizer.encode(prompt) for prompt in prompts], device=device)  # (16, 4)
    generator = torch.Generator(device).manual_seed(seed)
    with few_row_products(device):
        text, text_top_k = (  # (16, 4 + NEW_TOKENS)
            generate(model, ids, NEW_TOKENS, top_k=k, generator=generator) for k in (None, TOP_K)
        )
    prompt_length = ids.shape[1]
    sample_nats = nats_per_token(start.to(device), text, prompt_length)
    start.to(home)  # a training step needs the memory
    samples = text[:, prompt_length:]
    return Evaluation(
        r=mask[samples].float().mean().item(),
        r_top_k=mask[text_top_k[:, prompt_length:]].float().mean().item(),
        passage_perplexity=passage_nats.double().exp().item(),
        sample_perplexity=sample_nats.double().exp().item(),
        samples=list(zip(prompts, samples.tolist(), strict=True)),
    )


@torch.no_grad()
def nats_per_token(model: GPT2, tokens: Tensor, prompt_length: int = 1) -> Tensor:
    """Return the mean of -log p(token | those before it) over (B, T) without the prompts."""
    model.eval()
    logits = model(tokens[:, :-1])[:, prompt_length - 1 :].float()  # (B, T - prompt_length, V)
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, prompt_length:].flatten())


@torch.no_grad()
def target_probability(
    hidden: Tensor, weight: Tensor, index: Tensor, lse: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Return the probability of all target tokens together, mean over rows, a scalar.

    It is the sum over the target tokens of e^(z - lse): given lse, only their logits are needed,
    |S| of V columns of the LM head's product.

    For a target that lies wholly on them (beta = 0) it is at least exp(-KL): merging the tokens
    into "target" and "other" cannot raise the divergence, and KL((1, 0) || (m, 1 - m)) is -log m;
    for the mean over rows this follows by Jensen's inequality.

    Args:
        hidden: (..., C), the model's hidden states.
        weight: (V, C), the LM head.
        index: ids of the target tokens, int64 (|S|,).
        lse: (...), log of the sum over the vocabulary of e^logit.
        bias: (V,), added to the logits, as in a TeacherTarget; lse is then that of the sum.
    """
    head = weight[index]  # (|S|, C)
    added = 0.0 if bias is None else bias[index]
    chunks = hidden.flatten(0, -2).split(ROWS), lse.flatten().split(ROWS)
    probabilities = [
        (F.linear(rows, head).float() + added - row_lse[:, None]).exp().sum(-1)
        for rows, row_lse in zip(*chunks, strict=True)
    ]
    return torch.cat(probabilities).mean()
