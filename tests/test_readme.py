"""The README says what is there: its numbers are the committed report's, its files exist, its commands are make's."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_result_table_is_that_of_the_committed_report():
    table = re.search(r"## What you get\n\n(\|.*?)\n\n", README, re.DOTALL).group(1)
    assert "test accuracy" in table
    assert table in (ROOT / "report/cpu/report.md").read_text(encoding="utf-8")


def test_every_link_and_picture_exists():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


@pytest.mark.parametrize("pattern", ["labcore/*.py", "notebooks/*.ipynb", "report/template*"])
def test_every_file_has_its_line(pattern):
    names = [path.name for path in ROOT.glob(pattern) if path.name != "__init__.py"]
    assert names
    assert [name for name in names if name not in README] == []


def test_every_command_is_one_of_make():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = set(re.findall(r"(?:^|`)make (\w+)", README, re.MULTILINE))
    assert {"report", "test", "lab", "status", "clean"} <= commands
    assert [
        name for name in commands if not re.search(rf"^[\w ]*\b{name}\b[\w ]*:", makefile, re.MULTILINE)
    ] == []
