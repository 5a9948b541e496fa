"""The HTML page: one file, with its pictures in it."""

import argparse
import base64
import io
import re
from collections.abc import Sequence
from html import escape
from importlib.metadata import version
from pathlib import Path
from string import Template

from experiment import Experiment
from findings import Finding
from memory import memory_rows
from methods import find_method
from panels import Panel, cosine_panels, main_panels, study_panels, write_svg
from report import Shown, has_seconds
from studies import studies_in, study_rows

VARIED = (
    "<p>Each value is tuned by itself, in the same way. What is not varied is as in the "
    "table above: q=5, l=5, a linear auxiliary model.</p>"
)
TIMED = (
    "<li>Simulated seconds are what training would take on the fleet of the command below: each "
    "run's clock adds up computing and sending, from the rows computed and the bytes sent "
    "(docs/planning.md). Evaluation takes no time. The fleet is made up, and another one puts the "
    "methods in another order.</li>"
)
TUNED = (
    "<li>Learning rates are tuned for each method in the same way, with seeds of their own, on "
    "validation examples that no client trains on: all points of a small grid in runs of a quarter "
    "of the rounds, then the best three in runs of half of them with two other seeds. Where the "
    "best is at an end of the grid, further points are tried. A rate marked * is at an end all the "
    "same, so a better one may lie beyond it.</li>"
)
GIVEN = "<li>Learning rates are those of the command; nothing was tuned.</li>"


def write_page(
    options: argparse.Namespace,
    experiment: Experiment,
    shown: Sequence[Shown],
    found: list[Finding],
    path: Path,
) -> None:
    """Write the page."""
    template = Template((Path(__file__).parent / "page.html").read_text())
    methods = dict.fromkeys(method for one in shown for method in one.finals)
    title = f"{len(methods)} ways to train together on {experiment.title}"
    lead = (
        f"{options.clients} clients train with {options.rounds} rounds of {options.local_steps} "
        f"mini-batches of {options.batch_size} each. Who wins depends on how the labels are "
        "spread over the clients, and on what you pay for: rounds, bytes, or the server's time."
    )
    html = template.substitute(
        title=escape(title),
        lead=escape(lead),
        notes=f"<p>{escape(experiment.notes)}</p>" if experiment.notes else "",
        links=_links(shown, found),
        expectations=_expectations(found),
        sections="\n".join(map(_section, shown)),
        methods="\n".join(map(_method, methods)),
        matters=f"{options.matters:g}",
        target=f"{options.target:g}",
        num_seeds=len(options.seeds),
        timed=TIMED if any(has_seconds(one.finals) for one in shown) else "",
        tuned=GIVEN if options.rates else TUNED,
        command=escape(options.command),
        flsplit=version("flsplit"),
        torch=version("torch"),
    )
    path.write_text(html)


def _links(shown: Sequence[Shown], found: list[Finding]) -> str:
    parts = {_anchor(one): one.title for one in shown}
    parts |= {"expected": "Expected and measured"} if found else {}
    parts |= {
        "methods": "The methods",
        "how": "How it was done",
        "limits": "What it doesn't show",
    }
    return "".join(f'<a href="#{anchor}">{escape(name)}</a>' for anchor, name in parts.items())


def _anchor(shown: Shown) -> str:
    return "part-" + re.sub(r"[^a-zA-Z0-9]+", "-", shown.title).strip("-")


def _expectations(found: list[Finding]) -> str:
    if not found:
        return ""
    by_expected: dict[str, list[Finding]] = {}
    for one in found:
        by_expected.setdefault(one.expected, []).append(one)
    cards = "".join(_card(expected, own) for expected, own in by_expected.items())
    return f'<h2 id="expected">Expected and measured</h2>\n<div class="cards">{cards}</div>'


def _card(expected: str, found: list[Finding]) -> str:
    items = "".join(
        f'<li class="{one.verdict.split()[0]}"><b>{escape(one.where)}: {escape(one.verdict)}.</b> '
        f"{escape(one.measured)}</li>"
        for one in found
    )
    return f"<section><p>{escape(expected)}</p><ul>{items}</ul></section>"


def _section(shown: Shown) -> str:
    finals, where = shown.finals, escape(shown.title)
    parts = [
        f'<h2 id="{_anchor(shown)}">{where}</h2>',
        f"<p>{escape(shown.summary)}</p>",
        _figures(main_panels(finals) + cosine_panels(finals), shown.title),
        _table(shown.rows),
    ]
    for heading, rows in (
        ("Each client: all test examples / its own kind", shown.clients),
        ("How the learning rates were found", shown.tuning),
        ("What a client holds", memory_rows(finals)),
    ):
        if rows:
            parts += [f"<h3>{heading} ({where})</h3>", _table(rows)]
    if studies := studies_in(finals):
        parts += [f"<h3>One thing varied at a time ({where})</h3>", VARIED]
        parts.append(_figures(study_panels(finals), shown.title))
    parts += [_table(study_rows(title, own, shown.target)) for title, own in studies.items()]
    return "\n".join(parts)


def _figures(panels: list[Panel], where: str) -> str:
    return f'<div class="pictures">{"".join(_figure(one, where) for one in panels)}</div>'


def _figure(panel: Panel, where: str) -> str:
    file = io.BytesIO()
    write_svg(panel, file)
    data = base64.b64encode(file.getvalue()).decode()
    text = f"{where}. {panel.caption}"
    return (
        f'<figure><img alt="{escape(text)}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{escape(panel.caption)}</figcaption></figure>"
    )


def _table(rows: list[dict[str, str]]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(value)}</td>" for value in row.values()) + "</tr>"
        for row in rows
    )
    whole = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{whole}</div>'


def _method(name: str) -> str:
    method = find_method(name)
    kind = "shared" if method.shares_clients else "own"
    return f'<dt class="{kind}">{escape(method.title)}</dt><dd>{escape(method.says)}</dd>'
