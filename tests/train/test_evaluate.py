"""An evaluation against counts by hand and against log-softmax in float64."""

import copy
import math

import pytest
import torch

import train.evaluate
from model import GPT2, GPT2Config
from model.generate import generate
from model.tokenizer import load_tokenizer
from tests.model.oracle import shake
from train.evaluate import (
    PASSAGE,
    PROMPTS,
    SAMPLES,
    TOP_K,
    Evaluation,
    evaluate,
    nats_per_token,
    target_probability,
)

TOKENIZER = load_tokenizer()
CONFIG = GPT2Config(n_positions=128, n_embd=64, n_layer=1, n_head=1)
NEW_TOKENS = 12  # per sample in these tests
MASK = torch.arange(CONFIG.vocab_size) % 3 == 0
MASK[[i for prompt in PROMPTS for i in TOKENIZER.encode(prompt)]] = True  # R must not count them


def small_model(seed: int, config: GPT2Config = CONFIG) -> GPT2:
    model = GPT2(config)
    shake(model, seed)
    return model


@torch.no_grad()
def nats(model: GPT2, ids: list[int], prompt_length: int) -> list[float]:
    """Return -log p of each token after the first `prompt_length`, in float64, one at a time."""
    logits = copy.deepcopy(model).double()(torch.tensor([ids]))[0]
    return [-logits[i - 1].log_softmax(0)[ids[i]].item() for i in range(prompt_length, len(ids))]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


MODEL, START = small_model(seed=0), small_model(seed=1)


@pytest.fixture(scope="module")
def generated() -> dict[int | None, list[list[int]]]:
    """By top_k, what the model generated for `evaluation`, without the prompts."""
    return {None: [], TOP_K: []}


@pytest.fixture(scope="module")
def evaluation(generated: dict[int | None, list[list[int]]]) -> Evaluation:
    """Of one random model that is said to have started as another."""

    def watched(model, tokens, *args, top_k, **options):
        new = generate(model, tokens, *args, top_k=top_k, **options)
        generated[top_k] += new[:, tokens.shape[1] :].tolist()
        return new

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.evaluate, "NEW_TOKENS", NEW_TOKENS)
        patch.setattr(train.evaluate, "generate", watched)
        return evaluate(MODEL, START, TOKENIZER, MASK, seed=0)


@pytest.mark.parametrize("prompt_length", [1, 3])
def test_nats_per_token_leaves_out_the_prompt(prompt_length: int) -> None:
    """Two sequences of ten, against each token's log-softmax in float64."""
    config = GPT2Config(vocab_size=509, n_positions=10, n_embd=64, n_layer=2, n_head=1)
    model = small_model(0, config)
    tokens = torch.randint(509, (2, 10), generator=torch.Generator().manual_seed(0))
    expected = mean([n for ids in tokens.tolist() for n in nats(model, ids, prompt_length)])
    assert nats_per_token(model, tokens, prompt_length).item() == pytest.approx(expected, rel=1e-5)


def test_r_counts_the_sampled_target_tokens_and_none_of_the_prompts(
    evaluation: Evaluation, generated: dict[int | None, list[list[int]]]
) -> None:
    """By hand over what was generated; every token of a prompt is a target token here."""
    for r, top_k in ((evaluation.r, None), (evaluation.r_top_k, TOP_K)):
        ids = [i for sample in generated[top_k] for i in sample]
        assert len(ids) == len(PROMPTS) * SAMPLES * NEW_TOKENS
        assert r == pytest.approx(mean([MASK[i].item() for i in ids]))
    assert evaluation.r != evaluation.r_top_k


def test_the_untruncated_samples_are_the_ones_that_are_kept(
    evaluation: Evaluation, generated: dict[int | None, list[list[int]]]
) -> None:
    """In order, each with its prompt, against what the model generated."""
    prompts = [prompt for prompt in PROMPTS for _ in range(SAMPLES)]
    assert evaluation.samples == list(zip(prompts, generated[None], strict=True))


def test_samples_are_judged_by_the_start_and_the_passage_by_the_model(
    evaluation: Evaluation,
) -> None:
    """In float64, under the one and the other: with the two swapped, both would be far off."""
    passage = nats(MODEL, TOKENIZER.encode(PASSAGE), prompt_length=1)
    assert evaluation.passage_perplexity == pytest.approx(math.exp(mean(passage)), rel=1e-4)
    samples = []
    for prompt, ids in evaluation.samples:
        prompt_length = TOKENIZER.encode(prompt)
        samples += nats(START, prompt_length + ids, prompt_length=len(prompt_length))
    assert evaluation.sample_perplexity == pytest.approx(math.exp(mean(samples)), rel=1e-4)


def test_a_model_whose_logits_are_not_numbers_gives_no_samples() -> None:
    """Before anything is sampled: on CUDA that would end the process."""
    broken = copy.deepcopy(MODEL)
    broken.ln_f.weight.data[3] = math.inf
    evaluation = evaluate(broken, START, TOKENIZER, MASK, seed=0)
    assert evaluation.samples == []
    assert math.isnan(evaluation.passage_perplexity)


def test_the_target_probability_is_the_softmax_summed_over_the_target_tokens() -> None:
    """Against the definition in float64, over more rows than one chunk has."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1500, 3, 16, generator=generator)
    weight = torch.randn(40, 16, generator=generator)
    mask = torch.arange(40) % 3 == 0
    logits = hidden.double() @ weight.double().T
    expected = logits.softmax(-1)[..., mask].sum(-1).mean()
    index, lse = mask.nonzero().squeeze(1), logits.logsumexp(-1).float()
    probability = target_probability(hidden, weight, index, lse)
    assert probability.item() == pytest.approx(expected.item(), rel=1e-5)
