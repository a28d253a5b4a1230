"""The X-factor experiment: fine-tune GPT-2 toward tokens that contain the letter X.

    python -m train.xfactor                                 gpt2-medium, learning rate 1e-4
    python -m train.xfactor --model tiny --lr 1e-5 1e-3     two rates on the embedded checkpoint

Every step draws token ids and pulls the model's prediction at every position toward the target, a
distribution that lies on the tokens with the letter. A small learning rate nudges the model, a
large one collapses it: the table at the end says which, in numbers.
"""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from tqdm import tqdm

from kernels import TwoLevelTarget, fused_kl_div, fused_linear_kl_div
from kernels.reference import kl_div
from model import GPT2
from model.tokenizer import load_tokenizer
from train.evaluate import evaluate
from train.inputs import Inputs, read_text
from train.objective import find_members, mass_on_members
from train.report import Run, print_report, save_report
from weights import layout_of, load_weights

Loss = Callable[[Tensor, Tensor, TwoLevelTarget], Tensor]

LOSSES: dict[str, Loss] = {
    "linear": fused_linear_kl_div,
    "fused": lambda hidden, weight, target: fused_kl_div(F.linear(hidden, weight), target),
    "unfused": lambda hidden, weight, target: kl_div(F.linear(hidden, weight), target),
}


@dataclass(frozen=True)
class Options:
    """Fine-tune GPT-2 toward tokens that contain a letter."""

    model: Literal["gpt2-medium", "gpt2", "gpt2-xl", "tiny"] = "gpt2-medium"  # what to start from
    weights: Path | None = None  # a safetensors file, or a folder with one, in place of --model
    lr: tuple[float, ...] = (1e-4,)  # learning rates of Adam: a run each, same seed, same data
    steps: int = 300  # optimisation steps of a run
    batch: int = 4  # B, sequences in a step
    length: int = 64  # T, tokens in a sequence
    letter: str = "X"  # members are the tokens that contain it; any string will do
    match_case: bool = False  # tell "X" from "x"
    alpha: float = 1.0  # relative weight of a member in the target
    beta: float = 0.0  # relative weight of any other token; alpha > beta >= 0
    inputs: str = "random"  # "random" token ids, or a text file: windows of it
    loss: Literal["linear", "fused", "unfused"] = "linear"  # fused with the LM head; alone; not
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the products; weights stay float32
    seed: int = 0  # of the inputs and the samples
    out: Path = Path("runs/xfactor")  # folder for curves.png and results.json


def training_steps(
    model: GPT2,
    optimizer: torch.optim.Optimizer,
    target: TwoLevelTarget,
    draw: Callable[[], Tensor],
    loss_fn: Loss,
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The experiment: the same six things, each time the caller asks for a step.

    Args:
        model: trained in place, on whatever device it is.
        optimizer: of the model's parameters.
        draw: gives a step's token ids, int64 (B, T).
        loss_fn: (hidden (B, T, C), weight (V, C), target) -> mean KL over the B T positions.
        dtype: torch.bfloat16 runs the matrix products under autocast; weights stay float32.

    Yields:
        The step's loss in nats and the model's mass on the members, both before Adam's update:
        scalars on the device, so that nobody waits for it who does not look at them.
    """
    weight = model.wte.weight  # the LM head is the embedding
    half = dtype != torch.float32
    autocast = torch.autocast(weight.device.type, dtype) if half else nullcontext()
    while True:
        model.train()
        tokens = draw()  # 1. token ids (B, T)
        with autocast:
            hidden = model.hidden_states(tokens)  # 2. forward (B, T, C)
            loss = loss_fn(hidden, weight, target)  # 3. log-softmax and 4. KL to the target
            mass = mass_on_members(hidden, weight, target.index)
        optimizer.zero_grad(set_to_none=False)  # fresh pages for the gradients would cost more
        loss.backward()  # 5. backward
        optimizer.step()  # 6. Adam
        yield loss.detach(), mass


def check(options: Options) -> None:
    """Refuse what cannot run, before any model is loaded; raises ValueError."""
    for name in ("steps", "batch", "length"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)}: expected at least 1")
    for lr in options.lr:
        if not (math.isfinite(lr) and lr >= 0):
            raise ValueError(f"--lr {lr:g}: expected a finite rate, 0 or more; for instance 1e-4")
    if len(set(options.lr)) < len(options.lr) or not options.lr:
        raise ValueError(f"--lr {options.lr}: expected one or several rates, each once")
    layout = layout_of(options.weights or options.model)
    if options.length > layout.n_positions:
        raise ValueError(
            f"--length {options.length}: the model has {layout.n_positions} positions; "
            f"expected 1 to {layout.n_positions}"
        )
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / ".writable").touch()
        (options.out / ".writable").unlink()
    except OSError as error:
        raise ValueError(f"--out {options.out}: cannot write there: {error}") from error


def experiment(options: Options) -> None:
    """A run for each learning rate from the same start; then table, samples and curves."""
    tokenizer, text = load_tokenizer(), None
    members = find_members(tokenizer, options.letter, options.match_case)
    target = TwoLevelTarget(members, options.alpha, options.beta)
    if options.inputs != "random":
        text = read_text(Path(options.inputs), tokenizer, options.length)
    check(options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(describe(options, target, device))

    target = target.to(device)
    state_dict = load_weights(options.weights or options.model)
    start = GPT2.from_state_dict(state_dict, assign=True).to(device)
    before = evaluate(start, start, tokenizer, target.members, options.seed)
    runs = []
    for lr in options.lr:
        model = GPT2.from_state_dict(start.state_dict())
        optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
        inputs = Inputs(
            tokenizer.n_vocab, options.batch, options.length, options.seed, device, text
        )
        dtype = getattr(torch, options.dtype)
        steps = training_steps(model, optimizer, target, inputs.draw, LOSSES[options.loss], dtype)
        losses, masses, seconds = record(islice(steps, options.steps), options, lr)
        after = evaluate(model, start, tokenizer, target.members, options.seed)
        runs.append(Run(lr, losses, masses, seconds, after))
    print_report(before, runs)
    for path in save_report(options.out, asdict(options), before, runs):
        print(f"wrote {path}")


def record(
    steps: Iterator[tuple[Tensor, Tensor]], options: Options, lr: float
) -> tuple[list[float], list[float], float]:
    """Run the steps under a progress bar; losses, masses, and the seconds it took."""
    tokens, results = options.batch * options.length, []
    with tqdm(total=options.steps, desc=f"lr {lr:g}", unit="step") as bar:
        for result in steps:
            results.append(result)
            if bar.update():  # True where the bar was redrawn: only then wait for the device
                rate = bar.n / bar.format_dict["elapsed"]
                loss, mass = (x.item() for x in result)
                shown = f"loss {loss:.4f}, mass {mass:.4f}, {rate * tokens:,.0f} tokens/s"
                bar.set_postfix_str(shown, refresh=False)
        losses, masses = torch.tensor(results, device="cpu").T.tolist()
        return losses, masses, bar.format_dict["elapsed"]


def describe(options: Options, target: TwoLevelTarget, device: torch.device) -> str:
    """What runs, and where, in the words that a user needs before waiting for it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    lines = [
        f"{options.weights or options.model} in {options.dtype} on {name}, "
        f"loss: {options.loss} ({loss_path(options.loss, device)})",
        f"{target.size} of {target.vocab_size} tokens contain {options.letter!r}",
    ]
    if device.type == "cpu" and options.model != "tiny":
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


def main() -> None:
    """The command line: a bad option or weight file ends in one line."""
    options = tyro.cli(Options, description=__doc__)
    try:
        experiment(options)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
