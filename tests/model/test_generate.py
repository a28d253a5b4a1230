"""Sampling: the cache changes no result, options do what they say, bad arguments are refused."""

from unittest.mock import patch

import pytest
import torch

from model import GPT2, GPT2Config
from model.generate import _pick, generate, stream
from tests.model.oracle import oracle, shake

CONFIG = GPT2Config(vocab_size=301, n_positions=64, n_embd=128, n_layer=2, n_head=2)


@pytest.fixture(scope="module")
def model() -> GPT2:
    model = GPT2(CONFIG)
    shake(model, 0)
    return model.eval()


@pytest.fixture(scope="module")
def prompts() -> torch.Tensor:
    return torch.randint(CONFIG.vocab_size, (3, 7), generator=torch.Generator().manual_seed(0))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_greedy_tokens_equal_those_of_transformers(prompts: torch.Tensor) -> None:
    """A batch of prompts continued to the last position, against transformers' generate."""
    hf = oracle(CONFIG, seed=3)
    ours = generate(GPT2.from_state_dict(hf.state_dict()), prompts, 57, temperature=0)
    everything = torch.ones_like(prompts)  # else transformers takes id 0 for padding
    theirs = hf.generate(
        prompts, attention_mask=everything, max_new_tokens=57, do_sample=False, pad_token_id=0
    )
    assert torch.equal(ours, theirs)
    assert len(ours[:, 7:].unique()) > 3, "the text is too repetitive to test anything"


def test_the_seed_determines_the_text(model: GPT2, prompts: torch.Tensor) -> None:
    """Equal seeds give equal tokens, another seed others; the global generator is left alone."""
    state = torch.get_rng_state()
    first, again, other = (generate(model, prompts, 30, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(generate(model, prompts, 0), prompts)


@pytest.mark.parametrize(("temperature", "biased"), [(1.0, False), (0.5, False), (0.7, True)])
def test_sampled_frequencies_follow_the_softmax(model: GPT2, temperature, biased) -> None:
    """4,000 draws of one token against softmax((logits + bias) / temperature), written out, within
    4 sigma. One of the random biases bans the likeliest token."""
    many = torch.tensor([[5, 9]]).expand(4000, 2).contiguous()
    with torch.no_grad():
        p = (model(many[:1])[0, -1] / temperature).softmax(0)
    options = {"temperature": temperature, "generator": seeded(0)}
    if biased:
        bias = torch.randn(CONFIG.vocab_size, generator=seeded(1))
        bias[p.argmax()] = -torch.inf
        options["logit_bias"] = bias
        p = p * (bias / temperature).exp() / (p * (bias / temperature).exp()).sum()
    draws = generate(model, many, 1, **options)[:, -1]
    frequency = draws.bincount(minlength=CONFIG.vocab_size) / 4000
    sigma = (p * (1 - p) / 4000).sqrt()
    assert ((frequency - p).abs() <= 4 * sigma + (p > 0) / 4000).all()


def test_a_large_logit_bias_decides(model: GPT2, prompts: torch.Tensor) -> None:
    """Greedy, sampled, and among the two likeliest: the bias comes before all of them."""
    bias = torch.zeros(CONFIG.vocab_size).index_fill_(0, torch.tensor(17), 1e4)
    for options in ({"temperature": 0}, {"temperature": 2.0}, {"top_k": 2}):
        assert (generate(model, prompts, 3, logit_bias=bias, **options)[:, 7:] == 17).all()


def test_top_k_draws_from_the_k_likeliest_only(model: GPT2, prompts: torch.Tensor) -> None:
    """400 draws contain all of the five likeliest tokens and no other; more than V is V."""
    prompt = prompts[:1].expand(400, 7).contiguous()
    draws = generate(model, prompt, 1, temperature=2.0, top_k=5, generator=seeded(0))[:, -1]
    with torch.no_grad():
        likeliest = model(prompts[:1])[0, -1].topk(5).indices
    assert set(draws.tolist()) == set(likeliest.tolist())
    every = generate(model, prompts, 10, top_k=CONFIG.vocab_size + 7, generator=seeded(4))
    assert torch.equal(every, generate(model, prompts, 10, generator=seeded(4)))


@pytest.mark.parametrize("top_k", [None, 5])
def test_a_row_without_a_distribution_gives_some_token(model: GPT2, top_k: int | None) -> None:
    """NaN, +inf or only -inf: an id in the vocabulary. The other rows draw what they draw alone."""
    good = torch.randn(1, CONFIG.vocab_size, generator=seeded(0))
    for bad in (torch.nan, torch.inf, -torch.inf):
        logits = torch.cat((good, good, torch.full_like(good, -torch.inf)))
        logits[1:, 7] = bad
        tokens = _pick(logits, 0.5, top_k, seeded(1))
        assert ((tokens >= 0) & (tokens < CONFIG.vocab_size)).all()
        assert torch.equal(tokens[:1], _pick(good, 0.5, top_k, seeded(1)))


def test_a_token_without_probability_is_never_drawn(model: GPT2) -> None:
    """Also at the ends of the vocabulary, where the inverse of the CDF could slip over."""
    logits = torch.full((4096, CONFIG.vocab_size), -torch.inf)
    logits[:, [3, 4, 9]] = 0.0
    drawn = _pick(logits, 1.0, None, seeded(0))
    assert set(drawn.flatten().tolist()) == {3, 4, 9}
    with patch("torch.rand", lambda *shape, **_: torch.zeros(shape[:2], dtype=torch.float64)):
        assert (_pick(logits, 1.0, None, None) == 3).all()  # where the CDF is 0 at first


PROMPTS = [[5], [7, 290, 31, 4, 4, 18, 3], [100, 200, 300]]


def test_prompts_of_different_lengths_continue_as_if_alone(model: GPT2) -> None:
    """Greedy, each batch against its prompts one by one; the longest text fills all positions."""
    long = [n % 301 for n in range(40)]
    for prompts in (PROMPTS, [*PROMPTS, long], PROMPTS[1:]):
        got = generate(model, prompts, 24, temperature=0)
        for prompt, row in zip(prompts, got, strict=True):
            assert row == generate(model, torch.tensor([prompt]), 24, temperature=0)[0].tolist()


@torch.no_grad()
def test_padding_changes_no_hidden_state(model: GPT2) -> None:
    """Against each row alone, at every position of the prompt and for one more token with the
    cache; the ids in the padding do not matter."""
    padding = torch.tensor([6, 0, 4])
    for filler in (0, 300):
        rows = [[filler] * (7 - len(prompt)) + prompt for prompt in PROMPTS]
        cache = model.new_cache(8)
        hidden = model.hidden_states(torch.tensor(rows), cache, padding)
        one_more = model.hidden_states(torch.tensor([[9], [9], [9]]), cache, padding)
        for row, prompt in enumerate(PROMPTS):
            alone = model.hidden_states(torch.tensor([[*prompt, 9]]))[0]
            batched = torch.cat((hidden[row, padding[row] :], one_more[row]))
            torch.testing.assert_close(batched, alone, atol=2e-5, rtol=1e-5)


def test_every_query_of_a_padded_batch_sees_a_key(model: GPT2, monkeypatch) -> None:
    """Padding too: some backends return NaN for a softmax over no key, and the NaN would spread."""

    def attention(q, k, v, mask, *rest):
        assert mask.any(dim=-1).all()
        return q

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", attention)
    generate(model, PROMPTS, 2)


def test_a_row_ends_at_its_stop_token_and_the_others_continue(model: GPT2) -> None:
    """Against continuations without stop, cut by hand, for every token of the first row."""
    free = generate(model, PROMPTS, 12, temperature=0)
    for stop in set(free[0][1:]):
        cut = []
        for prompt, row in zip(PROMPTS, free, strict=True):
            new = row[len(prompt) :]
            cut.append(prompt + (new[: new.index(stop) + 1] if stop in new else new))
        assert generate(model, PROMPTS, 12, temperature=0, stop=stop) == cut
    same = torch.tensor([PROMPTS[1], PROMPTS[1]])
    first = free[1][7]
    ended = generate(model, same, 12, temperature=0, stop=first)
    assert ended.tolist() == [[*PROMPTS[1], first]] * 2  # every row has ended: no more columns


def test_a_row_that_has_ended_repeats_its_stop_token(model: GPT2) -> None:
    """40 equal prompts, sampled, so that the rows end at different steps."""
    prompt = torch.full((40, 1), 5)
    options = {"temperature": 0.8, "generator": seeded(0)}
    rows = generate(model, prompt, 20, **options)[:, 1:]
    stop = int(rows.flatten().mode().values)
    options["generator"] = seeded(0)
    stopped = generate(model, prompt, 20, **options, stop=stop)[:, 1:]
    for free, row in zip(rows.tolist(), stopped.tolist(), strict=True):
        end = free.index(stop) + 1 if stop in free else 20
        assert row[:end] == free[:end]
        assert set(row[end:]) <= {stop}
    assert len({row.index(stop) for row in stopped.tolist() if stop in row}) > 3


def test_two_streams_of_one_model_do_not_disturb_each_other(
    model: GPT2, prompts: torch.Tensor
) -> None:
    """Token by token in turn, against generate; no module's mode is changed meanwhile."""
    modes = [module.training for module in model.h[0].train().modules()]
    turns = zip(*(stream(model, prompts, 9, generator=seeded(s)) for s in (2, 3)), strict=True)
    columns = []
    for columns_of_a_step in turns:
        assert [module.training for module in model.h[0].modules()] == modes
        columns.append(columns_of_a_step)
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
    sampled = generate(model, prompts, 20, temperature=temperature, generator=seeded(0))
    assert torch.equal(sampled, greedy)


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
