"""The walkthrough: what it prints is what the modules, the losses and the operators do."""

import contextlib
import copy
import functools
import io
import itertools
import math
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import TwoLevelTarget, fused_kl_div, fused_linear_kl_div, reference
from model import GPT2, GPT2Config
from tests.model.oracle import shake
from train.walkthrough import Walk, divergences, traffic, walkthrough
from weights import save_weights

ROOT = Path(__file__).parents[2]
SMALL = GPT2Config(vocab_size=509, n_positions=80, n_embd=192, n_layer=3, n_head=3)
B, T = 2, 5
TOKENS = torch.arange(B * T).view(B, T)


class Row(NamedTuple):
    stage: str
    formula: str
    shape: str
    parameters: str
    check: str


@pytest.fixture(scope="module")
def model() -> GPT2:
    model = GPT2(SMALL)
    shake(model, seed=0)
    return model.eval()


@pytest.fixture
def table(model: GPT2, capsys: pytest.CaptureFixture[str]) -> list[Row]:
    """The table of the small model, cut at the columns of its heading."""
    Walk().model(model, TOKENS)
    heading, *lines = capsys.readouterr().out.splitlines()
    starts = [heading.index(name) for name in ("stage", "formula", "shape", "parameters", "check")]
    cuts = list(itertools.pairwise([*starts, None]))
    return [Row(*(line[start:end].strip() for start, end in cuts)) for line in lines]


@pytest.fixture(scope="module")
def printed() -> str:
    """Everything that the command prints about the embedded checkpoint."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        walkthrough()
    return out.getvalue()


def number(printed: str, name: str) -> float:
    """Return the value on the line that starts with a name."""
    (value,) = re.findall(rf"^ *{re.escape(name)} +(\S+)", printed, re.M)
    return float(value.replace(",", ""))


def test_the_walk_ends_with_the_model_s_own_logits(model: GPT2) -> None:
    """Attention written out against the model's fused call, in float64."""
    exact = copy.deepcopy(model).double()
    hidden, logits = Walk().model(exact, TOKENS)
    torch.testing.assert_close(hidden, exact.hidden_states(TOKENS), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logits, exact(TOKENS), rtol=1e-12, atol=1e-12)


def test_each_named_stage_has_the_shape_that_its_module_returns(
    model: GPT2, table: list[Row]
) -> None:
    """Against hooks on the model's own forward pass; wpe shows the sum of both embeddings."""
    shapes = {"tokens": [B, T], "wpe": [B, T, SMALL.n_embd], "logits": [B, T, SMALL.vocab_size]}
    watched = copy.deepcopy(model)
    for name, module in watched.named_modules():

        def hook(
            module: torch.nn.Module, args: object, out: torch.Tensor, name: str = name
        ) -> None:
            shapes.setdefault(name, [*out.shape])

        module.register_forward_hook(hook)
    watched(TOKENS)
    named = [row for row in table if row.stage]
    assert len(named) == 13
    for row in named:
        in_block = row.stage.startswith(("attn.", "mlp."))
        assert row.shape == str(shapes["h.0." * in_block + row.stage]), row


def test_queries_scores_and_weights_have_the_shapes_of_the_formulas(table: list[Row]) -> None:
    """H = 3 heads of D = 64; one score per query and key; a v has D elements per head again."""
    heads, scores, stream = f"[{B}, 3, {T}, 64]", f"[{B}, 3, {T}, {T}]", f"[{B}, {T}, 192]"
    expected = [heads, scores, scores, heads, stream, f"[{B}, {T}, 768]", stream]
    assert [row.shape for row in table if not row.stage] == expected


def test_parameter_counts_are_their_products_and_add_up(model: GPT2, table: list[Row]) -> None:
    """Each product is multiplied out; the sum is the model's, so each parameter counts once."""
    total = 0
    for row in table:
        if row.parameters:
            product, count = row.parameters.replace(",", "").split(" = ")
            product = product.replace("12C^2+13C", "12*192*192+13*192")
            terms = [math.prod(map(int, term.split("*"))) for term in product.split("+")]
            assert sum(terms) == int(count), row
            total += int(count)
    assert total == sum(p.numel() for p in model.parameters())


def test_attention_ignores_later_positions_and_its_weights_sum_to_one(table: list[Row]) -> None:
    """5 * 4 / 2 = 10 pairs lie above the diagonal; position 0 sees itself alone."""
    checks = [row.check for row in table]
    assert "10 = 5*4/2 -inf" in checks
    assert "sum_j 1.0000, j>i 0" in checks
    assert "y[0] - v[0] = 0" in checks


def test_the_four_divergences_agree_and_have_a_closed_form_at_zero_logits() -> None:
    """At h = 0 every token has q = 1/V, so KL = log(V / |S|)."""
    target = TwoLevelTarget(torch.arange(509) % 3 == 0)
    weight = torch.randn(509, 16, generator=torch.Generator().manual_seed(0))
    for h in (torch.zeros(B, T, 16), weight[: B * T].view(B, T, 16)):
        kls = [float(kl) for kl in divergences(h, weight, h @ weight.T, target).values()]
        assert len(kls) == 4
        assert kls == pytest.approx([kls[0]] * 4, rel=1e-6)
        if not h.any():
            assert kls[0] == pytest.approx(math.log(509 / 170), rel=1e-12)


class Traffic(TorchDispatchMode):
    """Counts the tensors of one size that operators read or write; views move nothing."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.bytes, self.tensors = 4 * elements, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        # A tensor given as out= is written once, and is the result; a new one is not written yet.
        if not op.is_view and "empty" not in op.name():
            moved = [t for t in tree_leaves((args, out)) if isinstance(t, torch.Tensor)]
            self.tensors += sum(t.untyped_storage().nbytes() == self.bytes for t in moved)
        return out


LOSSES = {
    "unfused": lambda z, h, w, p: reference.kl_div(z, p),
    "fused_kl_div": lambda z, h, w, p: fused_kl_div(z, p),
    "LM head, unfused": lambda z, h, w, p: reference.kl_div(F.linear(h, w), p),
    "LM head, fused_kl_div": lambda z, h, w, p: fused_kl_div(F.linear(h, w), p),
    "fused_linear_kl_div": lambda z, h, w, p: fused_linear_kl_div(h, w, p),
}


def count_traffic(name: str, rows: int, vocab: int, width: int) -> list[int]:
    """Count tensors of (rows, vocab) and of (vocab, width) moved by a loss and its gradients."""
    counts = []
    for elements in (rows * vocab, vocab * width):
        shapes = (rows, vocab), (rows, width), (vocab, width)
        tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
        with Traffic(elements) as traffic:
            LOSSES[name](*tensors, TwoLevelTarget(torch.arange(vocab) % 3 == 0)).backward()
        counts.append(traffic.tensors)
    return counts


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "fused_linear_kl_div"])
def test_traffic_is_what_the_operators_read_and_write(name: str) -> None:
    """The large tensors of every operator in forward and backward are counted."""
    assert count_traffic(name, rows=6, vocab=101, width=64) == list(traffic(6)[name])


@pytest.mark.parametrize("rows", [6, 513])
def test_traffic_of_the_fused_head_grows_by_the_chunk(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reads and writes of V C elements, counted alike; 513 rows are two chunks.

    The counter cannot see inside a custom operator, so its body is called instead. The logits are
    read in tiles, which are not counted.
    """
    module = import_module("kernels.fused_linear_kl_div")  # the package's name is the function
    body = functools.partial(module.loss_and_gradients, "two_level")
    monkeypatch.setitem(module.OPERATORS, "two_level", body)
    monkeypatch.setattr(module, "scale_", module.scale_._init_fn)
    counted = count_traffic("fused_linear_kl_div", rows, vocab=101, width=64)
    assert counted[1] == traffic(rows)["fused_linear_kl_div"][1]


def test_it_fits_a_terminal_and_its_numbers_agree(printed: str) -> None:
    """On the embedded checkpoint: 100 columns, every parameter used, one loss in four ways."""
    assert max(map(len, printed.splitlines())) <= 100
    assert number(printed, "parameters used above") == number(printed, "parameters of the model")
    assert number(printed, "largest difference from model(tokens), relative") < 5e-6
    names = (
        "definition: sum over S of alpha (log alpha - log q)",
        "kernels.reference: F.log_softmax, then F.kl_div",
        "fused_kl_div: one pass over z",
        "fused_linear_kl_div: from h and wte",
    )
    kls = [number(printed, name) for name in names]
    assert kls == pytest.approx([kls[0]] * 4, abs=1e-4)


def test_neither_logits_nor_their_exponentials_are_normalised_but_log_softmax_is(
    printed: str,
) -> None:
    """At one position of the embedded checkpoint; the target sums to one as well."""
    for name in ("sum of z", "sum of exp(z)"):
        assert abs(number(printed, name) - 1) > 0.1
    for name in (
        "sum of exp(z - lse(z))",
        "sum of exp(F.log_softmax(z)) in float64",
        "sum of P = 984 alpha + 49273 beta",
    ):
        assert number(printed, name) == pytest.approx(1, abs=1e-6)
    assert "[4, 64, 50257] -> [256, 50257]" in printed


def test_weights_that_cannot_be_loaded_end_with_advice_and_status_1(tmp_path: Path) -> None:
    """Without a cache and a network: the message of weights.WeightsError, and no traceback."""
    result = subprocess.run(
        [sys.executable, "-m", "train.walkthrough", "--model", "gpt2-medium"],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stdout == ""
    assert "error: gpt2-medium is not cached" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_model_with_another_vocabulary_is_refused(model: GPT2, tmp_path: Path) -> None:
    """The target tokens are GPT-2's, so a model of 509 tokens has none."""
    save_weights(model.state_dict(), tmp_path)
    with pytest.raises(ValueError, match="got 509 tokens and 80 positions, expected 50257"):
        walkthrough(str(tmp_path))
