"""Style: no user's settings, names of any script, colours that a grey print tells apart, labels apart."""

import ast
import itertools
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from labcore import LabError
from labcore.plots import engines, style
from labcore.plots.training import image_grid, lr_curve

NOBODY_HAS = "\U000f0000"  # for private use, in no font


def test_no_setting_of_a_user_leaks_in():
    matplotlib.rcParams.update({"text.usetex": True, "axes.facecolor": "red", "font.family": ["cmr10"]})
    figure, ((axis,),) = style.new_figure()
    text = axis.text(0, 0, "a_b")
    figure.canvas.draw()  # in a machine without TeX, too
    assert not text.get_usetex() and text.get_family()[0] == "DejaVu Sans"
    assert axis.get_facecolor()[:3] == (1, 1, 1)


def test_names_are_drawn_as_they_are_written():
    names = ["$x$", "a$b", "_x", r"c\$d$", "e\tf"]
    shown = list(map(style.plain, names))
    figure, ((axis,),) = style.new_figure()
    for name, text in zip(names, shown, strict=True):
        exact = axis.text(0, 0, name.replace("\t", " "), parse_math=False)
        assert axis.text(0, 0, text).get_window_extent().width == exact.get_window_extent().width


def test_glyphs_come_from_other_fonts_or_are_codes(capsys):
    assert style.plain("Ⓐ") == "Ⓐ", "matplotlib's STIX has it, DejaVu Sans has not"
    assert style.plain(f"x{NOBODY_HAS}") == style.plain(f"x{NOBODY_HAS}") == r"x\U000f0000"
    assert capsys.readouterr().out.count("No installed font") == 1, "it is said once"
    figure = image_grid(np.zeros((2, 4, 4, 3)), ["Ⓐ 中文 한국 😀", NOBODY_HAS], columns=2)
    figure.canvas.draw()  # a missing glyph would warn, which is an error here


@pytest.mark.parametrize(
    "colors", [style.COLORS.values(), style.SERIES, [color for color, _ in engines.LOOKS.values()]]
)
def test_colours_differ_in_a_grey_print(colors):
    grey = [np.dot(to_rgb(color), (0.299, 0.587, 0.114)) for color in colors]
    assert min(abs(a - b) for a, b in itertools.combinations(grey, 2)) > 0.1


def test_every_curve_is_drawn_or_refused():
    rates = {f"schedule {number}": np.linspace(number, 0, 5) for number in range(4)}
    ((axis),) = lr_curve(np.arange(5), rates).axes
    assert [line.get_label() for line in axis.lines] == list(rates)
    assert len({line.get_linestyle() for line in axis.lines}) == 4
    with pytest.raises(LabError, match="4 curves apart, found 5"):
        lr_curve(np.arange(5), rates | {"fifth": np.zeros(5)})


def test_no_zip_drops_what_is_too_much():
    sources = list(Path(style.__file__).parent.glob("*.py"))
    calls = [node for path in sources for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    zips = [node for node in calls if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "zip"]
    strict = [any(word.arg == "strict" and word.value.value for word in call.keywords) for call in zips]
    assert len(strict) > 10 and all(strict)


def test_labels_of_close_points_stand_apart(drawn):
    figure, ((axis,),) = style.new_figure()
    points = [(0.5 + 0.004 * number, 0.5) for number in range(12)]
    axis.scatter(*zip(*points, strict=True), s=64)
    axis.set(xlim=(0, 1), ylim=(0, 1))
    style.label_points(axis, points, [f"name {number}" for number in range(12)], [4] * 12)
    assert len([text for text in drawn(figure) if text.startswith("name")]) == 12
