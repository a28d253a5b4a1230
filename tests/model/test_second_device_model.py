"""The model on the second device: the CPU's text, no wait in a step, and what a step starts."""

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
    """From a tensor of prompts, which waits once, to check that they lie in the vocabulary, unless
    it may stop; and from a list of prompts of two lengths, which needs padding."""

    def sample(device, prompts):
        generator, net = torch.Generator(device).manual_seed(1), model().to(device)
        gpu.clear()
        return generate(net, prompts, 12, generator=generator, **options)

    got = sample("cuda", tokens("cuda"))
    assert "stop" in options or gpu.waits().total() == 1
    assert got.tolist() == sample("cpu", tokens("cpu")).tolist()
    prompts = [[1, 2, 3], [4]]
    assert sample("cuda", prompts) == sample("cpu", prompts)


BLOCKS = 24  # gpt2-medium's; its width does not change how many kernels a step starts
# Forward: 2 LayerNorms, 4 products, attention, gelu, 2 sums. Backward: 8 products, 4 sums over rows
# for biases, the join of q, k and v, and one for each of the others.
PER_BLOCK, OUTSIDE = 10 + 19, 23
# Under autocast: 8 parameters and the input of 2 products, there and back; 2 gradients of sums.
CONVERSIONS_PER_BLOCK, CONVERSIONS_OUTSIDE = 2 * (8 + 2) + 2, 6
# The forward, and keys and values written to the cache; outside: embeddings, head, sampling.
PER_BLOCK_SAMPLED, OUTSIDE_SAMPLED = 12, 13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_waits_for_nothing_and_starts_no_more_kernels_than_it_did(gpu, dtype):
    """On a GPU a step of few tokens takes as long as the host needs to start them. Ids from pinned
    memory, forward, loss, backward, Adam; the first step also makes Adam's state."""
    net, batch = model(BLOCKS).to("cuda"), tokens("cpu").pin_memory()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2, fused=True)
    for _ in range(2):
        gpu.clear()
        ids = batch.to("cuda", non_blocking=True)
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            logits = net(ids)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert not gpu.waits()
    assert gpu.copies().total() == 1  # the ids
    allowed = 0
    if dtype == torch.bfloat16:
        allowed = CONVERSIONS_PER_BLOCK * BLOCKS + CONVERSIONS_OUTSIDE
    assert gpu.launches()["aten._to_copy"] <= allowed
    assert gpu.launches().total() <= PER_BLOCK * BLOCKS + OUTSIDE + allowed


def test_a_sampled_token_starts_no_more_kernels_than_it_did(gpu):
    net, prompt, counts = model(BLOCKS).to("cuda"), tokens("cuda"), []
    for new in (3, 4):
        gpu.clear()
        generate(net, prompt, new)
        counts.append(gpu.launches().total())
    assert counts[1] - counts[0] <= PER_BLOCK_SAMPLED * BLOCKS + OUTSIDE_SAMPLED
