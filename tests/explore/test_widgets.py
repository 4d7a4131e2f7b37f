"""The page without a front end: what is overtaken is never drawn, and nothing piles up."""

import gc
import threading
import time
from types import SimpleNamespace

import ipywidgets as widgets
import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure

from labcore.explore import page as module
from labcore.explore.page import Latest, Page
from labcore.explore.tensors import Setting


def settled(call, seconds: float = 20):
    """Wait until something is true."""
    deadline = time.monotonic() + seconds
    while not call():
        assert time.monotonic() < deadline, "never came true"
        time.sleep(0.01)


def test_of_many_moves_the_first_and_the_last_are_drawn():
    first, go_on, drawn = threading.Event(), threading.Event(), []

    def draw(position):
        drawn.append(position)
        first.set()
        assert go_on.wait(10)

    latest = Latest(drawn.append)
    latest.ask(lambda: draw(0))
    assert first.wait(10)
    before = threading.active_count()
    for position in range(1, 1000):
        latest.ask(lambda position=position: draw(position))
    assert threading.active_count() == before, "one thread, however many moves"
    go_on.set()
    settled(lambda: latest._thread is None)
    assert drawn == [0, 999]


def test_an_error_is_told_and_the_next_move_is_drawn():
    told = []
    latest = Latest(told.append)
    latest.ask(lambda: 1 / 0)
    settled(lambda: latest._thread is None)
    latest.ask(lambda: told.append("drawn"))
    settled(lambda: len(told) == 2)
    assert isinstance(told[0], ZeroDivisionError) and told[1] == "drawn"


@pytest.fixture
def page(explorer, monkeypatch):
    monkeypatch.setattr(module, "is_live", lambda: True)
    return Page(explorer.study.run, explorer)


def parts(view, kind) -> list:
    """All widgets of a kind in a view, in order."""
    inner = [part for child in getattr(view, "children", ()) for part in parts(child, kind)]
    return [view] * isinstance(view, kind) + inner


def figures() -> int:
    """How many figures are alive."""
    gc.collect()
    return sum(type(thing) is Figure for thing in gc.get_objects())


def control(view, name: str):
    (found,) = [part for part in parts(view, widgets.Widget) if getattr(part, "description", "") == name]
    return found


def test_moves_replace_the_one_picture_and_nothing_piles_up(page):
    view = page.tensor(Setting("conv1", bits=4))
    (picture,), numbers = parts(view, widgets.Image), parts(view, widgets.HTML)[0]
    settled(lambda: "dB" in numbers.value)
    count, seen = (len(parts(view, widgets.Widget)), figures()), set()
    for step in (1, -2, 3):
        before = numbers.value
        control(view, "exponent by").value = step
        settled(lambda before=before: numbers.value != before)
        seen.add(bytes(picture.value))
        snr_db = page.explorer.look(Setting("conv1", bits=4, exponent_by=step))["snr_db"]
        assert f"<b>{snr_db:.1f} dB</b>" in numbers.value
    assert len(seen) == 3 and all(value.startswith(b"\x89PNG") for value in seen)
    assert (len(parts(view, widgets.Widget)), figures()) == count and plt.get_fignums() == []


def test_controls_that_do_not_fit_the_tensor_are_off(page):
    view = page.tensor(Setting("conv1"))
    button = control(view, "apply to this layer")
    assert control(view, "zero point").disabled and not control(view, "per channel").disabled
    control(view, "zero point by").value = 5  # a weight has none, and no error comes of it
    control(view, "tensor").value = ("conv1", "activation")
    assert not control(view, "zero point").disabled and control(view, "per channel").disabled
    assert button.disabled
    numbers = parts(view, widgets.HTML)[0]
    settled(lambda: "zero point 133" in numbers.value)


def test_what_is_applied_joins_the_scoreboard(page):
    view, setting = page.tensor(Setting("conv1", bits=3)), Setting("conv1", bits=3)
    page.explorer.apply(Setting("fc"))
    board = page.scoreboard()
    assert "conv1" not in board.value
    control(view, "apply to this layer").click()
    settled(lambda: "conv1" in board.value)
    lost = page.explorer.tried[setting]["lost"]
    assert f"{lost} lost" in parts(view, widgets.HTML)[1].value


def test_sliders_of_the_journey_end_where_the_layer_ends(page):
    view = page.journey(image=1, layer="conv1", channel=7, row=15, column=15)
    (picture,) = parts(view, widgets.Image)
    settled(lambda: picture.value)
    control(view, "layer").value = "fc"
    ends = {name: control(view, name).max for name in ("channel", "row", "column")}
    assert ends == {"channel": 3, "row": 0, "column": 0}
    settled(lambda before=picture.value: picture.value != before)
    assert parts(view, widgets.HTML)[0].value == "", "no error"


@pytest.mark.parametrize(
    ("metadata", "by_make", "is_live"),
    [
        ({"cellId": "a"}, False, True),
        ({}, False, False),
        ({"cellId": "a"}, True, False),
        (None, False, False),
    ],
)
def test_widgets_are_for_front_ends_which_name_the_cell(metadata, by_make, is_live, monkeypatch):
    kernel = SimpleNamespace(get_parent=lambda: {"metadata": metadata})
    shell = None if metadata is None else SimpleNamespace(kernel=kernel)
    monkeypatch.setattr(module, "get_ipython", lambda: shell)
    monkeypatch.delenv("LAB_PROGRESS", raising=False)
    if by_make:
        monkeypatch.setenv("LAB_PROGRESS", "progress.log")
    assert module.is_live() is is_live


def test_where_nobody_can_move_a_widget_there_are_pictures(explorer):
    page = Page(explorer.study.run, explorer)
    explorer.apply(Setting("fc"))
    first, second = page.tensor(Setting("conv1")), page.journey(image=0, layer="fc", channel=0)
    assert first.data.startswith(b"\x89PNG") and second.data.startswith(b"\x89PNG")
    assert page.scoreboard().loc[0, "layer"] == "fc"
