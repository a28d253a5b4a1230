"""An evaluation against counts by hand and log-softmax in float64."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import train.evaluate
from model import GPT2, GPT2Config
from model.tokenizer import load_tokenizer
from tests.model.oracle import shake
from train.evaluate import PASSAGE, PROMPTS, evaluate

TOKENIZER = load_tokenizer()
CONFIG = GPT2Config(n_positions=128, n_embd=64, n_layer=1, n_head=1)
NEW_TOKENS, COUNT = 12, 8
MASK = torch.arange(CONFIG.vocab_size) % 3 == 0
MASK[[i for prompt in PROMPTS for i in TOKENIZER.encode(prompt)]] = True  # R must not count them


def small_model(seed: int) -> GPT2:
    model = GPT2(CONFIG)
    shake(model, seed)
    return model.eval()


def log_p(exact: GPT2, ids: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return log p at each position after the first of texts (N, T), (N, T - 1, V) in float64."""
    logits = exact(ids[:, :-1])
    return (logits if bias is None else logits + bias).log_softmax(-1)


@pytest.mark.parametrize("limit", [False, True])
@torch.no_grad()
def test_r_counts_target_tokens_and_none_of_the_prompts(limit: bool, monkeypatch) -> None:
    """Of a random model that is said to have started as another, or of the start with a bias. R
    counts no prompt, and its error is that of the mean of independent texts. Samples under the
    start, the passage under the model, KL(model || start) at each position of a sample."""
    monkeypatch.setattr(train.evaluate, "NEW_TOKENS", NEW_TOKENS)
    start = small_model(1)
    model, bias = (start, -1.5 * MASK) if limit else (small_model(0), None)
    found, samples = evaluate(model, start, MASK, COUNT, 0, bias)
    assert [prompt for prompt, _ in samples] == [p for p in PROMPTS for _ in range(COUNT)]
    shares = [sum(MASK[i].item() for i in ids) / NEW_TOKENS for _, ids in samples]
    mean = sum(shares) / len(shares)
    assert found.r == pytest.approx(mean)
    variance = sum((s - mean) ** 2 for s in shares) / (len(shares) - 1)
    assert found.r_error == pytest.approx(math.sqrt(variance / len(shares)))
    pairs = [pair for _, ids in samples for pair in pairwise(ids)]
    assert found.distinct_2 == pytest.approx(len(set(pairs)) / len(pairs))

    model, start = (copy.deepcopy(m).double() for m in (model, start))
    passage = torch.tensor([TOKENIZER.encode(PASSAGE)])
    nats = -log_p(model, passage, bias).gather(2, passage[:, 1:, None]).mean()
    assert found.passage_perplexity == pytest.approx(nats.exp().item(), rel=1e-4)
    text = torch.tensor([TOKENIZER.encode(prompt) + ids for prompt, ids in samples])
    p, q = (log_p(m, text, b)[:, -NEW_TOKENS:] for m, b in ((start, None), (model, bias)))
    nats = -p.gather(2, text[:, -NEW_TOKENS:, None]).mean()
    assert found.sample_perplexity == pytest.approx(nats.exp().item(), rel=1e-4)
    kl = (q.exp() * (q - p)).sum(-1).mean()
    assert found.kl_to_start == pytest.approx(kl.item(), rel=1e-4)
    if limit:  # R is the closed form in expectation: at four standard errors of Bernoulli draws
        m = p.exp()[..., MASK].sum(-1)
        p = m * math.exp(-1.5) / (1 - m + m * math.exp(-1.5))
        error = (p * (1 - p)).sum().sqrt() / p.numel()
        assert abs(found.r - p.mean()) < 4 * error
        assert abs(p.mean() - 1 / 3) > 8 * error  # which is the share without the bias
