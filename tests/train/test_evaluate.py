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
from train.evaluate import PASSAGE, PROMPTS, Evaluation, evaluate

TOKENIZER = load_tokenizer()
CONFIG = GPT2Config(n_positions=128, n_embd=64, n_layer=1, n_head=1)
NEW_TOKENS, COUNT = 12, 8
MASK = torch.arange(CONFIG.vocab_size) % 3 == 0
MASK[[i for prompt in PROMPTS for i in TOKENIZER.encode(prompt)]] = True  # R must not count them


def small_model(seed: int) -> GPT2:
    model = GPT2(CONFIG)
    shake(model, seed)
    return model.eval()


MODEL, START, BIAS = small_model(0), small_model(1), -1.5 * MASK
EXACT = {model: copy.deepcopy(model).double() for model in (MODEL, START)}


@pytest.fixture(scope="module", params=["model", "limit"])
def measured(
    request: pytest.FixtureRequest,
) -> tuple[Evaluation, list[tuple[str, list[int]]], bool]:
    """Of a random model that is said to have started as another, and of that with a bias."""
    limit = request.param == "limit"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.evaluate, "NEW_TOKENS", NEW_TOKENS)
        model, bias = (START, BIAS) if limit else (MODEL, None)
        return *evaluate(model, START, MASK, COUNT, 0, bias), limit


@torch.no_grad()
def log_p(model: GPT2, ids: list[int], bias: Tensor | None = None) -> Tensor:
    """Return log p at each position after the first, (T - 1, V) in float64."""
    logits = EXACT[model](torch.tensor([ids[:-1]]))[0]
    return (logits if bias is None else logits + bias).log_softmax(-1)


def test_r_counts_target_tokens_and_none_of_the_prompts(measured) -> None:
    """By hand over the samples; its error is that of the mean of independent texts."""
    evaluation, samples, _ = measured
    assert [prompt for prompt, _ in samples] == [p for p in PROMPTS for _ in range(COUNT)]
    shares = [sum(MASK[i].item() for i in ids) / NEW_TOKENS for _, ids in samples]
    mean = sum(shares) / len(shares)
    assert evaluation.r == pytest.approx(mean)
    variance = sum((s - mean) ** 2 for s in shares) / (len(shares) - 1)
    assert evaluation.r_error == pytest.approx(math.sqrt(variance / len(shares)))
    pairs = [pair for _, ids in samples for pair in pairwise(ids)]
    assert evaluation.distinct_2 == pytest.approx(len(set(pairs)) / len(pairs))


def test_perplexities_and_kl_are_those_of_float64(measured) -> None:
    """Samples under the start, the passage under the model, KL(model || start) at each position of
    a sample; in the limit R is the closed form in expectation."""
    evaluation, samples, limit = measured
    model, bias = (START, BIAS) if limit else (MODEL, None)
    passage = TOKENIZER.encode(PASSAGE)
    nats = -log_p(model, passage, bias)[range(len(passage) - 1), passage[1:]].mean()
    assert evaluation.passage_perplexity == pytest.approx(math.exp(nats), rel=1e-4)
    nats_of_samples, kl, tilted = [], [], []
    for prompt, ids in samples:
        text = TOKENIZER.encode(prompt) + ids
        p, q = (log_p(m, text, b)[-NEW_TOKENS:] for m, b in ((START, None), (model, bias)))
        nats_of_samples.append(-p[range(NEW_TOKENS), ids])
        kl.append((q.exp() * (q - p)).sum(-1))
        m = p.exp()[:, MASK].sum(-1)
        tilted.append(m * math.exp(-1.5) / (1 - m + m * math.exp(-1.5)))
    assert evaluation.sample_perplexity == pytest.approx(
        math.exp(torch.cat(nats_of_samples).mean()), rel=1e-4
    )
    assert evaluation.kl_to_start == pytest.approx(torch.cat(kl).mean().item(), rel=1e-4)
    if limit:  # at four standard errors of Bernoulli draws
        p = torch.cat(tilted)
        error = (p * (1 - p)).sum().sqrt() / len(p)
        assert abs(evaluation.r - p.mean()) < 4 * error
        assert abs(p.mean() - 1 / 3) > 8 * error  # which is the share without the bias
