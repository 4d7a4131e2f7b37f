"""Figures that hold the stages against each other: accuracy, costs, answers, confidence."""

from collections.abc import Sequence
from itertools import groupby
from textwrap import fill

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from labcore.plots.style import (
    COLORS,
    NAMES,
    SHAPES,
    annotate,
    interval_lengths,
    label_points,
    new_figure,
    plain,
)

FEW = 25  # images; a bin of fewer has no bar in `reliability`


def forest(rows: Sequence[dict], margin: float | None = None) -> Figure:
    """Return paired differences with their intervals, one under the other, in points; positive is worse.

    A row has title, group, mean, low, high. Rows of a group follow each other, under its name ("" has none).
    A point is filled where its interval leaves out zero. `margin` shades what counts as no difference.
    """
    lines = []  # (text, row); a group's name has no row
    for group, members in groupby(rows, key=lambda row: row["group"]):
        lines += [(group, None)] * bool(group) + [(fill(row["title"], 40), row) for row in members]
    height = 0.34 if any("\n" in text for text, _ in lines) else 0.23  # inches
    figure, ((axis,),) = new_figure(height=height * len(lines) + 0.95, width=7)
    if margin is not None:
        axis.axvspan(-margin, margin, color="0.9", zorder=0)
    axis.axvline(0, color="0.3", linewidth=0.9, zorder=1)
    axis.set_yticks(range(len(lines)), [text for text, _ in lines], fontsize=8.5)
    for place, (label, (_, row)) in enumerate(zip(axis.get_yticklabels(), lines, strict=True)):
        if row is None:
            label.set_fontweight("bold")
            axis.axhline(place - 0.5, color="0.8", linewidth=0.8)
            continue
        mean, low, high = row["mean"], row["low"], row["high"]
        inside = "0.15" if low > 0 or high < 0 else "white"
        axis.plot([low, high], [place, place], color="0.15", linewidth=1.4, zorder=2)
        axis.plot(mean, place, "o", color="0.15", markerfacecolor=inside, markersize=5.5, zorder=3)
        text = f"{mean:+.2f}  ({low:+.2f} to {high:+.2f})".replace("-", "\u2212")
        axis.text(1.02, place, text, transform=axis.get_yaxis_transform(), va="center", fontsize=8.5)
    axis.set_ylim(len(lines) - 0.5, -0.5)
    axis.set_title("drop (95 % interval)", loc="right", x=1.02, ha="left", fontsize=8.5, fontweight="normal")
    shaded = "" if margin is None else f"; shaded: up to {margin:g}"
    axis.set_xlabel(f"accuracy drop in points (positive is worse){shaded}", fontsize=9)
    axis.tick_params(axis="x", labelsize=8.5)
    axis.grid(False, axis="y")
    return figure


def accuracy_bars(table: pd.DataFrame) -> Figure:
    """Return accuracies with their confidence intervals; index stage, columns acc, acc_low, acc_high."""
    figure, ((axis,),) = new_figure(height=2.9, width=6)
    positions, lengths = range(len(table)), interval_lengths(table, "acc")
    axis.errorbar(positions, table["acc"], lengths, fmt="none", ecolor="0.3", capsize=6)
    for position, (stage, value) in enumerate(table["acc"].items()):
        axis.plot(position, value, "o", markersize=10, color=COLORS[stage])
        annotate(axis, f"{value:.2%}", (position, value), (10, 0), va="center", fontsize=9)
    axis.set_xticks(positions, [NAMES[stage] for stage in table.index])
    axis.set_xlim(-0.5, len(table) - 0.3)
    axis.yaxis.set_major_formatter("{x:.2%}")
    axis.set(ylabel="test accuracy", title="Accuracy with its 95 % interval")
    return figure


def cost_bars(size_mb: pd.Series, latency: pd.DataFrame) -> Figure:
    """Return file sizes (MB of 10^6 bytes) beside latencies of one image (ms, with quartiles)."""
    figure, ((sizes, times),) = new_figure(2, height=2.9)
    middle, tops = latency["latency_ms"], latency["latency_ms_high"]
    for axis, values, heights in ((sizes, size_mb, size_mb), (times, middle, tops)):
        axis.bar(values.index.map(NAMES), values, color=values.index.map(COLORS), width=0.6)
        for position, (value, height) in enumerate(zip(values, heights, strict=True)):
            annotate(axis, f"{value:.2f}", (position, height), (0, 4), ha="center", fontsize=8)
        axis.set_ylim(0, 1.18 * heights.max())
    sizes.set(ylabel="file size (MB)", title="Size")
    times.set(ylabel="latency, one image (ms)", title="Latency")
    errors = interval_lengths(latency, "latency_ms")
    times.errorbar(range(len(latency)), middle, errors, fmt="none", ecolor="0.3", capsize=4)
    return figure


def tradeoff(table: pd.DataFrame) -> Figure:
    """Return accuracy against latency; the area of a point is its file's size.

    Index stage (those of NAMES); columns acc, acc_low, acc_high, latency_ms, size_mb.
    """
    figure, ((axis,),) = new_figure(height=3.6, width=7)
    latency, acc, lengths = table["latency_ms"], table["acc"], interval_lengths(table, "acc")
    axis.errorbar(latency, acc, lengths, fmt="none", ecolor="0.7", elinewidth=1, capsize=3, zorder=1)
    areas = 300 * table["size_mb"] / table["size_mb"].max()
    for stage, area in areas.items():
        look = {"color": COLORS[stage], "marker": SHAPES[stage], "edgecolor": "white", "zorder": 3}
        axis.scatter(latency[stage], acc[stage], s=area, **look)
    axis.yaxis.set_major_formatter("{x:.2%}")
    axis.margins(y=0.1)
    axis.set(xlabel="latency, one image (ms)", ylabel="test accuracy", title="Trade-off: area is file size")
    axis.set_xlim(0, 1.35 * latency.max())
    texts = [f"{NAMES[stage]}, {size:.2f} MB" for stage, size in table["size_mb"].items()]
    bars = [((row.latency_ms, row.acc_low), (row.latency_ms, row.acc_high)) for row in table.itertuples()]
    label_points(axis, list(zip(latency, acc, strict=True)), texts, np.sqrt(areas) / 2, bars)
    return figure


def confusion_matrix(counts: pd.DataFrame, title: str) -> Figure:
    """Return counts, true classes down, predicted across; the colour scale leaves correct answers out."""
    wrong, annotated = counts.mask(np.eye(len(counts), dtype=bool)).to_numpy(), len(counts) <= 20
    names = list(map(plain, counts.index)) if annotated else "auto"
    figure, ((axis,),) = new_figure(height=4.6, width=6)
    numbers = {"annot": counts if annotated else False, "annot_kws": {"fontsize": 8}, "fmt": "d"}
    look = {"cmap": "Blues", "linewidths": 0.3, "cbar_kws": {"label": "wrong answers"}}
    sns.heatmap(wrong, ax=axis, xticklabels=names, yticklabels=names, **numbers, **look)
    for position, count in enumerate(np.diag(counts) if annotated else ()):
        axis.text(position + 0.5, position + 0.5, count, ha="center", va="center", fontsize=8, color="0.35")
    axis.grid(False)
    axis.set(xlabel="predicted", ylabel="true", title=title)
    return figure


def confusion_difference(differences: dict[str, pd.DataFrame]) -> Figure:
    """Return how each stage's confusion matrix differs from FP32's: what went up and what went down."""
    differences = {stage: table.rename(index=plain, columns=plain) for stage, table in differences.items()}
    figure, axes = new_figure(len(differences), height=4.1, width=8.4)
    limit = max(1, *(int(table.abs().to_numpy().max()) for table in differences.values()))
    annotated = all(len(table) <= 12 for table in differences.values())
    look = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit, "cbar": False, "linewidths": 0.3}
    look |= {"annot_kws": {"fontsize": 7}, "fmt": ""}
    for axis, (stage, table) in zip(axes.flat, differences.items(), strict=True):
        numbers = table.map(lambda change: f"{change:+d}" if change else "") if annotated else False
        sns.heatmap(table, ax=axis, annot=numbers, **look)
        axis.set(xlabel="predicted", ylabel="true", title=f"{NAMES[stage]} minus FP32 (images)")
        axis.tick_params(labelsize=7)
        axis.label_outer()
    return figure


def class_drops(stages: dict[str, dict[str, dict]]) -> Figure:
    """Return what each class loses against FP32 in points, with 95 % intervals; positive is worse.

    By stage and class, a row of `paired_by_class`. Of more than 20 classes the most changed stand.
    """
    drops = {stage: pd.DataFrame(classes).T.astype(float) for stage, classes in stages.items()}
    largest = pd.concat([table["acc_drop_pp"].abs() for table in drops.values()], axis=1).max(axis=1)
    shown = [name for name in largest.index if name in set(largest.nlargest(20).index)]
    names = list(map(plain, shown))
    figure, ((axis,),) = new_figure(height=0.27 * len(shown) + 1.1, width=7)
    axis.axvline(0, color="0.3", linewidth=0.8)
    for number, (stage, table) in enumerate(drops.items()):
        rows = table.loc[shown]
        places = np.arange(len(shown)) + 0.32 * (number - (len(drops) - 1) / 2)
        look = {"fmt": SHAPES[stage], "color": COLORS[stage], "ecolor": "0.45", "capsize": 2, "linewidth": 1}
        axis.errorbar(
            rows["acc_drop_pp"],
            places,
            xerr=interval_lengths(rows, "acc_drop_pp"),
            label=NAMES[stage],
            **look,
        )
    axis.set_yticks(range(len(shown)), names, fontsize=8.5)
    axis.set_ylim(len(shown) - 0.4, -0.6)
    axis.set(xlabel="accuracy drop against FP32 in points (positive is worse), with its 95 % interval")
    figure.legend(loc="outside upper center", ncols=len(drops), fontsize=8.5)
    return figure


def reliability(tables: dict[str, pd.DataFrame], errors: dict[str, float]) -> Figure:
    """Return accuracy against confidence, a column per stage; on the diagonal a network is as sure as right.

    Columns low, high, confidence, accuracy, count (`stats.calibration`). Below stands the share of the images
    in each bin; one of fewer than FEW images tells nothing, and has no bar above.
    """
    ratios = {"height_ratios": [3, 1.1], "sharex": True, "sharey": "row"}
    figure, axes = new_figure(len(tables), 2, height=3.6, width=8.4, **ratios)
    for (upper, lower), (stage, table) in zip(axes.T, tables.items(), strict=True):
        look = {"width": table["high"] - table["low"], "align": "edge", "edgecolor": "white", "zorder": 2}
        accuracy = table["accuracy"].where(table["count"] >= FEW)
        upper.bar(table["low"], accuracy, color=COLORS[stage], **look)
        upper.plot([0, 1], [0, 1], color="0.5", linewidth=1.4, linestyle=":", zorder=3)
        upper.set(xlim=(0, 1), ylim=(0, 1), title=f"{NAMES[stage]}: ECE {errors[stage]:.3f}")
        lower.bar(table["low"], table["count"] / table["count"].sum(), color="0.6", **look)
        lower.set(xlabel="confidence")
    axes[1, 0].yaxis.set_major_formatter("{x:.0%}")
    axes[0, 0].set_ylabel(f"accuracy\n(bins of {FEW} images or more)")
    axes[1, 0].set_ylabel("images")
    return figure
