"""Data parallelism under torchrun; without it there is a single rank.

    torchrun --nproc-per-node 2 -m train.xfactor --model tiny

Every rank holds the whole model and takes its shard of every batch, so a seed gives the same data
for any number of ranks. DistributedDataParallel averages the gradients during the backward pass.
The main rank prints, evaluates and writes.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # imported before a group exists: see `join`
from torch import Tensor, nn

TIMEOUT = timedelta(hours=2)  # the main rank evaluates and saves while the others wait
T = TypeVar("T")


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
def join() -> Iterator[torch.device]:
    """Join the other ranks, and yield the device of this one.

    Raises ValueError if this machine has too few GPUs, or if another rank has failed.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if here > gpus:
            expected = f"one per GPU; start torchrun with --nproc-per-node {gpus}"
            raise ValueError(f"{here} processes on a machine with {gpus} GPUs: expected {expected}")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if world_size() == 1:
        yield device
        return
    # Numbers on the CPU go through gloo, so that no rank waits for its GPU.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield device
    except RuntimeError as error:
        if "by peer" not in str(error):
            raise
        raise ValueError("another rank failed; see its error above") from error
    # After an error this is skipped: the other ranks may be in a collective that never completes,
    # and leaving the group would wait for them. torchrun stops them once this process has ended.
    # The group's threads must end before the interpreter does: one that frees a tensor later aborts
    # the process. They end with the last reference to the group, and if a group exists when
    # torch.distributed.nn.functional is first imported, its default arguments hold ten forever.
    dist.destroy_process_group()


def shard(batch: Tensor) -> Tensor:
    """Return this rank's rows of the global batch: (B, T) -> (B / world_size, T)."""
    return batch.chunk(world_size())[rank()]


def parallel(model: nn.Module) -> nn.Module:
    """Return a module with the same forward, whose backward averages gradients over the ranks."""
    return model if world_size() == 1 else nn.parallel.DistributedDataParallel(model)


def mean(values: Tensor) -> Tensor:
    """Return the elementwise mean over the ranks; every rank must call it."""
    if world_size() > 1:
        values = values / world_size()
        dist.all_reduce(values)
    return values


def largest(value: int) -> int:
    """Return the largest value on any rank; every rank must call it."""
    if world_size() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.int32)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def from_main(value: T) -> T:
    """Return the main rank's value on every rank; every rank must call it."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values, device=torch.device("cpu"))
    return values[0]
