"""The architecture against transformers' GPT-2 and the formulas of the paper."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from model import GPT2, GPT2Config
from tests.model.oracle import GPT2LMHeadModel, oracle, shake
from tests.weights.official_file import SMALL as SMALL_FILE
from tests.weights.official_file import write_official
from weights import layout_of, load_weights

# Sizes that differ from each other and from gpt2-medium's, whose n_positions = n_embd would hide
# swapped dimensions.
CONFIGS = [
    GPT2Config(vocab_size=131, n_positions=48, n_embd=64, n_layer=1, n_head=1),
    GPT2Config(vocab_size=509, n_positions=80, n_embd=192, n_layer=3, n_head=3),
    GPT2Config(vocab_size=1000, n_positions=33, n_embd=320, n_layer=5, n_head=5),
]
SMALL = CONFIGS[1]


def small_model(seed: int = 0, config: GPT2Config = SMALL) -> GPT2:
    model = GPT2(config)
    shake(model, seed)
    return model.eval()


def random_tokens(config: GPT2Config, B: int, T: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (B, T), generator=generator)


def mean_kl(logits: torch.Tensor) -> torch.Tensor:
    """KL to the uniform distribution over the first tenth of the vocabulary, mean over rows."""
    log_q = F.log_softmax(logits.flatten(0, 1), dim=-1)
    size = log_q.shape[1] // 10
    return -math.log(size) - log_q[:, :size].mean(1).mean()


def assert_equals_transformers(config: GPT2Config, B: int, T: int) -> None:
    hf = oracle(config)
    model = GPT2.from_state_dict(hf.state_dict())
    tokens = random_tokens(config, B, T)
    ours, theirs = model(tokens), hf(tokens).logits
    assert theirs.std() > 0.5, "the reference logits are too flat to test anything"
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    mean_kl(ours).backward()
    mean_kl(theirs).backward()
    expected = dict(hf.transformer.named_parameters())
    for name, p in model.named_parameters():
        error = (p.grad - expected[name].grad).norm() / expected[name].grad.norm()
        assert error < 1e-4, f"gradient of {name}: relative error {error:.1e}"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.n_layer}x{c.n_embd}")
def test_logits_and_every_gradient_equal_those_of_transformers(config: GPT2Config) -> None:
    """Logits to 1e-4 and the gradient of every parameter to 1e-4 relative, in float32."""
    assert_equals_transformers(config, B=2, T=config.n_positions)


def test_gpt2_medium_equals_transformers_at_full_size() -> None:
    """The same with the 354,823,168 parameters of gpt2-medium, on 2 x 8 tokens."""
    assert_equals_transformers(GPT2Config(), B=2, T=8)


def test_a_file_laid_out_as_the_official_one_gives_the_same_logits_in_both(tmp_path: Path) -> None:
    """Both load the same file: with masks, no prefix, and tensors 2 bytes off alignment."""
    write_official(tmp_path / "model.safetensors", **SMALL_FILE)
    layout = layout_of(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(layout.config()))
    hf = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    model = GPT2.from_state_dict(load_weights(tmp_path))
    tokens = random_tokens(model.config, B=2, T=layout.n_positions)
    torch.testing.assert_close(model(tokens), hf(tokens).logits, atol=1e-5, rtol=1e-4)


def test_gpt2_medium_has_its_354_823_168_parameters() -> None:
    """The published count for gpt2-medium, tied head counted once; 12,596,224 per block."""
    with torch.device("meta"):
        model = GPT2(GPT2Config())
    assert sum(p.numel() for p in model.parameters()) == 354_823_168
    assert sum(p.numel() for p in model.h[0].parameters()) == 12_596_224


def test_attention_is_the_written_out_formula() -> None:
    """softmax(q k^T / sqrt(d) + mask) v in each head, against scaled_dot_product_attention."""
    attention = small_model().h[0].attn
    with torch.no_grad():
        attention.c_attn.weight.mul_(3)  # sharp enough that the scale and the mask matter
        x = torch.randn(2, 17, SMALL.n_embd, generator=torch.Generator().manual_seed(0))
        q, k, v = (x @ attention.c_attn.weight + attention.c_attn.bias).split(SMALL.n_embd, dim=2)
        heads = []
        for head in range(SMALL.n_head):
            columns = slice(64 * head, 64 * head + 64)
            scores = q[..., columns] @ k[..., columns].transpose(1, 2) / math.sqrt(64)
            mask = torch.full((17, 17), -math.inf).triu(1)
            heads.append((scores + mask).softmax(dim=2) @ v[..., columns])
        expected = torch.cat(heads, 2) @ attention.c_proj.weight + attention.c_proj.bias
        torch.testing.assert_close(attention(x), expected, atol=1e-5, rtol=1e-5)


def test_a_token_changes_no_logits_before_it() -> None:
    """Causality: bitwise equal before the changed position, different from there on."""
    model, tokens = small_model(), random_tokens(SMALL, 1, 40)
    other = tokens.clone()
    other[0, 25] = (other[0, 25] + 1) % SMALL.vocab_size
    before, after = model(tokens)[0], model(other)[0]
    assert torch.equal(before[:25], after[:25])
    assert ((before[25:] - after[25:]).abs().amax(dim=1) > 1e-3).all()


@pytest.mark.parametrize("pieces", [[40], [1] * 40, [7, 1, 20, 12]], ids=["whole", "ones", "mixed"])
def test_logits_with_a_cache_equal_those_without(pieces: list[int]) -> None:
    """Tokens fed in pieces with a cache, against all of them at once."""
    model, tokens = small_model(), random_tokens(SMALL, 3, 40)
    cache = model.new_cache(40)
    with torch.no_grad():
        logits = torch.cat([model(piece, cache) for piece in tokens.split(pieces, dim=1)], dim=1)
        torch.testing.assert_close(logits, model(tokens), atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_each_dropout_drops_what_it_should_and_only_in_training() -> None:
    """Dropped with probability 1, the outputs of attention and MLP are 0, and the sum of the
    embeddings, so that tokens do not matter. Attention weights, with 1/2, differ from call to call.
    In evaluation, and by default in training too, nothing is dropped."""
    tokens, x = random_tokens(SMALL, 2, 20), torch.randn(2, 20, SMALL.n_embd)
    plain = small_model().train()(tokens)

    def with_dropout(**p: float) -> GPT2:
        model = small_model(config=GPT2Config(**{**vars(SMALL), **p}))
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
    """N(0, 0.02), c_proj / sqrt(2 n_layer) as in the paper's 2.3; the loss starts near ln V."""
    config = GPT2Config(vocab_size=2000, n_positions=64, n_embd=256, n_layer=8, n_head=4)
    torch.manual_seed(0)
    model = GPT2(config)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            std = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.03), name
            assert abs(p.mean().item()) < 0.1 * std, name
        else:
            assert (p == (1.0 if name.endswith("weight") else 0.0)).all(), name
    tokens = random_tokens(config, 4, 64)
    loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1).flatten())
    assert loss.item() == pytest.approx(math.log(2000), abs=0.2)


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


NO_BLOCKS = {name: None for name in small_model().state_dict() if name.startswith("h.")}
BAD_STATES = [  # tensors to replace or drop (None), and the message
    ({"h.1.mlp.c_fc.bias": None}, r'Missing.*"h\.1\.mlp\.c_fc\.bias"'),
    (
        {"lm_head.weight": torch.zeros(509, 192)},
        r"lm_head\.weight: got values that differ from wte",
    ),
    ({"lm_head.weight": torch.zeros(509, 192).half()}, r"lm_head\.weight: got values that differ"),
    (
        {"h.0.attn.c_attn.weight": torch.zeros(576, 192)},
        r"h\.0\.attn\.c_attn\.weight.* \S+\[576, 192\].* \S+\[192, 576\]",
    ),
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


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), r"\(3,\)"),
        (torch.zeros(1, 3, dtype=torch.int32), "int32"),
        (torch.zeros(1, 0, dtype=torch.int64), r"\(1, 0\)"),
        (torch.zeros(1, 81, dtype=torch.int64), "T = 81 after 0 cached positions, .* at most 80"),
    ],
    ids=["rank", "dtype", "empty", "too long"],
)
def test_forward_refuses_what_it_cannot_embed(tokens: torch.Tensor, message: str) -> None:
    """The message gives the rank, dtype or length; with a cache the limit counts what is in it."""
    with pytest.raises(ValueError, match=message):
        small_model()(tokens)
    model, cache = small_model(), small_model().new_cache(6)
    model(random_tokens(SMALL, 1, 5), cache)
    with pytest.raises(ValueError, match="T = 2 after 5 cached positions, expected at most 1"):
        model(random_tokens(SMALL, 1, 2), cache)


def test_the_model_exports_with_any_batch_and_length() -> None:
    """torch.export with dynamic B and T, then run at another size than the one it was traced at."""
    model = small_model()
    B, T = torch.export.Dim("B"), torch.export.Dim("T", max=SMALL.n_positions)
    program = torch.export.export(
        model, (random_tokens(SMALL, 2, 8),), dynamic_shapes=({0: B, 1: T},)
    )
    tokens = random_tokens(SMALL, 5, 31)
    torch.testing.assert_close(program.module()(tokens), model(tokens))


@pytest.mark.parametrize("bad", [{"n_head": 5}, {"n_layer": 0}, {"vocab_size": -1}])
def test_an_impossible_configuration_is_refused(bad: dict[str, int]) -> None:
    """The message names the field."""
    with pytest.raises(ValueError, match=next(iter(bad))):
        GPT2Config(**bad)
