"""Figures of the engines study: speed, and accuracy against latency."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from labcore.engines.bench import BEST, FLOAT, FP32, OWN, POWER2, parts
from labcore.plots.style import COLORS, GREEN, GREY, annotate, new_figure

LOOKS = {
    FP32: (COLORS["fp32"], "o"),
    POWER2: (COLORS["ptq"], "s"),
    FLOAT: (COLORS["qat"], "D"),
    OWN: (GREY, "^"),
    BEST: (GREEN, "P"),
}
_ROOFS = {"FP32": (COLORS["fp32"], "--"), "INT8": (COLORS["ptq"], ":")}


def engine_bars(tables: dict[str, pd.DataFrame], bounds: dict[str, dict[str, float]]) -> Figure:
    """Return images per second of every engine, and the most that the measured matrix rates allow.

    Tables, one per panel, have the same engines and columns engine, images_per_s, latency_ms,
    latency_ms_low, latency_ms_high. Bounds hold FP32 and INT8 as far as they were measured.
    """
    order = list(next(iter(tables.values())).sort_values("images_per_s")["engine"])
    names, numbers = zip(*map(parts, order), strict=True)
    figure, axes = new_figure(len(tables), height=0.27 * len(order) + 1.5, width=8.6, sharey=True)
    places = range(len(order))
    look = {"fmt": "none", "ecolor": "0.55", "capsize": 2, "zorder": 4, "linewidth": 1}
    for axis, (title, table) in zip(axes.flat, tables.items(), strict=True):
        rows = table.set_index("engine").loc[order]
        speed = rows["images_per_s"]
        slowest, fastest = (speed * rows["latency_ms"] / rows[f"latency_ms_{end}"] for end in ("high", "low"))
        errors = np.stack([speed - slowest, fastest - speed]).clip(min=0)
        axis.barh(places, speed, color=[LOOKS[kind][0] for kind in numbers], zorder=3)
        axis.errorbar(speed, places, xerr=errors, **look)
        for name, bound in bounds[title].items():
            color, line = _ROOFS[name]
            axis.axvline(bound, color=color, linestyle=line, zorder=5, label=f"{name} roof")
        axis.set_title(title, fontsize=10)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.set(xlabel="images per second", xlim=(0, None))
        axis.grid(False, axis="y")
    axes[0, 0].set_yticks(places, names, fontsize=8)
    roofs, _ = axes[0, 0].get_legend_handles_labels()
    bars = [axes[0, 0].bar(0, 0, color=LOOKS[kind][0], label=kind) for kind in LOOKS if kind in numbers]
    figure.legend(handles=[*bars, *roofs], loc="outside upper center", ncols=3, fontsize=8)
    return figure


def engine_front(table: pd.DataFrame) -> Figure:
    """Return accuracy against latency; the area of a point is its file's size, its number leads to its name.

    Columns engine, latency_ms, acc, size_mb.
    """
    figure, ((axis,),) = new_figure(height=4.4, width=8.6)
    lowest, highest = table["acc"].min(), table["acc"].max()
    spread = (highest - lowest) or 0.001
    kinds = table["engine"].map(lambda engine: parts(engine)[1])
    areas = 40 + 260 * table["size_mb"] / table["size_mb"].max()
    for kind, (color, marker) in LOOKS.items():
        rows = table[kinds == kind]
        look = {"color": color, "marker": marker, "alpha": 0.75, "edgecolor": "white", "zorder": 3}
        axis.scatter(rows["latency_ms"], rows["acc"], s=areas[kinds == kind], label=kind, **look)
    key, placed = [], []
    for number, row in enumerate(table.sort_values("latency_ms").itertuples(), start=1):
        x, level = np.log10(row.latency_ms), 0  # a number stands above those of the points close by
        for other_x, other_acc, other_level in placed:
            if abs(x - other_x) < 0.03 and abs(other_acc - row.acc) < spread / 20:
                level = max(level, other_level + 1)
        placed.append((x, row.acc, level))
        look = {"ha": "center", "fontsize": 7, "zorder": 4}
        annotate(axis, str(number), (row.latency_ms, row.acc), (0, 10 + 9 * level), **look)
        key.append(f"{number}  " + ", ".join(parts(row.engine)))
    axis.text(1.02, 1.0, "\n".join(key), transform=axis.transAxes, fontsize=7, va="top", linespacing=1.35)
    axis.set_ylim(lowest - 0.2 * spread, highest + 0.6 * spread)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:.3g}")
    axis.xaxis.set_minor_formatter("{x:.3g}")
    axis.xaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
    axis.tick_params(axis="x", which="both", labelsize=8)
    axis.set(xlabel="latency of one image (ms)", ylabel="test accuracy")
    axis.yaxis.set_major_formatter("{x:.1%}")
    legend = figure.legend(loc="outside upper center", ncols=4, fontsize=8)
    for handle in legend.legend_handles:
        handle.set_sizes([50])
    return figure
