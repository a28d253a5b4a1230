"""Data parallelism as torchrun starts it; without torchrun there is one rank, which is alone.

    torchrun --nproc-per-node 2 -m train.xfactor --model tiny

Every rank holds the whole model and takes its shard of a batch that all ranks draw alike, so a seed
names the same data for any number of ranks. After the backward pass the gradients are averaged,
then Adam makes the same update everywhere. (DistributedDataParallel averages during the backward
pass, which hides the communication, but also the step.) The main rank alone prints, evaluates and
writes.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # imported before a group exists: see `process_group`
from torch import Tensor, nn

TIMEOUT = timedelta(hours=2)  # the other ranks wait while the main rank evaluates or saves


def rank() -> int:
    """Return this process's number among all."""
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
    # Flags travel by gloo, on the CPU, so that no device is waited for.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT
    )
    try:
        yield device
    except RuntimeError as error:
        if "by peer" not in str(error):
            raise
        raise ValueError(
            f"rank {rank()} of {world_size()} ended because another one did; see its message"
        ) from error
    # Not after an error: the other ranks may sit in a collective that never completes, and leaving
    # the group would wait for them. torchrun ends them once this process has ended.
    #
    # The group's threads must end before the interpreter does, or one that drops a tensor aborts
    # the process. They end with the last reference to the group; torch.distributed.nn.functional
    # keeps ten for good, as default arguments, if it is first imported after the group was made.
    dist.destroy_process_group()


def shard(batch: Tensor) -> Tensor:
    """Return this rank's rows of the global batch: (B, T) -> (B / world_size, T)."""
    return batch.chunk(world_size())[rank()]


def average_gradients(model: nn.Module) -> None:
    """Replace the gradient of every parameter by its mean over the ranks."""
    if world_size() > 1:
        for p in model.parameters():
            if p.grad is not None:
                p.grad = all_reduce_mean(p.grad)


def all_reduce_mean(values: Tensor) -> Tensor:
    """Return the mean over the ranks, element by element, on the device of the values."""
    if world_size() == 1:
        return values
    values = values / world_size()
    dist.all_reduce(values)
    return values


def all_reduce_max(value: int) -> int:
    """Return the largest value of any rank; all ranks must call it."""
    if world_size() == 1:
        return value
    largest = torch.tensor(value, dtype=torch.int32, device="cpu")
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def barrier() -> None:
    """Return when all ranks have come here."""
    all_reduce_max(0)
