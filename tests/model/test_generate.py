"""Sampling: the cache changes no result, options do what they say, bad arguments are refused."""

from unittest.mock import patch

import pytest
import torch

from model import GPT2, GPT2Config
from model.generate import _pick, generate, stream
from tests.model.oracle import oracle, shake

CONFIG = GPT2Config(vocab_size=301, n_positions=64, n_embd=128, n_layer=2, n_head=2)
PROMPTS = [[5], [7, 290, 31, 4, 4, 18, 3], [100, 200, 300]]


@pytest.fixture(scope="module")
def model() -> GPT2:
    model = GPT2(CONFIG)
    shake(model, 0)
    return model.eval()


@pytest.fixture(scope="module")
def prompts() -> torch.Tensor:
    return torch.randint(CONFIG.vocab_size, (3, 7), generator=seeded(0))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_greedy_tokens_equal_those_of_transformers(prompts: torch.Tensor) -> None:
    """A batch of prompts continued to the last position, against transformers' generate."""
    hf = oracle(CONFIG, seed=3)
    model = GPT2.from_state_dict(hf.state_dict())
    ours = generate(model, prompts, 57, temperature=0)
    everything = torch.ones_like(prompts)  # else transformers takes id 0 for padding
    theirs = hf.generate(
        prompts, attention_mask=everything, max_new_tokens=57, do_sample=False, pad_token_id=0
    )
    assert torch.equal(ours, theirs)
    assert len(ours[:, 7:].unique()) > 3, "the text is too repetitive to test anything"
    assert torch.equal(generate(model, prompts, 0), prompts)


@torch.no_grad()
def test_sampled_frequencies_follow_the_softmax(model: GPT2) -> None:
    """4,000 draws of one token against softmax((logits + bias) / temperature), written out, within
    4 sigma. One of the random biases bans the likeliest token."""
    prompt = torch.tensor([[5, 9]])
    logits = model(prompt)[0, -1]
    bias = torch.randn(CONFIG.vocab_size, generator=seeded(1))
    bias[logits.argmax()] = -torch.inf
    options = {"temperature": 0.7, "logit_bias": bias, "generator": seeded(0)}
    draws = generate(model, prompt.repeat(4000, 1), 1, **options)[:, -1]
    frequency = draws.bincount(minlength=CONFIG.vocab_size) / 4000
    p = ((logits + bias) / 0.7).softmax(0)
    sigma = (p * (1 - p) / 4000).sqrt()
    assert ((frequency - p).abs() <= 4 * sigma + (p > 0) / 4000).all()


@torch.no_grad()
def test_top_k_draws_from_the_k_likeliest_only(model: GPT2, prompts: torch.Tensor) -> None:
    """400 draws contain all of the five likeliest tokens and no other; more than V is V."""
    prompt = prompts[:1].repeat(400, 1)
    draws = generate(model, prompt, 1, temperature=2.0, top_k=5, generator=seeded(0))[:, -1]
    assert set(draws.tolist()) == set(model(prompts[:1])[0, -1].topk(5).indices.tolist())
    every = generate(model, prompts, 10, top_k=CONFIG.vocab_size + 7, generator=seeded(4))
    assert torch.equal(every, generate(model, prompts, 10, generator=seeded(4)))


@pytest.mark.parametrize("top_k", [None, 5])
def test_a_row_without_a_distribution_gives_some_token(top_k: int | None) -> None:
    """NaN, +inf or only -inf: an id in the vocabulary. The other rows draw what they draw alone."""
    good = torch.randn(1, CONFIG.vocab_size, generator=seeded(0))
    for bad in (torch.nan, torch.inf, -torch.inf):
        logits = torch.cat((good, good, torch.full_like(good, -torch.inf)))
        logits[1:, 7] = bad
        tokens = _pick(logits, 0.5, top_k, seeded(1))
        assert ((tokens >= 0) & (tokens < CONFIG.vocab_size)).all()
        assert torch.equal(tokens[:1], _pick(good, 0.5, top_k, seeded(1)))


@pytest.mark.parametrize(("u", "token"), [(0.0, 3), (1 - 2**-53, 27)])
def test_a_token_without_probability_is_never_drawn(u: float, token: int) -> None:
    """Also at the ends of the vocabulary, where the inverse of the CDF could slip over: at first
    the CDF is 0, and at last these 25 rounded probabilities add up to less than 1."""
    logits = torch.full((1, CONFIG.vocab_size), -torch.inf)
    logits[:, 3:28] = 0.0
    with patch("torch.rand", lambda *shape, **_: torch.full((1, 1), u, dtype=torch.float64)):
        assert _pick(logits, 1.0, None, None) == token


def test_prompts_of_different_lengths_continue_as_if_alone(model: GPT2) -> None:
    """Greedy, a batch against its prompts one by one; the longest text fills all positions."""
    prompts = [*PROMPTS, list(range(40))]
    for prompt, row in zip(prompts, generate(model, prompts, 24, temperature=0), strict=True):
        assert row == generate(model, torch.tensor([prompt]), 24, temperature=0)[0].tolist()


def test_every_query_of_a_padded_batch_sees_a_key(model: GPT2, monkeypatch) -> None:
    """Padding too: some backends return NaN for a softmax over no key, and the NaN would spread."""

    def attention(q, k, v, mask, *rest):
        assert mask.any(dim=-1).all()
        return q

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", attention)
    generate(model, PROMPTS, 2)


def test_a_row_ends_at_its_stop_token_and_the_others_continue(model: GPT2) -> None:
    """Equal prompts, sampled, so that they end at different steps, against a text without stop:
    in a tensor the stop token is repeated, in lists it is the last. When every row has ended,
    there are no more columns."""

    def sample(prompts, stop=None):
        return generate(model, prompts, 20, 0.8, generator=seeded(0), stop=stop)

    free = sample(torch.full((40, 1), 5)).tolist()
    stop = torch.tensor(free)[:, 1:].flatten().mode().values.item()
    cut = [row[: row.index(stop) + 1] if stop in row else row for row in free]
    assert len({len(row) for row in cut}) > 4
    assert sample([[5]] * 40, stop) == cut
    repeated = [row + [stop] * (21 - len(row)) for row in cut]
    assert sample(torch.full((40, 1), 5), stop).tolist() == repeated
    first = sample([[5]])[0][1]
    assert sample(torch.tensor([[5]]), first).tolist() == [[5, first]]


def test_two_streams_of_one_model_do_not_disturb_each_other(
    model: GPT2, prompts: torch.Tensor
) -> None:
    """Token by token in turn, against generate; no module's mode is changed meanwhile."""
    modes = [module.training for module in model.h[0].train().modules()]
    columns = []
    for step in zip(*(stream(model, prompts, 9, generator=seeded(s)) for s in (2, 3)), strict=True):
        assert [module.training for module in model.h[0].modules()] == modes
        columns.append(step)
    model.eval()
    for seed, steps in zip((2, 3), zip(*columns, strict=True), strict=True):
        expected = generate(model, prompts, 9, generator=seeded(seed))[:, 7:]
        assert torch.equal(torch.cat(steps, 1), expected)


def test_streamed_tokens_can_be_trained_on(model: GPT2, prompts: torch.Tensor) -> None:
    """As they are yielded; tensors of inference mode could not be saved for backward. Sampling
    itself records no graph, whose memory would grow with every token."""
    recorded = []
    hook = model.ln_f.register_forward_hook(lambda *call: recorded.append(call[2].requires_grad))
    steps = [*stream(model, prompts, 2)]
    hook.remove()
    assert recorded == [False, False]
    for tokens in steps:
        loss = model(tokens).logsumexp(-1).sum()
        assert torch.autograd.grad(loss, model.wte.weight)[0].norm() > 0


@pytest.mark.parametrize("temperature", [1e-300, 1e-31, 1e-29])
def test_a_temperature_near_zero_is_greedy(model: GPT2, prompts: torch.Tensor, temperature) -> None:
    """Where logits / temperature overflows float32, and just before."""
    greedy = generate(model, prompts, 20, temperature=0)
    assert torch.equal(generate(model, prompts, 20, temperature=temperature), greedy)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[301]], {}, r"ids from 301 to 301, expected them in \[0, 301\)"),
        ([[0, -1], [1]], {}, "ids from -1"),
        ([[1, 2], []], {}, "empty prompt"),
        ([], {}, "expected torch.int64"),
        ([[1.5, 1.5], [2]], {}, "float32"),
        (torch.zeros(2, dtype=torch.int64), {}, r"\(2,\)"),
        ([[1], [2] * 61], {}, "got 4 after a prompt of 61, expected 0 to 3"),
        ([[1, 2]], {"max_new_tokens": -1}, "got -1"),
        ([[1]], {"temperature": -0.1}, "temperature"),
        ([[1]], {"temperature": float("nan")}, "temperature"),
        ([[1]], {"top_k": 0}, "top_k"),
        ([[1]], {"logit_bias": torch.zeros(1)}, r"got shape \(1,\), expected \(301,\)"),
    ],
)
def test_bad_arguments_are_refused(model: GPT2, prompts, options: dict, message: str) -> None:
    """A ValueError that names the argument, what it is and what was expected. Padding hides no
    prompt that is empty, too long or out of the vocabulary."""
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, **{"max_new_tokens": 4, **options})
