"""A run on disk: one folder, which the same command continues.

    config.json        the model's configuration, as transformers reads it; under "xfactor" the
                       options, the target tokens, share and G, versions, device, fingerprints
    log.jsonl          {"step", "loss", "seconds"} for each step, seconds a mean since the last log;
                       {"step", "evaluation"}; with a share {"step": 0, "limit"}: the start model
                       sampled with the bias
    samples.jsonl      {"step", "prompt", "ids"}: the texts of the evaluations
    state.pt           weights, Adam's state, the text to train on, G, the step
    model.safetensors  the weights alone, at the end and at a stop, with the tokenizer's files

In every file, step n is the model after n updates.

A save flushes the logs, then replaces state.pt by one rename. If the process dies at any point, the
folder holds either no state (the run restarts) or a complete one, with every log line before it.
Continuing drops the later log lines and ends with the same log, samples and weights: bit for bit on
a CPU, up to rounding on CUDA, where the backward of attention adds in no fixed order.
"""

import math
import time
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from model import GPT2
from model.tokenizer import save_tokenizer
from train import folder, ranks
from train.command import PATIENCE, Stopped, expect, say, signals
from train.evaluate import FULL, SHORT, evaluate
from weights.checkpoint import atomic_write, fsync

LOG_EVERY = 10  # steps between two looks at the losses, each of which waits for the device
SAVE_EVERY = 60.0  # seconds: a save of gpt2-medium writes 4.3 GB


@dataclass
class Run:
    """What the loop of train.xfactor records, and continues from."""

    out: Path
    steps: int
    eval_every: int  # steps between evaluations; 0: only the first and the last
    seed: int
    model: GPT2
    optimizer: torch.optim.Adam
    start: GPT2  # the model before fine-tuning
    mask: Tensor  # bool (V,), the target tokens
    step: int = 0  # the last saved
    text: Tensor | None = None  # int64 (n,), the text to train on; None: random tokens
    g: float | None = None  # nats that a share adds to the start's logits of the target tokens
    losses: list[Tensor] = field(default_factory=list)  # of the steps not logged yet
    evaluated: set[int] = field(default_factory=set)  # steps with an evaluation
    logged: float = field(default_factory=time.perf_counter)  # time of the last log
    saved: float = field(default_factory=time.perf_counter)  # and of the last save

    def load(self) -> bool:
        """Restore the last save, if any, and return whether there was one.

        Raises ValueError for a file that cannot be read or is not a state of this model.
        """
        path = self.out / folder.STATE
        if not path.exists():
            if (self.out / folder.MODEL).exists():  # which is written after the last save
                raise ValueError(f"{path} is missing; restore it, or give another --out")
            return False
        try:
            state = torch.load(path, "cpu", weights_only=True)
            self.step, self.text, self.g = int(state["step"]), state["text"], state["g"]
            self.model.load_state_dict(state["model"])
            adam = self.optimizer.state_dict() | {"state": state["adam"]}  # the rate is an option
            self.optimizer.load_state_dict(adam)
            whole = all(map(self._is_whole, self.model.parameters()))
            whole &= (self.text is None or self.text.ndim == 1) and math.isfinite(self.g or 0.0)
            if not whole:
                raise ValueError(f"damaged, or not of step {self.step}")
        except Exception as error:  # whatever the file holds
            expected = f"expected a whole state of this run ({error!r:.80})"
            raise ValueError(f"{path}: {expected}; restore it, or give another --out") from error
        expect(self.step <= self.steps, "steps", self.steps, f"at least the {self.step} done")
        folder.lines_until(self.out, self.step)
        return True

    def _is_whole(self, p: Tensor) -> bool:
        """Return whether a parameter and its Adam state fit each other and the step."""
        adam = self.optimizer.state[p]
        mean, square = adam["exp_avg"], adam["exp_avg_sq"]
        fits = mean.shape == square.shape == p.shape and adam["step"].item() == self.step > 0
        finite = all(bool(x.isfinite().all()) for x in (p, mean, square))
        return fits and finite and bool((square >= 0).all())

    def begin(self, restored: bool) -> None:
        """Drop what was logged after the last save, and say where the run continues."""
        self.evaluated, again = folder.cut_logs(self.out, self.step)
        if restored and self.step == self.steps:
            say(f"the run in {self.out} is complete")
        elif restored or again:
            text = f"continuing after step {self.step}"
            say(f"{text}; {again} more were logged and are done again" if again else text)

    def record(self, step: int, received: list[int]) -> bool:
        """Log, save and evaluate what is due after `step` updates; return whether to end here.

        received: the signals so far. Every rank must call this; the main rank writes.

        Raises ValueError if the run has diverged or cannot be saved.
        """
        last = step == self.steps
        evaluates = last or step == 0 or (self.eval_every > 0 and step % self.eval_every == 0)
        waited = received or time.perf_counter() - self.logged > PATIENCE
        if not (evaluates or step % LOG_EVERY == 0 or (waited and ranks.world_size() == 1)):
            return False
        self._log(step)
        if ranks.is_main() and (last or time.perf_counter() - self.saved > SAVE_EVERY):
            self._save(step)
        stop = ranks.largest(received[0] if received else 0)
        if ranks.is_main():
            if evaluates and not stop and step not in self.evaluated:
                try:
                    with signals(hold=0):
                        self._evaluate(step)
                except Stopped as stopped:  # what is measured will be measured again
                    stop = stopped.number
            if stop:
                self._save(step)
            if step and (last or stop):
                self._save_model()
        if stop:
            done = f" after step {step}, which is saved in {self.out}" if step else ""
            raise Stopped(stop, f"{done}; the same command continues the run")
        self.logged = time.perf_counter()
        return last

    def _log(self, step: int) -> None:
        if not self.losses:
            return
        losses = ranks.mean(torch.stack(self.losses)).tolist()  # waits for the device
        seconds, first = (time.perf_counter() - self.logged) / len(losses), step - len(losses)
        self.losses.clear()
        finite = list(takewhile(math.isfinite, losses))
        lines = [{"step": first + i, "loss": x, "seconds": seconds} for i, x in enumerate(finite)]
        if ranks.is_main():
            folder.append(self.out, folder.LOG, lines)
            speed = f"{1e3 * seconds:,.0f} ms per step"
            say(f"step {step} of {self.steps}: loss {losses[-1]:.4f}, {speed}")
        if len(finite) < len(losses):
            self._diverged(f"the loss became {losses[len(finite)]} at step {first + len(finite)}")

    def _diverged(self, reason: str) -> None:
        kept = f"the save of step {self.step} is kept" if self.step else "no step was saved"
        raise ValueError(f"{reason}; {kept}. Try a smaller --lr, with another --out")

    def _save(self, step: int) -> None:
        if step == self.step:  # already saved
            return
        if not torch.stack([p.isfinite().all() for p in self.model.parameters()]).all():
            self._diverged(f"the weights became NaN or infinite at step {step}")
        state = {
            "step": step,
            "text": self.text,
            "g": self.g,
            "model": self.model.state_dict(),
            "adam": self.optimizer.state_dict()["state"],
        }
        for log in folder.LOGS:
            fsync(self.out / log)
        try:
            with atomic_write(self.out / folder.STATE) as path, open(path, "wb") as file:
                torch.save(state, file)
        except RuntimeError as error:  # PyTorch's, if a write raised: a full disk, a signal
            raise (error.__context__ or error) from None
        self.step, self.saved = step, time.perf_counter()

    def _evaluate(self, step: int) -> None:
        count = FULL if step in (0, self.steps) else SHORT
        bias = None if self.g is None else self.g * self.mask
        models = {"evaluation": (self.model, None), "limit": (self.start, bias)}
        for name, (model, bias) in models.items():
            if name == "evaluation" or (step == 0 and bias is not None):
                say(f"evaluating after step {step}" if bias is None else "evaluating the limit")
                found, samples = evaluate(model, self.start, self.mask, count, self.seed, bias)
                if math.isnan(found.passage_perplexity):
                    self._diverged(f"the logits became NaN at step {step}")
                if bias is None:
                    lines = [{"step": step, "prompt": p, "ids": ids} for p, ids in samples]
                    folder.append(self.out, folder.SAMPLES, lines)
                numbers = {k: v if math.isfinite(v) else None for k, v in vars(found).items()}
                folder.append(self.out, folder.LOG, [{"step": step, name: numbers}])
        self.evaluated.add(step)

    def _save_model(self) -> None:
        weights = {name: p.detach().cpu().contiguous() for name, p in self.model.named_parameters()}
        try:
            with atomic_write(self.out / folder.MODEL) as temporary:
                save_file(weights, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from error
        save_tokenizer(self.out)
