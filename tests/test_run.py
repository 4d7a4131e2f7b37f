"""What a run is told, and by whom."""

from dataclasses import replace

import pytest

from labcore.config import PROFILES
from labcore.files.artifacts import RESTORED, write_json
from labcore.lab.kept import forget
from labcore.lab.stale import State
from labcore.run import Run, open_run

TOLD = {"PROFILE": "smoke", "DATA": "", "SEED": "3", "SET": "width=16", "WEIGHTS": "committed"}


@pytest.mark.parametrize(
    ("told", "given", "expected"),
    [
        (TOLD, {}, ("smoke", 16, None, 3, "committed")),
        (TOLD, {"seed": 0, "weights": "mine"}, ("smoke", 16, None, 0, "mine")),
        (TOLD, {"profile": "cpu"}, ("cpu", 32, None, 0, None)),
        (TOLD | {"DATA": "digits"}, {"overrides": ""}, ("smoke", 8, "digits", 3, "committed")),
        ({}, {}, ("cpu", 32, None, 0, None)),
    ],
    ids=["make lab", "a cell's own value", "a cell's own profile", "nothing replaced", "by hand"],
)
def test_a_notebook_takes_what_make_lab_was_told_unless_it_names_a_profile(
    told, given, expected, monkeypatch
):
    for name in TOLD:
        monkeypatch.delenv(f"LAB_{name}", raising=False)
    for name, value in told.items():
        monkeypatch.setenv(f"LAB_{name}", value)
    run = open_run(**given)
    assert (run.profile.name, run.profile.width, run.source, run.seed, run.weights) == expected


def test_restored_results_are_of_one_network_and_make_forgets_them(tiny_data, tmp_path):
    def opened(seed: int = 0, **changes) -> Run:
        run = Run(replace(PROFILES["smoke"], **changes), None, seed, tmp_path)
        vars(run)["data"] = tiny_data
        return run

    run = opened()
    write_json(run.path("fp32", "metrics.json"), {"weights_sha256": "a"})
    write_json(run.path("qat", RESTORED), run.restored_from())
    assert run.is_restored("qat") and not run.is_restored("ptq")
    assert not opened(seed=1).is_restored("qat") and not opened(width=16).is_restored("qat")
    write_json(run.path("fp32", "metrics.json"), {"weights_sha256": "another training"})
    assert not run.is_restored("qat")
    write_json(run.path("fp32", "metrics.json"), {"weights_sha256": "a"})
    forget(State("smoke", root=tmp_path))
    assert not run.is_restored("qat")
