"""The charts of the reports as PNG files, drawn by matplotlib without a display and written whole or not at all."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.charts import histogram_counts
from common.commit import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Twelve hues of like lightness, the first ones apart for colour-blind eyes too; the same as on the HTML maps.
INKS = (
    *("#3566c8", "#d9662b", "#2b8a57", "#b03a7c", "#8a6fd1", "#b38600"),
    *("#2190a8", "#c4423f", "#6b7a1f", "#7d5a44", "#4d55a8", "#c46aa8"),
)
TEXT, QUIET, LINE, GREY = "#1b1f27", "#646a75", "#e3e3df", "#a8adb5"
MAX_NAMED_GROUPS = 30


def write_lines_png(
    path: str | Path,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str = "",
    x_label: str = "",
    y_label: str = "",
    log_x: bool = False,
    as_percent: bool = False,
) -> Path:
    """Write one line per series of (x, y) points, and return path."""
    figure, axes = _new_figure(title, x_label, y_label)
    for i, (name, points) in enumerate(series.items()):
        xs, ys = [x for x, _ in points], [y for _, y in points]
        axes.plot(xs, ys, color=INKS[i % len(INKS)], marker="o", markersize=5, linewidth=2, label=_plain(name))
    if log_x:
        axes.set_xscale("log")
        places = sorted({x for points in series.values() for x, _ in points})
        if len(places) <= 10:
            axes.set_xticks(places, [f"{x:,.6g}" for x in places])
            axes.set_xticks([], minor=True)
    _as_percent(axes.yaxis, as_percent)
    if len(series) > 1:
        axes.legend(frameon=False, labelcolor=TEXT)
    return _save(figure, path)


def write_histogram_png(
    path: str | Path,
    values: Sequence[float],
    *,
    bins: int | Sequence[float] = 20,
    title: str = "",
    x_label: str = "",
    y_label: str = "",
    as_percent: bool = False,
) -> Path:
    """Write a histogram of the finite values, and return path."""
    edges, counts = histogram_counts(values, bins=bins)
    figure, axes = _new_figure(title, x_label, y_label)
    axes.stairs(counts, edges, fill=True, color=INKS[0], edgecolor="white")
    _as_percent(axes.xaxis, as_percent)
    return _save(figure, path)


def write_bars_png(
    path: str | Path,
    values: Mapping[str, float],
    *,
    title: str = "",
    x_label: str = "",
    y_label: str = "",
) -> Path:
    """Write one column per value in the order given, named below where there are at most 25, and return path."""
    figure, axes = _new_figure(title, x_label, y_label)
    axes.bar(range(len(values)), list(values.values()), color=INKS[0], width=0.86)
    if len(values) <= 25:
        names = [_plain(name) for name in values]
        axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
    return _save(figure, path)


def write_scatter_png(
    path: str | Path,
    points: Any,
    *,
    labels: Sequence[object] | None = None,
    muted_label: object = None,
    title: str = "",
) -> Path:
    """Write a map of points [n, 2], coloured by label, with names at the medians of the 30 largest; return path.

    muted_label (noise) is drawn grey and has no name. Points without finite coordinates are left out.
    """
    import numpy as np

    places = np.asarray(points, dtype=np.float64).reshape(len(points), 2)
    names = np.asarray([str(label) for label in labels] if labels is not None else [""] * len(places), dtype=object)
    is_finite = np.isfinite(places).all(axis=1)
    places, names = places[is_finite], names[is_finite]
    figure, axes = _new_figure(title, "", "", size=(9.6, 7.2))
    order = [name for name, _ in sorted(Counter(names.tolist()).items(), key=lambda pair: (-pair[1], pair[0]))]
    muted = str(muted_label) if muted_label is not None else None
    for i, name in enumerate(order):
        members = places[names == name]
        color, alpha = (GREY, 0.4) if name == muted else (INKS[i % len(INKS)], 0.75)
        size = min(30.0, max(2.0, 12_000 / (len(places) + 200)))
        axes.scatter(members[:, 0], members[:, 1], s=size, color=color, alpha=alpha, linewidths=0)
    for name in [name for name in order if name and name != muted][:MAX_NAMED_GROUPS]:
        _write_name(axes, name, np.median(places[names == name], axis=0))
    axes.set_aspect("equal", adjustable="datalim")
    axes.axis("off")
    return _save(figure, path)


def write_points_png(
    path: str | Path,
    points: Sequence[tuple[float, float]],
    *,
    values: Sequence[float],
    front: Sequence[tuple[float, float]] = (),
    title: str = "",
    x_label: str = "",
    y_label: str = "",
    value_label: str = "",
) -> Path:
    """Write points coloured by a value, and a line through those of `front`; return path."""
    figure, axes = _new_figure(title, x_label, y_label)
    xs, ys = [x for x, _ in points], [y for _, y in points]
    drawn = axes.scatter(xs, ys, c=list(values), cmap="viridis", s=22, alpha=0.8, linewidths=0)
    if front:
        axes.plot([x for x, _ in front], [y for _, y in front], color=INKS[1], marker="o", markersize=6, linewidth=2)
    _add_colour_bar(figure, axes, drawn, value_label)
    return _save(figure, path)


def write_parallel_png(
    path: str | Path,
    axis_names: Sequence[str],
    axis_ticks: Sequence[Sequence[str]],
    lines: Sequence[Sequence[float]],
    *,
    values: Sequence[float],
    title: str = "",
    value_label: str = "",
) -> Path:
    """Write parallel coordinates: one line per row of places, 0 (below) to 1 (above), those of higher value on top.

    `axis_ticks` names the places of each axis from below to above, evenly spread. A place that is NaN breaks the line.
    Lines through the same places lie a little apart, so that their number shows.
    """
    import numpy as np
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    figure, axes = _new_figure(title, "", "", size=(max(9.6, 1.5 * len(axis_names)), 5.4))
    axes.grid(visible=False)
    low, high = (min(values), max(values)) if len(values) else (0.0, 1.0)
    scale = ScalarMappable(Normalize(low, high if high > low else low + 1.0), "viridis")
    apart = np.random.default_rng(0).uniform(-0.025, 0.025, (len(lines), len(axis_names)))
    for row in np.argsort(values, kind="stable"):
        alpha = 0.15 + 0.75 * (values[row] - low) / ((high - low) or 1.0)
        axes.plot(
            range(len(axis_names)),
            lines[row] + apart[row],
            color=scale.to_rgba(values[row]),
            alpha=alpha,
            linewidth=1.4,
        )
    for place, ticks in enumerate(axis_ticks):
        axes.axvline(place, color=LINE, linewidth=1, zorder=0)
        for step, name in enumerate(ticks):
            height = step / max(len(ticks) - 1, 1) if len(ticks) > 1 else 0.5
            halo = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
            axes.text(place, height, _plain(name), fontsize=8, color=TEXT, ha="center", va="center", bbox=halo)
    axes.set_xticks(range(len(axis_names)), [_plain(name) for name in axis_names], fontsize=8, rotation=12)
    axes.set_yticks([])
    _add_colour_bar(figure, axes, scale, value_label)
    return _save(figure, path)


def _add_colour_bar(figure: Figure, axes: Axes, drawn: Any, label: str) -> None:
    bar: Any = figure.colorbar(drawn, ax=axes, pad=0.02)
    bar.set_label(_plain(label), color=QUIET)
    bar.ax.tick_params(colors=QUIET, length=0)
    bar.outline.set_visible(False)


def _new_figure(
    title: str, x_label: str, y_label: str, *, size: tuple[float, float] = (9.6, 5.4)
) -> tuple[Figure, Axes]:
    """Return a figure that belongs to no window: pyplot would keep it, and keep a state that threads share."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", w_pad=0.18, h_pad=0.18)  # inches
    axes = figure.add_subplot()
    axes.set_title(_plain(title), loc="left", fontsize=14, fontweight="bold", color=TEXT, pad=12)
    axes.set_xlabel(_plain(x_label), color=QUIET)
    axes.set_ylabel(_plain(y_label), color=QUIET)
    axes.tick_params(colors=QUIET, length=0)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    return figure, axes


def _write_name(axes: Axes, name: str, place: Any) -> None:
    from matplotlib.patheffects import withStroke

    shown = _plain(name if len(name) <= 26 else f"{name[:25]}…")
    halo = [withStroke(linewidth=3, foreground="white")]
    axes.annotate(shown, place, ha="center", va="center", fontsize=8.5, color=TEXT, path_effects=halo)


def _as_percent(axis: Any, as_percent: bool) -> None:
    if as_percent:
        from matplotlib.ticker import PercentFormatter

        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _plain(text: str) -> str:
    """Return text that matplotlib does not read as a formula, and that its fonts can draw without complaint."""
    return "".join(letter for letter in str(text) if letter.isprintable() and ord(letter) < 0x10000).replace("$", r"\$")


def _save(figure: Figure, path: str | Path) -> Path:
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})  # no version in it: equal input, equal bytes
    write_bytes(path, content.getvalue())
    return Path(path)
