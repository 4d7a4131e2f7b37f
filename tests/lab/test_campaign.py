"""A short campaign: runs that are killed, inputs that nobody means to give, what an attacker might hope for.

The long one is tests/campaign.py, run by hand.
"""

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path

import campaign
import fuzz
import mutations
import numpy as np
import pytest
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from processes import end_with_tests, wait_for
from project import ROOT, lab_options

from labcore import LabError
from labcore.files.artifacts import UNREADABLE, load_logits, read_npz, sha256_file
from labcore.lab import execute, kept, pipeline
from labcore.lab.stale import State
from labcore.report import verify

ODD = (*mutations.CODE, "$(shell touch pwned)", "$$x", "-x", "'\"", 'a"; touch pwned; "', "a\n!touch pwned")


@pytest.mark.slow
def test_inputs_end_in_success_or_in_one_line(tmp_path):
    done = fuzz.fuzz(0, 60, 0, tmp_path)
    assert not [outcome for outcome in done if outcome.faults]
    refused = {outcome.kind for outcome in done if outcome.status == 1}
    assert refused == mutations.KIND.keys() == {outcome.kind for outcome in done if outcome.status != 1}


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "whom", "seconds"), [("ptq", "kernel", 9), ("report", "parent", 8)])
def test_a_killed_run_goes_on_to_the_same_files(built, tmp_path, stage, whom, seconds):
    whole = campaign.Copy(tmp_path / "whole", names=campaign.TIMELESS)
    built.copy(whole.project.root)
    assert not campaign.kill(whole, tmp_path / "killed", stage, whom, seconds).faults


def test_what_a_killed_run_left_goes_with_the_next_one(tmp_path, monkeypatch):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names = ["runs/smoke/fp32/.weights.pt.{}.part", "figures/smoke/.a.png.{}.part", "lab-{}-abc/kernel-1"]
    for name in (name.format(pid) for name in names for pid in (gone.pid, os.getpid())):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    pipeline._remove_unfinished(State("smoke", root=tmp_path))
    with execute._connection():
        pass
    left = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(left) == sorted(name.format(os.getpid()) for name in names)


@pytest.fixture(scope="module")
def box(tmp_path_factory) -> fuzz.Box:
    return fuzz.Box(tmp_path_factory.mktemp("box"))


def give_results(box: fuzz.Box, name: str, content: bytes) -> None:
    """Put the results into the box, one of them changed, as if it had been so when they were listed."""
    box.empty()
    path = box.lab / "report/cpu/results" / name
    path.write_bytes(content)
    listed = box.lab / "report/cpu/results/run.json"
    facts = json.loads(listed.read_text())
    facts["files"][name] = sha256_file(path)
    listed.write_text(json.dumps(facts))


@pytest.mark.parametrize("damage", [b'"x"', b"{}", b"[]", b"9" * 5000, b"[" * 100_000])
def test_results_that_are_damaged_are_not_restored(box, damage):
    give_results(box, "ptq/metrics.json", damage)
    with pytest.raises(LabError, match="is damaged"):
        kept.restore(fuzz.KnownImages("cpu", "digits", root=box.lab))
    assert not list(box.lab.glob("runs/*/*/*"))


@pytest.mark.parametrize("damage", ['"x"', "[3]", '{"size_bytes": 0}', '{"size_bytes": "x"}', '{"a": NaN}'])
def test_results_are_written_again_all_or_none(box, damage, monkeypatch, capsys):
    give_results(box, "qat/metrics.json", damage.encode())
    results = box.lab / "report/cpu/results"
    before = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    monkeypatch.setattr(verify, "write_again", partial(verify.write_again, root=box.lab))
    assert verify.main(["--write"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize("text", ODD)
def test_make_hands_on_what_it_is_told_and_runs_none_of_it(text, tmp_path):
    """The Python of the virtual environment is one that prints its arguments."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin/python").write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))")
    (venv / "bin/python").chmod(0o755)
    (venv / ".installed").touch()
    names = ("DATA", "SET", "WEIGHTS", "PROFILE", "STUDIES", "SEED")
    told = [f"{name}={text}" for name in names]
    command = ["make", "--silent", f"--file={ROOT / 'Makefile'}", f"--directory={ROOT}", "status"]
    for arguments, given in ((told, {}), ([], dict.fromkeys(names, text))):
        result = subprocess.run(
            [*command, f"VENV={venv}", *arguments],
            env=os.environ | given,
            capture_output=True,
            text=True,
            check=True,
        )
        handed_on = dict(part.split("=", 1) for part in json.loads(result.stdout)[3:])
        assert handed_on == {f"--{name.lower()}": text for name in names}
    assert not list(ROOT.glob("pwned*")) and not list(tmp_path.rglob("pwned*"))


def test_a_parameter_of_a_notebook_is_text_whatever_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook = load_notebook_node(str(ROOT / "notebooks/01_fp32_train.ipynb"))
    told = {f"SET{number}": text for number, text in enumerate((*ODD, *mutations.TEXTS, '"""', "\\"))}
    ran = parameterize_notebook(notebook, told, report_mode=False, kernel_name="python3", language="python")
    (cell,) = (cell for cell in ran.cells if "injected-parameters" in cell.metadata.get("tags", []))
    found: dict = {}
    exec(cell.source, {}, found)
    assert found == told and not list(tmp_path.iterdir())


@pytest.mark.parametrize("read", [read_npz, load_logits])
@pytest.mark.parametrize("inside", [{"logits": [mutations.Command()], "labels": [0]}, {}])
def test_no_pickle_in_results_is_executed(read, inside, tmp_path, monkeypatch):
    """Whether it is one of the arrays, or the file itself."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "logits.npz"
    if inside:
        np.savez(path, **{name: np.array(value, dtype=object) for name, value in inside.items()})
    else:
        path.write_bytes(mutations.pickle.dumps(mutations.Command()))
    with pytest.raises((LabError, *UNREADABLE), match="llow_pickle|pickled"):
        read(path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_jupyterlab_answers_on_the_loopback_address_alone_and_asks_for_its_token(tmp_path):
    """Started as make lab starts it, but for the browser, the port and a token that is known here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port, token = free.getsockname()[1], secrets.token_hex(16)
    options = [part for part in lab_options() if not part.startswith("--port")]
    homes = ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR")
    lab = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--no-browser", f"--port={port}", *options],
        cwd=ROOT,
        env=os.environ | {"JUPYTER_TOKEN": token} | {name: str(tmp_path / name) for name in homes},
        stderr=subprocess.DEVNULL,
        preexec_fn=end_with_tests,
    )

    def status(path: str) -> int:
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=5).status
        except urllib.error.HTTPError as error:
            return error.code

    try:
        assert wait_for(lambda: status(f"api/contents?token={token}"), 60) == 200
        assert {status(path) for path in ("api/contents", "api/kernels", "api/contents?token=x")} == {403}
        listening = {
            row.split()[1].split(":")[0]
            for table in Path("/proc/net").glob("tcp*")
            for row in table.read_text().splitlines()[1:]
            if row.split()[1].endswith(f":{port:04X}") and row.split()[3] == "0A"
        }
        assert listening <= {"0100007F"}, "no other address than 127.0.0.1"
    finally:
        lab.terminate()
        lab.wait(20)
