"""The X-factor experiment: fine-tune GPT-2 toward tokens that contain the letter X.

    python -m train.xfactor                                 gpt2-medium, learning rate 1e-4
    python -m train.xfactor --model tiny --lr 1e-5 1e-3     two rates on the embedded checkpoint
    python -m train.xfactor --resume runs/xfactor           go on where a run was stopped
    torchrun --nproc-per-node 2 -m train.xfactor            each process takes half of every batch

Every step draws token ids and pulls the model's prediction at every position toward the target, a
distribution that lies on the tokens with the letter. A small learning rate nudges the model, a
large one collapses it: the table at the end says which, in numbers.
"""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import TwoLevelTarget, fused_kl_div, fused_linear_kl_div
from kernels.reference import kl_div
from model import GPT2, GPT2Config
from model.gpt2 import HEAD_DIM
from model.tokenizer import load_tokenizer
from train.console import advance, describe, progress_bar
from train.evaluate import Evaluation, evaluate
from train.folders import create, lock, reopen
from train.inputs import Inputs, read_text
from train.machine import forward_context, prepare
from train.objective import choose_members, make_target, mass_on_members
from train.options import Options, check, layout_of_start, parse_options, run_configs
from train.parallel import Processes
from train.report import print_report, write_report
from train.run import DivergedError, Run
from train.saves import Training
from train.signals import Stopped, StopSignals
from weights import load_weights

Loss = Callable[[Tensor, Tensor, TwoLevelTarget], tuple[Tensor, Tensor]]


def on_logits(kl: Callable[[Tensor, TwoLevelTarget], Tensor]) -> Loss:
    """A loss on logits as one on hidden states: (loss, log-sum-exp of each row's logits)."""

    def loss(hidden: Tensor, weight: Tensor, target: TwoLevelTarget) -> tuple[Tensor, Tensor]:
        logits = F.linear(hidden, weight)
        return kl(logits, target), logits.detach().float().logsumexp(-1)

    return loss


LOSSES: dict[str, Loss] = {
    "linear": lambda *arguments: fused_linear_kl_div(*arguments, return_lse=True),
    "fused": on_logits(fused_kl_div),
    "unfused": on_logits(kl_div),
}


def training_steps(
    model: GPT2,
    optimizer: torch.optim.Optimizer,
    target: TwoLevelTarget,
    draw: Callable[[], Tensor],
    loss_fn: Loss,
    dtype: torch.dtype = torch.float32,
    hidden_states: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The experiment: the same six things, each time the caller asks for a step.

    Args:
        model: trained in place, on whatever device it is.
        optimizer: of the model's parameters.
        draw: gives a step's token ids, int64 (B, T).
        loss_fn: (hidden (B, T, C), weight (V, C), target) -> mean KL over the B T positions, and
            the log-sum-exp of each one's logits (B, T).
        dtype: torch.bfloat16 runs the matrix products under autocast; weights stay float32.
        hidden_states: the model's own by default; `Processes` gives one for several processes.

    Yields:
        The step's loss in nats and the model's mass on the members, both before Adam's update:
        scalars on the device, so that nobody waits for it who does not look at them.
    """
    hidden_states = hidden_states or model.hidden_states
    weight = model.wte.weight  # the LM head is the embedding
    while True:
        model.train()
        tokens = draw()  # 1. token ids (B, T)
        with forward_context(tokens, dtype):
            hidden = hidden_states(tokens)  # 2. forward (B, T, C)
            loss, lse = loss_fn(hidden, weight, target)  # 3. log-softmax and 4. KL to the target
            mass = mass_on_members(hidden, weight, target.index, lse)
        optimizer.zero_grad()
        loss.backward()  # 5. backward
        optimizer.step()  # 6. Adam
        yield loss.detach(), mass


class Experiment:
    """What the runs of one command share: goal, data, the model to start from, the processes.

    Raises ValueError, before any model is loaded, at options that cannot run.
    """

    def __init__(self, options: Options, processes: Processes) -> None:
        self.options, self.processes, self.device = options, processes, processes.device
        self.tokenizer, self.text = load_tokenizer(), None
        members, goal = choose_members(
            self.tokenizer,
            options.letter,
            options.contains,
            options.regex,
            options.tokens,
            options.match_case,
        )
        self.target = make_target(members, options.alpha, options.beta, options.mass)
        if options.inputs != "random":
            self.text = read_text(Path(options.inputs), self.tokenizer, options.length)
        check(options, processes.count)
        self.configs = run_configs(options, goal, self.target, self.text, processes.device_name)
        processes.print(describe(options, goal, self.target, processes))
        prepare(self.device, options.dtype)
        self.target = self.target.to(self.device)
        self.start = starting_model(options)

    @cached_property
    def before(self) -> Evaluation:
        """Of the start: the same for every run, and not needed where all of them go on."""
        return self.measure(self.start)

    def measure(self, model: GPT2) -> Evaluation:
        """R and the perplexities of a model, and its samples."""
        seed, members = self.options.seed, self.target.mask
        self.start.to(self.device)  # only meanwhile: a step needs the memory for itself
        try:
            return evaluate(model, self.start, self.tokenizer, members, seed)
        finally:
            self.start.cpu()

    def fine_tune(self, run: Run, config: dict[str, Any]) -> None:
        """One run, from its newest save on: the steps, and what is kept of them.

        Raises:
            ValueError: the folder cannot be read or written.
            DivergedError: the loss or the logits are not finite.
            Stopped: a signal came; its step is saved.
        """
        options, processes = self.options, self.processes
        lr = config["xfactor"]["lr"]
        model = GPT2.from_state_dict(self.start.state_dict()).to(self.device)
        optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
        shape = self.tokenizer.n_vocab, options.batch, options.length
        inputs = Inputs(*shape, options.seed, self.device, self.text)
        training = Training(model, optimizer, inputs.generator)
        run.restore(training)
        processes.wait()  # until all have read what the first now cleans up
        run.begin(config)
        hidden_states = processes.hidden_states(model)
        steps = training_steps(
            model,
            optimizer,
            self.target,
            lambda: processes.rows(inputs.draw()),
            LOSSES[options.loss],
            torch.bfloat16 if options.dtype == "bfloat16" else torch.float32,
            torch.compile(hidden_states) if options.compile else hidden_states,
        )
        if run.step:
            processes.print(f"{run.folder} goes on after step {run.step}")
        else:
            run.evaluate(lambda: self.before)
        with StopSignals() as signals, progress_bar(run, lr, options) as bar:
            while run.step < options.steps:
                run.add(*processes.mean(*next(steps)))
                advance(bar, run, options.batch * options.length)
                if run.is_due(options.eval_every, options.steps):
                    run.evaluate(lambda: self.measure(model))
                stopped = processes.any(signals.received is not None)
                if stopped or run.is_due(options.save_every, options.steps):
                    run.save(training)
                # All learn it only now, once the save is whole: the end of one process is the end
                # of all under torchrun.
                if processes.any(run.diverged is not None):
                    raise run.diverged or DivergedError("in the first process", run.step)
                if stopped:
                    raise Stopped(signals.received or signal.SIGTERM, run.step)


def experiment(options: Options) -> None:
    """A run for each learning rate from the same start, each in its folder; then the report.

    A rate that diverges ends its own run only; the command then ends, after the report, in a
    ValueError that names it.
    """
    with Processes() as processes, ExitStack() as stack:
        shared = Experiment(options, processes)
        processes.wait()  # until all have accepted the options
        if processes.is_first:
            (reopen if options.resume else create)(options.out, shared.configs)
            stack.enter_context(lock(options.out))
        processes.wait()
        diverged = {}
        for name, config in shared.configs.items():
            try:
                shared.fine_tune(Run(options.out / name, writes=processes.is_first), config)
            except DivergedError as error:
                if not error.finite_steps:  # nor would any other rate do one
                    raise
                diverged[name] = error
                processes.print(f"{name} ends here: {error}")
        if processes.is_first:
            folders = [options.out / name for name in shared.configs]
            print_report(folders)
            for path in write_report(folders, options.out):
                print(f"wrote {path}")
        processes.wait()
        if diverged:
            raise ValueError("; ".join(f"{name}: {error}" for name, error in diverged.items()))


def starting_model(options: Options) -> GPT2:
    """The model before fine-tuning, on the CPU."""
    if options.weights != "random":
        state_dict = load_weights(options.weights or options.model)
        return GPT2.from_state_dict(state_dict, assign=True)
    sizes = layout_of_start(options)
    torch.manual_seed(options.seed)
    return GPT2(GPT2Config(**asdict(sizes), n_head=sizes.n_embd // HEAD_DIM))


def main() -> None:
    """The command line: a bad option or weight file ends in one line, a signal in how to go on."""
    try:
        experiment(options := parse_options(sys.argv[1:], __doc__ or ""))
    except ValueError as error:
        sys.exit(f"error: {error}")
    except Stopped as stopped:
        print(f"{stopped}; go on with --resume {options.out}", file=sys.stderr)
        sys.exit(128 + stopped.signal)
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        sys.exit(f"error: {reason} Try a smaller --batch, --dtype bfloat16 or --model gpt2")
    except KeyboardInterrupt:  # outside of the steps, where there is nothing to save
        print("interrupted; go on with --resume and the folder of --out", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
