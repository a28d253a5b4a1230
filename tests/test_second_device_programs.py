"""Programs on the second device: autograd, modules, optimizers, files, with the CPU's values."""

import copy
import os

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from tests.second_device import second_device


def test_gradients_cross_the_devices(cuda):
    """A leaf of either device, whose gradient lies where the leaf does."""
    for there, elsewhere in (("cpu", "cuda"), ("cuda", "cpu")):
        x = torch.ones(3, device=there, requires_grad=True)
        (x.to(elsewhere) * 3).sum().backward()
        assert x.grad.device.type == there
        assert x.grad.tolist() == [3.0, 3.0, 3.0]


def test_views_share_memory_and_versions(cuda):
    x = torch.zeros(2, 3, device="cuda")
    version = x._version
    x[0].add_(1.0)
    x.T[2] = 5.0
    assert x.tolist() == [[1, 1, 5], [0, 0, 5]]
    assert x._version > version


def test_each_makes_others_on_its_own_device_unless_told(cuda):
    x, y = torch.ones(2, device="cuda"), torch.ones(2)
    made = (x.new_zeros(2), torch.zeros_like(x), x.new_tensor([1.0]), x.clone(), x.to(x), x.half())
    assert {z.device for z in made} == {x.device}
    assert {z.device.type for z in (x.new_zeros(2, device="cpu"), y.to(y), x.to(y))} == {"cpu"}
    assert {z.device.type for z in (torch.zeros_like(x, device="cpu"), y.double())} == {"cpu"}
    assert {z.device for z in (y.new_zeros(2, device="cuda"), y.to(x))} == {x.device}
    assert x.to("cuda") is x
    assert x.to("cuda", copy=True) is not x
    assert x.to("meta").is_meta


def test_a_module_that_moves_keeps_its_parameters(cuda):
    """As on CUDA: an optimizer made before .to("cuda") trains the model after it."""
    layer = torch.nn.Linear(3, 3)
    weight, before = layer.weight, layer.weight.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    layer.to("cuda")
    layer(torch.ones(2, 3, device="cuda")).sum().backward()
    optimizer.step()
    assert layer.weight is weight
    assert torch.equal(layer.to("cpu").weight, before - 2)
    twin = copy.deepcopy(layer.to("cuda"))
    assert isinstance(twin.weight, torch.nn.Parameter)
    assert twin.weight.device == layer.weight.device


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {}])
def test_adam_steps_as_on_the_cpu_without_a_wait(gpu, options):
    def train(device):
        torch.manual_seed(0)
        net = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3))).to(device)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.1, **options)
        x = torch.rand(5, 4).to(device)
        gpu.clear()
        for _ in range(3):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
        return net, optimizer

    net, optimizer = train("cuda")
    assert not gpu.waits(), gpu.report("waits")
    name = "aten._fused_adam_" if "fused" in options else "aten._foreach_addcdiv_"
    assert gpu.launches()[name] == 3
    expected, _ = train("cpu")
    for p, q in zip(net.parameters(), expected.parameters(), strict=True):
        assert torch.equal(p.cpu(), q)
    state = optimizer.state_dict()["state"]
    assert state[0]["exp_avg"].device.type == "cuda"


def test_files_say_where_their_tensors_were(cuda, tmp_path):
    """torch.save, with an optimizer; and safetensors, whose files know no device."""
    layer = torch.nn.Linear(3, 2).to("cuda")
    optimizer = torch.optim.Adam(layer.parameters(), fused=True)
    layer(torch.ones(2, 3, device="cuda")).sum().backward()
    optimizer.step()
    torch.save({"model": layer.state_dict(), "adam": optimizer.state_dict()}, tmp_path / "state")
    for place, expected in ((None, "cuda"), ("cuda", "cuda"), ("cpu", "cpu")):
        state = torch.load(tmp_path / "state", map_location=place)
        assert state["model"]["weight"].device.type == expected
        assert state["adam"]["state"][0]["exp_avg"].device.type == expected
        assert torch.equal(state["model"]["weight"].cpu(), layer.weight.cpu())
        layer.load_state_dict(state["model"])
        optimizer.load_state_dict(state["adam"])
        assert optimizer.state[layer.weight]["exp_avg"].device.type == "cuda"
    save_file(layer.state_dict(), tmp_path / "file")
    assert torch.equal(load_file(tmp_path / "file")["weight"], layer.weight.detach().cpu())


def test_a_file_of_the_device_opens_elsewhere_only_with_a_map_location(tmp_path):
    with second_device():
        torch.save(torch.ones(2, device="cuda"), tmp_path / "state")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="map_location"):
            torch.load(tmp_path / "state")
    assert type(torch.load(tmp_path / "state", map_location="cpu")) is torch.Tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_those_of_the_cpu_bit_for_bit(gpu, dtype):
    """Attention, an embedding, autocast, a loss, and what a generator draws."""

    def compute(device):
        torch.manual_seed(0)
        net = torch.nn.Linear(16, 16).to(device)
        ids = torch.randint(9, (2, 5), generator=torch.Generator().manual_seed(1)).to(device)
        table = torch.rand(9, 16).to(device).requires_grad_()
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            assert torch.is_autocast_enabled(device) == (dtype != torch.float32)
            x = net(F.embedding(ids, table))
            assert x.dtype == dtype
            y = F.scaled_dot_product_attention(
                x, x, x, is_causal=True
            )  # on any path: C++'s own too
            loss = F.cross_entropy(y.flatten(0, 1).float(), ids.flatten())
        loss.backward()
        generator = torch.Generator(device).manual_seed(2)
        drawn = torch.multinomial(y[0].float().softmax(-1), 3, generator=generator)
        noise = torch.randn(4, device=device, generator=generator)
        return loss, table.grad, net.weight.grad, drawn, noise, torch.rand(3, device=device)

    for got, expected in zip(compute("cuda"), compute("cpu"), strict=True):
        assert got.device.type == "cuda"
        assert torch.equal(got.cpu(), expected)


@torch.library.custom_op("tests::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    """Twice x, with a wait and, asked for by a name, with an operand of the CPU."""
    assert x.is_cuda
    assert x.sum().item() != 9
    return x * 2 + (torch.ones(5) if len(x) == 5 else 0)


def test_an_operator_of_ours_is_looked_into(gpu):
    """What it computes runs on the device, is counted, and is refused where CUDA would."""
    x = torch.ones(3, device="cuda")
    assert doubled(x).tolist() == [2, 2, 2]
    assert "x.sum().item()" in gpu.report("waits")
    assert gpu.launches()["aten.mul"] == 1
    with pytest.raises(RuntimeError, match="two devices"):
        doubled(torch.ones(5, device="cuda"))


def test_inference_mode_changes_nothing(gpu):
    with torch.inference_mode():
        x = torch.ones(2, 3, device="cuda")
        assert F.linear(x, x).to(torch.float64).tolist() == [[3, 3], [3, 3]]
        with pytest.raises(RuntimeError, match="two devices"):
            F.linear(x, torch.ones(2, 3))


def test_a_test_that_does_not_ask_for_a_gpu_sees_none():
    """Nor do the processes that it starts."""
    assert not torch.cuda.is_available()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_torch_is_itself_again_afterwards():
    def of_torch():
        return (
            torch.Tensor.to, torch.Generator, torch.load, torch.autocast, torch.cuda.is_available,
            torch.zeros_like, torch.__future__.get_swap_module_params_on_conversion(),
        )  # fmt: skip

    before = of_torch()
    with second_device():
        inside = of_torch()
    assert not set(inside) & set(before)
    assert of_torch() == before
