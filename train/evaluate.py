"""What fine-tuning did to the text: samples, R, and two perplexities.

The perplexity of a fixed passage tells what the model forgot; the perplexity of its own samples
under the model before fine-tuning tells whether they still read as text.
"""

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from model import GPT2
from model.generate import generate
from model.tokenizer import Tokenizer
from train.cpu import few_row_products
from train.objective import member_rate

# Four tokens each, so that one batch continues them all: a step of it reads every weight once.
PROMPTS = ("Once upon a time", "In the morning the", '"What is that', "The old woman said")
SAMPLES = 4  # continuations of each prompt; the seed is the run's
NEW_TOKENS = 64
TOP_K = 50
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
    """One model, measured. Perplexities are exp of the mean nats a token."""

    r: float  # share of sampled tokens that are members, untruncated sampling
    r_top_k: float  # the same, sampled among the 50 likeliest tokens
    passage_perplexity: float
    sample_perplexity: float  # of the untruncated samples, under the model before fine-tuning
    samples: list[tuple[str, list[int]]]  # the untruncated ones: prompt, and ids without it

    def measures(self) -> dict[str, float | None]:
        """The four numbers by name; one that is too large for a float is None, as JSON has it."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "samples"}
        return {name: None if math.isinf(value) else value for name, value in values.items()}


def positions_needed(tokenizer: Tokenizer) -> int:
    """How long a context an evaluation reads: a prompt with its continuation, or the passage."""
    longest = max(len(tokenizer.encode(prompt)) for prompt in PROMPTS)
    return max(longest + NEW_TOKENS, len(tokenizer.encode(PASSAGE)))


class NotFiniteError(ValueError):
    """A model whose logits are NaN or infinite."""


def evaluate(
    model: GPT2, start: GPT2, tokenizer: Tokenizer, members: Tensor, seed: int
) -> Evaluation:
    """Sample from `model` and measure the samples, `start` being the model before fine-tuning.

    Raises NotFiniteError where logits are NaN or infinite: there is nothing to sample from.
    """
    device = members.device
    passage = torch.tensor([tokenizer.encode(PASSAGE)], device=device)
    passage_nats = nats_per_token(model, passage)
    if not passage_nats.isfinite():
        raise NotFiniteError("the logits became NaN or infinite")
    prompts = [prompt for prompt in PROMPTS for _ in range(SAMPLES)]
    ids = torch.tensor([tokenizer.encode(prompt) for prompt in prompts], device=device)
    T, generator = ids.shape[1], torch.Generator(device).manual_seed(seed)
    with few_row_products(device):
        text, truncated = (
            generate(model, ids, NEW_TOKENS, top_k=k, generator=generator) for k in (None, TOP_K)
        )
    return Evaluation(
        r=member_rate(text[:, T:], members),
        r_top_k=member_rate(truncated[:, T:], members),
        passage_perplexity=passage_nats.double().exp().item(),
        sample_perplexity=nats_per_token(start, text, given=T).double().exp().item(),
        samples=list(zip(prompts, text[:, T:].tolist(), strict=True)),
    )


@torch.no_grad()
def nats_per_token(model: GPT2, tokens: Tensor, given: int = 1) -> Tensor:
    """Mean of -log p(token | those before it) over (B, T), the first `given` apart; a scalar."""
    model.eval()
    logits = model(tokens[:, :-1])[:, given - 1 :].float()
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, given:].flatten())
