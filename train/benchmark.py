"""Our training step, load and generation against transformers' GPT-2 as people write it.

    python -m train.benchmark
    python -m train.benchmark --model tiny --dtype float32 --repetitions 5

Both models start from the same random weights, saved once in a temporary folder, and each lives in
a process of its own with what its users would set: theirs trains with F.log_softmax, F.kl_div and
torch.optim.Adam at their defaults; ours is the loop of train.xfactor, which also computes the mass
on the members in every step. Runs are interleaved, so that both see the same machine; the table
gives medians and the last line is JSON.

    load        from a file in the page cache to the logits of one token
    generate    greedy, batch 1, with a key/value cache: milliseconds a token
    step        one of training
    memory      peak of the first step above the loaded model: gradients, Adam's moments,
                activations, logits
"""

import json
import math
import multiprocessing
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from multiprocessing.connection import Connection
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from kernels import TwoLevelTarget, fused_linear_kl_div
from kernels.measure import milliseconds, peak_megabytes
from model import GPT2, GPT2Config
from model.generate import generate
from train import cpu
from train.evaluate import target_probability
from weights import layout_of, load_weights, save_weights

MEMBERS = 984  # the tokens with an x
PROMPT, NEW_TOKENS = 16, 48


@dataclass(frozen=True)
class Options:
    """Benchmark a model of this project against transformers'."""

    model: Literal["gpt2-medium", "gpt2", "gpt2-xl", "tiny"] = "gpt2-medium"  # its size only
    dtype: tuple[Literal["bfloat16", "float32"], ...] = ("bfloat16", "float32")  # autocast or none
    batch: int = 4  # B, sequences in a step
    length: int = 64  # T, tokens in a sequence
    repetitions: int = 3  # of everything, after a first step that is not timed
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"


class Ours:
    """This project's model and loop."""

    name = "ours"

    def __init__(self, folder: str, device: torch.device) -> None:
        self.model = GPT2.from_state_dict(load_weights(folder), assign=True).to(device)

    def steps(self, tokens: Tensor, members: Tensor, dtype: str) -> Iterator[object]:
        cpu.prepare(tokens.device, tokens.shape[1])
        optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-6, fused=True)
        target, wte = TwoLevelTarget(members), self.model.wte.weight
        while True:
            with torch.autocast(tokens.device.type, torch.bfloat16, dtype == "bfloat16"):
                hidden = self.model.hidden_states(tokens)
                loss, lse = fused_linear_kl_div(hidden, wte, target, return_lse=True)
                probability = target_probability(hidden, wte, target.index, lse)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.detach(), probability

    def generate(self, prompt: Tensor) -> Tensor:
        with cpu.few_row_products(prompt.device):
            return generate(self.model, prompt, NEW_TOKENS, temperature=0)


class Transformers:
    """GPT2LMHeadModel and a loop as people write it."""

    name = "transformers"

    def __init__(self, folder: str, device: torch.device) -> None:
        from transformers import GPT2LMHeadModel  # a development dependency: needed here only

        model: Any = GPT2LMHeadModel.from_pretrained(folder)
        self.model = model.to(device)

    def steps(self, tokens: Tensor, members: Tensor, dtype: str) -> Iterator[object]:
        optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-6)
        p = members.float() / members.sum()
        while True:
            with torch.autocast(tokens.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
                log_q = F.log_softmax(self.model(tokens).logits.flatten(0, 1), dim=-1)
                loss = F.kl_div(log_q, p.expand_as(log_q), reduction="batchmean")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.detach()

    def generate(self, prompt: Tensor) -> Tensor:
        return self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=0,
        )


CONTENDERS = (Ours, Transformers)


class Bench:
    """One contender's measurements; made in a process of its own."""

    def __init__(self, contender: type[Ours] | type[Transformers], folder: str, options: Options):
        self.load_model = partial(contender, folder, torch.device(options.device))
        self.device = torch.device(options.device)
        self.tokens = torch.randint(
            GPT2Config.vocab_size,
            (options.batch, options.length),
            generator=torch.Generator().manual_seed(0),
        ).to(self.device)
        self.members = torch.arange(GPT2Config.vocab_size, device=self.device) < MEMBERS

    def load(self) -> float:
        """Milliseconds."""
        return milliseconds(self._load, self.device)

    def _load(self) -> None:
        # Used once, for transformers maps the file and reads it when a weight is touched.
        with torch.no_grad():
            self.load_model().model(torch.zeros(1, 1, dtype=torch.int64, device=self.device))

    def generate(self) -> float:
        """Milliseconds a token; the first call is the one that loads the model."""
        run = partial(self.contender.generate, self.tokens[:1, :PROMPT])
        return milliseconds(run, self.device) / NEW_TOKENS

    @cached_property
    def contender(self) -> Ours | Transformers:
        return self.load_model()

    def first_step(self, dtype: str) -> float:
        """MB at the peak of a first step, which makes Adam's moments."""
        self.contender.model.zero_grad(set_to_none=True)
        steps = self.contender.steps(self.tokens, self.members, dtype)
        self._next = partial(next, steps)
        return peak_megabytes(self._next, self.device) or math.nan

    def step(self) -> float:
        """Milliseconds."""
        return milliseconds(self._next, self.device)


class Remote:
    """A Bench in a process of its own, which waits while it is not asked."""

    def __init__(self, contender: type[Ours] | type[Transformers], *arguments: object) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would share the threads' state
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, contender, *arguments))
        self._process.start()
        theirs.close()  # so that the end of the process is the end of the pipe

    def ask(self, method: str, *arguments: object) -> float:
        """The method's answer; RuntimeError if the process has ended, its traceback printed."""
        self._pipe.send((method, *arguments))
        try:
            return self._pipe.recv()
        except EOFError as error:
            raise RuntimeError(f"the process that measures {method!r} has ended") from error

    def close(self) -> None:
        self._pipe.close()
        self._process.join()


def _serve(pipe: Connection, *arguments: Any) -> None:
    bench = Bench(*arguments)
    while True:
        try:
            method, *rest = pipe.recv()
        except EOFError:
            return
        pipe.send(getattr(bench, method)(*rest))


def measure(options: Options, folder: str) -> dict[str, dict[str, float]]:
    """Quantity -> contender -> median: load in ms, generate in ms a token, step in ms, memory."""
    remotes = {c.name: Remote(c, folder, options) for c in CONTENDERS}

    def once(method: str, *arguments: object) -> dict[str, float]:
        return {name: remote.ask(method, *arguments) for name, remote in remotes.items()}

    def interleaved(method: str) -> dict[str, float]:
        once(method)  # the first one warms up
        rounds = [once(method) for _ in range(options.repetitions)]
        return {name: statistics.median(r[name] for r in rounds) for name in remotes}

    try:
        results = {"load, ms": interleaved("load")}
        results["generate, ms a token"] = interleaved("generate")
        for dtype in options.dtype:
            peaks = once("first_step", dtype)
            results[f"step in {dtype}, ms"] = interleaved("step")
            results[f"memory in {dtype}, MB"] = peaks
    finally:
        for remote in remotes.values():
            remote.close()
    return results


def main(options: Options) -> None:
    """Measure and print."""
    layout = layout_of(options.model)
    config = GPT2Config(
        n_positions=layout.n_positions,
        n_embd=layout.n_embd,
        n_layer=layout.n_layer,
        n_head=layout.n_embd // 64,
    )
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(
        f"{options.model}, B = {options.batch}, T = {options.length}, {name}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        save_weights(GPT2(config).state_dict(), folder)
        results = measure(options, folder)
    print(f"{'':24}{'ours':>12}{'transformers':>14}{'ratio':>8}")
    for quantity, of in results.items():
        ratio = of["transformers"] / of["ours"]
        print(f"{quantity:24}{of['ours']:12.1f}{of['transformers']:14.1f}{ratio:8.2f}")
    print(json.dumps({"options": vars(options), "results": results}))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
