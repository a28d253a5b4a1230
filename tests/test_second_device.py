"""The second device refuses, allows and waits as CUDA does. A real GPU, if any, is asked too."""

import os

import pytest
import torch
import torch.nn.functional as F

from tests.second_device import second_device


class Tensors:
    """A few on either device, named c (CPU) and g (GPU) by their shape or use."""

    def __init__(self):
        torch.manual_seed(0)
        self.c = torch.rand(3, 3)
        self.c_number = torch.tensor(2.0)
        self.c_ids = torch.tensor([0, 2, 1])
        self.c_mask = self.c > 0.5
        for name, x in list(vars(self).items()):
            setattr(self, name.replace("c", "g", 1), x.to("cuda"))
        self.c_pinned = self.c.pin_memory()


REFUSED = {
    "a sum": lambda t: t.g + t.c,
    "a number of the GPU in a CPU operator": lambda t: t.c + t.g_number,
    "an index of the GPU": lambda t: t.c[t.g_ids],
    "values to put": lambda t: t.g.index_put_((t.g_ids,), t.c),
    "a mask": lambda t: t.g.masked_fill(t.c_mask, 0.0),
    "in inference mode": torch.inference_mode(lambda t: F.linear(t.g, t.c)),
    "a generator of the CPU": lambda t: torch.rand(3, device="cuda", generator=torch.Generator()),
    "a generator of the GPU": lambda t: torch.randn(3, generator=torch.Generator("cuda")),
    "numpy": lambda t: t.g.numpy(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cuda_refuses_is_refused(cuda, name):
    with pytest.raises((RuntimeError, TypeError)):
        REFUSED[name](Tensors())


ALLOWED = {
    "a number of the CPU": lambda x, number, ids, mask: number - x,
    "to put": lambda x, number, ids, mask: x.clone().index_put_((mask,), number),
    "an index of the CPU": lambda x, number, ids, mask: x[ids, ids],
    "to put at an index of the CPU": lambda x, number, ids, mask: x.clone().index_put_((ids,), x),
    "a copy from the CPU": lambda x, number, ids, mask: torch.empty_like(x).copy_(torch.eye(3)),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_what_cuda_allows_has_the_value_of_the_cpu(cuda, name):
    t = Tensors()
    got = ALLOWED[name](t.g, t.c_number, t.c_ids, t.g_mask)
    assert got.device.type == "cuda"
    assert torch.equal(got.cpu(), ALLOWED[name](t.c, t.c_number, t.c_ids, t.c_mask))


WAITING = {
    "item": lambda t: t.g_number.item(),
    "tolist": lambda t: t.g.tolist(),
    "cpu": lambda t: t.g.cpu(),
    "copy_ to the CPU": lambda t: t.c.copy_(t.g),
    "to the GPU": lambda t: t.c.to("cuda"),
    "a tensor of a list": lambda t: torch.tensor([1.0, 2.0], device="cuda"),
    "pinned but blocking": lambda t: t.c_pinned.to("cuda"),
    "nonzero": lambda t: t.g_mask.nonzero(),
    "a mask as index": lambda t: t.g[t.g_mask],
    "an index of the CPU": lambda t: t.g[t.c_ids],
    "unique": lambda t: t.g_ids.unique(),
}
NOT_WAITING = {
    "pinned and not blocking": lambda t: t.c_pinned[1].to("cuda", non_blocking=True),
    "copy_ to it": lambda t: t.c_pinned.copy_(t.g, non_blocking=True),
    "to the CPU, not blocking": lambda t: t.g.to("cpu", non_blocking=True),
    "arithmetic": lambda t: (t.g @ t.g + t.c_number).softmax(-1),
    "factories": lambda t: torch.zeros(3, device="cuda") + torch.arange(3, device="cuda"),
    "an index": lambda t: t.g[t.g_ids, 0],
    "a number where a mask is": lambda t: t.g.index_put_((t.g_mask,), t.c_number),
    "embedding": lambda t: F.embedding(t.g_ids, t.g.requires_grad_()).sum().backward(),
}


@pytest.mark.parametrize("name", [*WAITING, *NOT_WAITING])
def test_what_waits_for_cuda_is_counted_and_nothing_else(cuda, name):
    assert waits(cuda, (WAITING | NOT_WAITING)[name]) == (name in WAITING)


def waits(record, function):
    """Whether the function waits for the device: CUDA itself raises, the second device counts."""
    t = Tensors()
    if record:
        record.clear()
        function(t)
        return bool(record.waits())
    function(t)  # so that no kernel is loaded below
    torch.cuda.set_sync_debug_mode("error")
    try:
        function(t)
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def test_a_copy_of_memory_that_is_not_pinned_waits_even_if_non_blocking(gpu):
    """CUDA first copies it to pinned memory of its own; its debug mode does not tell."""
    t = Tensors()
    gpu.clear()
    t.c.to("cuda", non_blocking=True)
    t.g.copy_(t.c, non_blocking=True)
    t.c.copy_(t.g, non_blocking=True)
    assert gpu.waits().total() == 3


def test_operators_that_start_a_kernel_are_counted_and_views_are_not(gpu):
    x = torch.empty(4, 4, device="cuda")
    assert len(x.view(16)[2:].detach().unsqueeze(0).mT) == 14
    assert not gpu.launches()
    (x @ x).relu_().to(torch.bfloat16)
    assert gpu.launches() == {"aten.mm": 1, "aten.relu_": 1, "aten._to_copy": 1}


def test_a_file_of_the_device_opens_elsewhere_only_with_a_map_location(tmp_path):
    with second_device():
        torch.save(torch.ones(2, device="cuda"), tmp_path / "state")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="map_location"):
            torch.load(tmp_path / "state")
    assert type(torch.load(tmp_path / "state", map_location="cpu")) is torch.Tensor


def test_a_test_that_does_not_ask_for_a_gpu_sees_none():
    """Nor do the processes that it starts."""
    assert not torch.cuda.is_available()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
