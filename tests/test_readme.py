"""The README says what is there: numbers of the committed report, files that exist, make's commands."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("docs/**/*.md")))]
HEART = ["config", "data", "model", "observer", "qconfig", "quantize", "train", "evaluate", "run"]


def lines(paths) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def result_rows(profile: str) -> list[list[str]]:
    """The cells of a committed report's table of results, row by row, without its head.

    make report writes its own there, which is none of README's; git has the committed one.
    """
    path = f"report/{profile}/report.md"
    committed = subprocess.run(["git", "-C", ROOT, "show", f":{path}"], capture_output=True, encoding="utf-8")
    text = (ROOT / path).read_text(encoding="utf-8") if committed.returncode else committed.stdout
    table = re.search(r"^\|  \| FP32 \| PTQ \| QAT \|\n.*\n((?:\|.*\n)+)", text, re.MULTILINE).group(1)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_the_result_table_is_that_of_the_committed_reports():
    table = re.search(r"## What you get\n\n.*\n.*\n((?:\|.*\n)+)", README).group(1)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    small, large = result_rows("cpu"), result_rows("resnet50")
    assert len(rows) == 7 and rows == [a + b[1:] for a, b in zip(small, large, strict=True)]


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_picture_exists(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+)\)", text)
    assert [target for target in targets if not ((ROOT / page).parent / target).exists()] == []


def test_every_folder_and_every_file_of_the_heart_has_its_line():
    folders = [f"`labcore/{path.parent.name}/`" for path in ROOT.glob("labcore/*/__init__.py")]
    assert len(folders) == 10
    assert [
        name for name in [*folders, *(f"`labcore/{name}.py`" for name in HEART)] if name not in README
    ] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_one_of_make(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = re.findall(r"(?:^|`)make ([\w-]+)", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    targets = set(re.findall(r"^([\w -]+):(?!=)", makefile, re.MULTILINE))
    known = {name for line in targets for name in line.split()}
    assert {name for name in commands if name not in known} == set()
    assert page != "README.md" or {"report", "test", "lab", "studies", "verify"} <= set(commands)


def test_the_heart_stays_nine_thin_files():
    assert {path.stem for path in ROOT.glob("labcore/*.py")} == {*HEART, "stats", "__init__"}
    assert lines(ROOT / f"labcore/{name}.py" for name in HEART) <= 2000
    assert all(lines([path]) <= 350 for path in ROOT.glob("labcore/**/*.py"))
    assert len(README.split()) <= 1300
