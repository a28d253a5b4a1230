"""Read runs back from disk: the folders that `train.xfactor` writes, one per rate and tilt.

Steps count from 1, and step s is measured before update s. So element i of a curve here, counted
from 0, describes the model after i updates, as an evaluation at step i does.
"""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

from annotated_types import Ge, Le, Lt, MinLen
from pydantic import AliasPath, BaseModel, BeforeValidator, Field, FiniteFloat, ValidationError

from train.checkpoint import CONFIG, METRICS, SAMPLES
from weights.layout import printable

EXPECTED = f"a run of train.xfactor ({CONFIG}, {METRICS}, {SAMPLES}) or a folder of such runs"
TokenId = Annotated[int, Ge(0), Lt(50_257)]
Share = Annotated[FiniteFloat, Ge(0), Le(1)]
Probability = Annotated[FiniteFloat, Ge(0), Le(1.001)]  # a sum in float32
Perplexity = Annotated[float, BeforeValidator(lambda x: math.inf if x is None else x), Ge(0)]


class Step(BaseModel, strict=True):
    """What was measured before an update."""

    step: int
    loss: FiniteFloat  # nats
    target_probability: Probability
    predicted_probability: Probability = 0.0  # of a tilted teacher
    seconds: Annotated[FiniteFloat, Ge(0)]


class Sample(BaseModel, strict=True):
    """One continuation of a prompt, as token ids without the prompt's."""

    step: Annotated[int, Ge(0), Le(10**9)]
    prompt: str
    ids: Annotated[list[TokenId], MinLen(1)]


class Evaluation(BaseModel, strict=True):
    """One evaluation, with the samples it was made on; a perplexity may be infinite."""

    r: Share
    r_top_k: Share
    passage_perplexity: Perplexity
    sample_perplexity: Perplexity
    samples: list[Sample]

    def tokens(self) -> int:
        return sum(len(sample.ids) for sample in self.samples)

    def r_error(self) -> float:
        """Return the binomial standard error of R: sqrt(R (1 - R) / tokens)."""
        return math.sqrt(self.r * (1 - self.r) / self.tokens())


class Run(BaseModel, strict=True):
    """One run, as far as it got."""

    folder: Path
    model: dict[str, Any]  # config.json without "xfactor"
    about: dict[str, Any]  # its "xfactor", of which:
    goal: str
    device: str
    dtype: str
    lr: FiniteFloat
    tilt: FiniteFloat | None  # G of a tilted teacher; None for the original target
    beta: FiniteFloat
    target_token_ids: Annotated[frozenset[TokenId], Field(strict=False)]
    rates: list[float] = Field(validation_alias=AliasPath("options", "lr"))  # the command's
    tilts: list[float] | None = Field(None, validation_alias=AliasPath("options", "tilt"))
    versions: dict[str, Any]
    label: str = ""
    predicted_r: float | None = None  # the tilted teacher's own, mean over the steps
    steps: list[Step] = []
    evaluations: dict[int, Evaluation] = {}  # by updates done; 0: start

    @property
    def before(self) -> Evaluation:
        return self.evaluations[0]

    @property
    def after(self) -> Evaluation:
        return self.evaluations[max(self.evaluations)]

    @property
    def kind(self) -> str:
        """Name what the run did to the text, by the measurements of its latest evaluation."""
        rise = self.after.sample_perplexity / max(self.before.sample_perplexity, 1)
        if self.after.r >= 0.9 or rise > 100:
            return "collapse"
        return "nudge" if self.tilt is None else "dial"


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read the runs in `paths`, each a run's folder or a folder of them; duplicates count once.

    Runs keep the order of the paths; in a folder, those of the original target come first, then the
    tilts, both by rate, in the order of the command that made them. A killed run is read as far as
    its files go; one without a finished step, or without its start's evaluation, is left out.

    Raises ValueError, in one line: no runs, a file that is missing or is not what a run writes.
    """
    found = list({run.folder.resolve(): run for path in paths for run in _find(path)}.values())
    runs = [run for run in found if run.steps and 0 in run.evaluations]
    if not runs:
        places = printable(", ".join(map(str, paths)) or "no folder")
        raise ValueError(f"{places}: got no finished step, expected {EXPECTED}")
    rates = {run.lr for run in runs if run.tilt is not None}
    for run in runs:
        run.label = rate = f"lr {scientific(run.lr)}"
        if run.tilt is not None:
            run.label = f"G = {run.tilt:g}" + f", {rate}" * (len(rates) > 1)
            run.predicted_r = fmean(step.predicted_probability for step in run.steps)
    labels = [run.label for run in runs]
    for run in runs:
        if labels.count(run.label) > 1:
            run.label += f" ({printable(run.folder.resolve().parent.name)})"
    return runs


def best(runs: Sequence[Run]) -> Run:
    """Return the run with the highest R that is not a collapse; the last run if all are."""
    alive = [run for run in runs if run.kind != "collapse"]
    return max(alive, key=lambda run: run.after.r) if alive else runs[-1]


def scientific(value: float, digits: int = 6) -> str:
    """Write a number as people write a learning rate: 1e-4, 2.5e-5, 0; inf."""
    mantissa, e, exponent = f"{value:.{digits}e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}" if e and value else f"{value:g}"


def _find(path: Path) -> list[Run]:
    with _expecting(path):
        configs = [path / CONFIG] if (path / CONFIG).is_file() else [*path.glob(f"*/{CONFIG}")]
        if not configs:
            raise ValueError("got no run" if path.is_dir() else "got no folder")
    runs = [_read(config.parent) for config in sorted(configs)]
    runs.sort(key=lambda run: [*run.rates, run.lr].index(run.lr))
    runs.sort(key=lambda run: [None, *(run.tilts or ()), run.tilt].index(run.tilt))
    return runs


def _read(folder: Path) -> Run:
    with _expecting(folder / CONFIG):
        model = {**json.loads((folder / CONFIG).read_text(encoding="utf-8"))}
        about = model.pop("xfactor")
        run = Run(**about, about=about, model=model, folder=folder)
    samples: dict[int, list[Sample]] = {}
    for where, text in _lines(folder / SAMPLES):
        with _expecting(where):
            sample = Sample.model_validate_json(text)
            samples.setdefault(sample.step, []).append(sample)
    for where, text in _lines(folder / METRICS):
        with _expecting(where):
            line = json.loads(text)
            if "evaluation" not in line:
                run.steps.append(step := Step.model_validate(line))
                if step.step != len(run.steps):
                    raise ValueError(f"got step {step.step} after step {len(run.steps) - 1}")
                if (run.tilt is None) == ("predicted_probability" in line):
                    raise ValueError("got no predicted_probability, or one without a tilt")
            elif found := samples.get(line["step"]):  # a kill may cut the one log, not the other
                run.evaluations[found[0].step] = Evaluation(**line["evaluation"], samples=found)
    return run


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield each line's place and text, but for a last line that a kill cut off."""
    with _expecting(path):
        *lines, _ = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        yield f"{path}, line {number}", line


@contextmanager
def _expecting(where: object) -> Iterator[None]:
    """Turn an error in reading a file into one short line: where, what was got and expected."""
    try:
        yield
    except (KeyError, OSError, RecursionError, TypeError, ValueError) as error:
        got = f"no key {error}" if isinstance(error, KeyError) else str(error)[:200]
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            value = "nothing" if first["type"] == "missing" else str(first["input"])[:40]
            got = "".join(f"{key}: " for key in first["loc"]) + f"got {value}: {first['msg']}"
        raise ValueError(printable(f"{where}: {got}; expected {EXPECTED}")) from error
