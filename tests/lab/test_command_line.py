"""Bad options are one line and a status; the notebooks' sources are as the lab wants them."""

import re
import subprocess

import nbformat
import pytest
from project import NOTEBOOKS, ROOT, STUDIES, code_cells

from labcore import LabError
from labcore.config import STUDIES as STUDY_STAGES
from labcore.lab.__main__ import chosen_studies, main
from labcore.lab.execute import execute


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "smok"], "unknown profile 'smok': did you mean 'smoke'?"),
        (["--set", "widht=8"], "unknown parameter 'widht': did you mean 'width'?"),
        (["--set", "fp32.epoch=2"], "unknown parameter 'epoch': did you mean 'epochs'?"),
        (["--set", "width=0"], "width must be in [4, 1024], found 0"),
        (["--seed", "-1"], "SEED must be a whole number in 0 … 4294967295, found '-1'"),
        (["--data", "nowhere/at/all"], "nor an existing folder or archive"),
        (["--studies", "05 5"], "'5' is no study: did you mean '05'?"),
    ],
)
def test_bad_options_are_one_line_and_a_status(arguments, message, capsys):
    assert main(["studies", "--profile", "smoke", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("variables", "status", "message"),
    [
        (["PROFIL=smoke"], 2, "unknown variable PROFIL: known are PROFILE DATA SEED SET WEIGHTS STUDIES"),
        (["SET=fp32.epochs=2 width=16", "DATA=a path/with 'quotes'", "PROFILE=smoke"], 0, ""),
    ],
)
def test_make_knows_its_variables(variables, status, message):
    result = subprocess.run(
        ["make", "--dry-run", "help", *variables], cwd=ROOT, capture_output=True, text=True
    )
    assert (result.returncode, message in result.stderr) == (status, True)


@pytest.mark.parametrize(
    ("text", "stages"),
    [("", list(STUDY_STAGES)), ("05", ["observers"]), (" 09_engines, mixed ", ["engines", "mixed"])],
)
def test_studies_are_chosen_by_number_notebook_or_stage(text, stages):
    assert chosen_studies(text) == stages


@pytest.mark.parametrize("name", NOTEBOOKS + STUDIES)
def test_notebook_sources_hold_no_outputs_and_little_code_per_cell(name):
    code = code_cells(nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4))
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert not any(re.search(r"^\s*def ", cell.source, re.MULTILINE) for cell in code)
    lengths = sorted(len(cell.source.splitlines()) for cell in code)
    assert lengths[len(lengths) // 2] <= 10
    assert any("assert " in cell.source for cell in code)
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in code) == 1


def test_an_unknown_notebook_parameter_is_refused(tmp_path):
    source = ROOT / "notebooks/01_fp32_train.ipynb"
    with pytest.raises(LabError, match=r"takes no parameter 'PROFILES': did you mean 'PROFILE'\?"):
        execute(source, tmp_path / "out.ipynb", {"PROFILES": "smoke"}, tmp_path / "log")
