"""Read runs back from disk, as far as they got: the folders that `train.xfactor` writes."""

import json
import math
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

CONFIG, LOG, SAMPLES, MODEL = "config.json", "log.jsonl", "samples.jsonl", "model.safetensors"


@dataclass
class Evaluation:
    """What was measured of one model. NaN: not measured, in a log of an older program."""

    r: float  # share of target tokens in text sampled from the model, 0 to 1
    r_error: float = math.nan  # standard error of r over the texts
    sample_perplexity: float = math.nan  # of that text under the start model
    passage_perplexity: float = math.nan  # of a fixed text under this model
    kl_to_start: float = math.nan  # KL(model || start), nats per token of that text
    distinct_2: float = math.nan  # share of different pairs of tokens in that text


@dataclass
class Run:
    """One run. Step n is the model after n updates."""

    folder: Path
    about: dict[str, Any]  # "xfactor" of config.json
    targets: frozenset[int]  # ids of the target tokens
    lr: float
    share: float | None  # asked for, 0 to 1; None: the original target
    label: str
    seconds: float = 0.0
    steps: "array[int]" = field(default_factory=lambda: array("q"))
    losses: "array[float]" = field(default_factory=lambda: array("d"))  # nats, one per step
    evaluations: dict[int, Evaluation] = field(default_factory=dict)  # by step
    limit: Evaluation | None = None  # the start model, sampled with a bias on target tokens' logits
    typical: dict[int, dict[str, "array[int]"]] = field(default_factory=dict)  # step, prompt: ids
    last_texts: list["array[int]"] = field(default_factory=list)  # ids, of the last evaluation

    @property
    def start(self) -> tuple[object, ...]:
        """What runs have in common that can be compared: the start model and the target tokens."""
        return self.about.get("start"), self.targets

    @property
    def end(self) -> Evaluation:
        return self.evaluations[max(self.evaluations)]

    def share_of(self, ids: Sequence[int]) -> float:
        return sum(i in self.targets for i in ids) / len(ids)

    def add_measurement(self, line: dict[str, Any]) -> None:
        """Take a line of the log; a diverged model, which has no R, was not evaluated."""
        if "loss" in line:
            self.steps.append(line["step"])
            self.losses.append(math.nan if line["loss"] is None else line["loss"])
            self.seconds += line.get("seconds", 0)
        for kind in line.keys() & {"evaluation", "limit"}:
            known = [f.name for f in fields(Evaluation) if f.name in line[kind]]
            evaluation = Evaluation(**{
                name: math.inf if line[kind][name] is None else float(line[kind][name])
                for name in known
            })  # fmt: skip
            if 0 <= evaluation.r <= 1 and kind == "evaluation":
                self.evaluations[int(line["step"])] = evaluation
            elif 0 <= evaluation.r <= 1:
                self.limit = evaluation
            elif math.isfinite(evaluation.r):
                raise ValueError(f"r is {evaluation.r}, not in 0 to 1")

    def add_sample(self, line: dict[str, Any]) -> None:
        """Keep per evaluation and prompt the typical text: the one whose share is nearest R."""
        ids = array("q", line["ids"])
        if not 0 <= min(ids) <= max(ids) < 50_257:
            raise ValueError("a token id is not in 0 to 50256")
        step = line["step"]
        if step in self.evaluations:
            kept = self.typical.setdefault(step, {})
            near = [ids, kept.get(str(line["prompt"]), ids)]
            r = self.evaluations[step].r
            kept[str(line["prompt"])] = min(near[::-1], key=lambda t: abs(self.share_of(t) - r))
            if step == max(self.evaluations):
                self.last_texts.append(ids)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the run in each folder, once where a folder is given twice.

    Raises ValueError, in one line: no run there, nothing measured yet, a damaged file.
    """
    runs = [_read(path) for path in {folder.resolve(): folder for folder in folders}.values()]
    labels, places = [run.label for run in runs], [run.folder.resolve() for run in runs]
    for run, place in zip(runs, places, strict=True):
        if labels.count(run.label) > 1:
            run.label += f" ({place.relative_to(os.path.commonpath(places))})"
    return runs


def compare(runs: Sequence[Run]) -> tuple[Run, Run, int, float] | None:
    """Find what shows the price of the original target: the middle one of the runs with a share.

    Returns that run; of the runs with the original target, the one that passes the same R at the
    lowest perplexity, its evaluation with the nearest R, and that perplexity. None if none does.
    """
    found = []
    for run in sorted((run for run in runs if run.share is not None), key=lambda run: run.share):
        others = [other for other in runs if other.share is None and other.start == run.start]
        r = run.end.r
        passing = [(perplexity_at([*o.evaluations.values()], r), i) for i, o in enumerate(others)]
        perplexity, i = min(passing, default=(math.inf, 0))
        if perplexity < math.inf and math.isfinite(run.end.sample_perplexity):
            seen = others[i].evaluations
            found.append((run, others[i], min(seen, key=lambda s: abs(seen[s].r - r)), perplexity))
    return found[len(found) // 2] if found else None


def main_run(runs: Sequence[Run]) -> Run:
    """Return the run that is compared; else the last one with a share; else the last."""
    found = compare(runs)
    return found[0] if found else ([run for run in runs if run.share is not None] or runs)[-1]


def perplexity_at(path: Sequence[Evaluation], r: float) -> float:
    """Return the lowest perplexity of the samples at which a path passes `r`; inf if it does not.

    Between two evaluations the logarithm of the perplexity is linear in R.
    """
    found = [math.inf]
    for a, b in pairwise(e for e in path if 0 < e.sample_perplexity < math.inf):
        if a.r != b.r and min(a.r, b.r) <= r <= max(a.r, b.r):
            low, high = math.log(a.sample_perplexity), math.log(b.sample_perplexity)
            found.append(math.exp(low + (high - low) * (r - a.r) / (b.r - a.r)))
    return min(found)


def _read(folder: Path) -> Run:
    file, number = CONFIG, 1
    try:
        about = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["xfactor"]
        lr, share = float(about["options"]["lr"]), about.get("share")
        label = f"lr {scientific(lr)}" if share is None else f"share {100 * share:g} %"
        run = Run(folder, about, frozenset(about["target_token_ids"]), lr, share, label)
        file = LOG
        for number, line in _lines(folder / LOG):
            run.add_measurement(json.loads(line))
        file, number = SAMPLES, 1
        for number, line in _lines(folder / SAMPLES) if run.evaluations else ():
            run.add_sample(json.loads(line))
    except FileNotFoundError as error:
        holds = [*folder.glob(f"*/{CONFIG}")]
        hint = f"give the runs in it: {folder}/*" if holds else "expected the --out of a run"
        raise ValueError(f"{folder}: no {file} here; {hint}") from error
    except (AttributeError, LookupError, OSError, OverflowError, RecursionError, TypeError,
            ValueError) as error:  # fmt: skip
        reason = f"no {error}" if isinstance(error, KeyError) else f"{error!s:.200}"
        message = f"{folder / file}, line {number}: {reason}; remove the line or leave the run out"
        raise ValueError(message) from error
    if not run.evaluations:
        raise ValueError(f"{folder}: nothing was measured yet; wait for the run, or continue it")
    return run


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number the lines from 1, without a last one that a kill cut off."""
    with open(path, encoding="utf-8", newline="\n") as file:
        yield from ((n, line) for n, line in enumerate(file, start=1) if line.endswith("\n"))


def scientific(value: float, digits: int = 6) -> str:
    """Write a number as people write a learning rate: 1e-4, 2.5e-5, 0; inf."""
    mantissa, e, exponent = f"{value:.{digits}e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}" if e and value else f"{value:g}"
