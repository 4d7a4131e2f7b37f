"""What the explorer says of a tensor and of the answers, against `inspect_qparams` and whole networks."""

from dataclasses import replace

import numpy as np
import pytest

from labcore import LabError
from labcore.explore.tensors import STEPS, Setting
from labcore.qconfig import RECOMMENDED, Scheme
from labcore.quantize import convert
from labcore.studies.errors import inspect_qparams
from labcore.studies.mixed import overrides


@pytest.mark.parametrize(
    ("weight", "activation"),
    [
        (Scheme(), Scheme(rule="none", zero_point="affine")),
        (Scheme(4, rule="ceil", per_channel=True), Scheme(5, rule="floor", zero_point="unsigned")),
        (Scheme(3, rule="least_error"), Scheme(6, rule="least_error", zero_point="affine")),
        (Scheme(8, rule="least_error", per_channel=True, max_shift_amount=3), Scheme(max_shift_amount=3)),
    ],
)
def test_numbers_are_those_of_the_calibrated_network(weight, activation, explorer):
    calibrated = explorer.study.prepared(weight, activation)
    table = inspect_qparams(calibrated, explorer.study.batches).set_index(["layer", "tensor"])
    assert {kind: list(table.xs(kind, level=1).index) for kind in explorer.tensors} == explorer.tensors
    for (layer, kind), row in table.iterrows():
        scheme = weight if kind == "weight" else activation
        words = {name: value for name, value in vars(scheme).items() if name != "range"}
        found = explorer.look(Setting(layer, kind, **words))
        assert found == pytest.approx(row.to_dict(), rel=1e-5), (layer, kind)


def test_a_moved_grid_errs_as_numpy_says(explorer):
    setting = Setting(
        "conv1", "activation", 4, "round", zero_point="unsigned", exponent_by=-2, zero_point_by=3
    )
    values, scale, zero_point = explorer.widest(setting)
    rule, row = explorer.look(replace(setting, exponent_by=0, zero_point_by=0)), explorer.look(setting)
    assert (scale, zero_point) == (rule["scale"] / 4, rule["zero_point"] + 3)
    grid = (np.arange(16) - zero_point) * scale
    nearest = np.abs(values.astype(np.float64)[:, None] - grid).min(1)
    assert row["mse_rounding"] + row["mse_clipping"] == pytest.approx(np.square(nearest).mean(), rel=1e-6)
    moved = explorer.moved(replace(setting, zero_point_by=0))
    assert list(moved.index) == list(STEPS) and moved.loc[0].to_dict() == rule


def test_a_clamp_holds_an_exponent_that_is_moved(explorer):
    wide = Setting("conv1", rule="ceil", exponent_by=-4)
    held = explorer.look(replace(wide, max_shift_amount=3))
    assert explorer.look(wide)["exponent"] < -3 and held["exponent"] == -3


def test_applied_weights_give_the_answers_of_a_network_quantized_so(explorer):
    study, name = explorer.study, "layer2.0.0"
    network = study.eager(*RECOMMENDED, overrides=overrides({name: 3}, *RECOMMENDED, mode="ptq"))
    expected = study.judge(study.logits(convert(network)))
    before = study.logits(explorer.int8)
    found = explorer.apply(Setting(name, bits=3, rule="least_error", per_channel=True))
    for key, other in (("lost", "only_before"), ("gained", "only_after"), ("acc", "acc")):
        assert found[key] == expected[other]
    assert found["logit_mse"] == pytest.approx(expected["logit_mse"]) != study.judge(before)["logit_mse"]
    assert np.array_equal(study.logits(explorer.int8), before), "the recommended network stays as it is"
    explorer.apply(Setting("fc", max_shift_amount=8))
    table = explorer.scoreboard()
    assert len(table) == 2 and table["logit_mse"].is_monotonic_increasing
    assert set(table["max_shift_amount"]) == {None, 8}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (Setting("conv2"), "unknown weight of a layer, 'conv2': did you mean"),
        (Setting("conv1", "bias"), "unknown bias of a layer, 'conv1'"),
        (Setting("conv1", bits=9), "bits must be one of"),
        (Setting("conv1", max_shift_amount=127), "max_shift_amount must be in 0 … 126 or None"),
        (Setting("conv1", zero_point="affine"), "weights are symmetric"),
        (Setting("conv1", zero_point_by=1), "a weight's zero point is 0, found it moved by 1"),
        (Setting("quant", "activation", per_channel=True), "activations have one scale per tensor"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(setting, message, explorer):
    with pytest.raises(LabError, match=message):
        explorer.look(setting)


def test_activations_are_not_applied(explorer):
    with pytest.raises(LabError, match="only weights can be applied"):
        explorer.apply(Setting("conv1", "activation"))
