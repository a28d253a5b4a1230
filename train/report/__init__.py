"""Report finished or interrupted runs: report.html, its figures as PNG, its table as CSV.

The page is self-contained: it embeds the figures, fetches nothing and runs no script. Each number
in a sentence is computed from the runs' logs.
"""

import codecs
import csv
import io
import math
import shlex
from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import astuple, replace
from pathlib import Path

from train.command import say
from train.report.runs import Evaluation, Run, Text, compare, read_runs


def write_report(folders: Sequence[Path], out: Path) -> None:
    """Write report.html, its figures and table.csv into `out`, and print their paths.

    Raises ValueError for a folder that is not a run, and if `out` cannot be written.
    """
    runs = read_runs(folders)  # first, as the imports take a second
    from weights.checkpoint import atomic_write

    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in _files(runs):
            with atomic_write(out / name) as temporary:
                temporary.write_bytes(content)
            say(visible(f"wrote {out / name}"))
    except OSError as error:
        again = f"python -m train.report {shlex.join(map(str, folders))} --out FOLDER"
        raise ValueError(f"cannot write to {out}: {error}; report elsewhere: {again}") from error


def _files(runs: Sequence[Run]) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the content of each file of a report as soon as it is made."""
    from train.report.figures import DARK, FRONTIER, GRID, LIGHT, draw

    yield "frontier.png", draw(FRONTIER, runs, LIGHT)
    yield "frontier-dark.png", draw(FRONTIER, runs, DARK)
    yield "curves.png", draw(GRID, runs, LIGHT)
    yield "table.csv", _csv(runs).encode()
    yield "report.html", _page(runs).encode()


def summary(folders: Sequence[Path]) -> str:
    """Return what a terminal shows: the table, a text before and after, and what to run next."""
    runs = read_runs(folders)
    rows, (best, sentence) = table(runs), finding(runs)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["", *("  ".join(map(str.rjust, row, widths)) for row in rows), "", sentence]
    for run in (run for run in (shown(runs)[0], best) if run.typical):
        text = "".join(piece for piece, _ in pieces(run, run.typical[0]))
        lines += ["", f"{run.label}: {text}"]
    if (best.folder / "model.safetensors").exists():  # a killed run has none
        command = f"python -m train.sample --model {shlex.quote(str(best.folder))}"
        lines += ["", "Sample more text:", f"    {command}"]
    return "\n".join(map(visible, lines))


def shown(runs: Sequence[Run]) -> list[Run]:
    """List the start model, the runs with a share, and those without one.

    A run ends where it is shown. The first one without a share is the run that `compare` found, cut
    at the step of the comparison.
    """
    at = min(runs[0].evaluations)
    start = replace(runs[0], label="start model", share=None, limit=Evaluation(), colour="")
    rows = [replace(start, evaluations={at: start.evaluations[at]})]
    rows += [run for run in runs if run.share is not None]
    if found := compare(runs):
        _, path, at = found
        label = f"{path.label}, step {at}"
        rows.append(replace(path, evaluations={at: path.evaluations[at]}, label=label))
    return rows + [run for run in runs if run.share is None]


def finding(runs: Sequence[Run]) -> tuple[Run, str]:
    """Return the run that the report is about, and a sentence that compares it."""
    found, start = compare(runs), cells(shown(runs)[0])
    run = found[0] if found else max(runs, key=lambda run: (run.share or 0, run.end.r))
    row = cells(run)
    given = f"With {run.label}" if run.share is None else f"Asked for {row['asked']}"
    other = f"the start model writes {start['R']} at {start['perplexity']}"
    if found:
        nearest = cells(shown(runs)[-1 - sum(run.share is None for run in runs)])
        other = f"the original target writes {nearest['R']} at {nearest['perplexity']}"
    elif row["limit R"]:
        other = f"the limit writes {row['limit R']} at {row['limit perplexity']}"
    got = f"{row['R']} target tokens at perplexity {row['perplexity']}"
    return run, f"{given}, the model writes {got}; {other}."


def cells(run: Run) -> dict[str, str]:
    """Return a run's row of the table: empty where nothing was measured."""
    return {
        "run": visible(run.label), "asked": percent(run.share),
        "R": percent(run.end.r, run.end.r_error), "limit R": percent(run.limit.r),
        "perplexity": plain(run.end.sample_perplexity),
        "limit perplexity": plain(run.limit.sample_perplexity),
        "KL to start": plain(run.end.kl_to_start), "distinct-2": plain(run.end.distinct_2),
    }  # fmt: skip


def table(runs: Sequence[Run]) -> list[list[str]]:
    """Return the names of the columns, and a row for each run that is shown."""
    return [[*cells(runs[0])], *([*cells(run).values()] for run in shown(runs))]


def pieces(run: Run, text: Text) -> list[tuple[str, bool]]:
    """Return the prompt and what each token adds to it, and whether that is a target token.

    A character that takes several tokens is shown with the last one; invalid bytes become U+FFFD.
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
    """Write three digits: 58.4, 206,000, 3.86e8; nothing for NaN."""
    rounded = float(f"{value:.{digits}g}")
    return "" if math.isnan(value) else f"{rounded:,g}".replace("e+0", "e")


def visible(text: str) -> str:
    """Write a sign for each character that is invisible or reverses the text around it."""
    signs = {"\n": "↵", "\t": "⇥"}
    return "".join(c if c.isprintable() else signs.get(c, f"U+{ord(c):04X}") for c in text)


def _csv(runs: Sequence[Run]) -> str:
    """Write everything measured, in full precision."""
    names = Evaluation.__match_args__
    writer = csv.writer(written := io.StringIO(), lineterminator="\n")
    writer.writerow(["run", "step", "asked", *names, *(f"limit_{name}" for name in names)])
    for run in shown(runs):
        label, step = visible(run.label), max(run.evaluations)
        writer.writerow([label, step, run.share, *astuple(run.end), *astuple(run.limit)])
    return written.getvalue()


def _page(runs: Sequence[Run]) -> str:
    from jinja2 import StrictUndefined, Template
    from markupsafe import Markup

    from train.report.figures import CURVES, DARK, LIGHT, draw

    template = Template(
        Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8"),
        autoescape=True,  # the model can write any text, markup included
        finalize=lambda value: value if isinstance(value, Markup) else visible(str(value)),
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    figures = {name: [b64encode(draw([[name]], runs, theme)).decode() for theme in (LIGHT, DARK)]
               for name in ("frontier", *CURVES)}  # fmt: skip
    given = [{"": run.label, "folder": run.folder} | run.about["options"] | run.about
             | run.about.get("versions", {}) for run in runs]  # fmt: skip
    left_out = ("options", "versions", "target_token_ids")
    names = dict.fromkeys(name for one in given for name in one if name not in left_out)
    return template.render(
        runs=runs, rows=shown(runs), finding=finding(runs)[1], figures=figures, curves=CURVES,
        light=LIGHT, dark=DARK, cells=cells, pieces=pieces, measures=table(runs),
        settings=[[name, *(one.get(name, "") for one in given)] for name in names],
    )  # fmt: skip
