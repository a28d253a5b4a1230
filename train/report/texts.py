"""What is shown of runs, in words: a row for each model, its texts, and the finding."""

import codecs
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from train.report.runs import Evaluation, Run, compare, scientific

ORIGINAL = "original target, "


class Row(NamedTuple):
    """A model that is shown: a run after some step."""

    run: Run
    step: int
    title: str

    @property
    def measured(self) -> Evaluation:
        return self.run.evaluations[self.step]

    @property
    def texts(self) -> dict[str, list[int]]:
        """A typical text per prompt, as token ids."""
        return self.run.typical.get(self.step, {})

    @property
    def cells(self) -> dict[str, str]:
        """The table's row: empty where nothing was measured."""
        one, limit = self.measured, self.run.limit
        return {
            "run": visible(self.title.removeprefix(ORIGINAL)), "asked": percent(self.run.share),
            "R": percent(one.r, one.r_error), "limit R": percent(limit.r),
            "perplexity": plain(one.sample_perplexity),
            "limit perplexity": plain(limit.sample_perplexity),
            "KL to start": plain(one.kl_to_start), "distinct-2": plain(one.distinct_2),
        }  # fmt: skip


def table(runs: Sequence[Run]) -> list[Row]:
    """List each start model, each run with a share, each with the original target.

    Ahead of the latter, the one that is compared, at its evaluation with the nearest R.
    """
    starts = [*{run.origin: run for run in reversed(runs)}.values()]
    bare = [replace(run, share=None, limit=Evaluation()) for run in reversed(starts)]
    rows = [Row(run, min(run.evaluations), "start model") for run in bare]
    rows += [Row(run, max(run.evaluations), run.label) for run in runs if run.share is not None]
    originals = [(run, max(run.evaluations), run.label) for run in runs if run.share is None]
    if found := compare(runs):
        run, path, _ = found
        off = {step: abs(one.r - run.end.r) for step, one in path.evaluations.items()}
        step = min(off, key=lambda step: off[step])
        originals.insert(0, (path, step, f"{path.label}, step {step}"))
    return rows + [Row(run, step, ORIGINAL + label) for run, step, label in originals]


def finding(runs: Sequence[Run]) -> tuple[Run, str]:
    """Say in one sentence what was measured, and compare; return also the run that it is about."""
    found = compare(runs)
    run = found[0] if found else max(runs, key=lambda run: (run.share or 0, run.end.r))
    share, perplexity = percent(run.end.r, run.end.r_error), plain(run.end.sample_perplexity)
    got = f"{share} target tokens at perplexity {perplexity}"
    if found:
        other = f"the original target at the same share: {plain(found[-1])}"
    elif run.share is not None:
        other = f"the limit, {percent(run.limit.r)}: {plain(run.limit.sample_perplexity)}"
    else:
        other = f"the start model, {percent(run.start.r)}: {plain(run.start.sample_perplexity)}"
    asked = f"With {run.label}" if run.share is None else f"Asked for {percent(run.share)}"
    return run, f"{asked}, the model writes {got}; {other}."


def pieces(ids: Sequence[int], targets: frozenset[int]) -> list[tuple[str, bool]]:
    """Return the text that each token adds, and whether it is a target token.

    A character that several tokens make is shown with the last one; other bytes become U+FFFD.
    """
    from model.tokenizer import load_tokenizer  # here, as it takes a second to import

    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    token_bytes = load_tokenizer().token_bytes
    return [(visible(decoder.decode(token_bytes(i))), i in targets) for i in ids]


def percent(share: float | None, error: float = math.nan) -> str:
    """Write a share, and its error where it is known: 20 %, 21.3 ± 1.1 %; None and NaN: nothing."""
    if share is None or math.isnan(share):
        return ""
    known = not math.isnan(error)
    return f"{100 * share:.1f} ± {100 * error:.1f} %" if known else f"{100 * share:.3g} %"


def plain(value: float, digits: int = 3) -> str:
    """Write three digits: 1.00, 58.4, 206,000; from ten million on 3.86e8; NaN: nothing."""
    if value < 10**digits - 0.5:
        return f"{value:#.{digits}g}".rstrip(".")
    if value < 1e7:
        return f"{float(f'{value:.{digits}g}'):,.0f}"
    return "" if math.isnan(value) else scientific(value, digits - 1)


def visible(text: str) -> str:
    """Write a sign for each character that is invisible or reverses the text around it."""
    signs = {"\n": "↵", "\t": "⇥"}
    return "".join(c if c.isprintable() else signs.get(c, f"U+{ord(c):04X}") for c in text)
