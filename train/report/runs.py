"""Read runs back from disk, as far as they got: the folders that `train.xfactor` writes."""

import json
import math
import os
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path
from typing import Any

Text = tuple[str, Sequence[int]]  # a prompt, and the ids of the tokens that continue it
BLUES, ORANGES = ("#62a8d8", "#2f86c9", "#1d6fb8"), ("#f08a3c", "#e0600f", "#c24a0a")


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one model. NaN: not measured, in a log of an older program."""

    r: float = math.nan  # share of target tokens in text sampled from the model, 0 to 1
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
    share: float | None  # asked for, 0 to 1; None: a two-level target
    label: str
    colour: str = ""
    losses: "array[float]" = field(default_factory=lambda: array("d"))  # nats, by step
    evaluations: dict[int, Evaluation] = field(default_factory=dict)  # by step
    limit: Evaluation = Evaluation()  # the start model, sampled with a bias on target tokens
    texts: dict[int, list[Text]] = field(default_factory=dict)  # by step

    @property
    def original(self) -> bool:
        """Whether it had the original target, which gives the target tokens all probability."""
        return self.share is None and self.about["options"].get("mass", 1) == 1

    @property
    def end(self) -> Evaluation:
        return self.evaluations[max(self.evaluations)]

    @property
    def typical(self) -> list[Text]:
        """The texts of the last evaluation, first those whose share is nearest R."""
        texts = self.texts.get(max(self.evaluations), [])
        return sorted(texts, key=lambda text: abs(self.share_of(text[1]) - self.end.r))

    def share_of(self, ids: Sequence[int]) -> float:
        return sum(i in self.targets for i in ids) / len(ids)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the run in each folder; sort them by share, those without one last.

    Raises ValueError: no run there, nothing measured yet, a damaged file, runs that cannot be
    compared.
    """
    places = {folder.resolve(): folder for folder in folders}  # given twice, read once
    if not places:
        raise ValueError("no run: give one or several folders that train.xfactor wrote")
    runs = [_read(folder) for folder in places.values()]
    if len({(run.about.get("start"), run.targets) for run in runs}) > 1:
        raise ValueError("runs of several start models or goals: report them one by one")
    labels = [run.label for run in runs]
    for run, place in zip(runs, places, strict=True):
        if labels.count(run.label) > 1:
            run.label += f" ({place.relative_to(os.path.commonpath(places))})"
    runs.sort(key=lambda run: (run.share is None, run.share or 0))
    colours = {True: cycle(ORANGES), False: cycle(BLUES)}
    return [replace(run, colour=next(colours[run.share is None])) for run in runs]


def _read(folder: Path) -> Run:
    place = str(folder / "config.json")
    try:
        about = json.loads(Path(place).read_text(encoding="utf-8"))["xfactor"]
        share, rate = about.get("share"), f"{about['options']['lr']:e}"  # 1.000000e-03
        label = re.sub(r"\.?0*e(.)0", r"e\1", f"lr {rate}")  # as people write it: 1e-3
        label = label if share is None else f"share {100 * share:g} %"
        run = Run(folder, about, frozenset(about["target_token_ids"]), share, label)
        if share is None and not run.original:
            run.label = f"mass {about['options']['mass']:g}, {label}"
        for path in (str(folder / "log.jsonl"), str(folder / "samples.jsonl")):
            place = path
            with open(path, encoding="utf-8", newline="\n") as file:
                for number, line in enumerate(file, start=1):
                    place = f"{path}, line {number}"
                    if line.endswith("\n"):  # else a kill cut it off
                        _add(run, json.loads(line))
    except Exception as error:  # of any kind: another program may have written this
        reason = f"{place}: {type(error).__name__}: {error!s:.200}"
        advice = f"; give {folder}/*" if any(folder.glob("*/config.json")) else ""
        raise ValueError(f"{reason}; expected a folder that train.xfactor wrote{advice}") from error
    if not run.evaluations:
        raise ValueError(f"{folder}: nothing was measured yet; wait for the run, or continue it")
    return run


def _add(run: Run, line: dict[str, Any]) -> None:
    step = line["step"]
    if "loss" in line:
        run.losses.append(line["loss"])
    for kind in line.keys() & {"evaluation", "limit"}:  # null is an infinite perplexity
        known = {k: v for k, v in line[kind].items() if k in Evaluation.__match_args__}
        one = Evaluation(**{k: math.inf if v is None else float(v) for k, v in known.items()})
        if kind == "evaluation":
            run.evaluations[step] = one
        else:
            run.limit = one
    if "ids" in line:
        run.texts.setdefault(step, []).append((str(line["prompt"]), array("i", line["ids"])))


def compare(runs: Sequence[Run]) -> tuple[Run, Run, int] | None:
    """Find what the original target costs at about the R of the middle run with a share.

    Returns that run, and the run with the original target and the step at which its R came nearest
    and its perplexity is finite. None if none came within a quarter of that R.
    """
    found = []
    for run in (run for run in runs if run.share is not None):
        r, nearest = run.end.r, None
        for path in (path for path in runs if path.original):
            for step, e in path.evaluations.items():
                distance = abs(e.r - r)
                if 0 < e.sample_perplexity < math.inf and distance < (nearest or (r / 4,))[0]:
                    nearest = (distance, path, step)
        if nearest and run.end.sample_perplexity < math.inf:
            found.append((run, *nearest[1:]))
    return found[(len(found) - 1) // 2] if found else None
