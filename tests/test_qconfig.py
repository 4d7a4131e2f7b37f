"""Schemes and the QConfigs made of them."""

import itertools

import pytest
import torch
from torch.ao.quantization import FakeQuantize
from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize

from labcore import LabError
from labcore.observer import PowerOfTwoObserver
from labcore.qconfig import (
    FLOAT,
    MODES,
    REFERENCE,
    CustomQConfig,
    Scheme,
    activation_range,
    has_vnni,
    make_qconfig,
)
from labcore.quantizers.learned import LearnedFakeQuantize


@pytest.mark.parametrize(
    ("config", "is_power"), [(CustomQConfig.POWER2, True), (CustomQConfig.DEFAULT, False)]
)
def test_each_configuration_observes_weights_and_activations_in_its_own_way(config, is_power):
    watchers = [
        config.value.activation(),
        config.value.weight(),
        *(part().activation_post_process for part in config.qat),
    ]
    assert [isinstance(watcher, PowerOfTwoObserver) for watcher in watchers] == [is_power] * 4


@pytest.mark.parametrize("config", CustomQConfig)
def test_only_the_training_configuration_fakes_quantization(config):
    assert all(isinstance(part(), FakeQuantize) for part in config.qat)
    assert not any(isinstance(part(), FakeQuantize) for part in config.value)


def test_the_power_configuration_is_the_references_scheme():
    activation, weight = (part() for part in CustomQConfig.POWER2.value)
    assert (activation.dtype, weight.dtype) == (torch.quint8, torch.qint8)
    assert {activation.qscheme, weight.qscheme} == {torch.per_tensor_symmetric} and (
        activation.max_shift_amount,
        weight.max_shift_amount,
    ) == (8, 8)


def test_training_averages_the_range_of_activations_only():
    activation, weight = (part().activation_post_process for part in CustomQConfig.POWER2.qat)
    assert (activation.averaging_constant, weight.averaging_constant) == (0.01, 1.0)


def test_activations_use_all_eight_bits_where_the_processor_adds_exactly(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    assert has_vnni() and activation_range() == (0, 255)


@pytest.mark.skipif("x86" not in torch.backends.quantized.supported_engines, reason="needs the x86 engine")
def test_activations_keep_to_seven_bits_where_sums_of_16_bits_would_saturate(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    monkeypatch.setattr(torch.backends.quantized, "engine", "x86")
    low, high = activation_range()
    assert (low, high) == (0, 127)
    assert 2 * high * 128 <= 2**15 - 1 < 2 * 255 * 128


def test_other_engines_than_those_of_x86_need_no_seventh_bit(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    monkeypatch.setattr(torch.backends.quantized, "engine", "qnnpack")
    assert activation_range() == (0, 255)


@pytest.mark.skipif("x86" not in torch.backends.quantized.supported_engines, reason="needs the x86 engine")
@pytest.mark.parametrize("rule", ["round", "least_error", "none"])
def test_simulation_has_all_eight_bits_and_its_own_rule_also_where_kernels_would_saturate(monkeypatch, rule):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    monkeypatch.setattr(torch.backends.quantized, "engine", "x86")
    scheme = Scheme(rule=rule)
    limited, full = make_qconfig(scheme, scheme).activation(), make_qconfig(scheme, scheme, "simulated")
    assert limited.quant_max == 127 and limited.rule == ("none" if rule == "none" else "ceil")
    trained = make_qconfig(scheme, scheme, "learned", full_range=True)
    for observer in (full.activation(), trained.activation().activation_post_process):
        found = getattr(observer, "activation_post_process", observer)
        assert (found.quant_min, found.quant_max, found.rule) == (0, 255, rule)


@pytest.fixture
def vnni(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_bits_give_the_integer_range(bits, vnni):
    scheme = Scheme(bits=bits)
    weight, activation = scheme.observer_args("weight"), scheme.observer_args("activation")
    assert (weight["quant_min"], weight["quant_max"]) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert (activation["quant_min"], activation["quant_max"]) == (0, 2**bits - 1)


@pytest.mark.parametrize(
    ("argument", "value", "listed"),
    [
        ("bits", 1, "2, 3, 4, 5, 6, 7, 8"),
        ("bits", 9, "2, 3, 4, 5, 6, 7, 8"),
        ("bits", "8", "2, 3, 4, 5, 6, 7, 8"),
        ("range", "min_max", "minmax, percentile, histogram, moving_average"),
        ("rule", "nearest", "round, ceil, floor, least_error, none"),
        ("rule", None, "round, ceil, floor, least_error, none"),
        ("zero_point", "signed", "symmetric, unsigned, affine"),
    ],
)
def test_an_unknown_word_is_refused_with_the_list_of_known_ones(argument, value, listed):
    with pytest.raises(LabError) as caught:
        Scheme(**{argument: value})
    assert str(caught.value) == f"{argument} must be one of {listed}, found {value!r}; change it."


def test_an_unknown_mode_is_refused_with_the_list_of_known_ones():
    with pytest.raises(LabError, match="ptq, simulated, qat, learned, lsq, found 'qta'"):
        make_qconfig(REFERENCE, REFERENCE, "qta")


@pytest.mark.parametrize("zero_point", ["unsigned", "affine"])
def test_weights_are_symmetric(zero_point):
    with pytest.raises(LabError, match=f"weights are symmetric, found zero_point '{zero_point}'"):
        make_qconfig(Scheme(zero_point=zero_point), Scheme())


def test_activations_have_one_scale_per_tensor():
    with pytest.raises(LabError, match="activations have one scale per tensor"):
        make_qconfig(Scheme(), Scheme(per_channel=True))


def test_learned_float_scales_are_per_tensor():
    with pytest.raises(LabError, match="one scale per tensor"):
        make_qconfig(Scheme(per_channel=True), Scheme(), "lsq")


@pytest.mark.parametrize(
    ("mode", "kind"), [("simulated", FakeQuantize), ("qat", FakeQuantize), ("learned", LearnedFakeQuantize)]
)
def test_every_mode_has_its_own_module_around_the_observer(mode, kind):
    for part in make_qconfig(REFERENCE, REFERENCE, mode):
        assert type(part()) is kind and type(part().activation_post_process) is PowerOfTwoObserver


def test_the_mode_without_simulation_only_observes():
    assert [type(part()) for part in make_qconfig(REFERENCE, REFERENCE)] == [PowerOfTwoObserver] * 2


def test_learned_float_scales_are_torchs():
    assert [type(part()) for part in make_qconfig(FLOAT, FLOAT, "lsq")] == [_LearnableFakeQuantize] * 2


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("ptq", (None, None)), ("simulated", (None, None)), ("qat", (0.01, 1.0)), ("learned", (None, 1.0))],
)
def test_the_averaging_of_activations_and_weights_by_mode(mode, expected):
    watchers = [part() for part in make_qconfig(REFERENCE, REFERENCE, mode)]
    found = [getattr(watcher, "activation_post_process", watcher).averaging_constant for watcher in watchers]
    assert tuple(found) == expected


def test_the_moving_average_is_min_max_with_the_constant_of_torchs_default():
    args = Scheme(range="moving_average").observer_args("activation")
    assert (args["range"], args["averaging_constant"]) == ("minmax", 0.01)


def test_the_float_baseline_differs_from_the_reference_in_rounding_only():
    assert (FLOAT.rule, FLOAT.max_shift_amount) == ("none", None)
    assert Scheme(max_shift_amount=8) == REFERENCE and Scheme(rule="none") == FLOAT


COMBINATIONS = [
    (range_, rule, zero_point, per_channel, mode)
    for range_, rule, zero_point, per_channel, mode in itertools.product(
        ("minmax", "percentile", "histogram", "moving_average"),
        ("round", "ceil", "floor", "least_error", "none"),
        ("symmetric", "unsigned", "affine"),
        (False, True),
        MODES,
    )
    if not (per_channel and (range_ == "histogram" or mode == "lsq"))
]


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_every_combination_makes_modules_with_what_was_asked_for(bits, vnni):
    assert len(COMBINATIONS) == 480
    for range_, rule, zero_point, per_channel, mode in COMBINATIONS:
        weight = Scheme(bits, range_, rule, per_channel)
        activation = Scheme(bits, range_, rule, zero_point=zero_point)
        parts = [part() for part in make_qconfig(weight, activation, mode)]
        if mode == "lsq":
            continue
        for part, scheme in zip(parts, (activation, weight), strict=True):
            watcher = getattr(part, "activation_post_process", part)
            assert watcher.rule == rule and watcher.quant_max - watcher.quant_min == 2**bits - 1
            assert watcher.unsigned == (scheme.zero_point == "unsigned")
            assert (watcher.ch_axis == 0) == scheme.per_channel


@pytest.mark.skipif("x86" not in torch.backends.quantized.supported_engines, reason="needs the x86 engine")
@pytest.mark.parametrize(("rule", "expected"), [("round", "ceil"), ("floor", "ceil"), ("none", "none")])
def test_seven_bit_activations_round_their_scale_up(rule, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    monkeypatch.setattr(torch.backends.quantized, "engine", "x86")
    args = Scheme(rule=rule).observer_args("activation")
    assert (args["rule"], args["quant_max"]) == (expected, 127)
    assert Scheme(bits=4, rule=rule).observer_args("activation")["rule"] == rule
    assert Scheme(rule=rule).observer_args("weight")["rule"] == rule
