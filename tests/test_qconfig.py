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
    WORDS,
    CustomQConfig,
    Scheme,
    activation_range,
    has_vnni,
    make_qconfig,
)
from labcore.quantize import observer_of
from labcore.quantizers.learned import LearnedFakeQuantize
from labcore.quantizers.least_error import LeastErrorObserver
from labcore.training import device

has_x86 = "x86" in torch.backends.quantized.supported_engines
needs_x86 = pytest.mark.skipif(not has_x86, reason="needs the x86 engine")


@pytest.fixture
def vnni(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)


@pytest.mark.parametrize("config", CustomQConfig)
def test_each_configuration_observes_in_its_own_way_and_only_that_for_training_fakes(config):
    observing, training = [part() for part in config.value], [part() for part in config.qat]
    for module in (*observing, *map(observer_of, training)):
        assert isinstance(module, PowerOfTwoObserver) == (config is CustomQConfig.POWER2)
    fakes = [isinstance(module, FakeQuantize) for module in (*observing, *training)]
    assert fakes == [False, False, True, True]


def test_the_power_configuration_is_the_references_scheme():
    activation, weight = (part() for part in CustomQConfig.POWER2.value)
    assert (activation.dtype, weight.dtype) == (torch.quint8, torch.qint8)
    for observer in (activation, weight):
        assert (observer.qscheme, observer.max_shift_amount) == (torch.per_tensor_symmetric, 8)


@needs_x86
@pytest.mark.parametrize(
    ("has_it", "engine", "highest"), [(True, "x86", 255), (False, "x86", 127), (False, "qnnpack", 255)]
)
def test_activations_have_seven_bits_where_sums_would_saturate(has_it, engine, highest, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: has_it)
    monkeypatch.setattr(torch.backends.quantized, "engine", engine)
    assert has_vnni() == (highest == 255) and activation_range() == (0, highest)
    assert 2 * 127 * 128 <= 2**15 - 1 < 2 * 255 * 128


@needs_x86
@pytest.mark.parametrize("rule", ["round", "floor", "least_error", "none"])
def test_seven_bits_round_their_scale_up_and_simulation_keeps_eight_bits_and_its_rule(rule, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    monkeypatch.setattr(torch.backends.quantized, "engine", "x86")
    scheme = Scheme(rule=rule)
    limited = make_qconfig(scheme, scheme).activation()
    assert limited.quant_max == 127 and limited.rule == ("none" if rule == "none" else "ceil")
    assert make_qconfig(scheme, Scheme(bits=4, rule=rule)).activation().rule == rule
    assert make_qconfig(scheme, scheme).weight().rule == rule
    for args in (("simulated",), ("learned", True)):
        observer = observer_of(make_qconfig(scheme, scheme, *args).activation())
        assert (observer.quant_min, observer.quant_max, observer.rule) == (0, 255, rule)


@pytest.mark.parametrize(
    ("argument", "value", "listed"),
    [
        ("bits", 1, "2, 3, 4, 5, 6, 7, 8"),
        ("bits", 9, "2, 3, 4, 5, 6, 7, 8"),
        ("bits", "8", "2, 3, 4, 5, 6, 7, 8"),
        ("range", "min_max", "minmax, percentile, histogram, moving_average"),
        ("rule", "nearest", "round, ceil, floor, none, least_error"),
        ("rule", None, "round, ceil, floor, none, least_error"),
        ("zero_point", "signed", "symmetric, unsigned, affine"),
    ],
)
def test_an_unknown_word_is_refused_with_the_list_of_known_ones(argument, value, listed):
    with pytest.raises(LabError) as caught:
        Scheme(**{argument: value})
    assert str(caught.value) == f"{argument} must be one of {listed}, found {value!r}; change it."


@pytest.mark.parametrize(
    ("weight", "activation", "mode", "message"),
    [
        (REFERENCE, REFERENCE, "qta", "ptq, simulated, qat, learned, lsq, found 'qta'"),
        (Scheme(zero_point="unsigned"), FLOAT, "ptq", "weights are symmetric, found zero_point 'unsigned'"),
        (Scheme(zero_point="affine"), Scheme(), "ptq", "weights are symmetric, found zero_point 'affine'"),
        (Scheme(), Scheme(per_channel=True), "ptq", "activations have one scale per tensor"),
        (Scheme(per_channel=True), Scheme(), "lsq", "one scale per tensor"),
    ],
)
def test_what_does_not_fit_is_refused(weight, activation, mode, message):
    with pytest.raises(LabError, match=message):
        make_qconfig(weight, activation, mode)


@pytest.mark.parametrize(
    ("mode", "module", "averaging"),
    [
        ("ptq", PowerOfTwoObserver, (None, None)),
        ("simulated", FakeQuantize, (None, None)),
        ("qat", FakeQuantize, (0.01, 1.0)),
        ("learned", LearnedFakeQuantize, (None, 1.0)),
    ],
)
def test_every_mode_has_its_own_module_and_averaging_of_activations_and_weights(mode, module, averaging):
    made = [part() for part in make_qconfig(REFERENCE, REFERENCE, mode)]
    observers = [observer_of(part) for part in made]
    assert [type(part) for part in made] == [module] * 2
    assert [type(observer) for observer in observers] == [PowerOfTwoObserver] * 2
    assert tuple(observer.averaging_constant for observer in observers) == averaging


def test_the_moving_average_is_min_max_with_the_constant_of_torchs_default():
    args = Scheme(range="moving_average").observer_args("activation")
    assert (args["range"], args["averaging_constant"]) == ("minmax", 0.01)


def test_the_float_baseline_differs_from_the_reference_in_rounding_only():
    assert Scheme(max_shift_amount=8) == REFERENCE and Scheme(rule="none") == FLOAT


@pytest.mark.parametrize("rule", WORDS["rule"])
@pytest.mark.parametrize("mode", ["qat", "learned", "lsq", "torch"])
def test_it_trains_in_bfloat16_where_that_moves_no_value_off_its_grid(mode, rule, monkeypatch):
    monkeypatch.setattr(device, "multiplies_bfloat16", lambda: True)
    scheme = Scheme(rule=rule)
    qconfig = CustomQConfig.DEFAULT.qat if mode == "torch" else make_qconfig(scheme, scheme, mode)
    fakes = torch.nn.Sequential(qconfig.activation(), qconfig.weight())
    values = torch.linspace(-1.1, 1.3, 3000).reshape(3, -1)
    if mode == "lsq":
        fakes.apply(lambda fake: getattr(fake, "enable_static_observation", int)())
    rounded = [fake(fake(values)) for fake in fakes]
    is_exact = all(torch.equal(value, value.bfloat16().float()) for value in rounded)
    assert (device.autocast_dtype(fakes) is torch.bfloat16) == is_exact
    assert is_exact == (mode == "learned" or (mode == "qat" and rule != "none"))
    assert device.autocast_dtype(torch.nn.Linear(2, 2)) is torch.bfloat16, "FP32 training is as it was"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_combination_makes_modules_with_what_was_asked_for(bits, mode, vnni):
    words = WORDS["range"], WORDS["rule"], WORDS["zero_point"], (False, True)
    for range_, rule, zero_point, per_channel in itertools.product(*words):
        if per_channel and (range_ == "histogram" or mode == "lsq"):
            continue
        weight = Scheme(bits, range_, rule, per_channel)
        activation = Scheme(bits, range_, rule, zero_point=zero_point)
        parts = [part() for part in make_qconfig(weight, activation, mode)]
        limits = (0, 2**bits - 1), (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        if mode == "lsq":  # learned float scales are torch's
            assert [type(part) for part in parts] == [_LearnableFakeQuantize] * 2
            assert [part.qscheme for part in parts] == [torch.per_tensor_affine, torch.per_tensor_symmetric]
            assert [(part.quant_min, part.quant_max) for part in parts] == [*limits]
            continue
        for part, scheme, limit in zip(parts, (activation, weight), limits, strict=True):
            observer = observer_of(part)
            expected = LeastErrorObserver if rule == "least_error" else PowerOfTwoObserver
            assert type(observer) is expected and observer.rule == rule
            assert (observer.quant_min, observer.quant_max) == limit
            assert observer.unsigned == (scheme.zero_point == "unsigned")
            assert (observer.ch_axis == 0) == scheme.per_channel
