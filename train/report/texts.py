"""Choose the texts that are shown, and write them token by token."""

import math
from array import array
from collections.abc import Sequence
from itertools import groupby, islice
from typing import NamedTuple

from train.report.runs import Evaluation, Run, compare, main_run, scientific


class Moment(NamedTuple):
    """A model whose text is shown: a run after some step."""

    run: Run
    step: int
    label: str

    @property
    def title(self) -> str:
        original = self.step > 0 and self.run.share is None
        return f"original target, {self.label}" if original else self.label

    @property
    def evaluation(self) -> Evaluation:
        return self.run.evaluations[self.step]

    @property
    def texts(self) -> "dict[str, array[int]]":
        """A typical text per prompt."""
        return self.run.typical.get(self.step, {})


class Piece(NamedTuple):
    """The text of a token, or the part of it that is a target token's or a sign."""

    text: str
    target: bool
    sign: bool  # stands for a character that cannot be seen


def moments(runs: Sequence[Run]) -> list[Moment]:
    """List each start model, the runs with a share, and those with the original target.

    Ahead of the latter, one of them at the R that a run with a share has, where they are compared.
    """
    starts = {run.start: run for run in reversed(runs)}
    shown = [Moment(run, min(run.evaluations), "start model") for run in reversed(starts.values())]
    ends = [Moment(run, max(run.evaluations), run.label) for run in runs]
    shares = [end for end in ends if end.run.share is not None]
    shown += sorted(shares, key=lambda end: end.run.share or 0)
    if found := compare(runs):
        _, run, step, _ = found
        shown.append(Moment(run, step, f"{run.label}, step {step}"))
    return shown + [end for end in ends if end.run.share is None and end not in shown]


def finding(runs: Sequence[Run]) -> str:
    """Say in one sentence what was measured: of a share if there is one, and what else it costs."""
    run, found = main_run(runs), compare(runs)
    end, start = run.end, run.evaluations[min(run.evaluations)]
    got = f"{percent(end.r, end.r_error)} at perplexity {plain(end.sample_perplexity)}"
    if run.share is None:
        before = f"{percent(start.r)} at {plain(start.sample_perplexity)}"
        return f"{run.label}: the model writes {got}; the start model, {before}."
    said = f"Asked for {percent(run.share)} target tokens, the model writes {got}"
    if found:
        return f"{said}; the original target at the same share: {plain(found[-1])}."
    if run.limit:
        return f"{said}; the limit at {percent(run.limit.r)}: {plain(run.limit.sample_perplexity)}."
    return f"{said}."


def pieces(ids: Sequence[int], targets: frozenset[int]) -> list[Piece]:
    """Split the text of `ids` into its tokens, with the target tokens marked.

    A character may be spread over several tokens: it is shown with the first of them, and marked if
    any of them is a target token. Bytes that are not UTF-8 become U+FFFD.
    """
    from model.tokenizer import load_tokenizer  # here, as it takes seconds to import

    tokens = [load_tokenizer().token_bytes(i) for i in ids]
    owners = iter([at for at, token in enumerate(tokens) for _ in token])  # of each byte
    owned = []
    for character in b"".join(tokens).decode("utf-8", errors="surrogateescape"):
        of_tokens = [*islice(owners, len(character.encode("utf-8", errors="surrogateescape")))]
        target, seen = any(ids[at] in targets for at in of_tokens), visible(character)
        owned.append((of_tokens[0], Piece(seen, target, seen != character)))
    groups = groupby(owned, key=lambda o: (o[0], o[1].target, o[1].sign))
    return [
        Piece("".join(piece.text for _, piece in group), target, sign)
        for (_, target, sign), group in groups
    ]


def percent(share: float, error: float = math.nan) -> str:
    """Write a share, and its error where it is known: 20 %, 21.3 ± 1.1 %."""
    if math.isnan(error):
        return f"{100 * share:.3g} %"
    return f"{100 * share:.1f} ± {100 * error:.1f} %"


def plain(value: float, digits: int = 3) -> str:
    """Write three significant digits: 1.00, 58.4, 206,000; from ten million on 3.86e8."""
    if value < 10**digits - 0.5:
        return f"{value:#.{digits}g}".rstrip(".")
    return f"{float(f'{value:.{digits}g}'):,.0f}" if value < 1e7 else scientific(value, digits - 1)


def visible(text: str) -> str:
    """Write a sign for each character that is invisible or reverses the text around it."""
    signs = {"\n": "↵", "\t": "⇥"} | {chr(c): "\ufffd" for c in range(0xDC80, 0xDD00)}  # bytes
    return "".join(c if c.isprintable() else signs.get(c, f"U+{ord(c):04X}") for c in text)
