"""What is shown of runs, in words: a row for each model, its texts, and the finding."""

import codecs
import math
from collections.abc import Sequence
from typing import NamedTuple

from train.report.runs import Evaluation, Run, compare, scientific


class Row(NamedTuple):
    """A model that is shown: a run after some step."""

    run: Run
    step: int
    label: str

    @property
    def title(self) -> str:
        original = self.run.share is None and self.step
        return f"original target, {self.label}" if original else self.label

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
        one, limit, asked = self.measured, self.run.limit, self.run.share
        if not (self.step and asked):
            limit, asked = Evaluation(math.nan), math.nan
        return {
            "run": self.label, "asked": percent(asked), "R": percent(one.r, one.r_error),
            "limit R": percent(limit.r), "perplexity": plain(one.sample_perplexity),
            "limit perplexity": plain(limit.sample_perplexity),
            "KL to start": plain(one.kl_to_start), "distinct-2": plain(one.distinct_2),
        }  # fmt: skip


def table(runs: Sequence[Run]) -> list[Row]:
    """List each start model, each run with a share, each with the original target.

    Ahead of the latter, the one that is compared, at its evaluation with the nearest R.
    """
    starts = {run.origin: run for run in reversed(runs)}
    rows = [Row(run, min(run.evaluations), "start model") for run in reversed(starts.values())]
    ends = [Row(run, max(run.evaluations), run.label) for run in runs]
    rows += [row for row in ends if row.run.share is not None]
    if found := compare(runs):
        run, original, _ = found
        off = {step: abs(one.r - run.end.r) for step, one in original.evaluations.items()}
        step = min(off, key=lambda step: off[step])
        rows.append(Row(original, step, f"{original.label}, step {step}"))
    return rows + [row for row in ends if row.run.share is None]


def finding(runs: Sequence[Run]) -> tuple[Run, str]:
    """Say in one sentence what was measured, and compare; return also the run that it is about."""
    found = compare(runs)
    run = found[0] if found else max(runs, key=lambda run: (run.share or 0, run.end.r))
    got = f"{percent(run.end.r, run.end.r_error)} at perplexity {plain(run.end.sample_perplexity)}"
    if found:
        other = f"the original target at the same share: {plain(found[-1])}"
    elif run.share is not None:
        other = f"the limit, {percent(run.limit.r)}: {plain(run.limit.sample_perplexity)}"
    else:
        other = f"the start model, {percent(run.start.r)}: {plain(run.start.sample_perplexity)}"
    asked = run.label if run.share is None else f"Asked for {percent(run.share)} target tokens"
    return run, f"{asked}, the model writes {got}; {other}."


def pieces(ids: Sequence[int], targets: frozenset[int]) -> list[tuple[str, bool]]:
    """Return the text that each token adds, and whether it is a target token.

    A character that several tokens make is shown with the last one; other bytes become U+FFFD.
    """
    from model.tokenizer import load_tokenizer  # here, as it takes a second to import

    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    token_bytes = load_tokenizer().token_bytes
    return [(visible(decoder.decode(token_bytes(i))), i in targets) for i in ids]


def percent(share: float, error: float = math.nan) -> str:
    """Write a share, and its error where it is known: 20 %, 21.3 ± 1.1 %; nothing for NaN."""
    if math.isnan(error):
        return "" if math.isnan(share) else f"{100 * share:.3g} %"
    return f"{100 * share:.1f} ± {100 * error:.1f} %"


def plain(value: float, digits: int = 3) -> str:
    """Write three digits: 1.00, 58.4, 206,000; from ten million on 3.86e8; nothing for NaN."""
    if value < 10**digits - 0.5:
        return f"{value:#.{digits}g}".rstrip(".")
    if value < 1e7:
        return f"{float(f'{value:.{digits}g}'):,.0f}"
    return "" if math.isnan(value) else scientific(value, digits - 1)


def visible(text: str) -> str:
    """Write a sign for each character that is invisible or reverses the text around it."""
    signs = {"\n": "↵", "\t": "⇥"}
    return "".join(c if c.isprintable() else signs.get(c, f"U+{ord(c):04X}") for c in text)
