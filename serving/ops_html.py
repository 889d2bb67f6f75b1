"""How the ops page looks: one HTML page that needs no other file and no script.

Here belong templates, formats and the geometry of the plot; what the page tells is ops_page.py's.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from hashlib import sha256
from math import ceil, floor
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

import streamflow
from serving.ops_page import Drift, FeatureDrift, Interval, OpsPage
from streamflow.relations import MEANINGS

CHANCE = 0.5
NO_BREAK = "\N{NO-BREAK SPACE}"
DONE = {
    "promote": "promoted",
    "rollback": "rolled back",
    "wait": "waits",
    "refuse": "refused",
    "threshold": "threshold",
    "flag": "flagged",
}
"""What the actions of the ledger are called once they are done."""
FOLDERS = (Path(__file__).parent / "templates", Path(streamflow.__file__).parent / "templates")
STYLE = "".join(
    (folder / name).read_text() for folder, name in zip(FOLDERS, ("ops.css", "model_card.css"), strict=True)
)


def headers() -> dict[str, str]:
    """What the answer says beside the page: never stored, never framed, and nothing in it loads or runs."""
    style = base64.b64encode(sha256(STYLE.encode()).digest()).decode()
    return {
        "Cache-Control": "no-store",
        "Content-Security-Policy": (
            f"default-src 'none'; style-src 'sha256-{style}'; img-src data:; form-action 'self'; base-uri 'none'; "
            "frame-ancestors 'none'"
        ),
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }


def render(page: OpsPage, mlflow: str) -> str:
    """The page; ``mlflow`` is where a browser finds MLflow."""
    template = _environment().get_template("ops.html.jinja")
    return template.render(
        page=page,
        version=page.production,
        plot=quality_plot(page),
        heat=heat_map(page.drifts),
        mlflow=mlflow.rstrip("/"),
        meanings=MEANINGS,
        done=DONE,
        style=STYLE,
    )


def unavailable(reason: str, at: datetime) -> str:
    """The page while the database cannot be read."""
    return _environment().get_template("ops_unavailable.html.jinja").render(reason=reason, at=at, style=STYLE)


# --- the plot of promised and achieved AUC --------------------------------------------------------------------------

HEIGHT, TOP, BOTTOM, LEFT, RIGHT = 300, 28, 52, 8, 44
COLUMN, NARROW_COLUMN, FEW = 92, 62, 5


@dataclass(frozen=True)
class Mark:
    """A measure in the plot with its interval: pixels from the top, and its value."""

    x: float
    y: float
    low: float
    high: float
    interval: Interval


@dataclass(frozen=True)
class PlotColumn:
    """What a version promised and achieved in a month; the newest promise may stand alone, in no month yet."""

    x: float
    month: str | None
    version: int
    promised: Mark
    achieved: Mark | None
    decayed: bool


@dataclass(frozen=True)
class QualityPlot:
    """The plot, in pixels, with its axis beside the newest month; ``ticks`` are AUCs with their pixels from the top."""

    width: float
    height: float
    left: float
    right: float
    bottom: float
    chance: float
    ticks: Sequence[tuple[float, float]]
    columns: Sequence[PlotColumn]


def quality_plot(page: OpsPage) -> QualityPlot | None:
    """Promised and achieved AUC by month, oldest first, and what Production promises; None when there is neither."""
    reports = page.performances
    unjudged = page.production if page.production and page.production.promised and not page.achieved else None
    intervals = [one for report in reports for one in (report.promised, report.achieved)]
    if unjudged and unjudged.promised:
        intervals.append(unjudged.promised)
    if not intervals:
        return None
    low = floor(10 * min(CHANCE, *(one.low for one in intervals)) - 0.2) / 10
    high = ceil(10 * max(CHANCE, *(one.high for one in intervals)) + 0.2) / 10
    bottom = HEIGHT - BOTTOM

    def y(auc: float) -> float:
        return round(bottom - (auc - low) / (high - low) * (bottom - TOP), 1)

    def mark(x: float, interval: Interval) -> Mark:
        return Mark(x, y(interval.value), y(interval.low), y(interval.high), interval)

    count = len(reports) + bool(unjudged)
    step, aside = (COLUMN, 11) if count <= FEW else (NARROW_COLUMN, 7)
    places = [LEFT + step * (number + 0.5) for number in range(count)]
    columns = [
        PlotColumn(
            x,
            one.month,
            one.version,
            mark(x - aside, one.promised),
            mark(x + aside, one.achieved),
            one.decayed,
        )
        for x, one in zip(places, reports, strict=False)
    ]
    if unjudged and unjudged.promised:
        x = places[-1]
        columns.append(PlotColumn(x, None, unjudged.version, mark(x, unjudged.promised), None, False))
    ticks = [(tick / 10, y(tick / 10)) for tick in range(round(low * 10), round(high * 10) + 1)]
    width = LEFT + step * count + RIGHT
    return QualityPlot(width, HEIGHT, LEFT, width - RIGHT, bottom, y(CHANCE), ticks, columns)


# --- the heat map of drift ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeatRow:
    """One feature, or the scores, over the months shown; None where a month's version did not take the feature."""

    name: str
    cells: Sequence[FeatureDrift | None]


@dataclass(frozen=True)
class HeatMap:
    """PSI by feature and month, the newest first: ``rows`` are those that moved in some, ``still`` names the others."""

    months: Sequence[Drift]
    rows: Sequence[HeatRow]
    score: HeatRow
    still: Sequence[str]


def heat_map(drifts: Sequence[Drift]) -> HeatMap | None:
    """The features that moved at all, the one that moved most first; None without reports, given oldest first."""
    if not drifts:
        return None
    months = list(reversed(drifts))
    by_month = [{one.name: one for one in drift.features} for drift in months]
    names = dict.fromkeys(name for features in by_month for name in features)
    rows = [HeatRow(name, [features.get(name) for features in by_month]) for name in names]
    moved = [row for row in rows if any(cell and (cell.significant or cell.size != "none") for cell in row.cells)]
    moved.sort(key=lambda row: -max(cell.psi for cell in row.cells if cell))
    still = [row.name for row in rows if row not in moved]
    return HeatMap(months, moved, HeatRow("scores", [one.score for one in months]), still)


# --- formats --------------------------------------------------------------------------------------------------------


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(FOLDERS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "amount": amount,
        "short": lambda value: "–" if value is None else f"{value:.4g}".replace("-", "\N{MINUS SIGN}"),  # noqa: RUF001
        "words": lambda name: name.replace("_", " "),
        "interval": lambda one: f"{amount(one.value, 3)} ({ends(one)})",
        "ends": ends,
        "percent_interval": lambda one: f"{amount(100 * one.value, 1)}{NO_BREAK}% ({ends(one, 100, 1)}{NO_BREAK}%)",
        "sentence": sentence,
        "ended": lambda text: text if text.endswith((".", "?", "!")) else text + ".",
        "minute": lambda at: f"{at.astimezone(UTC):%Y-%m-%d %H:%M} UTC",
        "second": lambda at: f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC",
        "iso": lambda at: at.astimezone(UTC).isoformat(timespec="seconds"),
    }
    return environment


def amount(value: float, digits: int = 0) -> str:
    """A number with thousands separators and a true minus sign."""
    return f"{value:,.{digits}f}".replace("-", "\N{MINUS SIGN}")


def sentence(text: str) -> Markup:
    """A reason as a sentence begins, with what stands between backticks set as code."""
    parts = (text[:1].upper() + text[1:]).replace(" %", f"{NO_BREAK}%").split("`")
    if len(parts) % 2 == 0:
        return escape("`".join(parts))
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if number % 2 else escape(part) for number, part in enumerate(parts)
    )


def ends(interval: Interval, times: float = 1, digits: int = 3) -> str:
    """The ends of an interval, which no line break tears."""
    return f"{amount(times * interval.low, digits)}{NO_BREAK}to{NO_BREAK}{amount(times * interval.high, digits)}"
