"""Pictures of the explorer's views."""

from types import SimpleNamespace

import numpy as np
import torch
from matplotlib.figure import Figure

from labcore.explore.tensors import Explorer, Setting
from labcore.plots.quantization import HISTOGRAM
from labcore.plots.style import BARE, COLORS, new_figure, series


def _figure(columns: int, rows: int, height: float, **options) -> tuple[Figure, np.ndarray]:
    """Return a figure with fixed margins: to lay it out anew takes longer than all else in it."""
    figure, axes = new_figure(columns, rows, height=height, width=8.6, **options)
    figure.set_layout_engine(None)
    figure.subplots_adjust(left=0.08, right=0.99, bottom=0.6 / height, top=1 - 0.3 / height, wspace=0.25)
    return figure, axes


def tensor_figure(explorer: Explorer, setting: Setting) -> Figure:
    """Return a tensor's values over its grid, what is clipped shaded; beside it the errors by exponent."""
    values, scale, zero_point = explorer.widest(setting)
    row, moved = explorer.look(setting), explorer.moved(setting)
    lowest = 0 if setting.tensor == "activation" else -(2 ** (setting.bits - 1))
    grid = (np.arange(2**setting.bits) + lowest - zero_point) * scale
    figure, ((left, right),) = _figure(2, 1, 3.3, width_ratios=(3, 2))
    margin = 0.04 * np.ptp(values) or 1.0
    low, high = values.min() - margin, values.max() + margin
    left.hist(values.ravel(), bins=120, **HISTOGRAM)
    inside = grid[(grid >= low) & (grid <= high)]
    look = {"linewidths": 0.9 if len(inside) < 40 else 0.3, "zorder": 4, "color": COLORS["ptq"]}
    left.vlines(inside, 0, 1, transform=left.get_xaxis_transform(), **look)
    for start, end in ((low, grid[0]), (grid[-1], high)):
        if start < end:
            left.axvspan(start, end, color=COLORS["qat"], alpha=0.4, linewidth=0)
    which = f"widest of {row['channels']} channels" if row["channels"] > 1 else setting.tensor
    left.set_title(f"{setting.layer}, {which}: scale $2^{{{np.log2(scale):.4g}}}$", fontsize=10)
    left.set(xlim=(low, high), xlabel="value (lines: what a code means; shaded: clipped)", ylabel="count")
    for part, look in zip(("rounding", "clipping"), series(2), strict=True):
        errors = moved[f"mse_{part}"]
        right.plot(moved.index, errors.where(errors > 0), label=part, **look)
    right.axvline(setting.exponent_by, color=COLORS["ptq"], linewidth=1.5, zorder=1)
    right.set_title("The error by exponent", fontsize=10)
    right.set(yscale="log", xlabel="steps from the rule's exponent", ylabel="mean squared error")
    right.legend(fontsize=8)
    left.grid(False), left.minorticks_off(), right.minorticks_off()
    return figure


def journey_figure(image: np.ndarray, way: SimpleNamespace) -> Figure:
    """Return one pixel's way, from `journey`: its largest products, and the sum from there to its code."""
    parts = torch.stack([way.inputs, way.weights, way.products]).flatten(2).numpy()  # (3, C, k k)
    if parts.shape[2] == 1:  # single terms, nine to a square
        parts = np.pad(parts[:, :, 0], ((0, 0), (0, -parts.shape[1] % 9)))
        parts = parts[:, np.abs(parts[2]).argsort(kind="stable")[::-1]].reshape(3, -1, 9)
    chosen = parts[:, np.abs(parts[2].sum(1)).argsort(kind="stable")[::-1][:3]]  # those of most weight
    side = int(chosen.shape[2] ** 0.5)
    figure, axes = _figure(4, chosen.shape[1], 4.4, width_ratios=(1.7, 1, 1, 1))
    for axis in axes.flat:
        axis.set(**BARE)
    axes[0, 0].imshow(image.transpose(1, 2, 0))
    axes[0, 0].set_position((0.01, 0.48, 0.3, 0.5))
    if way.place:
        across, down = np.array(way.place[::-1]) * (np.array(image.shape[:0:-1]) - 1)
        axes[0, 0].plot(across, down, "s", color=COLORS["ptq"], markerfacecolor="none")
    titles = f"input codes ({way.input_zero_point} is zero)", "weight codes", "products"
    for part, title in enumerate(titles):
        axes[0, part + 1].set_title(title, fontsize=9)
        middle = 0 if part else way.input_zero_point
        reach = 2 * np.abs(chosen[part] - middle).max() or 1
        for axis, terms in zip(axes[:, part + 1], chosen[part].reshape(-1, side, side), strict=True):
            axis.imshow(terms, cmap="RdBu_r", vmin=middle - reach, vmax=middle + reach, aspect="auto")
            for (down, across), value in np.ndenumerate(terms):
                axis.text(across, down, value, ha="center", va="center", fontsize=7)
    seen, rounded = int(chosen[2].sum()), round(way.shifted)
    steps = {
        "these products": seen,
        f"{way.products.numel() - chosen[2].size:,} others": way.total - way.bias - seen,
    }
    steps |= {
        "bias": way.bias,
        "sum": way.total,
        f"times 2^{way.shift}": round(way.shifted, 3),
        "rounded": rounded,
    }
    steps |= {
        f"plus zero point {way.zero_point}": rounded + way.zero_point,
        f"clamped to {way.low} … {way.high}": way.code,
    }
    text = "\n".join(
        f"{name:<20}{value:>9,}" for name, value in (steps | {"int8 kernel": way.kernel}).items()
    )
    figure.text(0.02, 0.09, text, family="monospace", fontsize=8)
    return figure
