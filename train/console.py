"""What a run says on the terminal: what runs and where, and how far it is."""

import torch
from tqdm import tqdm

from kernels import TwoLevelTarget
from train.options import Options
from train.parallel import Processes
from train.run import Run


def describe(options: Options, goal: str, target: TwoLevelTarget, processes: Processes) -> str:
    """What runs, and where, in the words that a user needs before waiting for it."""
    device, where = processes.device, processes.device_name
    if processes.count > 1:
        where += f" in {processes.count} processes"
    named = options.weights in (None, "random")
    model = options.model if named else f"the model in {options.weights}"
    lines = [
        f"{model}{' of random weights' if options.weights == 'random' else ''} in {options.dtype}"
        f"{', compiled,' if options.compile else ''} on {where}, "
        f"loss: {options.loss} ({loss_path(options.loss, device)})",
        f"{target.size} of {target.vocab_size} tokens are the goal: {goal}",
    ]
    if device.type == "cpu" and named and options.model != "tiny":
        lines.append(
            "No CUDA device was found. On a CPU the larger models take seconds a step, and 7 GiB "
            "of memory in gpt2-medium; --model tiny takes a minute."
        )
    return "\n".join(lines)


def loss_path(loss: str, device: torch.device) -> str:
    """Which implementation a choice of --loss runs on a device."""
    if loss == "unfused":
        return "F.log_softmax, F.kl_div"
    return "Triton kernels" if device.type == "cuda" else "PyTorch path"


def progress_bar(run: Run, lr: float, options: Options) -> tqdm:
    """Of the steps; in the first process only."""
    total, label = options.steps, f"lr {lr:g}"
    return tqdm(total=total, initial=run.step, desc=label, unit="step", disable=not run.writes)


def advance(bar: tqdm, run: Run, tokens: int) -> None:
    """Count a step of so many tokens; with loss, mass and speed where the bar is redrawn.

    Only then, and at the last step, is the device waited for.
    """
    if bar.update() or (run.step == bar.total and not bar.disable):
        loss, mass = run.flush()
        rate = (bar.n - bar.initial) / bar.format_dict["elapsed"]
        bar.set_postfix_str(f"loss {loss:.4f}, mass {mass:.4f}, {rate * tokens:,.0f} tokens/s")
