"""Data parallelism under torchrun; without it there is a single rank.

    torchrun --nproc-per-node 2 -m train.xfactor --model tiny

Every rank holds the whole model, draws the same batch and takes its shard of it, so a seed gives
the same data for any number of ranks. After the backward pass the gradients are averaged,
then Adam makes the same update everywhere. (DistributedDataParallel averages during the backward
pass, which hides the communication, but also the step.)
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # imported before a group exists: see `process_group`
from torch import Tensor, nn

TIMEOUT = timedelta(hours=2)  # the main rank evaluates and saves while the others wait


def rank() -> int:
    """Return the number of this process."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Return whether this process prints, evaluates and writes."""
    return rank() == 0


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or "CPU"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Join the other ranks, and yield the device of this one.

    Raises ValueError if this machine has too few GPUs, or if another rank has ended.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= gpus:
            raise ValueError(
                f"got {local + 1} or more processes on a machine with {gpus} GPUs, expected one "
                f"process per GPU; start torchrun with --nproc-per-node {gpus}"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if world_size() == 1:
        yield device
        return
    # Flags go through gloo on the CPU, so that no rank waits for its GPU.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield device
    except RuntimeError as error:
        if "by peer" not in str(error):
            raise
        raise ValueError(
            f"rank {rank()} of {world_size()} ended because another one did; unless that was "
            "killed, its message says why"
        ) from error
    # Skipped after an error: the other ranks may be in a collective that never completes, and
    # leaving the group would wait for them. torchrun stops them once this process has ended.
    # The group's threads must end before the interpreter does: one that frees a tensor later aborts
    # the process. They end with the last reference to the group, and if a group exists when
    # torch.distributed.nn.functional is first imported, its default arguments hold ten forever.
    dist.destroy_process_group()


def shard(batch: Tensor) -> Tensor:
    """Return this rank's rows of the global batch: (B, T) -> (B / world_size, T)."""
    return batch.chunk(world_size())[rank()]


def average_gradients(model: nn.Module) -> None:
    """Replace the gradient of every parameter by its mean over the ranks."""
    for p in model.parameters():
        if p.grad is not None:
            p.grad = all_reduce_mean(p.grad)


def all_reduce_mean(values: Tensor) -> Tensor:
    """Return the elementwise mean over the ranks."""
    if world_size() > 1:
        values = values / world_size()
        dist.all_reduce(values)
    return values


def all_reduce_max(value: int) -> int:
    """Return the largest value on any rank; every rank must call it."""
    if world_size() == 1:
        return value
    largest = torch.tensor(value, dtype=torch.int32, device="cpu")
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def barrier() -> None:
    """Wait until every rank has called it."""
    all_reduce_max(0)
