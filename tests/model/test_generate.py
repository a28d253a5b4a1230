"""Sampling: the cache changes nothing, the options do what they say, bad arguments are refused."""

import pytest
import torch

from model import GPT2, GPT2Config
from model.generate import generate
from tests.model.oracle import official_names, oracle, shake

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
    """A batch of prompts, to the last position, against transformers' generate."""
    hf = oracle(CONFIG, seed=3)
    ours = generate(GPT2.from_state_dict(official_names(hf)), prompts, 57, temperature=0)
    everything = torch.ones_like(prompts)  # else transformers takes id 0 for padding
    theirs = hf.generate(
        prompts, attention_mask=everything, max_new_tokens=57, do_sample=False, pad_token_id=0
    )
    assert torch.equal(ours, theirs)
    assert len(ours[:, 7:].unique()) > 3, "the text repeats itself: the test would see little"


def test_greedy_with_the_cache_equals_greedy_without(model: GPT2, prompts: torch.Tensor) -> None:
    """Against the whole sequence fed anew for every token."""
    tokens = prompts
    for _ in range(20):
        tokens = torch.cat((tokens, model(tokens)[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(generate(model, prompts, 20, temperature=0), tokens)


def test_the_seed_names_the_text(model: GPT2, prompts: torch.Tensor) -> None:
    """Equal seeds, equal tokens; another seed, other tokens; the global generator is untouched."""
    state = torch.get_rng_state()
    first, again, other = (generate(model, prompts, 30, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_sampled_frequencies_follow_the_softmax(model: GPT2) -> None:
    """4,000 draws of one token against softmax(logits / temperature), within 4 sigma."""
    prompt = torch.tensor([[5, 9]])
    many = prompt.expand(4000, 2).contiguous()
    for temperature in (0.5, 1.0):
        draws = generate(model, many, 1, temperature=temperature, generator=seeded(0))[:, -1]
        with torch.no_grad():
            p = (model(prompt)[0, -1] / temperature).softmax(0)
        sigma = (p * (1 - p) / 4000).sqrt()
        frequency = draws.bincount(minlength=CONFIG.vocab_size) / 4000
        assert ((frequency - p).abs() <= 4 * sigma + 1 / 4000).all()


def test_top_k_draws_from_the_k_likeliest_only(model: GPT2, prompts: torch.Tensor) -> None:
    """All of the five likeliest occur in 400 draws and nothing else; top_k = 1 is greedy."""
    prompt = prompts[:1].expand(400, 7).contiguous()
    draws = generate(model, prompt, 1, temperature=2.0, top_k=5, generator=seeded(0))[:, -1]
    with torch.no_grad():
        likeliest = model(prompts[:1])[0, -1].topk(5).indices
    assert set(draws.tolist()) == set(likeliest.tolist())
    greedy = generate(model, prompts, 10, temperature=0)
    assert torch.equal(generate(model, prompts, 10, top_k=1, generator=seeded(0)), greedy)
    untruncated = generate(model, prompts, 10, generator=seeded(4))
    every = generate(model, prompts, 10, top_k=CONFIG.vocab_size + 7, generator=seeded(4))
    assert torch.equal(every, untruncated)


def test_generate_leaves_the_model_as_it_was_and_samples_without_dropout() -> None:
    """In training mode with dropout 0.5 the greedy text is that of evaluation mode."""
    model = GPT2(GPT2Config(**{**vars(CONFIG), "resid_pdrop": 0.5}))
    shake(model, 0)
    prompt = torch.tensor([[1, 2, 3]])
    expected = generate(model.eval(), prompt, 20, temperature=0)
    model.train()
    tokens = generate(model, prompt, 20, temperature=0)
    assert torch.equal(tokens, expected)
    assert model.training
    model(tokens).sum().backward()  # what was generated can be trained on


def test_no_new_tokens_gives_the_prompt_back(model: GPT2, prompts: torch.Tensor) -> None:
    """max_new_tokens = 0 is legal, and changes nothing."""
    assert torch.equal(generate(model, prompts, 0), prompts)


def test_a_meta_model_generates_meta_tokens() -> None:
    """No tensor is pinned to the CPU, where mixing it with a meta tensor would raise."""
    with torch.device("meta"):
        model = GPT2(CONFIG)
    tokens = torch.zeros(2, 3, dtype=torch.int64, device="meta")
    for options in ({}, {"temperature": 0.0}, {"top_k": 4}):
        new = generate(model, tokens, 5, **options)
        assert new.is_meta
        assert new.shape == (2, 8)


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([[301]], {}, r"ids from 301 to 301, expected them in \[0, 301\)"),
        ([[0, -1]], {}, "ids from -1"),
        ([[]], {}, r"\(1, 0\)"),
        ([1, 2], {}, r"\(2,\)"),
        ([[1.5]], {}, "float32"),
        ([[1, 2]], {"max_new_tokens": 63}, "expected 0 to 62"),
        ([[1, 2]], {"max_new_tokens": -1}, "got -1"),
        ([[1]], {"temperature": -0.1}, "temperature"),
        ([[1]], {"temperature": float("nan")}, "temperature"),
        ([[1]], {"top_k": 0}, "top_k"),
    ],
)
def test_bad_arguments_are_refused(model: GPT2, tokens: list, options: dict, message: str) -> None:
    """ValueError that names the argument, what was got and what was expected."""
    dtype = None if tokens == [[1.5]] else torch.int64
    with pytest.raises(ValueError, match=message):
        generate(model, torch.tensor(tokens, dtype=dtype), **{"max_new_tokens": 4, **options})
