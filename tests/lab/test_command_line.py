"""Bad options are one line and a status."""

import errno
import fcntl
import subprocess

import numpy as np
import pytest
import torch
from jupyterlab import NeverCheckForUpdate
from jupyterlab.labapp import LabApp
from project import ROOT, lab_options

from labcore import LabError
from labcore.config import STUDIES as STUDY_STAGES
from labcore.lab import pipeline
from labcore.lab.__main__ import chosen_studies, main
from labcore.lab.execute import execute
from labcore.lab.stale import State


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


@pytest.mark.parametrize("need", [lambda: torch.empty(10**15), lambda: np.empty(10**15)])
def test_too_little_memory_is_one_line(need, monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "run", lambda *_: need())
    assert main(["report", "--profile", "smoke"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: not enough memory (") and error.count("\n") == 1


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


def test_jupyterlab_is_this_machines_and_asks_nobody_for_news():
    lab = LabApp()
    lab.parse_command_line(lab_options())
    assert lab.news_url is None and lab.check_for_updates_class is NeverCheckForUpdate
    assert lab.config.ServerApp.ip == "127.0.0.1" and "token" not in str(lab.config)


@pytest.mark.parametrize(
    ("text", "stages"),
    [("", list(STUDY_STAGES)), ("05", ["observers"]), (" 09_engines, mixed ", ["engines", "mixed"])],
)
def test_studies_are_chosen_by_number_notebook_or_stage(text, stages):
    assert chosen_studies(text) == stages


@pytest.mark.parametrize(
    "name", ["EWOULDBLOCK", "EAGAIN", "EACCES", "ENOLCK", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EINVAL", "EIO"]
)
def test_only_a_lock_that_is_busy_stops_a_run(name, tmp_path, monkeypatch, capsys):
    """flock(2) and fcntl(2) have these words for busy; the others come from network file systems."""

    def flock(*_):
        raise OSError(getattr(errno, name), "the system's word")

    monkeypatch.setattr(fcntl, "flock", flock)
    if name in ("EWOULDBLOCK", "EAGAIN", "EACCES"):
        with (
            pytest.raises(LabError, match="^another run of profile smoke is at work"),
            pipeline._lock(State("smoke", root=tmp_path)),
        ):
            pytest.fail("entered")
        return
    with pipeline._lock(State("smoke", root=tmp_path)):
        said = capsys.readouterr().out
    assert said.startswith("note: ") and "has no locks (the system's word)" in said and said.count("\n") == 1


def test_an_unknown_notebook_parameter_is_refused(tmp_path):
    source = ROOT / "notebooks/01_fp32_train.ipynb"
    with pytest.raises(LabError, match=r"takes no parameter 'PROFILES': did you mean 'PROFILE'\?"):
        execute(source, tmp_path / "out.ipynb", {"PROFILES": "smoke"}, tmp_path / "log")
