"""The notebooks' sources are as the lab wants them, and committed executed ones are of these sources."""

import re

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from project import NOTEBOOKS, ROOT, STUDIES, code_cells

from labcore.observer import scale_approximate

TAUGHT = ("01_fp32_train", "02_ptq", "03_qat", "04_compare")
# The reports that are committed keep their networks beside them; that of smoke is neither.
EXECUTED = [path for name in ("cpu", "resnet50") for path in sorted(ROOT.glob(f"report/{name}/notebooks/*"))]


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def tagged(cell: nbformat.NotebookNode, tag: str) -> bool:
    return tag in cell.metadata.get("tags", [])


@pytest.mark.parametrize("name", NOTEBOOKS + STUDIES)
def test_sources_hold_no_outputs_and_little_code_per_cell(name):
    code = code_cells(read(name))
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    defining = [cell for cell in code if re.search(r"^\s*(def|class) ", cell.source, re.MULTILINE)]
    assert len(defining) <= (name in TAUGHT[:3]), "only what is taught is defined in a notebook"
    lengths = sorted(len(cell.source.splitlines()) for cell in code)
    assert lengths[len(lengths) // 2] <= 10
    assert any("assert " in cell.source for cell in code)


@pytest.mark.parametrize("name", NOTEBOOKS + STUDIES)
def test_the_first_cell_leaves_every_choice_to_make(name):
    (cell,) = [cell for cell in code_cells(read(name)) if tagged(cell, "parameters")]
    parameters: dict = {}
    exec(cell.source, {}, parameters)
    names = ["PROFILE", "DATA", "SEED", "SET"] + ["WEIGHTS"] * (name == NOTEBOOKS[0])
    assert parameters == dict.fromkeys(names)


@pytest.mark.parametrize("name", TAUGHT)
def test_a_notebook_that_teaches_asks_and_has_an_exercise(name):
    cells = read(name).cells
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert prose.count("**Question.**") in (2, 3) and prose.count("**Exercise.**") == 1
    for cell, following in zip(cells[:-1], cells[1:], strict=True):
        if "**Question.**" in cell.source:
            assert "Run the next" in cell.source and following.cell_type == "code"


BIAS = "bn.bias - bn.weight / (bn.running_var + bn.eps).sqrt() * bn.running_mean"


@pytest.mark.parametrize(
    ("name", "answer", "said"),
    [
        ("01_fp32_train", BIAS, "right"),
        ("01_fp32_train", "bn.bias", "not yet: the bias is off by up to"),
        ("02_ptq", "np.ceil(np.log2(raw_scales))", "right"),
        ("02_ptq", "np.round(np.log2(raw_scales))", "not yet: "),
        ("03_qat", "[1, 1, 0, 1]", "right"),
        ("03_qat", "[1, 1, 0, 0]", "not yet: 3 of 4 are right"),
        ("04_compare", '100 * (counts["only_before"] - counts["only_after"]) / n_images', "right"),
        ("04_compare", '(counts["only_before"] - counts["only_after"]) / n_images', "not yet"),
        *((name, "None", "not answered yet") for name in TAUGHT),
    ],
)
def test_an_exercise_tells_right_from_wrong(name, answer, said, capsys):
    (cell,) = [cell for cell in code_cells(read(name)) if "answer = None" in cell.source]
    row = {"only_before": 99, "only_after": 69}
    given = {"np": np, "torch": torch, "scale_approximate": scale_approximate, "labels": range(10_000)}
    given |= {
        "paired": pd.DataFrame({"FP32 → PTQ": row}).T,
        "found": {"paired": {"ptq": {"acc_drop_pp": 0.3}}},
    }
    exec(cell.source.replace("answer = None", f"answer = {answer}"), given)
    assert capsys.readouterr().out.startswith(said)


@pytest.mark.parametrize("path", EXECUTED, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_a_committed_notebook_ran_the_code_of_its_source(path):
    ran = [
        cell
        for cell in code_cells(nbformat.read(path, as_version=4))
        if not tagged(cell, "injected-parameters")
    ]
    ours, theirs = ([cell.source for cell in cells] for cells in (code_cells(read(path.stem)), ran))
    assert theirs == ours, f"run make report PROFILE={path.parts[-3]}, or studies, again"
