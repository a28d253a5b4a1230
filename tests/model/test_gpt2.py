"""The architecture against transformers' GPT-2 and the figures of the paper."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from model import GPT2, GPT2Config
from tests.model.oracle import oracle, shake

# Sizes that differ from each other and from gpt2-medium's, whose n_positions = n_embd would hide
# swapped dimensions.
SMALL = GPT2Config(vocab_size=509, n_positions=80, n_embd=192, n_layer=3, n_head=3)
CONFIGS = [
    GPT2Config(vocab_size=131, n_positions=48, n_embd=64, n_layer=1, n_head=1),
    SMALL,
    GPT2Config(vocab_size=1000, n_positions=33, n_embd=320, n_layer=5, n_head=5),
]


def small_model(**changes: float) -> GPT2:
    model = GPT2(GPT2Config(**vars(SMALL) | changes))
    shake(model, 0)
    return model.eval()


def random_tokens(config: GPT2Config, B: int, T: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(config.vocab_size, (B, T), generator=generator)


def loss(logits: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with the first tenth of the vocabulary: every logit has a gradient."""
    return -F.log_softmax(logits, dim=-1)[..., : logits.shape[-1] // 10].mean()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.n_layer}x{c.n_embd}")
def test_logits_and_every_gradient_equal_those_of_transformers(config: GPT2Config) -> None:
    """Logits to 1e-4 and the gradient of every parameter to 1e-4 relative, in float32."""
    hf = oracle(config)
    model = GPT2.from_state_dict(hf.state_dict())
    tokens = random_tokens(config, 2, config.n_positions)
    ours, theirs = model(tokens), hf(tokens).logits
    assert theirs.std() > 0.5, "the reference logits are too flat to test anything"
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    loss(ours).backward()
    loss(theirs).backward()
    expected = dict(hf.transformer.named_parameters())
    for name, p in model.named_parameters():
        error = (p.grad - expected[name].grad).norm() / expected[name].grad.norm()
        assert error < 1e-4, f"gradient of {name}: relative error {error:.1e}"


def test_the_default_is_gpt2_medium() -> None:
    """Its published 354,823,168 parameters, 12,596,224 per block, tied head counted once; and what
    no shape shows: 16 heads and the epsilon."""
    with torch.device("meta"):
        model = GPT2(GPT2Config())
    assert sum(p.numel() for p in model.parameters()) == 354_823_168
    assert sum(p.numel() for p in model.h[0].parameters()) == 12_596_224
    assert (len(model.h), model.h[0].attn.n_head, model.ln_f.eps) == (24, 16, 1e-5)


@torch.no_grad()
def test_logits_with_a_cache_equal_those_without() -> None:
    """Tokens fed in pieces with a cache, one alone among them, against all of them at once."""
    model, tokens = small_model(), random_tokens(SMALL, 3, 40)
    cache = model.new_cache(40)
    logits = [model(piece, cache) for piece in tokens.split([7, 1, 20, 12], dim=1)]
    torch.testing.assert_close(torch.cat(logits, dim=1), model(tokens), atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_each_dropout_drops_what_it_should_and_only_in_training() -> None:
    """Dropped with probability 1, the outputs of attention and MLP are 0, and the sum of the
    embeddings, so that tokens do not matter. Attention weights, with 1/2, differ from call to call.
    In evaluation, and by default in training too, nothing is dropped."""
    tokens, x = random_tokens(SMALL, 2, 20), torch.randn(2, 20, SMALL.n_embd)
    plain = small_model().train()(tokens)

    def with_dropout(**p: float) -> GPT2:
        model = small_model(**p)
        assert torch.equal(model(tokens), plain)
        return model.train()

    block = with_dropout(resid_pdrop=1.0).h[0]
    assert (block.attn(x) == 0).all()
    assert (block.mlp(x) == 0).all()
    model = with_dropout(embd_pdrop=1.0)
    assert torch.equal(model.hidden_states(tokens), model.hidden_states(tokens.flip(1)))
    attention = with_dropout(attn_pdrop=0.5).h[0].attn
    assert not torch.equal(attention(x), attention(x))


def test_initial_weights_have_the_deviations_of_gpt2() -> None:
    """N(0, 0.02), c_proj / sqrt(2 n_layer) as in the paper's 2.3; biases 0, gains 1."""
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=2000, n_positions=64, n_embd=256, n_layer=8, n_head=4))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            std = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.03), name
            assert abs(p.mean().item()) < 0.1 * std, name
        else:
            assert (p == (1.0 if name.endswith("weight") else 0.0)).all(), name


def test_from_state_dict_reads_the_configuration_and_copies_unless_told_to_assign() -> None:
    """Configuration and weights survive a state dict; float16 becomes float32. A model has its own
    copy of the weights, except with assign, which makes none."""
    state = {k: v.half() for k, v in small_model().state_dict().items()}
    again = GPT2.from_state_dict(state)
    assert again.config == SMALL
    for name, p in again.named_parameters():
        assert p.dtype == torch.float32
        assert p.requires_grad
        assert torch.equal(p, state[name].float())
    state = again.state_dict()
    kept = copy.deepcopy(state)
    with torch.no_grad():
        for p in GPT2.from_state_dict(state).parameters():
            p.zero_()
    assert all(torch.equal(state[k], kept[k]) for k in state)
    assigned = GPT2.from_state_dict(state, assign=True)
    assert all(p.data_ptr() == state[k].data_ptr() for k, p in assigned.named_parameters())


def test_a_tied_head_on_the_meta_device_is_dropped() -> None:
    """It has no values that could differ; the model has none either, and all its shapes."""
    with torch.device("meta"):
        named = GPT2(SMALL).state_dict()
    model = GPT2.from_state_dict({**named, "lm_head.weight": named["wte.weight"]})
    assert {k: p.shape for k, p in model.named_parameters()} == {k: named[k].shape for k in named}
    assert model.wte.weight.is_meta


NO_BLOCKS = {name: None for name in small_model().state_dict() if name.startswith("h.")}
BAD_STATES = [  # tensors to replace or drop (None), and the message
    ({"h.1.mlp.c_fc.bias": None}, r'Missing.*"h\.1\.mlp\.c_fc\.bias"'),
    ({"lm_head.weight": torch.zeros(509, 192)}, r"lm_head\.weight: got values that differ from"),
    ({"lm_head.weight": torch.zeros(509, 192).half()}, r"lm_head\.weight: got values that differ"),
    ({"h.0.attn.c_attn.weight": torch.zeros(576, 192)}, r"\S+\[576, 192\].* \S+\[192, 576\]"),
    ({"wte.weight": None}, "wte.weight: missing"),
    ({"wte.weight": torch.zeros(50, 96)}, "multiple of 64"),
    ({"ln_f.bias": torch.zeros(192, dtype=torch.int64)}, "floating-point"),
    ({"module.ln_f.bias": torch.zeros(192)}, "twice"),
    ({"state_dict": {}}, "state_dict: got dict, expected a tensor; if it holds the weights, pass"),
    (NO_BLOCKS, "n_layer = 0"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_STATES)
def test_from_state_dict_refuses_what_is_not_a_gpt2(changes: dict, message: str) -> None:
    """A one-line ValueError names the tensor, what it is and what was expected."""
    state = small_model().state_dict() | changes
    with pytest.raises(ValueError, match=message) as caught:
        GPT2.from_state_dict({k: v for k, v in state.items() if v is not None})
    assert "\n" not in str(caught.value)


def test_forward_refuses_what_it_cannot_embed() -> None:
    """The message gives the rank, dtype or length; with a cache the limit counts what is in it."""
    model = small_model()
    cache = model.new_cache(6)
    model(random_tokens(SMALL, 1, 5), cache)
    for tokens, of_cache, message in (
        (torch.zeros(3, dtype=torch.int64), None, r"\(3,\)"),
        (torch.zeros(1, 3, dtype=torch.int32), None, "int32"),
        (torch.zeros(1, 0, dtype=torch.int64), None, r"\(1, 0\)"),
        (random_tokens(SMALL, 1, 81), None, "T = 81 after 0 cached positions, .* at most 80"),
        (random_tokens(SMALL, 1, 2), cache, "T = 2 after 5 cached positions, expected at most 1"),
    ):
        with pytest.raises(ValueError, match=message):
            model(tokens, of_cache)


@pytest.mark.parametrize("bad", [{"n_head": 5}, {"n_layer": 0}, {"vocab_size": -1}])
def test_an_impossible_configuration_is_refused(bad: dict[str, int]) -> None:
    """The message names the field."""
    with pytest.raises(ValueError, match=next(iter(bad))):
        GPT2Config(**bad)
