"""Figures of quantized tensors: the rounding of scales, exponents, values over their grids."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from labcore.plots.style import SERIES, new_figure

HISTOGRAM = {"color": SERIES[2], "histtype": "stepfilled", "edgecolor": "none", "log": True, "zorder": 3}


def scale_staircase(scales: np.ndarray, approximated: np.ndarray) -> Figure:
    """Return the rounding of a scale, and the ratio it causes."""
    figure, ((steps, error),) = new_figure(2)
    color = SERIES[0]
    steps.plot(scales, scales, color="0.6", linestyle="--", label="scale as observed")
    steps.plot(scales, approximated, color=color, drawstyle="steps-mid", label="scale_approximate(scale)")
    steps.set(yscale="log", ylabel="scale after rounding", title="The staircase")
    steps.legend(fontsize=8)
    error.plot(scales, approximated / scales, color=color)
    for limit in (2**0.5, 2**-0.5):
        error.axhline(limit, color="0.5", linewidth=1, linestyle=":")
    error.set(ylim=(0, 4), ylabel="rounded / observed", title="The error it makes")
    for text, height in (("coarser steps", 1.6), ("clipping", 0.35)):
        error.annotate(text, (0.98, height), xycoords=("axes fraction", "data"), ha="right", fontsize=8)
    for axis in (steps, error):
        axis.set(xscale="log", xlabel="scale")
    return figure


def exponents(table: pd.DataFrame, max_shift_amount: int) -> Figure:
    """Return the exponent of every tensor of a network, in order; columns layer, tensor, exponent."""
    layers = list(dict.fromkeys(table["layer"]))
    figure, ((axis,),) = new_figure(height=min(0.19 * len(layers), 10) + 1.2)
    for tensor, color, marker in (("weight", SERIES[0], "s"), ("activation", SERIES[2], "o")):
        part = table[table["tensor"] == tensor]
        rows = part["layer"].map(layers.index)
        axis.scatter(part["exponent"], rows, color=color, marker=marker, s=26, label=tensor)
    clamp = f"clamp at 2^-{max_shift_amount}"
    axis.axvline(-max_shift_amount, color="0.4", linewidth=1, linestyle="--", label=clamp)
    axis.set_yticks(range(len(layers)), layers, fontsize=8 if len(layers) < 50 else 7)
    axis.margins(y=0.5 / len(layers))
    axis.invert_yaxis()
    axis.set(xlabel="exponent k of the scale 2^k")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside upper center", ncols=3, fontsize=8)
    return figure


def weights_on_grid(weights: dict[str, np.ndarray], scales: dict[str, float], bits: int = 8) -> Figure:
    """Return histograms of weight tensors, with the part that the grid of their scale covers marked."""
    figure, axes = new_figure(len(weights), height=2.6)
    for axis, (name, values) in zip(axes.flat, weights.items(), strict=True):
        low, high = -(2 ** (bits - 1)) * scales[name], (2 ** (bits - 1) - 1) * scales[name]
        axis.hist(values.ravel(), bins=80, **HISTOGRAM)
        axis.axvspan(low, high, color="0.88", label="range of the grid")
        axis.set_xlabel("weight")
        axis.set_title(f"{name}: scale 2^{int(np.log2(scales[name]))}", fontsize=9)
    axes[0, 0].set_ylabel("count (log)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", fontsize=8)
    return figure


def values_on_grids(panels: dict[str, dict[str, tuple[np.ndarray, float, int, tuple[int, int]]]]) -> Figure:
    """Return histograms of tensors over the values of a grid: a row per tensor, a column per scheme.

    A panel holds values, scale, zero point and (quant_min, quant_max).
    """
    columns = len(next(iter(panels.values())))
    figure, axes = new_figure(columns, len(panels), height=1.75 * len(panels) + 0.4, sharex="row")
    for row, (tensor, schemes) in zip(axes, panels.items(), strict=True):
        for axis, (name, panel) in zip(row, schemes.items(), strict=True):
            values, scale, zero_point, (quant_min, quant_max) = panel
            grid = (np.arange(quant_min, quant_max + 1) - zero_point) * scale
            smallest, largest = values.min(), values.max()
            margin = 0.04 * (largest - smallest)
            left, right = smallest - margin, largest + margin
            axis.hist(values.ravel(), bins=120, **HISTOGRAM)
            for value in grid[(grid >= left) & (grid <= right)]:
                axis.axvline(value, color=SERIES[0], linewidth=0.9 if len(grid) < 20 else 0.3, zorder=4)
            for start, end in ((left, grid[0]), (grid[-1], right)):  # what is clipped
                if start < end:
                    axis.axvspan(start, end, color="0.88", linewidth=0)
            axis.set_xlim(left, right)
            axis.xaxis.set_major_locator(MaxNLocator(4))
            axis.ticklabel_format(axis="x", scilimits=(-2, 3))
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.grid(False)
            used = np.count_nonzero((grid >= smallest - scale / 2) & (grid <= largest + scale / 2))
            title = f"{tensor}, {name}: 2^{int(np.log2(scale))}, {used} of {len(grid)} codes"
            axis.set_title(title, fontsize=8)
            axis.tick_params(labelsize=8)
        row[0].set_ylabel("count (log)", fontsize=8)
    return figure
