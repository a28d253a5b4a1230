"""The X-factor experiment: fine-tune GPT-2 toward tokens that contain the letter X.

    python -m train.xfactor                                 gpt2-medium, learning rate 1e-4
    python -m train.xfactor --model tiny --lr 1e-5 1e-3     two runs on the embedded checkpoint
    python -m train.xfactor --model tiny --tilt 3 5 7       a dial in place of a learning rate
    python -m train.xfactor --resume runs/xfactor           resume an interrupted run
    torchrun --nproc-per-node 2 -m train.xfactor            each rank takes its shard of every batch

Each step draws token ids and pulls the model's prediction at every position toward the target, a
distribution over the tokens that contain the letter. A small learning rate nudges the model, a
large one collapses it; the report shows which. With --tilt G the target is the start model's own
distribution with G nats added to the logits of the target tokens: G sets how many of them the model
writes, whatever the learning rate, and the text stays readable.
"""

import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le, MinLen
from pydantic import FiniteFloat
from torch import Tensor
from tyro.conf import arg

from kernels import TeacherTarget, TwoLevelTarget, fused_kl_div, fused_linear_kl_div
from kernels.reference import kl_div
from model import GPT2
from model.tokenizer import load_tokenizer
from train import checkpoint, console, cpu, distributed, inputs
from train.checkpoint import is_due
from train.evaluate import Evaluation, evaluate, target_probability
from train.target_tokens import Goal, choose_tokens, make_target

Count = Annotated[int, Ge(1), Le(65_536)]
Steps = Annotated[int, Ge(0), Le(10**9)]


@dataclass(frozen=True)
class Start:
    """The start model: the one before fine-tuning."""

    model: Literal["gpt2-medium", "gpt2", "gpt2-xl", "tiny"] = "gpt2-medium"
    """the model to fine-tune: official ones are downloaded once, tiny is embedded"""
    weights: Annotated[str, arg(metavar="random|PATH", help_behavior_hint="")] = ""
    """random, a safetensors file, or a folder that holds one (default: the model's own)"""


@dataclass(frozen=True)
class Optimisation:
    """Data, learning rates, precision."""

    inputs: Annotated[str, arg(metavar="random|samples|FILE", help_behavior_hint="")] = ""
    """random ids, text sampled from the start, or a file (default: random; with --tilt, samples)"""
    lr: Annotated[tuple[Annotated[FiniteFloat, Ge(0)], ...], MinLen(1)] = (1e-4,)
    """Adam's learning rates, one run each"""
    steps: Annotated[int, Ge(1), Le(10**9)] = 300  # optimisation steps per run
    batch: Count = 4  # B, sequences per step
    length: Count = 64  # T, tokens per sequence
    loss: Literal["linear", "fused", "unfused"] = "linear"
    """linear: fused with the LM head; fused: loss only; unfused: PyTorch"""
    dtype: Literal["float32", "tf32", "bfloat16"] = "float32"
    """precision of matrix products; the weights stay float32, and tf32 needs CUDA"""
    compile: bool = False  # torch.compile the forward pass: takes a minute, then steps are faster
    seed: Annotated[int, Ge(0), Le(2**63 - 1)] = 0  # of the inputs, samples and random weights


@dataclass(frozen=True)
class Output:
    """Files, and how often they are written."""

    eval_every: Steps = 0  # steps between evaluations; 0: before the first and after the last only
    save_every: Steps = 100  # steps between checkpoints; 0: after the last only
    out: Path = Path("runs/xfactor")  # folder for the runs and their report
    resume: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="")] = None
    """resume the runs in this folder with their own options (default: start new runs)"""


@dataclass(frozen=True)
class Options(Output, Optimisation, Goal, Start):
    """All options; --help shows one group per base class, the last one first."""


def get_batch(options: Options, text: Tensor | None, generator: torch.Generator) -> Tensor:
    """Draw this rank's token ids for one step, int64 (B / world size, T).

    Drawn on the CPU, so that a seed gives the same data on every device.
    """
    if text is None:
        shape = options.batch, options.length
        tokens = torch.randint(load_tokenizer().n_vocab, shape, generator=generator)
    else:
        windows = len(text) - options.length + 1
        first = torch.randint(windows, (options.batch, 1), generator=generator)
        tokens = text[first + torch.arange(options.length)]
    return distributed.shard(tokens)


def fine_tune(
    options: Options,
    folder: Path,
    lr: float,
    target: TwoLevelTarget,
    bias: Tensor | None,
    start: GPT2,
    before: Evaluation | None,
    text: Tensor | None,
    origin: dict[str, str],
) -> str:
    """Fine-tune at one learning rate, from the last checkpoint on; return why it diverged, or "".

    Args:
        target: the two-level target, on the device to train on.
        bias: (V,), on the same device: the target is then softmax(start's logits + bias) instead.
        start: the model before fine-tuning, on the CPU. before: its evaluation; None on a resume.
        text: ids to draw windows from, int64 (n,), or None for random ids.
        origin: digests of what the run started from, see `checkpoint.origin`.

    Raises ValueError if the folder cannot be read or written, Interrupted after a signal.
    """
    p: TwoLevelTarget | TeacherTarget = target
    index, device, is_main = target.index, target.mask.device, distributed.is_main()
    model = GPT2.from_state_dict(start.state_dict()).to(device)
    forward = torch.compile(model.hidden_states) if options.compile else model.hidden_states
    wte = model.wte.weight  # the LM head is the embedding, (V, C)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    generator = torch.Generator("cpu").manual_seed(options.seed)
    state = model, optimizer, generator
    step = done = checkpoint.resume(folder, state, origin)
    if is_main and before and done == 0:
        checkpoint.append_evaluation(folder, 0, before)
    if is_main and done:
        console.say(f"{folder.name}: resumes after step {done}")
    start.to("cpu" if bias is None else device)
    pending: list[Tensor] = []  # (loss, target probability[, predicted]) of steps not yet logged
    problem, stop, logged = "", 0, time.perf_counter()
    with console.progress(folder.name, done, options.steps) as bar, console.signals() as received:
        for step in range(done + 1, options.steps + 1):
            model.train()
            tokens = get_batch(options, text, generator).to(device)  # 1. token ids (B, T)
            with torch.autocast(device.type, torch.bfloat16, options.dtype == "bfloat16"):
                hidden = forward(tokens)  # 2. forward (B, T, C)
                if bias is not None:  # the target is the tilted start model
                    start_hidden, start_wte = start.hidden_states(tokens), start.wte.weight
                    p = TeacherTarget.from_hidden(start_hidden, start_wte, bias)
                    if options.loss != "linear":
                        p = TeacherTarget(F.linear(start_hidden, start_wte), bias)  # (B, T, V)
                if options.loss == "linear":  # 3. log-softmax and 4. KL to the target
                    loss, *lse = fused_linear_kl_div(hidden, wte, p, return_lse=True)
                else:
                    logits = F.linear(hidden, wte)  # (B, T, V)
                    loss = (fused_kl_div if options.loss == "fused" else kl_div)(logits, p)
                    lse = [logits.detach().float().logsumexp(-1)]  # (B, T)
                    if isinstance(p, TeacherTarget):
                        lse.append(p.whole_logits(torch.float32).logsumexp(-1))
                measured = [loss.detach(), target_probability(hidden, wte, index, lse[0])]
                if bias is not None:  # the same under the target
                    predicted = target_probability(start_hidden, start_wte, index, lse[1], bias)
                    measured.append(predicted)
            optimizer.zero_grad()
            loss.backward()  # 5. backward
            distributed.average_gradients(model)
            optimizer.step()  # 6. Adam

            pending.append(distributed.all_reduce_mean(torch.stack(measured)))
            stop = distributed.all_reduce_max(received[0] if received else 0)
            evaluating = is_due(step, options.eval_every, options.steps)
            saving = stop or is_due(step, options.save_every, options.steps)
            seconds = time.perf_counter() - logged
            if evaluating or saving or seconds > console.interval(bar):
                results = torch.stack(pending).tolist()  # the only wait for the device
                pending.clear()
                if is_main:
                    problem = checkpoint.append_steps(folder, step, results, seconds)
                    tokens_drawn = len(results) * options.batch * options.length
                    speed = tokens_drawn / max(seconds, 1e-9)  # the clock may not have advanced
                    console.show(bar, step, results[-1], speed, evaluating)
                if is_main and evaluating and not problem:
                    evaluation = evaluate(model, start, load_tokenizer(), target.mask, options.seed)
                    problem = checkpoint.append_evaluation(folder, step, evaluation)
                if is_main and saving and not problem:
                    checkpoint.save(folder, step, state, origin)
                bar.unpause()  # leave evaluations and saves out of the rate
                logged = time.perf_counter()
            if distributed.all_reduce_max(bool(problem)):
                problem = problem or "the main rank says why"
                saved = checkpoint.last_save(folder)
                return f"{problem}; {saved}. Try a smaller --lr, with another --out"
            if stop:
                break
    if is_main:
        checkpoint.save_model(folder, model)
    distributed.barrier()
    if stop := stop or next(iter(received), 0):  # or a signal since the last step
        raise console.Interrupted(stop, f" after step {step}, which is saved")
    return ""


def experiment(options: Options) -> None:
    """Run every learning rate from the same start model, each in its own folder; then report.

    A rate that diverges ends only its own run; a ValueError names it after the report.
    """
    with distributed.process_group() as device, ExitStack() as stack:
        tokenizer, is_main = load_tokenizer(), distributed.is_main()
        layout = inputs.check(options, device)
        wanted, goal = choose_tokens(tokenizer, options)
        target = make_target(wanted > 0, options.alpha, options.beta, options.mass)
        source = options.inputs or ("samples" if options.tilt else "random")
        from_file = source not in ("random", "samples")
        text = inputs.read_text(source, tokenizer, options.length) if from_file else None
        runs = {
            f"lr-{lr}" if tilt is None else f"tilt-{tilt}-lr-{lr}": (lr, tilt)
            for tilt in options.tilt or (None,)
            for lr in options.lr
        }
        if is_main:
            opened = checkpoint.open_folder(options.out, list(runs), bool(options.resume))
            stack.enter_context(opened)
            console.describe(options, goal, target)
        cpu.prepare(device, options.length)
        if options.dtype == "tf32":
            torch.set_float32_matmul_precision("high")
        start = inputs.load_start(options, layout)
        origin = checkpoint.origin(options, start, wanted, source if text is None else text)
        target, wanted, before = target.to(device), wanted.to(device), None
        done = [0]
        if is_main:
            done = [checkpoint.read(options.out / name, start, origin)[0] for name in runs]
            if max(done) > options.steps:
                got = f"--steps {options.steps}: a run in {options.out} has done {max(done)}"
                raise ValueError(f"{got} already; give more")
            about: dict[str, Any] = {
                "options": asdict(options),
                "goal": goal,
                "target_token_ids": target.index.tolist(),
                "alpha": target.alpha,
                "beta": target.beta,
                "device": distributed.device_name(device),
                "dtype": options.dtype,
            }
            for name, (lr, tilt) in runs.items():
                about |= {"lr": lr, "tilt": tilt}
                checkpoint.create(options.out / name, layout.config(), about)
        if source == "samples":
            text = inputs.sample_text(options.out, start, options.seed, device, any(done))
        if is_main and not all(done):
            console.say("evaluating the model before fine-tuning")
            before = evaluate(start.to(device), start, tokenizer, target.mask, options.seed)
        distributed.barrier()  # every rank has accepted the options, and the folders exist
        problems = []
        for name, (lr, tilt) in runs.items():
            bias = None if tilt is None else tilt * wanted
            run = options.out / name, lr, target, bias
            if problem := fine_tune(options, *run, start, before, text, origin):
                problems.append(f"{name}: {problem}")
        if is_main:
            console.report([options.out / name for name in runs], options.out)
        distributed.barrier()
        if problems:
            raise ValueError("; ".join(problems))


def main() -> None:
    """Run the command line."""
    with console.command():
        experiment(console.parse_options(Options, sys.argv[1:], __doc__))


if __name__ == "__main__":
    main()
