"""Both losses under torch.func, forward-mode differentiation and dynamic compilation; no device
synchronisation and no tables inside the operators."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import TeacherTarget, fused_kl_div, fused_linear_kl_div, target
from kernels.fused_kl_div import launchers
from tests.kernels.kl_cases import (
    DEVICE,
    FUSED,
    hidden_and_head,
    random_logits,
    two_level,
)

TARGET = two_level(30, 2.0, 1.0)
HEAD = random_logits(30, 8, seed=1)
LOSSES = {
    "fused_kl_div": lambda x, reduction="batchmean": fused_kl_div(
        F.linear(x, HEAD), TARGET, reduction
    ),
    "fused_linear_kl_div": lambda x, reduction="batchmean": fused_linear_kl_div(
        x, HEAD, TARGET, reduction, chunk_rows=2
    ),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", LOSSES)
def test_grad_vmap_and_jacrev_agree_with_autograd(name):
    """torch.func.grad; vmap over single rows, of the loss and of its grad; jacrev over rows."""
    loss, hidden = LOSSES[name], random_logits(3, 8).requires_grad_()
    rows = loss(hidden, "none")
    (expected,) = torch.autograd.grad(rows.sum(), hidden)
    hidden = hidden.detach()
    torch.testing.assert_close(torch.func.grad(loss)(hidden) * 3, expected)
    torch.testing.assert_close(torch.func.vmap(loss)(hidden), rows)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(hidden), expected)
    jacobian = torch.func.jacrev(lambda x: loss(x, "none"))(hidden)
    torch.testing.assert_close(jacobian.sum(0), expected)


@pytest.mark.parametrize("name", LOSSES)
def test_forward_mode_is_refused_in_one_line(name):
    """jvp, jacfwd and a dual tensor: an operator would drop the tangent and return 0."""
    loss, hidden = LOSSES[name], random_logits(3, 8)

    def dual():
        with forward_ad.dual_level():
            return loss(forward_ad.make_dual(hidden, hidden))

    for call in (
        lambda: torch.func.jvp(loss, (hidden,), (hidden,)),
        lambda: torch.func.jacfwd(loss)(hidden),
        dual,
    ):
        with pytest.raises(RuntimeError, match=f"{name} has reverse-mode derivatives only") as info:
            call()
        assert "\n" not in str(info.value)


@pytest.mark.parametrize("name", LOSSES)
def test_a_second_derivative_of_torch_func_is_refused(name):
    """grad of grad, which reaches the operator's own derivative: not silently 0."""
    loss, hidden = LOSSES[name], random_logits(3, 8)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.func.grad(lambda x: torch.func.grad(loss)(x).sum())(hidden)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_loss_compiled_for_any_shape_is_one_graph_and_the_same(inplace):
    """torch.compile(fullgraph=True, dynamic=True) on three shapes, loss and gradient."""

    def loss(hidden):
        return fused_kl_div(F.linear(hidden, HEAD), TARGET, inplace_backward=inplace)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((3, 8), (5, 8), (2, 4, 8)):
        hidden = random_logits(*shape).requires_grad_()
        got, expected = (torch.autograd.grad(f(hidden), hidden)[0] for f in (compiled, loss))
        torch.testing.assert_close(got, expected)


def test_tables_are_built_with_the_target_and_not_again(monkeypatch):
    """Two steps of each loss, forward and backward, and a tilt in a new target."""
    built = []
    function = target.pack_bits
    monkeypatch.setattr(target, "pack_bits", lambda *a: built.append(a) or function(*a))
    two_levels = two_level(30)
    assert len(built) == 2  # one per alignment
    for _ in range(2):
        for p in (two_levels, TeacherTarget(random_logits(3, 30), (two_levels, 5.0))):
            hidden, weight = hidden_and_head(3, vocab=30)
            fused_linear_kl_div(hidden, weight, p, impl="torch").backward()
            fused_kl_div(random_logits(3, 30).requires_grad_(), p, impl="torch").backward()
    fused_kl_div(random_logits(3, 30).requires_grad_(), two_levels, impl="triton").backward()
    assert len(built) == 2


class NoSynchronisation(TorchDispatchMode):
    """Fails on operators whose result the host must wait for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        assert name not in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal"), name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["two_level", "teacher"])
@pytest.mark.parametrize("path", FUSED)
def test_the_host_waits_for_nothing_in_forward_and_backward(path, kind):
    """As CUDA graphs demand: the bodies of the operators, watched for reads of values. Those of the
    PyTorch path run on the meta device, because on the CPU, where nobody waits, they look."""
    logits = random_logits(3, 1001)
    p = two_level(1001, 3.0, 0.5)
    if kind == "teacher":
        p = TeacherTarget(random_logits(3, 1001), (p, 5.0))
    p, kernels = p.parts, launchers(path, torch.device(DEVICE))
    if path == "torch":
        logits = logits.to("meta")
        p = type(p)(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in p))
    loss, lse, norm = kernels.forward(logits, p)
    with NoSynchronisation():
        loss, lse, norm = kernels.forward(logits, p)
        kernels.backward(logits, lse, norm, p, torch.ones_like(loss), logits)
