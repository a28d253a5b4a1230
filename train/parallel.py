"""Several processes, one model: data parallelism as torchrun starts it.

    torchrun --nproc-per-node 2 -m train.xfactor --model tiny

Each process holds the whole model and takes its rows of a batch that all of them draw alike, so a
seed names the same data however many there are. DistributedDataParallel averages the gradients
while the backward still runs; Adam then makes the same update everywhere. Process 0 alone prints,
evaluates and writes. Started without torchrun there is one process, and nothing here communicates.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before a group is made: see __exit__
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model import GPT2

# An evaluation or a save by process 0 is what the others may have to wait for.
TIMEOUT = timedelta(hours=2)


class Processes:
    """This process, its device, and what it shares with the others; a context manager."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.device = torch.device("cpu")

    @property
    def is_first(self) -> bool:
        """Whether this one prints, evaluates and writes."""
        return self.rank == 0

    @property
    def device_name(self) -> str:
        """The GPU's name, or "CPU"."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"

    def __enter__(self) -> "Processes":
        """Joins the others; leaving raises ValueError where one of them has gone.

        Raises ValueError where this machine has too few GPUs for them.
        """
        if torch.cuda.is_available():
            local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
            if local >= gpus:
                raise ValueError(
                    f"{local + 1} processes or more on a machine with {gpus} GPUs: expected one "
                    f"process a GPU; start torchrun with --nproc-per-node {gpus}"
                )
            self.device = torch.device("cuda", local)
            torch.cuda.set_device(self.device)
        if self.count > 1:  # flags travel between hosts by gloo: no device is waited for
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=TIMEOUT)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # After an error the others may sit in a collective operation that will never complete, and
        # leaving the group would wait for them. torchrun ends them once this process has ended.
        #
        # The group's threads must have ended before the interpreter does: one that lets go of a
        # tensor then aborts the process. They end with the last reference to the group, and
        # torch.distributed.nn.functional, if DistributedDataParallel is the first to import it,
        # takes ten of them for good, as default arguments.
        if self.count > 1 and error is None:
            dist.destroy_process_group()
        if isinstance(error, RuntimeError) and "by peer" in str(error):
            raise ValueError(
                f"process {self.rank} of {self.count} ended because another one did; the message "
                "of that one is the reason"
            ) from error

    def print(self, text: str) -> None:
        """Print it once, whatever the number of processes."""
        if self.is_first:
            print(text)

    def rows(self, tokens: Tensor) -> Tensor:
        """This process's share of the global batch (B, T): (B / count, T)."""
        share = len(tokens) // self.count
        return tokens[self.rank * share : (self.rank + 1) * share]

    def hidden_states(self, model: GPT2) -> Callable[[Tensor], Tensor]:
        """model.hidden_states, averaging the gradients of all processes in its backward."""
        if self.count == 1:
            return model.hidden_states
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(_HiddenStates(model), devices, gradient_as_bucket_view=True)

    def mean(self, *values: Tensor) -> list[Tensor]:
        """The mean over the processes of each scalar."""
        if self.count == 1:
            return list(values)
        total = torch.stack([v.float() for v in values])
        dist.all_reduce(total)
        return list((total / self.count).unbind())

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process; all of them must ask."""
        if self.count == 1:
            return flag
        raised = torch.tensor(flag, dtype=torch.int32, device="cpu")
        dist.all_reduce(raised, dist.ReduceOp.MAX)
        return bool(raised)

    def wait(self) -> None:
        """Return when all processes have come here."""
        self.any(False)


class _HiddenStates(nn.Module):
    """GPT2.hidden_states as a forward, which is what DistributedDataParallel wraps.

    The loss uses wte.weight a second time, as the LM head, outside this forward. That is sound: the
    gradients are averaged by hooks on the parameters, which run when all uses have been added up.
    """

    def __init__(self, model: GPT2) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.hidden_states(tokens)
