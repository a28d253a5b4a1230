"""The model on the second device: the CPU's values, no wait in a step, and what a step starts."""

import pytest
import torch
import torch.nn.functional as F

from model import GPT2, GPT2Config
from model.generate import generate

SIZES = {"vocab_size": 97, "n_positions": 32, "n_embd": 64, "n_head": 1}


def model(n_layer=2):
    torch.manual_seed(0)
    return GPT2(GPT2Config(n_layer=n_layer, **SIZES))


def tokens(device):
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randint(97, (2, 8), generator=generator).to(device)


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"temperature": 0.0}, {"stop": 3}])
def test_the_same_tokens_are_sampled(gpu, options):
    """From a tensor of prompts, and from a list of them of two lengths, which needs padding."""

    def sample(device, prompts):
        generator = torch.Generator(device).manual_seed(1)
        return generate(model().to(device), prompts, 12, generator=generator, **options)

    assert sample("cuda", tokens("cuda")).tolist() == sample("cpu", tokens("cpu")).tolist()
    prompts = [[1, 2, 3], [4]]
    assert sample("cuda", prompts) == sample("cpu", prompts)


def test_sampling_waits_once_a_call_and_not_for_each_token(gpu):
    """To check that the prompt lies in the vocabulary."""
    net, prompt = model().to("cuda"), tokens("cuda")
    gpu.clear()
    generate(net, prompt, 12, generator=torch.Generator("cuda"))
    assert gpu.waits().total() == 1


def trained(device, dtype, steps, n_layer, record):
    """Train on cross-entropy; count from the second step on. Return the model."""
    net = model(n_layer).to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2, fused=True)
    batch = tokens("cpu").pin_memory()
    for step in range(steps):
        if step == 1:
            record.clear()
        ids = batch.to(device, non_blocking=True)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            logits = net(ids)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_never_waits_for_the_device(gpu, dtype):
    """Ids from pinned memory, forward, loss, backward, Adam; three of them end as on the CPU."""
    net = trained("cuda", dtype, 3, 2, gpu)
    assert not gpu.waits()
    assert gpu.copies().total() == 2  # the ids
    for p, q in zip(net.parameters(), trained("cpu", dtype, 3, 2, gpu).parameters(), strict=True):
        assert torch.equal(p.cpu(), q)


BLOCKS = 24  # gpt2-medium's; its width does not change how many kernels a step starts
# Forward: 2 LayerNorms, 4 products, attention, gelu, 2 sums. Backward: 8 products, 4 sums over rows
# for biases, the join of q, k and v, and one for each of the others.
PER_BLOCK, OUTSIDE = 10 + 19, 23
# Under autocast: 8 parameters and the input of 2 products, there and back; 2 gradients of sums.
CONVERSIONS_PER_BLOCK, CONVERSIONS_OUTSIDE = 2 * (8 + 2) + 2, 6
# The forward, and keys and values written to the cache; outside: embeddings, head, sampling.
PER_BLOCK_SAMPLED, OUTSIDE_SAMPLED = 12, 13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_starts_no_more_kernels_than_it_did(gpu, dtype):
    """On a GPU a step of few tokens takes as long as the host needs to start them."""
    trained("cuda", dtype, 2, BLOCKS, gpu)
    launches, allowed = gpu.launches(), 0
    if dtype == torch.bfloat16:
        allowed = CONVERSIONS_PER_BLOCK * BLOCKS + CONVERSIONS_OUTSIDE
    assert launches["aten._to_copy"] <= allowed
    assert launches.total() <= PER_BLOCK * BLOCKS + OUTSIDE + allowed


def test_a_sampled_token_starts_no_more_kernels_than_it_did(gpu):
    net, prompt, counts = model(BLOCKS).to("cuda"), tokens("cuda"), []
    for new in (3, 4):
        gpu.clear()
        generate(net, prompt, new)
        counts.append(gpu.launches().total())
    allowed = PER_BLOCK_SAMPLED * BLOCKS + OUTSIDE_SAMPLED
    assert counts[1] - counts[0] <= allowed
