"""What is shown of runs, in words: which ones, a row of the table, the finding, the texts."""

import codecs
import math
from collections.abc import Sequence

from train.report.runs import Evaluation, Run, Text, compare, scientific


def shown(runs: Sequence[Run]) -> list[Run]:
    """List each start model, each run with a share, each with the original target.

    Each is a run that ends where it is shown. Ahead of the original target's stands the one that
    is compared, as it was when its R was nearest.
    """
    starts = {run.origin: run for run in reversed(runs)}.values()
    bare = {"label": "start model", "share": None, "limit": Evaluation(), "colour": ""}
    rows = [run.until(min(run.evaluations), **bare) for run in reversed(starts)]
    rows += [run for run in runs if run.share is not None]
    if found := compare(runs):
        run, path, _ = found
        step = min(path.evaluations, key=lambda step: abs(path.evaluations[step].r - run.end.r))
        rows.append(path.until(step, label=f"{path.label}, step {step}"))
    return rows + [run for run in runs if run.share is None]


def cells(run: Run) -> dict[str, str]:
    """Return a run's row of the table: empty where nothing was measured."""
    return {
        "run": visible(run.label), "asked": percent(run.share),
        "R": percent(run.end.r, run.end.r_error), "limit R": percent(run.limit.r),
        "perplexity": plain(run.end.sample_perplexity),
        "limit perplexity": plain(run.limit.sample_perplexity),
        "KL to start": plain(run.end.kl_to_start), "distinct-2": plain(run.end.distinct_2),
    }  # fmt: skip


def finding(runs: Sequence[Run]) -> tuple[Run, str]:
    """Say in one sentence what was measured, and compare; return also the run that it is about."""
    found = compare(runs)
    run = found[0] if found else max(runs, key=lambda run: (run.share or 0, run.end.r))
    row, start = cells(run), shown(runs)[0].end
    if found:
        other = f"the original target at the same share: {plain(found[-1])}"
    elif run.share is not None:
        other = f"the limit, {row['limit R']}: {row['limit perplexity']}"
    else:
        other = f"the start model, {percent(start.r)}: {plain(start.sample_perplexity)}"
    given = f"With {run.label}" if run.share is None else f"Asked for {row['asked']}"
    got = f"{row['R']} target tokens at perplexity {row['perplexity']}"
    return run, f"{given}, the model writes {got}; {other}."


def pieces(run: Run, text: Text) -> list[tuple[str, bool]]:
    """Return the prompt and what each token adds to it, and whether that is a target token.

    A character that several tokens make is shown with the last one; other bytes become U+FFFD.
    """
    from model.tokenizer import load_tokenizer  # here, as it takes a second to import

    decoder, (prompt, ids) = codecs.getincrementaldecoder("utf-8")("replace"), text
    token_bytes = load_tokenizer().token_bytes
    tokens = [(visible(decoder.decode(token_bytes(i))), i in run.targets) for i in ids]
    return [(visible(prompt), False), *tokens]


def percent(share: float | None, error: float = math.nan) -> str:
    """Write a share, with its error if that is known: 20 %, 21.3 ± 1.1 %; nothing for NaN."""
    if share is None or math.isnan(share):
        return ""
    known = not math.isnan(error)
    return f"{100 * share:.1f} ± {100 * error:.1f} %" if known else f"{100 * share:.3g} %"


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
