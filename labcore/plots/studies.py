"""Figures of studies 1 to 3: quantizers, mixed precision, training recipes."""

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from labcore.plots.style import BLUE, COLORS, SERIES, interval_lengths, new_figure


def drop_heatmap(panels: dict[str, pd.DataFrame]) -> Figure:
    """Return accuracy drops in points, one panel per table of choices; two points and more look alike."""
    figure, axes = new_figure(len(panels), height=3.3, width=8.4)
    top = max(1.0, min(2.0, max(float(table.to_numpy(dtype=float).max()) for table in panels.values())))
    look = {"cmap": "Oranges", "vmin": 0, "vmax": top, "cbar": False, "linewidths": 0.5}
    numbers = {"annot": True, "annot_kws": {"fontsize": 7}, "fmt": "+.2f"}
    for axis, (title, table) in zip(axes.flat, panels.items(), strict=True):
        sns.heatmap(table.astype(float), ax=axis, **numbers, **look)
        axis.set_title(title)
        axis.label_outer()
        axis.grid(False)  # it would show where a cell is empty
        axis.tick_params(labelsize=7)
        axis.tick_params(axis="x", rotation=30)
    return figure


def bits_curves(panels: dict[str, pd.DataFrame], reference: float) -> Figure:
    """Return accuracy against bits, one panel per kind of tensor; index bits, columns schemes."""
    figure, axes = new_figure(len(panels), height=3.2, sharey=True)
    for axis, (title, table) in zip(axes.flat, panels.items(), strict=True):
        for name, values in table.astype(float).items():
            color, marker = (COLORS["ptq"], "o") if name.startswith("power of two") else (COLORS["fp32"], "s")
            line = "--" if name.endswith("per tensor") else "-"
            axis.plot(table.index, values, line, color=color, marker=marker, markersize=4, label=name)
        axis.axhline(reference, color="0.5", linewidth=1, linestyle=":")
        axis.set(xlabel="bits", title=title)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(fontsize=7)
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
        shares.plot.barh(ax=axis, width=0.8, stacked=True, color=SERIES, legend=False)
        axis.autoscale(axis="y")
        axis.set(title=tensor + "s", xlabel="error power / signal power", ylabel="")
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
        axis.invert_yaxis()
        axis.tick_params(labelsize=7)
    axes[0, 1].legend(["rounding", "clipping"], fontsize=8)
    return figure


def sensitivity(table: pd.DataFrame, title: str, what: str = "validation loss (nats)") -> Figure:
    """Return increases of `what` as bars; index layer, up to four columns, one per experiment."""
    figure, ((axis,),) = new_figure(height=0.3 * len(table) + 1.3)
    table.astype(float).plot.barh(ax=axis, width=0.8, color=list(SERIES[: table.shape[1]]))
    axis.autoscale(axis="y")
    axis.set_yticks(range(len(table)), table.index, fontsize=7)
    axis.axvline(0, color="0.3", linewidth=0.8)
    axis.invert_yaxis()
    axis.set(xlabel=f"increase of the {what}", ylabel="", title=title)
    axis.legend(fontsize=8)
    return figure


def pareto(points: pd.DataFrame, reference: float) -> Figure:
    """Return accuracy against size, FP32 dotted; columns family (≤ 3), size_mb, acc, acc_low, acc_high."""
    figure, ((axis,),) = new_figure(height=3.4, width=7)
    families = points.groupby("family", sort=False)
    looks = ((COLORS["fp32"], "o"), (COLORS["ptq"], "s"), (BLUE, "D"))
    for (family, part), (color, marker) in zip(families, looks[: len(families)], strict=True):
        part = part[["size_mb", "acc", "acc_low", "acc_high"]].astype(float)
        look = {"color": color, "marker": marker, "markersize": 5, "capsize": 2, "linewidth": 1}
        axis.errorbar(part["size_mb"], part["acc"], interval_lengths(part, "acc"), label=family, **look)
    axis.axhline(reference, color="0.5", linewidth=1, linestyle=":")
    axis.set(xlabel="size of the packed file (MB)", ylabel="validation accuracy")
    axis.set_title("Size against accuracy")
    axis.yaxis.set_major_formatter("{x:.0%}")
    axis.legend(fontsize=8, loc="lower right")
    return figure


def differences(tables: dict[str, pd.DataFrame]) -> Figure:
    """Return differences to a baseline in points, one panel per question: means over seeds with intervals.

    Index recipe, the baseline first; columns diff_pp, sure_pp (half an interval).
    """
    heights = [len(table) + 1.5 for table in tables.values()]
    total = 0.24 * sum(heights) + 0.5
    figure, axes = new_figure(rows=len(tables), height=total, sharex=True, height_ratios=heights)
    look = {"fmt": "o", "color": COLORS["fp32"], "markersize": 5, "capsize": 2, "linewidth": 1}
    for axis, (title, table) in zip(axes.flat, tables.items(), strict=True):
        rows, numbers = range(len(table)), table[["diff_pp", "sure_pp"]].astype(float)
        axis.errorbar(numbers["diff_pp"], rows, xerr=numbers["sure_pp"], **look)
        axis.axvline(0, color="0.3", linewidth=0.8)
        axis.set_yticks(rows, table.index, fontsize=8)
        axis.set_ylim(len(table) - 0.4, -0.6)
        axis.set_title(title, fontsize=9)
    axes[-1, 0].set_xlabel("difference to the first recipe of each group (points of validation accuracy)")
    return figure
