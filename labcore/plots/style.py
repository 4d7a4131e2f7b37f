"""What all figures share: colours, names, sizes. No plot trains, saves or shows."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# One colour per stage throughout; they differ in lightness too, so that a grey print can be read.
COLORS = {"fp32": "#1b2a49", "ptq": "#d1603d", "qat": "#e9b44c"}
NAMES = {"fp32": "FP32", "fp32_fused": "FP32, fused", "ptq": "PTQ", "qat": "QAT"}
BLUE, GREEN, GREY = "#3a7ca5", "#4f8a5b", "#6c7a89"
SERIES = (*COLORS.values(), BLUE)  # of curves and bars that are no stages

BARE = {"xticks": [], "yticks": [], "frame_on": False}  # axes that hold a picture

sns.set_theme(style="whitegrid", font_scale=0.85, rc={"axes.titlesize": 11, "axes.titleweight": "bold"})


def plain(name: str) -> str:
    """Return the name of a class as text in which a dollar sign begins no formula."""
    return str(name).replace("$", r"\$")


def new_figure(
    columns: int = 1, rows: int = 1, height: float = 3.4, width: float = 8.0, **options
) -> tuple[Figure, np.ndarray]:
    """Return a figure (inches) and its axes (rows, columns); `options` are those of Figure.subplots.

    A margin at its foot is kept for the data set's name. It belongs to no window, so nothing is shown twice.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.035, 1, 0.965))
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def interval_lengths(table: pd.DataFrame, column: str) -> np.ndarray:
    """Return how far `<column>_low` and `<column>_high` lie from a column, (2, N), as errorbar takes them."""
    return np.stack([table[column] - table[f"{column}_low"], table[f"{column}_high"] - table[column]])


def annotate(axis: Axes, text: str, point: tuple, offset: tuple, **options) -> None:
    """Write beside a data point, `offset` typographic points away."""
    axis.annotate(text, point, xytext=offset, textcoords="offset points", **options)
