"""The walkthrough: what it prints is what the modules, the losses and the operators do."""

import functools
import math
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import TwoLevelTarget, fused_kl_div, fused_linear_kl_div, reference
from model import GPT2, GPT2Config
from tests.model.oracle import shake
from train.walkthrough import Walk, traffic, walkthrough
from weights import save_weights

SMALL = GPT2Config(vocab_size=509, n_positions=80, n_embd=192, n_layer=3, n_head=3)


def test_the_walk_is_the_model(capsys) -> None:
    """Attention written out against the model's fused call, in float64; each product is multiplied
    out and each parameter counts once; 10 pairs of 5 positions lie above the diagonal."""
    model, tokens = GPT2(SMALL), torch.arange(10).view(2, 5)
    shake(model, seed=0)
    exact = model.double().eval()
    hidden, logits = Walk().model(exact, tokens)
    torch.testing.assert_close(hidden, exact.hidden_states(tokens), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logits, exact(tokens), rtol=1e-12, atol=1e-12)
    table, total = capsys.readouterr().out, 0
    for product, count in re.findall(r" ([\d*+C^]+) = ([\d,]+)  ", table):
        product = product.replace("12C^2+13C", "12*192*192+13*192")
        terms = [math.prod(map(int, term.split("*"))) for term in product.split("+")]
        assert sum(terms) == int(count.replace(",", "")), product
        total += sum(terms)
    assert total == sum(p.numel() for p in model.parameters())
    for line in (r"\[2, 3, 5, 5\] +10 = 5\*4/2 -inf", r"\[2, 3, 5, 5\] +sum_j 1.0000, j>i 0",
                 r"\[2, 3, 5, 64\] +y\[0\] - v\[0\] = 0"):  # fmt: skip
        assert re.search(rf"{line} *\n", table), line


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


@pytest.mark.parametrize("rows", [6, 513])  # one chunk of fused_linear_kl_div and two
@pytest.mark.parametrize("name", LOSSES)
def test_traffic_is_what_the_operators_read_and_write(name, rows, monkeypatch) -> None:
    """The tensors of N V and of V C elements of every operator in forward and backward.

    The counter cannot see inside a custom operator, so the body of the fused head is called
    instead. It reads the logits in tiles, which are not counted.
    """
    module = import_module("kernels.fused_linear_kl_div")  # the package's name is the function
    body = functools.partial(module.loss_and_gradients, "two_level")
    monkeypatch.setitem(module.OPERATORS, "two_level", body)
    monkeypatch.setattr(module, "scale_", module.scale_._init_fn)
    counted, (vocab, width) = [], (101, 64)
    for elements in (rows * vocab, vocab * width):
        shapes = (rows, vocab), (rows, width), (vocab, width)
        tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
        with Traffic(elements) as moved:
            LOSSES[name](*tensors, TwoLevelTarget(torch.arange(vocab) % 3 == 0)).backward()
        counted.append(moved.tensors)
    in_tiles = name == "fused_linear_kl_div"
    assert counted[in_tiles:] == [*traffic(rows)[name]][in_tiles:]


def test_it_fits_a_terminal_and_its_numbers_agree(capsys) -> None:
    """On the embedded checkpoint: 100 columns; every parameter is used; one loss in four ways."""
    walkthrough()
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    used, parameters = re.findall(r"^  parameters .* ([\d,]+)$", printed, re.M)
    assert used == parameters
    kls = [float(x) for x in re.findall(r"(\d+\.\d+)  [+-]\d\.\de", printed)]
    assert kls == pytest.approx([kls[0]] * 4, abs=1e-4)


def test_a_model_with_another_vocabulary_is_refused(tmp_path: Path) -> None:
    """The target tokens are GPT-2's, so a model of 509 tokens has none."""
    save_weights(GPT2(SMALL).state_dict(), tmp_path)
    with pytest.raises(ValueError, match="got 509 tokens and 80 positions, expected 50257"):
        walkthrough(str(tmp_path))
