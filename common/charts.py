"""Charts as inline SVG that needs no script: bars, columns, histograms and lines, for the HTML reports.

Positions are percentages and texts are pixels, so that a chart fills any width while its letters stay readable.
Colours come from the stylesheet of the page (classes `ink-0` and so on), which knows light and dark.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

from common.escaping import escape

N_INKS = 8  # colours the stylesheet holds for series and categories


def format_number(value: object, *, digits: int | None = None) -> str:
    """Return a number as people read it: 1,234 · 0.0312 · 5.6e-07; other values as str; None and NaN as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        item = getattr(value, "item", None)  # a numpy scalar
        return format_number(item(), digits=digits) if item is not None else str(value)
    if not math.isfinite(value):
        return "–" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if digits is not None:
        text = f"{value:,.{digits}f}"
    elif isinstance(value, int) or abs(value) >= 1000:
        text = f"{value:,.0f}"
    elif value != 0 and abs(value) < 1e-4:
        text = f"{value:.2e}"
    else:
        text = f"{value:.4g}"
    return text.replace("-", "−", 1) if text.startswith("-") else text


def percent(share: float | None, *, digits: int = 1) -> str:
    """Return a share between 0 and 1 as a percentage; None and NaN as a dash."""
    if share is None or math.isnan(share):
        return "–"
    return f"{100 * share:.{digits}f}%"


def nice_ticks(low: float, high: float, *, n_ticks: int = 5) -> list[float]:
    """Return round numbers (1, 2, 2.5 or 5 times a power of ten apart) from at or below low to at or above high."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / max(1, n_ticks - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def histogram_counts(values: Sequence[float], *, bins: int | Sequence[float]) -> tuple[list[float], list[int]]:
    """Return the edges [b + 1] and counts [b] of the finite values; the last bin holds its right edge."""
    import numpy as np

    numbers = np.asarray([math.nan if value is None else value for value in values], dtype=np.float64)
    numbers = numbers[np.isfinite(numbers)]
    counts, edges = np.histogram(numbers, bins=bins if isinstance(bins, int) else np.asarray(bins, dtype=np.float64))
    return [float(edge) for edge in edges], [int(count) for count in counts]


def histogram_svg(edges: Sequence[float], counts: Sequence[int], *, as_percent: bool, y_label: str) -> str:
    """Return a histogram with bars between edges; hovering a bar tells its range and count."""
    n_all = max(1, sum(counts))
    write = percent if as_percent else format_number
    low, width = edges[0], (edges[-1] - edges[0]) or 1.0
    y_ticks = nice_ticks(0, max(1, *counts) if counts else 1)
    bars = []
    for left, right, count in zip(edges[:-1], edges[1:], counts, strict=True):
        tip = f"{write(left)} to {write(right)}: {format_number(count)} ({percent(count / n_all)})"
        x, x_width = 100 * (left - low) / width, 100 * (right - left) / width
        bars.append(_column(x + 0.04 * x_width, 0.92 * x_width, count / y_ticks[-1], tip))
    x_ticks = [tick for tick in nice_ticks(edges[0], edges[-1]) if edges[0] <= tick <= edges[-1]]
    marks = [(100 * (tick - low) / width, percent(tick, digits=0) if as_percent else write(tick)) for tick in x_ticks]
    return _plot("".join(bars), x_marks=marks, y_ticks=y_ticks, y_label=y_label)


def columns_svg(names: Sequence[str], values: Sequence[float], *, as_percent: bool, y_label: str) -> str:
    """Return one thin column per value, in the order given, without names below; hovering tells name and value."""
    write = percent if as_percent else format_number
    y_ticks = nice_ticks(min(0.0, *values, 0.0), max(0.0, *values, 0.0))
    step = 100 / max(1, len(values))
    fill = 0.84 if len(values) <= 120 else 1.0
    bars = [
        _column(i * step, fill * step, max(0.0, value) / y_ticks[-1], f"{name}: {write(value)}")
        for i, (name, value) in enumerate(zip(names, values, strict=True))
    ]
    ranks = [rank for rank in nice_ticks(1, len(values)) if 1 <= rank <= len(values)] if len(values) > 1 else [1]
    marks = [((rank - 0.5) * step, format_number(int(rank))) for rank in ranks if rank == int(rank)]
    return _plot("".join(bars), x_marks=marks, y_ticks=y_ticks, y_label=y_label, as_percent=as_percent)


def bars_html(names: Sequence[str], values: Sequence[float], *, as_percent: bool) -> str:
    """Return one labelled horizontal bar per value."""
    write = percent if as_percent else format_number
    longest = max((abs(value) for value in values), default=0.0) or 1.0
    lines = []
    for name, value in zip(names, values, strict=True):
        width = round(100 * max(0.0, value) / (1.0 if as_percent and longest <= 1 else longest), 2)
        bar = f'<svg aria-hidden="true"><rect class="track"/><rect class="ink-0" width="{width}%"/></svg>'
        lines.append(
            f'<dt dir="auto" title="{escape(name)}">{escape(name)}</dt><dd>{bar}<span>{write(value)}</span></dd>'
        )
    return f'<dl class="bars">{"".join(lines)}</dl>'


def lines_svg(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    as_percent: bool,
    log_x: bool,
    y_label: str,
    from_zero: bool,
) -> str:
    """Return one line per series of (x, y) points, with dots to hover over; points that are not finite are left out."""
    known = {
        name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)] for name, points in series.items()
    }
    xs = [x for points in known.values() for x, _ in points] or [0.0, 1.0]
    ys = [y for points in known.values() for _, y in points] or [0.0, 1.0]
    write = percent if as_percent else format_number
    y_ticks = nice_ticks(min([0.0, *ys]) if from_zero else min(ys), max(ys))
    position, x_ticks = _x_scale(min(xs), max(xs), log_x=log_x)
    own = sorted(set(xs))  # few points far enough apart are the best ticks
    if len(own) <= 10 and all(position(right) - position(left) >= 8 for left, right in itertools.pairwise(own)):
        x_ticks = own
    shapes = []
    for i, (name, points) in enumerate(known.items()):
        places = [(position(x), 100 - _height(y, y_ticks)) for x, y in points]
        tips = [f"{name} · {format_number(x)}: {write(y)}" for x, y in points]
        shapes.append(_curve(i % N_INKS, places, tips))
    marks = [(position(tick), format_number(tick)) for tick in x_ticks]
    return _plot("".join(shapes), x_marks=marks, y_ticks=y_ticks, y_label=y_label, as_percent=as_percent)


def legend_html(names: Sequence[str]) -> str:
    """Return the key of the colours of several series; nothing for a single one."""
    if len(names) < 2:
        return ""
    items = "".join(
        f'<li><svg aria-hidden="true" width="12" height="12"><rect class="ink-{i % N_INKS}" width="12" height="12" '
        f'rx="3"/></svg><span dir="auto">{escape(name)}</span></li>'
        for i, name in enumerate(names)
    )
    return f'<ul class="legend">{items}</ul>'


def _x_scale(low: float, high: float, *, log_x: bool) -> tuple[Callable[[float], float], list[float]]:
    """Return the function from x to percent of the width, and the ticks."""
    if log_x and low > 0:
        span = (math.log(high) - math.log(low)) or 1.0
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [f * 10.0**e for e in exponents for f in (1, 2, 5) if low <= f * 10.0**e <= high]
        return (lambda x: 100 * (math.log(x) - math.log(low)) / span), ticks
    span = (high - low) or 1.0
    ticks = [tick for tick in nice_ticks(low, high) if low <= tick <= high]
    return (lambda x: 100 * (x - low) / span), ticks


def _curve(ink: int, places: Sequence[tuple[float, float]], tips: Sequence[str]) -> str:
    """Return a line through places, in percent of width and height, with a dot and its tip at each."""
    path = " ".join(f"{x:.3f},{y:.3f}" for x, y in places)
    dots = "".join(
        f'<circle class="ink-{ink} dot" r="3.5" cx="{x:.3f}%" cy="{y:.3f}%" data-tip="{escape(tip)}"/>'
        for (x, y), tip in zip(places, tips, strict=True)
    )
    return (
        '<svg viewBox="0 0 100 100" preserveAspectRatio="none" width="100%" height="100%" class="curve">'
        f'<polyline class="line-{ink}" points="{path}" vector-effect="non-scaling-stroke"/></svg>{dots}'
    )


def _height(value: float, ticks: Sequence[float]) -> float:
    return 100 * (value - ticks[0]) / (ticks[-1] - ticks[0])


def _column(x: float, width: float, share: float, tip: str) -> str:
    tip = escape(tip)
    height = round(100 * share, 3)
    return (
        f'<g data-tip="{tip}"><rect class="hit" x="{x:.3f}%" width="{width:.3f}%" height="100%"/>'
        f'<rect class="ink-0" x="{x:.3f}%" y="{100 - height:.3f}%" width="{width:.3f}%" height="{height}%"/></g>'
    )


def _plot(
    shapes: str,
    *,
    x_marks: Sequence[tuple[float, str]],
    y_ticks: Sequence[float],
    y_label: str,
    as_percent: bool = False,
) -> str:
    """Put shapes on axes: horizontal grid lines with numbers at the left, marks below, the y label on top."""
    grid = []
    for tick in y_ticks:
        y = f"{100 - _height(tick, y_ticks):.3f}%"
        text = percent(tick, digits=0 if abs(y_ticks[-1] - y_ticks[0]) >= 0.05 else 1) if as_percent else ""
        text = text or format_number(int(tick) if tick == int(tick) else tick)
        grid.append(f'<line class="grid" x1="0" x2="100%" y1="{y}" y2="{y}"/><text x="-8" dy="4" y="{y}">{text}</text>')
    below = "".join(f'<text class="x" x="{x:.3f}%" y="100%" dy="18">{escape(text)}</text>' for x, text in x_marks)
    label = f'<p class="axis">{escape(y_label)}</p>' if y_label else ""
    return f'{label}<div class="plot"><svg aria-hidden="true">{"".join(grid)}{shapes}{below}</svg></div>'
