"""Figures of trainings: images, curves, learning rates."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from labcore.plots.style import BARE, label_points, new_figure, plain, series


def image_grid(images: np.ndarray, titles: Sequence[str] = (), columns: int = 10) -> Figure:
    """Return RGB images (N, H, W, 3), uint8 or float in 0 … 1, each with its title where titles are given."""
    rows, names = -(-len(images) // columns), list(map(plain, titles))
    figure, axes = new_figure(columns, rows, 0.86 * rows + 0.3, subplot_kw=BARE)
    for axis, image in zip(axes.flat[: len(images)], images, strict=True):
        axis.imshow(image, interpolation="nearest")
    for axis, title in zip(axes.flat[: len(names)], names, strict=True):
        axis.set_title(title, fontsize=8, fontweight="normal", pad=2)
    return figure


def curves(history: pd.DataFrame, best_epoch: int) -> Figure:
    """Return loss and accuracy per epoch: training as it was, training images as they are, validation.

    Fewer than five epochs are no curve: they are points with their values.
    """
    figure, axes = new_figure(2)
    names = ("validation", "training, augmented", "training images, not augmented")
    prefixes, looks, few = ("val", "train", "train_clean"), series(3), len(history) < 5
    looks[2]["linestyle"] = "-"
    for axis, quantity in zip(axes.flat, ("loss", "acc"), strict=True):
        axis.axvline(best_epoch, color="0.5", linewidth=1, linestyle=":")
        for prefix, name, look in zip(prefixes, names, looks, strict=True):
            look |= {"linestyle": "none", "markersize": 6} if few else {"markersize": 4}
            axis.plot(history["epoch"], history[f"{prefix}_{quantity}"], label=name, **look)
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0, 0].set(title="Loss", ylabel="cross-entropy loss (nats)")
    axes[0, 1].set(title="Accuracy", ylabel="accuracy")
    axes[0, 1].yaxis.set_major_formatter("{x:.1%}" if few else "{x:.0%}")
    figure.legend(*axes[0, 1].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8)
    if few:
        for axis, quantity, form in zip(axes.flat, ("loss", "acc"), ("{:.3f}", "{:.2%}"), strict=True):
            axis.margins(y=0.12)
            axis.set(xticks=history["epoch"], xlim=(0.5, len(history) + 0.5))
            table = history.set_index("epoch")[[f"{prefix}_{quantity}" for prefix in prefixes]]
            points = list(table.stack().droplevel(1).items())
            label_points(axis, points, [form.format(value) for _, value in points], [3] * len(points))
    return figure


def lr_curve(positions: np.ndarray, rates: dict[str, np.ndarray], xlabel: str = "epoch") -> Figure:
    """Return learning rates of up to four schedules against the epoch, or against what `xlabel` says."""
    figure, ((axis,),) = new_figure(height=2.8)
    for (name, rate), look in zip(rates.items(), series(len(rates)), strict=True):
        axis.plot(positions, rate, label=name, **look | {"marker": None})
    axis.set(xlabel=xlabel, ylabel="learning rate")
    figure.legend(loc="outside upper center", ncols=2, fontsize=8)
    return figure
