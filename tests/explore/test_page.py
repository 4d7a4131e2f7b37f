"""The page in a real browser: a slider is moved with the mouse, and the number and the picture follow."""

import re
from dataclasses import replace

import pytest
from browser import CHROMIUM, Browser, opened
from project import Project

from labcore.files.tensors import save_tensors
from labcore.run import open_run
from labcore.train import fit

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed to open the page in"),
]
NUMBERS = "[...document.querySelectorAll('.widget-html-content')].find(e => /dB/.test(e.innerText))"
PICTURE = "document.querySelector('img.widget-image')"


def handle(name: str) -> str:
    """The part of a slider that the mouse takes."""
    labels = f"[...document.querySelectorAll('.widget-label')].find(e => e.innerText == '{name}')"
    return f"{labels}.parentElement.querySelector('.noUi-handle')"


@pytest.fixture
def browser(tmp_path) -> Browser:
    """The page of a small network that saw the digits once."""
    project = Project.sources(tmp_path / "lab")
    run = open_run("smoke", root=project.root)
    recipe = replace(run.profile.fp32, epochs=1)
    model = fit(run.fresh_model(), recipe, run.data, run.split, 0, tmp_path / "training").model
    save_tensors(run.path("fp32", "weights.pt"), model.cpu().state_dict())
    (tmp_path / "browser").mkdir()
    settings = {"LAB_PROFILE": "smoke", "OMP_NUM_THREADS": "1"}
    with opened(project.root, "13_explore", tmp_path / "browser", **settings) as browser:
        yield browser


def test_a_slider_moves_and_the_numbers_and_the_one_picture_follow(browser, tmp_path):
    start = browser.until(f"{NUMBERS}.innerText", 90)
    done = "[...document.querySelectorAll('.jp-InputPrompt')].every(e => !/[*]|\\[ \\]/.test(e.innerText))"
    browser.until(done, 60)  # all cells were run
    page = browser.script("document.body.innerText")
    assert not re.search(r"Error displaying widget|Traceback|Loading widget", page)
    pictures, shown = (
        browser.script("document.querySelectorAll('img').length"),
        browser.script(f"{PICTURE}.src"),
    )

    browser.drag(handle("exponent by"), *range(0, -300, -10))
    moved = browser.until(f"{NUMBERS}.innerText != {start!r} && {NUMBERS}.innerText", 20)
    assert exponent(moved) < exponent(start)
    browser.until(f"{PICTURE}.src != {shown!r}", 20)

    # Fast, to and fro: the last position is the one that stays.
    browser.drag(handle("exponent by"), *[300, -300] * 30, 300)
    browser.until(f"/2\\^{exponent(start) + 4};/.test({NUMBERS}.innerText)", 20)
    assert browser.script("document.querySelectorAll('img').length") == pictures, "each picture is replaced"


def exponent(numbers: str) -> int:
    return int(re.search(r"scale 2\^(-?\d+);", numbers).group(1))
