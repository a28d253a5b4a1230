"""Our training step, load and generation against transformers' GPT-2 as people write it.

    python -m train.benchmark
    python -m train.benchmark --model tiny --dtype float32 --repetitions 5

Both models start from the same random weights, saved once in a temporary folder. Theirs trains with
F.log_softmax, F.kl_div and torch.optim.Adam at their defaults; ours is the loop of train.xfactor,
which also computes the mass on the members in every step. Runs are interleaved, so that both see
the same machine; the table gives medians and the last line is JSON. "load" is from a file in the
page cache to the logits of one token; "generate" is greedy, batch 1, with a key/value cache,
milliseconds a token; "memory" is the peak of the first step above the loaded model: gradients,
Adam's moments, activations, logits.
"""

import json
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from kernels import TwoLevelTarget
from kernels.measure import milliseconds, peak_megabytes
from model import GPT2, GPT2Config
from model.generate import generate
from train.xfactor import LOSSES, training_steps
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

    def steps(self, tokens: Tensor, members: Tensor, dtype: torch.dtype) -> Iterator[object]:
        optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-6, fused=True)
        target = TwoLevelTarget(members)
        return training_steps(
            self.model, optimizer, target, lambda: tokens, LOSSES["linear"], dtype
        )

    def generate(self, prompt: Tensor) -> Tensor:
        return generate(self.model, prompt, NEW_TOKENS, temperature=0)


class Transformers:
    """GPT2LMHeadModel and a loop as people write it."""

    name = "transformers"

    def __init__(self, folder: str, device: torch.device) -> None:
        from transformers import GPT2LMHeadModel  # a development dependency: needed here only

        model: Any = GPT2LMHeadModel.from_pretrained(folder)
        self.model = model.to(device)

    def steps(self, tokens: Tensor, members: Tensor, dtype: torch.dtype) -> Iterator[object]:
        optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-6)
        p = members.float() / members.sum()
        half = dtype != torch.float32
        while True:
            with torch.autocast(tokens.device.type, dtype) if half else nullcontext():
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


def measure(options: Options, folder: str) -> dict[str, dict[str, float]]:
    """Quantity -> contender -> median: load in ms, generate in ms a token, step in ms, memory."""
    device = torch.device(options.device)
    tokens = torch.randint(GPT2Config.vocab_size, (options.batch, options.length), device=device)
    members = torch.zeros(GPT2Config.vocab_size, dtype=torch.bool, device=device)
    members[:MEMBERS] = True

    def interleaved(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(options.repetitions):
            for name, run in runs.items():
                times[name].append(milliseconds(run, device))
        return {name: statistics.median(t) for name, t in times.items()}

    results = {
        "load, ms": interleaved({c.name: partial(_load, c, folder, device) for c in CONTENDERS})
    }
    models = [contender(folder, device) for contender in CONTENDERS]
    prompt = tokens[:1, :PROMPT]
    for m in models:
        m.generate(prompt)
    generation = interleaved({m.name: partial(m.generate, prompt) for m in models})
    results["generate, ms a token"] = {name: ms / NEW_TOKENS for name, ms in generation.items()}
    for dtype in options.dtype:
        steps: dict[str, Callable[[], object]] = {}
        peaks = {}
        for m in models:
            m.model.zero_grad(set_to_none=True)
            steps[m.name] = partial(next, m.steps(tokens, members, getattr(torch, dtype)))
            peaks[m.name] = peak_megabytes(steps[m.name], device) or math.nan
        results[f"step in {dtype}, ms"] = interleaved(steps)
        results[f"memory in {dtype}, MB"] = peaks
    return results


def _load(contender: type[Ours] | type[Transformers], folder: str, device: torch.device) -> None:
    # Used once, for transformers maps the file and reads it when a weight is touched; and let go
    # of, for no two of these should be in memory beside a third.
    with torch.no_grad():
        contender(folder, device).model(torch.zeros(1, 1, dtype=torch.int64, device=device))


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
