"""Figures of the engines study: data in, Figure out."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, PercentFormatter

from labcore.engines.bench import BEST, FLOAT, FP32, OWN, POWER2, parts
from labcore.plots.stages import COLORS, _figure

LOOKS = {
    FP32: (COLORS["fp32"], "o"),
    POWER2: (COLORS["ptq"], "s"),
    FLOAT: (COLORS["qat"], "D"),
    OWN: ("#6c7a89", "^"),
    BEST: ("#4f8a5b", "P"),
}


def engine_bars(tables: dict[str, pd.DataFrame], bounds: dict[str, dict[str, float]]) -> Figure:
    """Images per second of every engine, and the most that the measured matrix rates allow.

    Args:
        tables: panel's title -> columns engine, images_per_s, latency_ms, latency_ms_low, latency_ms_high; all panels have the
            same engines.
        bounds: panel's title -> {"FP32": images per second, "INT8": …}, as far as they were measured.
    """
    order = list(next(iter(tables.values())).sort_values("images_per_s")["engine"])
    figure, axes = _figure(len(tables), height=0.27 * len(order) + 1.5, width=8.6, sharey=True)
    places = np.arange(len(order))
    for axis, (title, table) in zip(axes.flat, tables.items(), strict=True):
        rows = table.set_index("engine").loc[order]
        colors = [LOOKS[parts(engine)[1]][0] for engine in order]
        ends = [
            rows["images_per_s"] * rows["latency_ms"] / rows[f"latency_ms_{end}"] for end in ("high", "low")
        ]
        errors = np.stack([rows["images_per_s"] - ends[0], ends[1] - rows["images_per_s"]]).clip(min=0)
        axis.barh(places, rows["images_per_s"], color=colors, zorder=3)
        axis.errorbar(
            rows["images_per_s"],
            places,
            xerr=errors,
            fmt="none",
            ecolor="0.55",
            capsize=2,
            zorder=4,
            linewidth=1,
        )
        for name, bound in bounds[title].items():
            color, line = {"FP32": (LOOKS[FP32][0], "--"), "INT8": (LOOKS[POWER2][0], ":")}[name]
            axis.axvline(bound, color=color, linestyle=line, zorder=5, label=f"{name} roof")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("images per second")
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axis.set_xlim(left=0)
        axis.grid(False, axis="y")
    axes[0, 0].set_yticks(places, [parts(engine)[0] for engine in order], fontsize=8)
    handles = [
        axes[0, 0].bar(0, 0, color=color, label=numbers)
        for numbers, (color, _) in LOOKS.items()
        if any(parts(engine)[1] == numbers for engine in order)
    ]
    lines = axes[0, 0].get_legend_handles_labels()
    roofs = [handle for handle, label in zip(*lines, strict=True) if label.endswith("roof")]
    figure.legend(handles=[*handles, *roofs], loc="outside upper center", ncols=3, fontsize=8)
    return figure


def engine_front(table: pd.DataFrame) -> Figure:
    """Accuracy against latency; the area of a point is the size of the file.

    Columns engine, latency_ms, acc, size_mb.
    """
    figure, axes = _figure(height=4.4, width=8.6)
    axis = axes[0, 0]
    largest = table["size_mb"].max()
    for numbers, (color, marker) in LOOKS.items():
        rows = table[[parts(engine)[1] == numbers for engine in table["engine"]]]
        axis.scatter(
            rows["latency_ms"],
            rows["acc"],
            s=40 + 260 * rows["size_mb"] / largest,
            color=color,
            marker=marker,
            alpha=0.75,
            edgecolor="white",
            label=numbers,
            zorder=3,
        )
    numbered = table.sort_values("latency_ms").reset_index(drop=True)
    spread = np.ptp(table["acc"]) or 0.001
    placed: list[tuple[float, float, int]] = []
    for number, row in enumerate(numbered.itertuples(), start=1):
        x, near = np.log10(row.latency_ms), [0]
        near += [
            level + 1
            for other, acc, level in placed
            if abs(x - other) < 0.03 and abs(acc - row.acc) < spread / 20
        ]
        placed.append((x, row.acc, max(near)))
        axis.annotate(
            str(number),
            (row.latency_ms, row.acc),
            (0, 10 + 9 * max(near)),
            textcoords="offset points",
            ha="center",
            fontsize=7,
            zorder=4,
        )
    axis.set_ylim(table["acc"].min() - 0.2 * spread, table["acc"].max() + 0.6 * spread)
    axis.set_xscale("log")
    for which in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
        which(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axis.xaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
    axis.tick_params(axis="x", which="both", labelsize=8)
    axis.set(xlabel="latency of one image (ms)", ylabel="test accuracy")
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    key = "\n".join(
        f"{number}  {parts(row.engine)[0]}, {parts(row.engine)[1]}"
        for number, row in enumerate(numbered.itertuples(), start=1)
    )
    axis.text(1.02, 1.0, key, transform=axis.transAxes, fontsize=7, va="top", linespacing=1.35)
    legend = figure.legend(loc="outside upper center", ncols=4, fontsize=8)
    for handle in legend.legend_handles:
        handle.set_sizes([50])
    return figure
