"""The second device refuses, allows and waits as CUDA does. A real GPU, if any, is asked too."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F


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


REFUSED = {
    "a sum": lambda t: t.g + t.c,
    "a sum in place": lambda t: t.g.add_(t.c),
    "a number of the GPU in a CPU operator": lambda t: t.c + t.g_number,
    "a number of the GPU into one of the CPU": lambda t: t.c_number.add_(t.g_number),
    "a product": lambda t: t.g @ t.c,
    "an output": lambda t: torch.mm(t.g, t.g, out=t.c),
    "a concatenation": lambda t: torch.cat([t.g, t.c]),
    "a stack of numbers": lambda t: torch.stack([t.g_number, t.c_number]),
    "ids of the CPU in an embedding of the GPU": lambda t: F.embedding(t.c_ids, t.g),
    "ids of the GPU in an embedding of the CPU": lambda t: F.embedding(t.g_ids, t.c),
    "an index of the GPU": lambda t: t.c[t.g_ids],
    "index_select": lambda t: t.g.index_select(0, t.c_ids),
    "gather": lambda t: t.g.gather(1, t.c_ids[:, None]),
    "values to put": lambda t: t.g.index_put_((t.g_ids,), t.c),
    "a mask": lambda t: t.g.masked_fill(t.c_mask, 0.0),
    "a condition": lambda t: torch.where(t.c_mask, t.g, 0.0),
    "labels": lambda t: F.cross_entropy(t.g, t.c_ids),
    "a gain": lambda t: F.layer_norm(t.g, (3,), t.c[0]),
    "an attention mask": lambda t: F.scaled_dot_product_attention(
        t.g[None], t.g[None], t.g[None], t.c_mask
    ),
    "a generator of the CPU": lambda t: torch.multinomial(t.g, 1, generator=torch.Generator()),
    "a generator of the GPU": lambda t: torch.multinomial(
        t.c, 1, generator=torch.Generator("cuda")
    ),
    "numpy": lambda t: t.g.numpy(),
    "numpy.asarray": lambda t: np.asarray(t.g),
    "pinning": lambda t: t.g.pin_memory(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cuda_refuses_is_refused(cuda, name):
    with pytest.raises((RuntimeError, TypeError), match=r"cuda|device|pin"):
        REFUSED[name](Tensors())


ALLOWED = {
    "a number of the CPU": lambda x, number, ids, mask: x + number,
    "on the left": lambda x, number, ids, mask: number - x,
    "in place": lambda x, number, ids, mask: x.clone().mul_(number),
    "to fill with": lambda x, number, ids, mask: x.masked_fill(mask, number),
    "to choose": lambda x, number, ids, mask: torch.where(mask, x, number),
    "to put": lambda x, number, ids, mask: x.clone().index_put_((mask,), number),
    "a comparison": lambda x, number, ids, mask: x > number,
    "an index of the CPU": lambda x, number, ids, mask: x[ids],
    "to put at an index of the CPU": lambda x, number, ids, mask: x.clone().index_put_((ids,), x),
    "a list as an index": lambda x, number, ids, mask: x[:, [2, 0]],
    "two indices": lambda x, number, ids, mask: x[ids, ids],
    "a copy from the CPU": lambda x, number, ids, mask: torch.empty_like(x).copy_(
        torch.arange(9.0).view(3, 3)
    ),
    "an item set": lambda x, number, ids, mask: x.clone().__setitem__(0, number),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_what_cuda_allows_has_the_value_of_the_cpu(cuda, name):
    t = Tensors()
    got = ALLOWED[name](t.g, t.c_number, t.c_ids, t.g_mask)
    expected = ALLOWED[name](t.c, t.c_number, t.c_ids, t.c_mask)
    if expected is None:
        return
    assert got.device.type == "cuda"
    assert torch.equal(got.cpu(), expected)


WAITING = {
    "item": lambda t: t.g_number.item(),
    "bool": lambda t: bool(t.g_number > 0),
    "all": lambda t: 1 if t.g_mask.all() else 0,
    "tolist": lambda t: t.g.tolist(),
    "repr": lambda t: repr(t.g),
    "format": lambda t: f"{t.g_number:.2f}",
    "to the CPU": lambda t: t.g.to("cpu"),
    "cpu": lambda t: t.g.cpu(),
    "copy_ to the CPU": lambda t: t.c.copy_(t.g),
    "to the GPU": lambda t: t.c.to("cuda"),
    "cuda": lambda t: t.c.cuda(),
    "a tensor of a list": lambda t: torch.tensor([1.0, 2.0], device="cuda"),
    "pinned but blocking": lambda t: t.c_pinned.to("cuda"),
    "nonzero": lambda t: t.g_mask.nonzero(),
    "a mask as index": lambda t: t.g[t.g_mask],
    "an index of the CPU": lambda t: t.g[t.c_ids],
    "masked_select": lambda t: t.g.masked_select(t.g_mask),
    "unique": lambda t: t.g_ids.unique(),
    "a number set": lambda t: t.g.__setitem__((0, 1), 5.0),
    "repeat_interleave": lambda t: t.g.repeat_interleave(t.g_ids, dim=0),
}
NOT_WAITING = {
    "pinned and not blocking": lambda t: t.c_pinned.to("cuda", non_blocking=True),
    "a row of it": lambda t: t.c_pinned[1].to("cuda", non_blocking=True),
    "copy_ from it": lambda t: t.g.copy_(t.c_pinned, non_blocking=True),
    "copy_ to it": lambda t: t.c_pinned.copy_(t.g, non_blocking=True),
    "to the CPU, not blocking": lambda t: t.g.to("cpu", non_blocking=True),
    "arithmetic": lambda t: (t.g @ t.g + t.c_number).softmax(-1),
    "factories": lambda t: torch.zeros(3, device="cuda") + torch.arange(3, device="cuda"),
    "an index": lambda t: t.g[t.g_ids, 0],
    "a number where a mask is": lambda t: t.g.__setitem__(t.g_mask, 0.0),
    "masked_fill": lambda t: t.g.masked_fill(t.g_mask, 0.0),
    "multinomial": lambda t: torch.multinomial(t.g, 1),
    "topk": lambda t: t.g.topk(2),
    "cross_entropy": lambda t: F.cross_entropy(t.g.requires_grad_(), t.g_ids).backward(),
    "embedding": lambda t: F.embedding(t.g_ids, t.g.requires_grad_()).sum().backward(),
    "shapes": lambda t: (t.g.shape, t.g.numel(), len(t.g), t.g.dtype, t.g.device),
}


@pytest.mark.parametrize("name", WAITING)
def test_what_waits_for_cuda_is_counted(cuda, name):
    assert waits(cuda, WAITING[name])


@pytest.mark.parametrize("name", NOT_WAITING)
def test_what_does_not_wait_is_not_counted(cuda, name):
    assert not waits(cuda, NOT_WAITING[name])


def waits(record, function):
    """Whether the function waits for the device: CUDA itself raises, the second device counts."""
    t = Tensors()
    t.c_pinned = t.c.pin_memory()
    if record:
        record.clear()
        function(t)
        return record.waits()
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
    assert gpu.waits().total() == 3, gpu.report("waits")


def test_a_wait_names_its_line_and_a_copy_its_direction(gpu):
    x = torch.ones(3).to("cuda")
    x.sum().item()
    assert list(gpu.copies()) == [
        'to the device  tests/test_second_device.py:LINE  x = torch.ones(3).to("cuda")'.replace(
            "LINE", str(line_of("x = torch.ones(3)"))
        )
    ]
    assert gpu.waits().total() == 2
    assert f":{line_of('x.sum().item()')}  x.sum().item()" in gpu.report("waits")
    gpu.clear()
    assert gpu.report("waits") == ""


def line_of(code):
    with open(__file__) as file:
        return next(n for n, line in enumerate(file, 1) if line.strip().startswith(code))


def test_operators_that_start_a_kernel_are_counted_and_views_are_not(gpu):
    x = torch.empty(4, 4, device="cuda")
    assert len(x.view(16)[2:].detach().unsqueeze(0).mT) == 14
    assert not gpu.launches()
    (x @ x).relu_().to(torch.bfloat16)
    assert dict(gpu.launches()) == {"aten.mm": 1, "aten.relu_": 1, "aten._to_copy": 1}
