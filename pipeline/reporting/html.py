"""One HTML file that opens offline: the template with its numbers, figures and pictures, and Plotly's script inside."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from pipeline.reporting.contrasts import Contrast
from pipeline.reporting.figures import Figure, Style
from pipeline.reporting.intervals import Difference, wilson_interval
from pipeline.reporting.perceptron_figures import Perceptron
from pipeline.reporting.pictures import Sheet
from pipeline.reporting.runs import Run
from pipeline.reporting.summary import Row, amount
from pipeline.reporting.synthetic import Quality
from pipeline.reporting.verdict import TOLD, Groups

TEMPLATE = "report.html.j2"


@dataclass(frozen=True)
class Page:
    """All that the page shows; `sheets` by strategy ("" for those of none), `provenance` by heading."""

    title: str
    confidence: float
    runs: Sequence[Run]
    groups: Groups
    summary: Sequence[Row]
    passes_per_second: float | None
    source_names: Mapping[str, str]
    notices: Sequence[str]
    verdict: Sequence[str]
    flags: Sequence[str]
    contrasts: Sequence[Contrast]
    overview: Sequence[Figure]
    data: Sequence[Figure]
    training: Sequence[Figure]
    perceptron: Perceptron
    perceptron_rows: Sequence[Sequence[Figure]]
    styles: Mapping[str, Style]
    sheets: Mapping[str, Sequence[Sheet]]
    num_without_margin: int
    margin_quality: Mapping[str, Any]
    synthetic_quality: Quality
    selection: str
    synthetic_sheets: Sequence[Sheet]
    margin_sentences: Sequence[str]
    digests: Mapping[str, str]
    provenance: Mapping[str, Any]

    @property
    def figures(self) -> list[Figure]:
        return [*self.overview, *self.data, *self.training, *chain(*self.perceptron_rows)]


def render(page: Page) -> str:
    """The page as text; equal pages give equal text."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.reporting", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"percent": percent, "points": points, "pretty": pretty, "amount": amount}
    environment.globals |= {"wilson": wilson_interval, "told": TOLD}
    drawn = {figure.key: {"data": figure.data, "layout": figure.layout} for figure in page.figures}
    return environment.get_template(TEMPLATE).render(
        page=page,
        figures=script_json(drawn),
        plotly=Markup(get_plotlyjs()),
    )


def script_json(content: Any) -> Markup:
    """JSON that cannot end the script element which it stands in."""
    return Markup(json.dumps(content, sort_keys=True, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"))


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}"


def points(difference: Difference) -> str:
    """A difference of accuracies in percentage points, with its sign."""
    return f"{100 * difference.mean:+.1f}".replace("-", "−")


def pretty(content: Any) -> str:
    return json.dumps(content, indent=2, sort_keys=True)
