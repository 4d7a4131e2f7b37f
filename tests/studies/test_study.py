"""Study: what its networks share, what its images show, what decides its cells, and that these are kept."""

import itertools
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small import network

from labcore.config import PROFILES, Recipe
from labcore.data import Split, calibration_batches
from labcore.files.artifacts import ROOT
from labcore.files.tensors import save_tensors
from labcore.images.transforms import normalize
from labcore.qconfig import Scheme, make_qconfig
from labcore.quantize import calibrate, prepare_ptq, simulate
from labcore.run import Run
from labcore.studies import study as module
from labcore.studies.errors import inspect_qparams
from labcore.studies.mixed import overrides
from labcore.studies.study import MODULES, Cell, Study, grid, run_cells

RECIPE = Recipe(epochs=1, batch_size=8, lr=0.1)


@pytest.fixture
def run(tiny_data, tiny_split, tmp_path) -> Run:
    run = Run(PROFILES["smoke"], None, 0, tmp_path)
    vars(run).update(data=tiny_data, split=tiny_split)  # as if they had been read
    save_tensors(run.path("fp32", "weights.pt"), network(width=PROFILES["smoke"].width).state_dict())
    return run


@pytest.fixture
def study(run) -> Study:
    return Study(run, "observers")


def test_other_images_calibrate_and_the_same_ones_judge(study, tiny_split):
    assert study.reference is study.redrawn(1).reference, "computed once"
    other, again = study.redrawn(1), study.redrawn(1)
    drawn = other.split.calibration
    assert set(drawn) <= set(tiny_split.train) and len(set(drawn)) == len(tiny_split.calibration)
    assert not np.array_equal(drawn, tiny_split.calibration) and np.array_equal(
        drawn, again.split.calibration
    )
    assert other.base == again.base != study.base and study.split is tiny_split
    ranges = [one.prepared(Scheme(), Scheme()).state_dict() for one in (study, other)]
    assert any(not torch.equal(ranges[0][name], value) for name, value in ranges[1].items())
    assert len(other.batches[0]) == len(study.batches[0])


def test_a_grid_has_every_combination_once():
    schemes = grid(Scheme(), bits=(8, 4), rule=("round", "ceil", "floor"))
    expected = itertools.product((8, 4), ("round", "ceil", "floor"))
    assert [(scheme.bits, scheme.rule) for scheme in schemes] == list(expected)


def test_images_sorted_by_class_leave_no_class_out(run, tiny_data, monkeypatch):
    order = np.argsort(tiny_data.train_labels, kind="stable")
    images, labels = tiny_data.train_images[order], tiny_data.train_labels[order]
    vars(run).update(
        data=replace(tiny_data, train_images=images, train_labels=labels),
        split=Split(np.arange(0, 96, 2), np.arange(1, 96, 2), np.arange(0, 96, 2)),
    )
    chosen = []

    def fit(network, recipe, data, split, seed, folder, description):
        chosen.extend(split.validation)
        return SimpleNamespace(model=network)

    monkeypatch.setattr(module, "fit", fit)
    study = Study(run, "observers", images=7)
    study.train(network(), RECIPE, "folder", "title")
    assert len(chosen) == 10 and set(chosen) <= set(run.split.validation)
    assert set(labels[chosen]) == set(study.labels) == {0, 1, 2, 3}
    first = calibration_batches(run.data, run.split, batch_size=12)[0]
    assert len(first.mean((1, 2, 3)).round(decimals=0).unique()) > 1, "one class only"


@pytest.mark.parametrize("rule", ["round", "ceil", "floor", "least_error", "none"])
def test_one_calibration_serves_all_weights_and_allocations_of_bits(rule, study, tiny_data):
    images = normalize(torch.from_numpy(tiny_data.test_images))
    activation, outputs = Scheme(rule=rule, zero_point="unsigned", max_shift_amount=2), []
    by_channel = Scheme(rule=rule, per_channel=True)
    for weight, bits in ((by_channel, {}), (Scheme(bits=3), {}), (by_channel, {"conv1": 4, "fc": 2})):
        shared, own = study.allocated(bits, weight, activation), overrides(bits, weight, activation)
        fresh = prepare_ptq(study.model, make_qconfig(weight, activation, "simulated"), own)
        fresh = calibrate(fresh, study.batches)
        assert inspect_qparams(shared, []).equals(inspect_qparams(fresh, []))
        outputs.append(simulate(shared)(images))
        assert torch.equal(outputs[-1], simulate(fresh)(images))
    assert len(study._calibrated) == 1 and not torch.equal(outputs[0], outputs[1])


def test_schemes_that_observe_otherwise_do_not_share_a_calibration(study):
    words = [
        {"rule": "least_error"},
        {"rule": "least_error", "zero_point": "unsigned"},
        {"range": "histogram"},
    ]
    words += [{"range": "histogram", "bits": 4}, {"range": "percentile"}, {"range": "moving_average"}]
    for activation in (
        Scheme(),
        *(Scheme(**each) for each in words),
        Scheme(rule="ceil"),
        Scheme(rule="none"),
    ):
        qconfig = make_qconfig(Scheme(), activation, "simulated")
        fresh = calibrate(prepare_ptq(study.model, qconfig), study.batches)
        shared = study.prepared(Scheme(), activation)
        assert inspect_qparams(shared, study.batches).equals(inspect_qparams(fresh, study.batches)), (
            activation
        )
    assert len(study._calibrated) == 7, "the nearest, the next and floats share one"


def test_with_its_scale_rounded_up_nothing_of_the_images_is_clipped_and_all_else_stays(study, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)  # the simulation itself
    ceil = make_qconfig(Scheme(), Scheme(rule="ceil"), "simulated")
    plain, up = (study.quantized(Scheme(), Scheme(), overrides=own) for own in ({}, {"quant": ceil}))
    high = max(batch.abs().max().item() for batch in study.batches)
    assert up.quant.activation_post_process.scale.item() == 2 ** math.ceil(math.log2(high / 127.5))
    before, after = (inspect_qparams(network, []) for network in (plain, up))
    assert before[before["layer"] != "quant"].equals(after[after["layer"] != "quant"])


def test_a_cell_that_a_notebook_builds_depends_on_the_notebooks_code_and_not_on_its_prose(study):
    path = study.run.root / "notebooks/05_observers.ipynb"
    path.parent.mkdir()

    def key(code: str, prose: str) -> dict:
        cells = [{"cell_type": "code", "source": [code]}, {"cell_type": "markdown", "source": [prose]}]
        path.write_text(json.dumps({"cells": cells}))
        return study.other("repair", network).key

    assert key("steps = 120", "a") == key("steps = 120", "b") != key("steps = 60", "a")


def test_a_cell_of_qat_depends_on_the_code_that_trains(study, monkeypatch):
    arguments = Scheme(), Scheme(), "plain", RECIPE
    before = study.qat(*arguments).key
    assert before == study.qat(*arguments).key
    monkeypatch.setattr(module, "modules_hash", lambda *names: f"other {names}")
    after = study.qat(*arguments).key
    assert before["training"] != after["training"] and "optim" in after["training"]


@pytest.fixture
def run_cell(tmp_path):
    """Run one cell; returns its result, and how often it has been computed and cleaned up after."""
    computed, cleaned = [], []

    def run(key=0, base=0):
        def compute():
            computed.append(key)
            return {"loss": 0.5, "acc": 1 / 3}

        cell = Cell({"key": key}, compute, cleanup=lambda: cleaned.extend(tmp_path.glob("*.json")))
        result = run_cells({"a": cell}, tmp_path, {"base": base}, "").loc["a"].to_dict()
        return result, len(computed), len(cleaned) > 0

    return run


def test_a_cell_is_read_where_nothing_that_decides_it_has_changed(run_cell):
    assert run_cell() == run_cell() == ({"acc": 1 / 3, "loss": 0.5}, 1, True)
    assert run_cell(key=1)[1] == 2 and run_cell(base=1)[1] == 3


@pytest.mark.parametrize("damage", [b"", b"{", b'{"cell": 1}', b"[]", b"\xff"])
def test_a_damaged_cell_is_computed_again(damage, run_cell, tmp_path):
    result = run_cell()[0]
    next(tmp_path.glob("*.json")).write_bytes(damage)
    assert run_cell()[:2] == (result, 2)


def test_all_cells_depend_on_the_code_of_every_quantizer():
    paths = (ROOT / "labcore/quantizers").glob("[!_]*.py")
    assert {f"quantizers.{path.stem}" for path in paths} <= set(MODULES)
