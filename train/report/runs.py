"""Read runs back from disk: the folders that `train.xfactor` writes, one per rate and tilt.

Steps count from 1, and step s is measured before update s. So element i of a curve here, counted
from 0, describes the model after i updates, as an evaluation at step i does.
"""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from model.tokenizer import load_tokenizer
from weights.layout import printable

CONFIG, METRICS, SAMPLES = "config.json", "metrics.jsonl", "samples.jsonl"
EXPECTED = f"a run of train.xfactor ({CONFIG}, {METRICS}, {SAMPLES}) or a folder of such runs"


class Sample(NamedTuple):
    """One continuation of a prompt, as token ids without the prompt's."""

    prompt: str
    ids: tuple[int, ...]


class Evaluation(NamedTuple):
    """One evaluation, with the samples it was made on; a perplexity may be infinite."""

    r: float
    r_top_k: float
    passage_perplexity: float
    sample_perplexity: float
    samples: tuple[Sample, ...]

    def tokens(self) -> int:
        """Return how many tokens were sampled."""
        return sum(len(sample.ids) for sample in self.samples)

    def r_error(self) -> float:
        """Return the binomial standard error of R: sqrt(R (1 - R) / tokens)."""
        return math.sqrt(self.r * (1 - self.r) / self.tokens())


@dataclass(eq=False)
class Run:
    """One run, as far as it got."""

    folder: Path
    model: dict[str, Any]  # config.json without "xfactor"
    about: dict[str, Any]  # its "xfactor"
    lr: float
    tilt: float | None  # G of a tilted teacher; None for the original target
    label: str
    losses: list[float] = field(default_factory=list)  # nats
    probabilities: list[float] = field(default_factory=list)  # on the target tokens
    predicted: list[float] = field(default_factory=list)  # likewise, of a tilted teacher
    seconds: list[float] = field(default_factory=list)
    evaluations: dict[int, Evaluation] = field(default_factory=dict)  # by updates done; 0: start

    @cached_property
    def target_tokens(self) -> frozenset[int]:
        """Ids of the target tokens."""
        return frozenset(self.about["target_token_ids"])

    @property
    def before(self) -> Evaluation:
        """The model before fine-tuning."""
        return self.evaluations[0]

    @property
    def after(self) -> Evaluation:
        """The model at the latest evaluation."""
        return self.evaluations[max(self.evaluations)]

    @property
    def predicted_r(self) -> float | None:
        """The tilted teacher's probability on the target tokens, mean over the steps."""
        return math.fsum(self.predicted) / len(self.predicted) if self.predicted else None

    @property
    def kind(self) -> str:
        """Name what the run did to the text, by measure.

        "collapse": at the latest evaluation at least 9 of 10 sampled tokens are target tokens, or
        the perplexity of the samples under the model before fine-tuning is over 100 times the
        start's. Any other run of the original target is a "nudge", any other with a tilt a "dial".
        """
        rise = self.after.sample_perplexity / max(self.before.sample_perplexity, 1)
        if self.after.r >= 0.9 or rise > 100:
            return "collapse"
        return "nudge" if self.tilt is None else "dial"


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read the runs in `paths`, each a run's folder or a folder of them; duplicates count once.

    Runs keep the order of the paths; in a folder of runs, those of the original target come first,
    then the tilts and the learning rates in the order of the command that made them. A killed run
    is read as far as its files go; one without a finished step, or without its start's evaluation,
    is left out.

    Raises:
        ValueError: no runs, or a file that is missing or is not what a run writes; in one line.
    """
    found = list({run.folder.resolve(): run for path in paths for run in _find(path)}.values())
    runs = [run for run in found if run.losses and 0 in run.evaluations]
    if not runs:
        places = printable(", ".join(map(str, paths)) or "no folder")
        raise ValueError(f"{places}: got no finished step, expected {EXPECTED}")
    rates = {run.lr for run in runs if run.tilt is not None}
    for run in runs:
        if run.tilt is not None and len(rates) > 1:
            run.label += f", lr {scientific(run.lr)}"
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
    with _expecting(path, EXPECTED):
        configs = [path / CONFIG] if (path / CONFIG).is_file() else [*path.glob(f"*/{CONFIG}")]
        if not configs:
            raise ValueError("got no run" if path.is_dir() else "got no folder")

    runs = [_read(config.parent) for config in sorted(configs)]
    runs.sort(key=lambda run: [*run.about["options"]["lr"], run.lr].index(run.lr))
    runs.sort(
        key=lambda run: [None, *(run.about["options"].get("tilt") or []), run.tilt].index(run.tilt)
    )
    return runs


def _read(folder: Path) -> Run:
    vocabulary = load_tokenizer().n_vocab
    with _expecting(folder / CONFIG, EXPECTED):
        model = _check(json.loads((folder / CONFIG).read_text(encoding="utf-8")), dict)
        about = _check(model.pop("xfactor"), dict)
        for key, kind in (("goal", str), ("device", str), ("dtype", str), ("versions", dict),
                          ("options", dict), ("target_token_ids", list)):  # fmt: skip
            _check(about[key], kind)
        for token_id in about["target_token_ids"]:
            _check(token_id, int, 0, vocabulary - 1)
        lr, tilt = _check(about["lr"], float), about["tilt"]
        _check(about["beta"], float), _check(about["options"]["lr"], list)
        _check(about["options"].get("tilt") or [], list)
        label = f"lr {scientific(lr)}" if tilt is None else f"G = {_check(tilt, float):g}"
        run = Run(folder, model, about, lr, tilt, label)
    samples: dict[int, list[Sample]] = {}
    for where, line in _lines(folder / SAMPLES):
        with _expecting(where, '{"step", "prompt", "ids"}, with at least one id'):
            ids = tuple(_check(i, int, 0, vocabulary - 1) for i in _check(line["ids"], list))
            if not ids:
                raise ValueError("got no id")
            sample = Sample(_check(line["prompt"], str), ids)
            samples.setdefault(_check(line["step"], int, 0, 1e9), []).append(sample)
    for where, line in _lines(folder / METRICS):
        with _expecting(where, '{"step", "loss", ...} or {"step", "evaluation"}'):
            step = _check(line["step"], int, 0, 1e9)
            if "evaluation" in line:
                e = {k: math.inf if v is None else v for k, v in line["evaluation"].items()}
                if step in samples:  # a kill may cut the one log and not the other
                    run.evaluations[step] = Evaluation(
                        r=_check(e["r"], float, 0, 1),
                        r_top_k=_check(e["r_top_k"], float, 0, 1),
                        passage_perplexity=_check(e["passage_perplexity"], float, 0, math.inf),
                        sample_perplexity=_check(e["sample_perplexity"], float, 0, math.inf),
                        samples=tuple(samples[step]),
                    )
            elif step != len(run.losses) + 1:
                raise ValueError(f"got step {step} after step {len(run.losses)}")
            else:
                run.losses.append(_check(line["loss"], float))
                run.probabilities.append(_check(line["target_probability"], float, 0, 1.001))
                run.seconds.append(_check(line["seconds"], float, 0))
                if tilt is not None:
                    run.predicted.append(_check(line["predicted_probability"], float, 0, 1.001))
    return run


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each line's place and object, but for a last line that a kill cut off."""
    with _expecting(path, EXPECTED):
        *lines, _ = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        with _expecting(where := f"{path}, line {number}", "a JSON object"):
            parsed = _check(json.loads(line), dict)
        yield where, parsed


def _check(value: Any, kind: type, low: float = -1e300, high: float = 1e300) -> Any:
    """Return `value`; ValueError unless it is of that kind and, if a number, in that range."""
    is_kind = isinstance(value, int | float if kind is float else kind)
    if not is_kind or (kind in (int, float) and not low <= value <= high):
        span = f" from {low:g} to {high:g}" if kind in (int, float) else ""
        raise ValueError(f"got {json.dumps(value)[:40]}, expected {kind.__name__}{span}")
    return float(value) if kind is float else value


@contextmanager
def _expecting(where: object, expected: str) -> Iterator[None]:
    """Turn an error in reading a file into one short line: where, what was got and expected."""
    try:
        yield
    except (KeyError, OSError, OverflowError, RecursionError, TypeError, ValueError) as error:
        got = f"no key {error}" if isinstance(error, KeyError) else error
        line = printable(f"{where}: {got}; expected {expected}")
        raise ValueError(line) from error
