"""The HTML page: one file, with its pictures in it."""

import argparse
import base64
import io
from html import escape
from importlib.metadata import version
from pathlib import Path
from string import Template

from decoupled_methods import L, Q
from finding import Finding
from findings import findings, summary, tried
from memory import memory_rows
from methods import METHODS
from panels import Panel, cosine_panels, main_panels, study_panels, write_svg
from report import Finals, alpha_name, has_seconds, table
from studies import main_part, studies_in, study_rows

VARIED = (
    "<p>Each value is tuned by itself, with the same six points. What is not varied is as in the "
    f"table above: q={Q}, l={L}, a linear auxiliary model.</p>"
)
TIMED = (
    "<li>Simulated seconds are what training would take on the fleet of the command below: each "
    "run's clock adds up computing and sending, from the rows computed and the bytes sent "
    "(docs/planning.md). Evaluation takes no time. The fleet is made up, and another one puts the "
    "methods in another order.</li>"
)
NAMES = {"digits": "handwritten digits (scikit-learn)", "mnist": "MNIST", "cifar10": "CIFAR-10"}


def write_page(options: argparse.Namespace, finals: dict[float, Finals], path: Path) -> None:
    """Write the page."""
    template = Template((Path(__file__).parent / "page.html").read_text())
    methods = {method for own in finals.values() for method in main_part(own)}
    title = f"{len(methods)} ways to train together on {NAMES[options.dataset]}"
    lead = (
        f"{options.clients} clients train with {options.rounds} rounds of {options.local_steps} "
        f"mini-batches of {options.batch_size} each. Who wins depends on how the labels are "
        "spread over the clients, and on what you pay for: rounds, bytes, or the server's time."
    )
    html = template.substitute(
        title=escape(title),
        lead=escape(lead),
        links=_links(finals),
        expectations=_expectations(findings(finals, options.target)),
        sections="\n".join(_section(options, alpha, own) for alpha, own in finals.items()),
        methods="\n".join(_method(name) for name in METHODS if name in methods),
        first_seed=options.seeds[0],
        target=f"{options.target:g}",
        num_seeds=len(options.seeds),
        timed=TIMED if any(map(has_seconds, finals.values())) else "",
        command=escape(options.command),
        flsplit=version("flsplit"),
        torch=version("torch"),
    )
    path.write_text(html)


def _links(finals: dict[float, Finals]) -> str:
    parts = {_anchor(alpha): alpha_name(alpha) for alpha in finals}
    parts |= {
        "expected": "Expected and measured",
        "methods": "The methods",
        "how": "How it was done",
        "limits": "What it doesn't show",
    }
    return "".join(f'<a href="#{anchor}">{escape(name)}</a>' for anchor, name in parts.items())


def _anchor(alpha: float) -> str:
    return f"alpha-{alpha:g}"


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
    why = tried(expected, found)
    note = f'<p class="tried">{escape(why)}</p>' if why else ""
    return f"<section><p>{escape(expected)}</p><ul>{items}</ul>{note}</section>"


def _section(options: argparse.Namespace, alpha: float, finals: Finals) -> str:
    main = main_part(finals)
    where = alpha_name(alpha)
    parts = [
        f'<h2 id="{_anchor(alpha)}">{escape(_heading(alpha))}</h2>',
        f"<p>{escape(summary(main))}</p>",
        _figures(main_panels(finals) + cosine_panels(finals), where),
        _table(table(main, options.target)),
    ]
    if held := memory_rows(finals):
        parts += [f"<h3>What a client holds ({escape(where)})</h3>", _table(held)]
    if studies := studies_in(finals):
        parts += [f"<h3>One thing varied at a time ({escape(where)})</h3>", VARIED]
        parts.append(_figures(study_panels(finals), where))
    parts += [_table(study_rows(title, own, options.target)) for title, own in studies.items()]
    return "\n".join(parts)


def _heading(alpha: float) -> str:
    if alpha == float("inf"):
        return "IID: every client has examples of every class"
    degree = "strongly skewed" if alpha < 0.3 else "skewed"
    return f"{alpha_name(alpha)}: {degree} labels"


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
    method = METHODS[name]
    kind = "shared" if method.shares_clients else "own"
    return f'<dt class="{kind}">{escape(method.title)}</dt><dd>{escape(method.says)}</dd>'
