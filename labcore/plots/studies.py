"""Figures of studies 1 to 3: quantizers, mixed precision, training recipes."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from labcore.plots.style import SERIES, interval_lengths, new_figure, series


def drop_heatmap(drop_pp: pd.DataFrame) -> Figure:
    """Return accuracy drops in points, by two choices; two points and more look alike, NaN has a dash."""
    drop_pp = drop_pp.astype(float).rename(columns=lambda name: str(name).replace(", ", ",\n"))
    figure, ((axis,),) = new_figure(height=0.33 * len(drop_pp) + 1.2, width=7)
    top = max(1.0, min(2.0, drop_pp.max(axis=None)))
    look = {"cmap": "Oranges", "vmin": 0, "vmax": top, "cbar": False, "linewidths": 0.5}
    look |= {"annot": drop_pp.map("{:+.2f}".format), "annot_kws": {"fontsize": 8.5}, "fmt": ""}
    sns.heatmap(drop_pp.fillna(0), ax=axis, mask=drop_pp.isna(), **look)
    for row, column in np.argwhere(drop_pp.isna().to_numpy()):
        axis.text(column + 0.5, row + 0.5, "\u2013", ha="center", va="center", color="0.5")
    axis.set_title("accuracy drop in points (positive is worse)", fontsize=10)
    axis.grid(False)  # it would show where a cell is empty
    axis.tick_params(labelsize=8.5, rotation=0)
    return figure


def bits_curves(panels: dict[str, pd.DataFrame], reference: float) -> Figure:
    """Return accuracy against bits, one panel per kind of tensor; index bits, columns schemes."""
    figure, axes = new_figure(len(panels), height=3.2, sharey=True)
    for axis, (title, table) in zip(axes.flat, panels.items(), strict=True):
        for name, values in table.astype(float).items():
            color, marker = (SERIES[0], "o") if name.startswith("power of two") else (SERIES[2], "s")
            line = "--" if name.endswith("per tensor") else "-"
            axis.plot(table.index, values, line, color=color, marker=marker, markersize=4, label=name)
        axis.axhline(reference, color="0.5", linewidth=1, linestyle=":", label="FP32")
        axis.set(xlabel="bits", title=title)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(fontsize=8, loc="lower right")
    axes[0, 0].yaxis.set_major_formatter("{x:.0%}")
    axes[0, 0].set_ylabel("validation accuracy")
    return figure


def error_split(table: pd.DataFrame) -> Figure:
    """Return the mean squared error of every tensor relative to its power, split into clipping and rounding.

    Columns layer, tensor, snr_db, mse_clipping, mse_rounding.
    """
    figure, axes = new_figure(2, height=0.17 * len(table) / 2 + 1.9)
    for axis, tensor in zip(axes.flat, ("weight", "activation"), strict=True):
        part = table[table["tensor"] == tensor].set_index("layer")
        errors, noise = part[["mse_rounding", "mse_clipping"]], 10 ** (-part["snr_db"] / 10)
        shares = errors.div(errors.sum(axis=1).replace(0, 1), axis=0).mul(noise, axis=0)
        shares.plot.barh(ax=axis, width=0.8, stacked=True, color=SERIES[::2], legend=False)
        axis.set_ylim(len(part) - 0.4, -0.6)
        axis.set(title=tensor + "s", xlabel="error power / signal power", ylabel="")
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
        axis.tick_params(labelsize=8)
    axes[0, 1].legend(["rounding", "clipping"], fontsize=8)
    return figure


def sensitivity(table: pd.DataFrame, title: str, what: str = "validation loss (nats)") -> Figure:
    """Return increases of `what` as bars; index layer, up to four columns, one per experiment."""
    figure, ((axis,),) = new_figure(height=min(0.3 * len(table), 9) + 1.3)
    colors = [look["color"] for look in series(table.shape[1])]
    table.astype(float).plot.barh(ax=axis, width=0.8, color=colors, legend=False)
    axis.set_yticks(range(len(table)), table.index, fontsize=8 if len(table) < 50 else 7)
    axis.axvline(0, color="0.3", linewidth=0.8)
    axis.set_ylim(len(table) - 0.4, -0.6)
    axis.set(xlabel=f"increase of the {what}", ylabel="", title=title)
    figure.legend(loc="outside upper center", ncols=table.shape[1], fontsize=8)
    return figure


def pareto(points: pd.DataFrame, reference: float) -> Figure:
    """Return accuracy against size; columns family (≤ 4), size_mb, acc, acc_low, acc_high."""
    figure, ((axis,),) = new_figure(height=3.4, width=7)
    families = points.groupby("family", sort=False)
    for (family, part), look in zip(families, series(len(families)), strict=True):
        part = part[["size_mb", "acc", "acc_low", "acc_high"]].astype(float)
        look |= {"markersize": 5, "capsize": 2, "linewidth": 1}
        axis.errorbar(part["size_mb"], part["acc"], interval_lengths(part, "acc"), label=family, **look)
    axis.axhline(reference, color="0.5", linewidth=1, linestyle=":", label="FP32")
    axis.set(xlabel="size of the packed file (MB)", ylabel="validation accuracy")
    axis.set_title("Size against accuracy")
    axis.yaxis.set_major_formatter("{x:.0%}")
    axis.legend(fontsize=8, loc="lower right")
    return figure


def differences(tables: dict[str, pd.DataFrame]) -> Figure:
    """Return drops against a baseline in points, one panel per question: means over seeds with intervals.

    Index recipe, the baseline first; columns diff_pp (more is better) and sure_pp (half an interval).
    """
    heights = [len(table) + 1.5 for table in tables.values()]
    total = 0.24 * sum(heights) + 0.5
    figure, axes = new_figure(rows=len(tables), height=total, sharex=True, height_ratios=heights)
    look = {"fmt": "o", "color": SERIES[0], "markersize": 5, "capsize": 2, "linewidth": 1}
    for axis, (title, table) in zip(axes.flat, tables.items(), strict=True):
        rows, numbers = range(len(table)), table[["diff_pp", "sure_pp"]].astype(float)
        axis.errorbar(-numbers["diff_pp"], rows, xerr=numbers["sure_pp"], **look)
        axis.axvline(0, color="0.3", linewidth=0.8)
        axis.set_yticks(rows, table.index, fontsize=8)
        axis.set_ylim(len(table) - 0.4, -0.6)
        axis.set_title(title, fontsize=9)
    axes[-1, 0].set_xlabel("drop against the first recipe of the group, in points (positive is worse)")
    return figure
