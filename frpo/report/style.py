"""How the figures look: a colour for each family, a shade and a marker for each method, one way to make a PNG."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from frpo.report.compare import Estimate
from frpo.report.measurements import BASE, FRPO, Measurements, number

# Light, middle and dark of each family's shades; further families take the spare ones in order.
SHADES = {
    BASE: ("#9ca3af", "#6b7280", "#374151"),
    "baseline": ("#f5b301", "#e8590c", "#7f1d1d"),
    FRPO: ("#38bdf8", "#2563eb", "#1e1b4b"),
}
SPARE = (("#86d38a", "#2f9e44", "#0b4a1b"), ("#d0a9e4", "#9c36b5", "#4a0e5c"), ("#f2a1bd", "#d6336c", "#6b0f33"))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", ":", "-.")
MOST_METHODS = 7
LEAST_SPAN = 0.1
RC: Any = {
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "lines.markersize": 6,
    "figure.facecolor": "white",
    "text.parse_math": False,
    "axes.formatter.use_mathtext": False,
}
DPI = 130


@dataclass(frozen=True)
class Picture:
    """A finished figure: ``name`` (of its file, without .png), ``title``, ``caption`` and the PNG."""

    name: str
    title: str
    caption: str
    png: bytes

    @property
    def base64(self) -> str:
        """The PNG as text, for a page that holds its own pictures."""
        return b64encode(self.png).decode("ascii")


@dataclass(frozen=True)
class Look:
    """How a method is drawn."""

    colour: tuple[float, float, float]
    marker: str
    line: str


class Styles:
    """The look of every method of a study; methods of a family share a colour and differ in shade and marker."""

    def __init__(self, m: Measurements) -> None:
        own = m.family(m.baseline)
        known = SHADES | {own: SHADES["baseline"]}
        spare = [name for name in dict.fromkeys(m.methods["family"].astype(str)) if name not in known]
        self.shades = known | {name: SPARE[i % len(SPARE)] for i, name in enumerate(spare)}
        self._looks: dict[str, Look] = {}
        for family in dict.fromkeys(m.methods["family"].astype(str)):
            self._dress(family, m.of_family(family))

    def _dress(self, family: str, names: list[str]) -> None:
        for i, name in enumerate(names):
            place = i / (len(names) - 1) if len(names) > 1 else 0.5
            stops = np.array([to_rgb(stop) for stop in self.shades[family]])
            red, green, blue = (float(np.interp(2 * place, range(3), stops[:, i])) for i in range(3))
            self._looks[name] = Look((red, green, blue), MARKERS[i % len(MARKERS)], LINES[i % len(LINES)])

    def __getitem__(self, method: str) -> Look:
        return self._looks[method]

    def family(self, name: str) -> str:
        """A family's own colour."""
        return self.shades[name][1]


def featured(m: Measurements, primary: str | None, among: Iterable[str]) -> list[str]:
    """At most MOST_METHODS methods for a figure of curves, in display order.

    The baseline and the primary method first, then one method of each further family, the baseline's weakest constraint
    (what FRPO has to beat), and FRPO and the baseline's family by turns.
    """
    present = [name for name in m.methods.index if name in set(among)]
    own = m.family(m.baseline)
    families = dict.fromkeys(m.family(name) for name in present)
    further = [next(n for n in present if m.family(n) == f) for f in families if f not in (own, FRPO)]
    frpo = [name for name in present if m.family(name) == FRPO]
    others = [name for name in present if m.family(name) == own]
    turns = [name for pair in zip(frpo, others, strict=False) for name in pair]
    wanted = [m.baseline, *([primary] if primary else []), *further[:3], *others[:1], *frpo[:2], *turns, *frpo, *others]
    chosen = list(dict.fromkeys(name for name in wanted if name in present))[:MOST_METHODS]
    return [name for name in present if name in chosen]


@contextmanager
def drawing() -> Iterator[None]:
    """Matplotlib as the report sets it, whatever the user's own settings."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(RC)
        yield


def panels(rows: int, columns: int, height: float = 4.0, width: float = 12.0) -> tuple[Figure, np.ndarray]:
    """A figure and its axes [rows, columns], without any global state."""
    figure = Figure(figsize=(width, height * rows), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def legend(figure: Figure, axes: Iterable[Axes], columns: int = 2) -> None:
    """One legend below all panels, each label once."""
    entries = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    if entries:
        figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=columns, fontsize=11)


def png(figure: Figure) -> bytes:
    """The figure as PNG, the same bytes for the same figure."""
    target = io.BytesIO()
    figure.savefig(target, format="png", metadata={"Software": None})
    return target.getvalue()


def log_axis(axis: mpl.axis.Axis, values: Iterable[float] = ()) -> None:
    """Plain numbers on a logarithmic axis whose limits stand: at ``values`` where they are given."""
    at = sorted({float(v) for v in values if np.isfinite(v)})
    if at:
        axis.set_ticks(at, labels=[number(v) for v in at])
    else:
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(base=10, subs=(1.0,) if high > 1000 * low else (1.0, 3.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def unit_axis(axes: Iterable[Axes], values: Iterable[float]) -> None:
    """Limit the y axes to [0, 1] and a little more where all values lie in it, so that panels compare."""
    known = [v for v in values if np.isfinite(v)]
    if known and min(known) >= 0 and max(known) <= 1:
        for ax in axes:
            ax.set_ylim(-0.03, 1.03)


def fit_axis(axis: mpl.axis.Axis, means: Iterable[float]) -> None:
    """Keep an axis of scores in [0, 1] to what matters there: no wider than [0, 1], no narrower than LEAST_SPAN.

    Intervals of few seeds go far beyond, and a difference of a thousandth should not fill a figure. Nothing is done
    where a mean lies outside.
    """
    known = [v for v in means if np.isfinite(v)]
    if known and min(known) >= 0 and max(known) <= 1:
        low, high = axis.get_view_interval()
        wider = max(0.0, LEAST_SPAN - (high - low)) / 2
        limit = axis.axes.set_xlim if axis is axis.axes.xaxis else axis.axes.set_ylim
        limit(max(low - wider, -0.03), min(high + wider, 1.03))


def point(ax: Axes, x: Estimate, y: Estimate, look: Look, label: str, *, ringed: bool = False) -> None:
    """A point with its intervals, as far as they are known, and with a black ring where it should be found fast."""
    bars = [[[i.mean - i.low], [i.high - i.mean]] if i.known else None for i in (x, y)]
    ax.errorbar([x.mean], [y.mean], xerr=bars[0], yerr=bars[1], fmt="none", ecolor=look.colour, capsize=3, elinewidth=1)
    edge, width, front = ("black", 1.8, 4) if ringed else (look.colour, 1.0, 3)
    ax.plot([x.mean], [y.mean], look.marker, color=look.colour, label=label, ms=9, mec=edge, mew=width, zorder=front)


def curve(ax: Axes, xs: list[float], ys: list[Estimate], look: Look, label: str, *, band: bool = True) -> None:
    """A line through means, with a band of their intervals where they are known."""
    ax.plot(xs, [y.mean for y in ys], color=look.colour, marker=look.marker, linestyle=look.line, label=label)
    if band:
        ax.fill_between(xs, [y.low for y in ys], [y.high for y in ys], color=look.colour, alpha=0.13, linewidth=0)
