"""What all figures share: colours, sizes, fonts, labels that keep apart. No plot trains, saves or shows."""

import unicodedata
from collections.abc import Sequence
from functools import cache
from itertools import product

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.transforms import Bbox

from labcore import LabError

# One colour per network throughout, which nothing else has. All differ in lightness too, so that a grey print
# can be read.
COLORS = {
    "fp32": "#1b2a49",
    "fp32_fused": "#8d99ae",
    "ptq": "#d1603d",
    "qat": "#e9b44c",
    "recommended": "#6f4a8e",
}
NAMES = {
    "fp32": "FP32",
    "fp32_fused": "FP32, fused",
    "ptq": "PTQ",
    "qat": "QAT",
    "recommended": "PTQ, recommended",
}
SHAPES = {"fp32": "o", "fp32_fused": "o", "ptq": "s", "qat": "D", "recommended": "^"}
SERIES = ("#143d46", "#2f8290", "#76b7bb", "#c4c4c4")  # of what is no network
LINES, MARKERS = ("-", "--", ":", "-."), ("o", "s", "D", "^")

BARE = {"xticks": [], "yticks": [], "frame_on": False}  # axes that hold a picture

_families = ["DejaVu Sans"]  # which comes with matplotlib: figures are alike everywhere
_without_glyph: set[str] = set()


def set_style() -> None:
    """Set matplotlib to the style of all figures, from its own defaults, whatever a user's matplotlibrc says.

    It holds until another is set, since ticks are made when a figure is drawn.
    """
    matplotlib.rcdefaults()
    look = {"axes.titlesize": 11, "axes.titleweight": "bold", "font.family": _families}
    sns.set_theme(style="whitegrid", font_scale=0.85, rc=look)


def new_figure(
    columns: int = 1, rows: int = 1, height: float = 3.4, width: float = 8.0, **options
) -> tuple[Figure, np.ndarray]:
    """Return a figure (inches) and its axes (rows, columns); `options` are those of Figure.subplots.

    A margin at its foot is kept for the data set's name. It belongs to no window, so nothing is shown twice.
    """
    set_style()
    figure, foot = Figure(figsize=(width, height), layout="constrained"), 0.16 / height
    figure.get_layout_engine().set(rect=(0, foot, 1, 1 - foot))
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def series(count: int) -> list[dict]:
    """Return color, linestyle and marker of so many curves; raises LabError for more than there are."""
    if count > len(SERIES):
        raise LabError(f"a figure tells {len(SERIES)} curves apart, found {count}; split it.")
    looks = zip(SERIES, LINES, MARKERS, strict=True)
    return [dict(zip(("color", "linestyle", "marker"), look, strict=True)) for look in looks][:count]


def interval_lengths(table: pd.DataFrame, column: str) -> np.ndarray:
    """Return how far `<column>_low` and `<column>_high` lie from a column, (2, N), as errorbar takes them."""
    return np.stack([table[column] - table[f"{column}_low"], table[f"{column}_high"] - table[column]])


def annotate(axis: Axes, text: str, point: tuple, offset: tuple, **options) -> None:
    """Write beside a data point, `offset` typographic points away."""
    axis.annotate(text, point, xytext=offset, textcoords="offset points", **options)


def label_points(
    axis: Axes,
    points: Sequence[tuple[float, float]],
    texts: Sequence[str],
    radii: Sequence[float],
    taken: Sequence[tuple] = (),
) -> None:
    """Write a text beside each data point, at the nearest place that is free; a line leads to distant ones.

    Points have radii (typographic points); `taken` are rectangles ((x low, y low), (x high, y high)) in data
    that stay free, too. Call it when all else is drawn, since places are measured on the figure as laid out.
    A text for which there is no room stands beside its point nevertheless.
    """
    figure, look = axis.get_figure(), {"ha": "center", "va": "center", "fontsize": 8, "zorder": 6}
    figure.draw_without_rendering()
    unit = figure.dpi / 72  # pixels per typographic point
    places, frame = axis.transData.transform(points), axis.get_window_extent()
    full = [Bbox([place - unit * r, place + unit * r]) for place, r in zip(places, radii, strict=True)]
    full += [Bbox(axis.transData.transform(corners)) for corners in taken]
    directions = [(1, 0), (0, 1), (0, -1), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1)]
    for point, place, text, radius in zip(points, places, texts, radii, strict=True):
        measured = axis.text(*point, text, **look)
        size = np.array(measured.get_window_extent().size) + 3 * unit
        measured.remove()
        for distance, direction in [*product((1, 7, 13, 20, 30, 42, 56), directions), (1, (1, 0))]:
            shift = np.array(direction) * (unit * (radius + distance) + size / 2)
            box = Bbox([place + shift - size / 2, place + shift + size / 2])
            is_inside = frame.contains(*box.min) and frame.contains(*box.max)
            if is_inside and not any(box.overlaps(other) for other in full):
                break
        full.append(box)
        look["arrowprops"] = {"arrowstyle": "-", "color": "0.5", "linewidth": 0.6} if distance > 7 else None
        axis.annotate(text, point, shift / unit, textcoords="offset points", **look).set_in_layout(False)
        del look["arrowprops"]


@cache
def _family_with(character: str) -> str | None:
    """Return a font family that has a glyph for a character: the usual one, else one that is installed."""
    fonts = sorted(fontManager.ttflist, key=lambda font: (font.name != _families[0], font.name, font.fname))
    for font in fonts:
        # The last resort has a box for everything, and fonts that hold pictures cannot be scaled.
        if font.style == "normal" and not font.name.startswith("Last Resort"):
            face = FT2Font(font.fname)
            if face.scalable and face.get_char_index(ord(character)):
                return font.name
    return None


def plain(name: str) -> str:
    """Return the name of a class as text that figures can show; call it before `new_figure`.

    A dollar sign begins no formula. Another installed font is taken where the usual one lacks a glyph; where
    all do, the character's code stands instead, which is printed once.
    """
    shown, missing = "", set()
    for character in unicodedata.normalize("NFC", str(name)):
        if unicodedata.category(character) in ("Cc", "Cf") or character in "\ufe0e\ufe0f":
            shown += " " if character.isspace() else ""  # what has no glyph of its own
        elif family := _family_with(character):
            shown += character
            if family not in _families:
                _families.append(family)
                matplotlib.rcParams["font.family"] = _families
        else:
            shown += character.encode("unicode_escape").decode()
            missing.add(character)
    if missing - _without_glyph:
        _without_glyph.update(missing)
        print(f"No installed font has all characters of {name}: figures write {shown}. Install one that has.")
    return shown.replace("$", r"\$")
