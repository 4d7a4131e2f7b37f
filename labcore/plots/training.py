"""Figures of trainings: images, curves, learning rates."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from labcore.plots.style import BARE, BLUE, COLORS, new_figure, plain


def image_grid(images: np.ndarray, titles: Sequence[str] = (), columns: int = 10) -> Figure:
    """Return RGB images (N, H, W, 3), uint8 or float in 0 … 1, each with its title where titles are given."""
    rows = -(-len(images) // columns)
    figure, axes = new_figure(columns, rows, 0.86 * rows + 0.3, subplot_kw=BARE)
    for axis, image in zip(axes.flat[: len(images)], images, strict=True):
        axis.imshow(image, interpolation="nearest")
    for axis, title in zip(axes.flat[: len(titles)], map(plain, titles), strict=True):
        axis.set_title(title, fontsize=8, fontweight="normal", pad=2)
    return figure


def curves(history: pd.DataFrame, best_epoch: int) -> Figure:
    """Return loss and accuracy per epoch: training as it was, training images as they are, validation."""
    figure, axes = new_figure(2)
    series = {
        "train": ("training, augmented", "0.65", "o--"),
        "train_clean": ("training images, not augmented", BLUE, "s-"),
        "val": ("validation", COLORS["fp32"], "D-"),
    }
    for axis, quantity in zip(axes.flat, ("loss", "acc"), strict=True):
        for prefix, (name, color, style) in series.items():
            values = history[f"{prefix}_{quantity}"]
            axis.plot(history["epoch"], values, style, color=color, markersize=4, label=name)
        axis.axvline(best_epoch, color="0.5", linewidth=1, linestyle=":")
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0, 0].set(title="Loss", ylabel="cross-entropy loss (nats)")
    axes[0, 1].set(title="Accuracy", ylabel="accuracy")
    axes[0, 1].yaxis.set_major_formatter("{x:.0%}")
    figure.legend(*axes[0, 1].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8)
    return figure


def lr_curve(positions: np.ndarray, rates: dict[str, np.ndarray], xlabel: str = "epoch") -> Figure:
    """Return learning rates of up to four schedules against the epoch, or against what `xlabel` says."""
    figure, ((axis,),) = new_figure(height=2.8)
    looks = ((COLORS["fp32"], "-"), (COLORS["ptq"], "--"), ("0.5", ":"), (COLORS["qat"], "-."))
    for (name, rate), (color, line) in zip(rates.items(), looks[: len(rates)], strict=True):
        axis.plot(positions, rate, line, color=color, label=name)
    axis.set(xlabel=xlabel, ylabel="learning rate", title="Learning rate")
    axis.legend(fontsize=8)
    return figure
