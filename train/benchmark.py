"""Time load, generation and a training step against transformers' GPT-2 as people write it.

    python -m train.benchmark
    python -m train.benchmark --model tiny --dtype float32 --repetitions 5

Both models start from the same random weights, saved in a temporary folder. The training step of
transformers is F.log_softmax, F.kl_div and torch.optim.Adam at their defaults; ours is the loop of
train.xfactor. They take turns, each time in a new process, so that both see the same machine and
neither inherits the other's settings. Only the third call is timed, because the first two also pay
for new memory. The table shows medians, and the last line is JSON.

    load        from a file in the page cache to the logits of one token
    generate    greedy, batch size 1, with a key/value cache
    step        one training step
    memory      peak of the first step above the loaded model: gradients, Adam's moments,
                activations, logits
"""

import json
import math
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import TwoLevelTarget, fused_kl_div
from kernels.measure import milliseconds, peak_megabytes
from model import GPT2, GPT2Config
from model.generate import generate
from model.gpt2 import HEAD_DIM
from train import cpu
from train.command import command, expect, parse, say
from train.ranks import device_name
from weights import layout_of, load_weights, save_weights

PROMPT, NEW_TOKENS = 16, 48
MASK = torch.arange(GPT2Config.vocab_size) < 984  # as many target tokens as contain an x


@dataclass(frozen=True)
class Options:
    """The sizes to measure with."""

    model: Literal["gpt2-medium", "gpt2", "gpt2-xl", "tiny"] = "gpt2-medium"
    """take the sizes of this model; the weights are random"""
    dtype: tuple[Literal["bfloat16", "float32"], ...] = "bfloat16", "float32"
    """run training steps in these; bfloat16 is autocast"""
    batch: int = 4  # take this many sequences per step
    length: int = 64  # make each sequence this many tokens long
    repetitions: int = 3  # repeat every measurement in this many new processes
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"  # measure here


class Ours:
    """This project's model, and the loop of train.xfactor."""

    def __init__(self, folder: str, device: torch.device) -> None:
        self.model = GPT2.from_state_dict(load_weights(folder), assign=True).to(device)

    def generate(self, prompt: Tensor) -> Tensor:
        return generate(self.model, prompt, NEW_TOKENS, temperature=0)

    def train(self, tokens: Tensor, dtype: str) -> Iterator[Tensor]:
        cpu.prepare(tokens.device, tokens.shape[1])
        optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-6, fused=True)
        target = TwoLevelTarget(MASK.to(tokens.device))
        while True:
            with torch.autocast(tokens.device.type, torch.bfloat16, dtype == "bfloat16"):
                loss = fused_kl_div(self.model(tokens), target, inplace_backward=True)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.detach()


class Transformers:
    """transformers' GPT2LMHeadModel, and a loop as people write it."""

    def __init__(self, folder: str, device: torch.device) -> None:
        # transformers imports Hugging Face's package `kernels` where that is installed; from this
        # repository's root it would find ours.
        ours = sys.modules["kernels"]
        sys.modules["kernels"] = None  # type: ignore[assignment]  # "not installed"
        try:
            from transformers import GPT2LMHeadModel  # a development dependency
            from transformers.utils.logging import disable_progress_bar
        finally:
            sys.modules["kernels"] = ours
        disable_progress_bar()
        model: Any = GPT2LMHeadModel.from_pretrained(folder)
        self.model = model.to(device)

    def generate(self, prompt: Tensor) -> Tensor:
        mask = torch.ones_like(prompt)
        new = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "pad_token_id": 0}
        return self.model.generate(prompt, attention_mask=mask, do_sample=False, **new)

    def train(self, tokens: Tensor, dtype: str) -> Iterator[Tensor]:
        optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-6)
        p = (MASK.float() / MASK.sum()).to(tokens.device)  # (V,)
        while True:
            with torch.autocast(tokens.device.type, torch.bfloat16, dtype == "bfloat16"):
                log_q = F.log_softmax(self.model(tokens).logits.flatten(0, 1), dim=-1)  # (B T, V)
                loss = F.kl_div(log_q, p.expand_as(log_q), reduction="batchmean")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.detach()


CONTENDERS: dict[str, type[Ours | Transformers]] = {"ours": Ours, "transformers": Transformers}


def measure(name: str, folder: str, options: Options) -> dict[str, float]:
    """Return every quantity of a contender, measured once."""
    device, size = torch.device(options.device), (options.batch, options.length)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(GPT2Config.vocab_size, size, generator=generator).to(device)  # (B, T)

    def load() -> Ours | Transformers:
        contender = CONTENDERS[name](folder, device)
        with torch.no_grad():  # transformers maps the file and reads a weight when it is used
            contender.model(tokens[:1, :1])
        return contender

    def third_call(quantity: str, step: Callable[[], object]) -> float:
        say(f"{name}: {quantity}", error=True)
        step(), step()
        return milliseconds(step, device)[0]

    results = {"load, ms": third_call("load", load)}
    contender = load()
    text = third_call("generate", lambda: contender.generate(tokens[:1, :PROMPT]))
    results["generate, ms per token"] = text / NEW_TOKENS
    for dtype in options.dtype:
        contender.model.zero_grad(set_to_none=True)
        steps = contender.train(tokens, dtype)
        results[f"memory in {dtype}, MB"] = peak_megabytes(steps.__next__, device) or math.nan
        results[f"step in {dtype}, ms"] = third_call(f"step in {dtype}", steps.__next__)
    return results


def benchmark(options: Options) -> None:
    """Measure and print. Raises ValueError if transformers is not installed."""
    has_device = options.device == "cpu" or torch.cuda.is_available()
    expect(has_device, "device", "cuda", "a machine with CUDA; use cpu")
    for name in ("batch", "length", "repetitions"):
        expect(getattr(options, name) > 0, name, getattr(options, name), "at least 1")
    expect(bool(options.dtype), "dtype", "", "bfloat16, float32 or both")
    if find_spec("transformers") is None:
        raise ValueError('transformers is not installed; run: pip install "transformers>=5"')
    where = f"{device_name(torch.device(options.device))}, {torch.get_num_threads()} threads"
    size = f"B = {options.batch}, T = {options.length}"
    say(f"{options.model}, {size}, {where}, torch {torch.__version__}")
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory() as folder:
        layout = layout_of(options.model)
        torch.manual_seed(0)
        config = GPT2Config(**asdict(layout), n_head=layout.n_embd // HEAD_DIM)
        save_weights(GPT2(config).state_dict(), folder)
        # A fork would share the state of threads; Ctrl-C is left to the process that waits.
        start = get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN)
        for _ in range(options.repetitions):
            for name in CONTENDERS:
                with ProcessPoolExecutor(1, *start) as process:
                    runs[name].append(process.submit(measure, name, folder, options).result())
    results = {}
    say(f"{'':24}{'ours':>12}{'transformers':>14}{'ratio':>8}")
    for quantity in runs["ours"][0]:
        ours, theirs = (statistics.median(r[quantity] for r in runs[name]) for name in CONTENDERS)
        results[quantity] = {"ours": ours, "transformers": theirs}
        say(f"{quantity:24}{ours:12.1f}{theirs:14.1f}{theirs / ours:8.2f}")
    say(json.dumps({"options": asdict(options), "results": results}))


if __name__ == "__main__":
    with command():
        benchmark(parse(Options, __doc__, "python -m train.benchmark"))
