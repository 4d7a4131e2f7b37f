"""The power-of-two observer against torch's own observers, Python's float arithmetic and numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch
from torch.ao.quantization import FakeQuantize
from torch.ao.quantization import observer as torch_observers
from torch.utils._python_dispatch import TorchDispatchMode

from labcore import LabError, observer
from labcore.observer import (
    CusQuantObserver,
    CustomQConfig,
    PowerOfTwoObserver,
    activation_range,
    has_vnni,
    scale_approximate,
)

INF, NAN = float("inf"), float("nan")
TENSOR = [torch.per_tensor_affine, torch.per_tensor_symmetric]
CHANNEL = [torch.per_channel_affine, torch.per_channel_symmetric]
SCHEMES = TENSOR + CHANNEL


def nearest_power(scale: float, limit: int) -> float:
    """Try every exponent; the distance is measured in the logarithm."""
    return 2.0 ** min(range(-limit, limit + 1), key=lambda exponent: abs(math.log2(scale) - exponent))


def seen(*batches, **kwargs) -> PowerOfTwoObserver:
    watcher = PowerOfTwoObserver(**kwargs)
    for batch in batches:
        watcher(torch.as_tensor(batch))
    return watcher


def qparams(*batches, **kwargs) -> tuple[list[float], list[int]]:
    scale, zero_point = seen(*batches, **kwargs).calculate_qparams()
    return scale.tolist(), zero_point.tolist()


def batches(count: int = 4, shape: tuple[int, ...] = (5, 3, 4, 2), shift: float = 0.4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) * (1 + number) + shift for number in range(count)]


@pytest.mark.parametrize("limit", [0, 1, 8, 40])
def test_the_approximation_is_the_power_nearest_in_the_logarithm(limit):
    exponents = np.random.default_rng(limit).uniform(-limit - 3, limit + 3, 400)
    scales = [float(np.float32(2.0**exponent)) for exponent in exponents]
    assert [scale_approximate(scale, limit) for scale in scales] == [
        nearest_power(scale, limit) for scale in scales
    ]


@pytest.mark.parametrize("exponent", [-9, -1, 0, 1, 5])
def test_floats_next_to_the_geometric_middle_go_to_the_right_side(exponent):
    middle = np.float32(2.0 ** (exponent + 0.5))
    scales = [
        float(np.nextafter(middle, np.float32(0))),
        float(middle),
        float(np.nextafter(middle, np.float32(1e9))),
    ]
    assert [scale_approximate(scale, 20) for scale in scales] == [
        nearest_power(scale, 20) for scale in scales
    ]


def test_exact_powers_of_two_stay():
    powers = [2.0**exponent for exponent in range(-126, 128)]
    assert [scale_approximate(power, None) for power in powers] == powers


@pytest.mark.parametrize(
    ("scale", "limit", "expected"),
    [
        (2.0**-9, 8, 2.0**-8),
        (1e-30, 8, 2.0**-8),
        (2.0**9, 8, 2.0**8),
        (3e38, 8, 2.0**8),
        (INF, 8, 2.0**8),
        (1e300, 8, 2.0**8),
        (1e-320, 8, 2.0**-8),
        (1e-45, 8, 2.0**-8),
        (1e-30, None, 2.0**-100),
        (1e-45, None, 2.0**-126),
        (INF, None, 2.0**127),
        (3.3, 0, 1.0),
        (0.01, 0, 1.0),
    ],
)
def test_the_exponent_is_clamped(scale, limit, expected):
    assert scale_approximate(scale, limit) == expected


@pytest.mark.parametrize("kind", [float, torch.tensor])
@pytest.mark.parametrize("scale", [0.0, -0.0, -1.5, -INF, NAN])
def test_what_is_no_positive_scale_comes_back_as_it_is(scale, kind):
    result = float(scale_approximate(kind(scale)))
    assert math.copysign(1, result) == math.copysign(1, scale)
    assert result == scale or (math.isnan(result) and math.isnan(scale))


@pytest.mark.parametrize("limit", [3, 8, None])
def test_floats_and_tensors_agree(limit):
    scales = torch.tensor([1e-45, 1e-38, 1e-5, 0.3, 1, 1.5, 77, 1e30, INF, 0, -2])
    assert scale_approximate(scales, limit).tolist() == [
        scale_approximate(scale, limit) for scale in scales.tolist()
    ]


@pytest.mark.parametrize("shape", [(), (0,), (1,), (4,), (2, 3, 1)])
def test_shape_and_type_are_kept(shape):
    result = scale_approximate(torch.full(shape, 0.3))
    assert (result.shape, result.dtype) == (shape, torch.float32)


def test_a_float_gives_a_float():
    assert type(scale_approximate(0.3)) is float


@pytest.mark.parametrize("limit", [-1, 127, 1000, NAN])
def test_a_limit_out_of_range_is_refused(limit):
    with pytest.raises(LabError, match="max_shift_amount must be in 0 … 126 or None"):
        scale_approximate(1.0, limit)


def test_twice_the_scale_gives_twice_the_power_inside_the_clamp():
    scales = torch.from_numpy(np.random.default_rng(2).uniform(2.0**-7.4, 2.0**6.4, 500).astype(np.float32))
    assert torch.equal(scale_approximate(2 * scales), 2 * scale_approximate(scales))


def test_a_larger_scale_never_gets_a_smaller_power():
    powers = scale_approximate(torch.logspace(-12, 12, 3001, base=2))
    assert (powers.diff() >= 0).all() and len(powers.unique()) == 17


@pytest.mark.parametrize("dtype", [torch.qint8, torch.quint8])
@pytest.mark.parametrize("scheme", TENSOR)
@pytest.mark.parametrize("averaging", [None, 0.01, 0.7])
def test_the_raw_scale_per_tensor_is_torchs_to_the_bit(dtype, scheme, averaging):
    kwargs = {"dtype": dtype, "qscheme": scheme} | ({"averaging_constant": averaging} if averaging else {})
    expected = (torch_observers.MovingAverageMinMaxObserver if averaging else torch_observers.MinMaxObserver)(
        **kwargs
    )
    watcher = PowerOfTwoObserver(**kwargs)
    for batch in batches():
        watcher(batch), expected(batch)
        assert torch.equal(watcher.raw_scale(), expected.calculate_qparams()[0])


@pytest.mark.parametrize("dtype", [torch.qint8, torch.quint8])
@pytest.mark.parametrize("scheme", CHANNEL)
@pytest.mark.parametrize("averaging", [None, 0.01])
@pytest.mark.parametrize("axis", [0, 1, 3])
def test_the_raw_scale_per_channel_is_torchs_to_the_bit(dtype, scheme, averaging, axis):
    kwargs = {"dtype": dtype, "qscheme": scheme, "ch_axis": axis} | (
        {"averaging_constant": averaging} if averaging else {}
    )
    expected = (
        torch_observers.MovingAveragePerChannelMinMaxObserver
        if averaging
        else torch_observers.PerChannelMinMaxObserver
    )(**kwargs)
    watcher = PowerOfTwoObserver(**kwargs)
    for batch in batches():
        watcher(batch), expected(batch)
        assert torch.equal(watcher.raw_scale(), expected.calculate_qparams()[0])


def test_a_channel_axis_counted_from_the_end_means_the_same_axis():
    kwargs = {"qscheme": torch.per_channel_symmetric, "dtype": torch.qint8}
    batch = batches(1)[0] * torch.tensor([1.0, 30.0])
    assert (
        seen(batch, ch_axis=-1, **kwargs).raw_scale().tolist()
        == seen(batch, ch_axis=3, **kwargs).raw_scale().tolist()
    )


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", [1e-4, 0.3, 7.0, 1e3])
def test_every_scale_is_a_power_of_two(scheme, size):
    scale, _ = seen(*(size * batch for batch in batches()), qscheme=scheme).calculate_qparams()
    assert (torch.frexp(scale).mantissa == 0.5).all()


@pytest.mark.parametrize(
    ("batch", "dtype", "scale", "zero_point"),
    [
        ([-1.0, 2.984375], torch.quint8, 2.0**-6, 64),  # 3.984375 / 255 = 2^-6; 0 + 1 * 64
        ([-1.0, 2.984375], torch.qint8, 2.0**-6, -64),
        ([0.5, 3.984375], torch.quint8, 2.0**-6, 0),  # the range is widened to hold zero
        ([-3.984375, -0.5], torch.quint8, 2.0**-6, 255),
        ([-1.0, 1.8], torch.quint8, 2.0**-7, 128),  # 2.8 / 255 = 2^-6.51
        ([-5.0, 0.1], torch.quint8, 2.0**-6, 255),  # 5.1 / 255 = 2^-5.64; 5 * 64 = 320 is clamped
    ],
)
def test_the_affine_zero_point_is_the_one_worked_out_by_hand(batch, dtype, scale, zero_point):
    assert qparams(batch, qscheme=torch.per_tensor_affine, dtype=dtype) == ([scale], [zero_point])


@pytest.mark.parametrize(
    ("kwargs", "zero_point"),
    [
        ({"dtype": torch.quint8}, 128),
        ({"dtype": torch.quint8, "quant_min": 0, "quant_max": 127}, 64),
        ({"dtype": torch.quint8, "quant_min": 0, "quant_max": 255}, 128),
        ({"dtype": torch.qint8}, 0),
        ({"dtype": torch.qint8, "quant_min": -128, "quant_max": 127}, 0),
    ],
)
def test_the_symmetric_zero_point_is_the_middle_of_the_range(kwargs, zero_point):
    assert qparams([-0.3, 5.0], **kwargs)[1] == [zero_point]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shift", [-9.0, 0.0, 9.0])
def test_zero_is_on_the_grid(scheme, shift):
    watcher = seen(*batches(shift=shift), qscheme=scheme)
    _, zero_point = watcher.calculate_qparams()
    assert (zero_point >= watcher.quant_min).all() and (zero_point <= watcher.quant_max).all()


def test_the_input_comes_back_unchanged():
    batch = batches(1)[0]
    assert PowerOfTwoObserver()(batch) is batch


def test_an_empty_batch_changes_nothing():
    assert qparams([1.0, -2.0], torch.empty(0, 4)) == qparams([1.0, -2.0])


@pytest.mark.parametrize(
    ("batch", "scheme", "scale", "zero_point"),
    [
        ([0.0, 0.0], "symmetric", 2.0**-8, 128),
        ([0.0, 0.0], "affine", 2.0**-8, 0),
        ([51.0], "affine", 2.0**-2, 0),
        ([-51.0], "affine", 2.0**-2, 204),
        ([51.0, 51.0, 51.0], "symmetric", 2.0**-1, 128),  # 51 / 255 = 0.2, 51 / 127.5 = 0.4
        (7.0, "symmetric", 2.0**-4, 128),
        ([1e30], "symmetric", 2.0**8, 128),
        ([-1e30], "affine", 2.0**8, 255),
        ([-3e38, 3e38], "affine", 2.0**8, 255),
        ([1e-45], "symmetric", 2.0**-8, 128),
        ([-1e-45], "affine", 2.0**-8, 0),
    ],
)
def test_degenerate_ranges_give_usable_parameters(batch, scheme, scale, zero_point):
    assert qparams(batch, qscheme=getattr(torch, f"per_tensor_{scheme}")) == ([scale], [zero_point])


def test_a_bfloat16_batch_counts_as_its_float32_values():
    batch = batches(1)[0].bfloat16()
    assert torch.equal(seen(batch).raw_scale(), seen(batch.float()).raw_scale())


@pytest.mark.parametrize("averaging", [None, 0.1])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_batch_that_is_not_finite_is_left_out_and_counted(bad, averaging):
    first, last = batches(2)
    watcher = seen(first, [1e9, bad], last, [bad], averaging_constant=averaging)
    assert torch.equal(watcher.raw_scale(), seen(first, last, averaging_constant=averaging).raw_scale())
    assert watcher.num_skipped == 2


def test_only_the_channels_that_are_not_finite_are_left_out():
    watcher = seen([[1.0, 2.0], [3.0, 4.0]], [[NAN, 9.0], [8.0, 7.0]], qscheme=torch.per_channel_symmetric)
    assert (watcher.max_val.tolist(), watcher.num_skipped.item()) == ([2.0, 8.0], 1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_observer_that_saw_nothing_has_scale_one_and_zero_point_zero(scheme):
    assert qparams(qscheme=scheme) == ([1.0], [0])


def test_a_channel_that_was_never_seen_has_scale_one_and_zero_point_zero():
    assert qparams([[NAN, 1.0], [-2.0, 51.0]], qscheme=torch.per_channel_symmetric) == ([1.0, 0.5], [0, 128])


def test_a_forgotten_range_was_never_seen():
    watcher = seen([5.0])
    watcher.reset_min_max_vals()
    assert watcher.calculate_qparams()[0].item() == 1


@pytest.mark.parametrize("averaging", [0, -0.1, 1.1, NAN])
def test_an_averaging_constant_out_of_range_is_refused(averaging):
    with pytest.raises(LabError, match="averaging_constant must be in"):
        PowerOfTwoObserver(averaging_constant=averaging)


def test_a_limit_out_of_range_is_refused_when_the_observer_is_made():
    with pytest.raises(LabError, match="max_shift_amount"):
        PowerOfTwoObserver(max_shift_amount=200)


@pytest.mark.parametrize("scheme", [torch.per_tensor_affine, torch.per_channel_affine])
def test_a_state_dict_brings_the_range_into_a_fresh_observer(scheme):
    watcher = seen(*batches(), torch.full((5, 3, 4, 2), NAN), qscheme=scheme)
    fresh = PowerOfTwoObserver(qscheme=scheme)
    fresh.load_state_dict(watcher.state_dict())
    assert [part.tolist() for part in fresh.calculate_qparams()] == [
        part.tolist() for part in watcher.calculate_qparams()
    ]
    assert fresh.num_skipped == 1


class NoHostSync(TorchDispatchMode):
    """Fails on the operators by which the host waits for a device's value."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not any(
            name in str(function)
            for name in ("_local_scalar_dense", "aten.item", "aten.is_nonzero", "aten.equal")
        ), function
        return function(*args, **(kwargs or {}))


def test_the_guard_against_host_synchronisation_notices_one():
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoHostSync():
        torch.ones(1).item()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("averaging", [None, 0.01])
def test_the_observer_never_waits_for_the_device(scheme, averaging):
    watcher, data = PowerOfTwoObserver(qscheme=scheme, averaging_constant=averaging), batches()
    with NoHostSync():
        for batch in data:
            watcher(batch)
            watcher.calculate_qparams()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_observer_runs_on_a_device_without_values(scheme):
    watcher = PowerOfTwoObserver(qscheme=scheme).to("meta")
    watcher(torch.empty(3, 4, device="meta"))
    assert [part.device.type for part in watcher.calculate_qparams()] == ["meta", "meta"]


@pytest.mark.parametrize("dtype", [torch.quint8, torch.qint8])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_fake_quantization_puts_values_on_the_grid(dtype, scheme):
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    fake = FakeQuantize(
        observer=PowerOfTwoObserver, dtype=dtype, qscheme=scheme, quant_min=low, quant_max=high
    )
    batch = batches(1)[0]
    shape = (-1, *[1] * (batch.dim() - 1))
    output = fake(batch)
    steps = output / fake.scale.view(shape) + fake.zero_point.view(shape)
    assert (
        torch.equal(steps, steps.round())
        and steps.min() >= low
        and steps.max() <= high
        and len(steps.unique()) > 20
    )


def test_the_gradient_of_fake_quantization_is_one_inside_and_zero_where_clipped():
    fake = FakeQuantize(observer=PowerOfTwoObserver, dtype=torch.qint8, quant_min=-128, quant_max=127)
    batch = torch.tensor(
        [-170.0, -129.0, -127.9, -0.3, 0.0, 60.2, 127.2, 128.0, 170.0], requires_grad=True
    )  # 170 / 127.5 is rounded to 1
    fake(batch).sum().backward()
    assert fake.scale.item() == 1
    assert batch.grad.tolist() == [0, 0, 1, 1, 1, 1, 1, 0, 0]


def test_the_assignments_name_is_the_observer():
    assert CusQuantObserver is PowerOfTwoObserver


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
    assert (activation.averaging_constant, weight.averaging_constant) == (0.01, None)


def test_activations_use_all_eight_bits_where_the_processor_adds_exactly(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    assert has_vnni() and activation_range() == (0, 255)


@pytest.mark.skipif("x86" not in torch.backends.quantized.supported_engines, reason="needs the x86 engine")
def test_activations_keep_to_seven_bits_where_sums_of_16_bits_would_saturate(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    monkeypatch.setattr(observer.torch.backends.quantized, "engine", "x86")
    low, high = activation_range()
    assert (low, high) == (0, 127)
    assert 2 * high * 128 <= 2**15 - 1 < 2 * 255 * 128


def test_other_engines_than_those_of_x86_need_no_seventh_bit(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    monkeypatch.setattr(observer.torch.backends.quantized, "engine", "qnnpack")
    assert activation_range() == (0, 255)
