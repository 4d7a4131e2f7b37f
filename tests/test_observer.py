"""The power-of-two observer against torch's own observers, Python's float arithmetic and numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch
from torch.ao.quantization import FakeQuantize
from torch.ao.quantization import observer as torch_observers
from torch.utils._python_dispatch import TorchDispatchMode

from labcore import LabError, observer
from labcore.observer import RANGES, RULES, CusQuantObserver, PowerOfTwoObserver, scale_approximate
from labcore.quantizers.learned import LearnedFakeQuantize

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
@pytest.mark.parametrize("scheme", TENSOR)
def test_with_float_scales_and_eight_bits_the_zero_point_is_torchs_too(dtype, scheme):
    expected = torch_observers.MinMaxObserver(dtype=dtype, qscheme=scheme)
    watcher = PowerOfTwoObserver(dtype=dtype, qscheme=scheme, rule="none")
    for batch in batches():
        watcher(batch), expected(batch)
        assert list(map(torch.Tensor.tolist, watcher.calculate_qparams())) == list(
            map(torch.Tensor.tolist, expected.calculate_qparams())
        )


def test_the_middle_of_seven_bits_is_64_where_torch_takes_63():
    options = {"dtype": torch.quint8, "qscheme": torch.per_tensor_symmetric, "quant_min": 0, "quant_max": 127}
    batch = batches(1)[0]
    expected, watcher = torch_observers.MinMaxObserver(**options), PowerOfTwoObserver(**options, rule="none")
    watcher(batch), expected(batch)
    (scale, middle), (torchs, below) = watcher.calculate_qparams(), expected.calculate_qparams()
    assert torch.equal(scale, torchs) and (middle.item(), below.item()) == (64, 63)


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


# Rules, ranges and granularities


KINDS = {
    "symmetric": {"dtype": torch.quint8, "qscheme": torch.per_tensor_symmetric},
    "signed": {"dtype": torch.qint8, "qscheme": torch.per_tensor_symmetric},
    "unsigned": {"dtype": torch.quint8, "qscheme": torch.per_tensor_symmetric, "unsigned": True},
    "affine": {"dtype": torch.quint8, "qscheme": torch.per_tensor_affine},
    "channel": {"dtype": torch.qint8, "qscheme": torch.per_channel_symmetric},
    "channel_affine": {"dtype": torch.quint8, "qscheme": torch.per_channel_affine},
}
ALLOWED = [
    (range_, rule, kind)
    for range_ in RANGES
    for rule in RULES
    for kind in KINDS
    if not (range_ == "histogram" and kind.startswith("channel"))
]
every_combination = pytest.mark.parametrize(("range_", "rule", "kind"), ALLOWED)


def limits(kind: str, bits: int) -> dict[str, int]:
    low = -(2 ** (bits - 1)) if KINDS[kind]["dtype"] == torch.qint8 else 0
    return {"quant_min": low, "quant_max": low + 2**bits - 1}


def make(kind: str = "symmetric", bits: int = 8, limit: int | None = None, **kwargs) -> PowerOfTwoObserver:
    return PowerOfTwoObserver(max_shift_amount=limit, **KINDS[kind], **limits(kind, bits), **kwargs)


def watched(watcher, *given):
    for batch in given:
        watcher(torch.as_tensor(batch))
    return watcher


def samples(kind: str, seed: int = 0, shape: tuple[int, ...] = (3, 400)) -> torch.Tensor:
    """Values with a tail, of another size in each row; not negative for the unsigned kind."""
    values = np.random.default_rng(seed).standard_t(4, shape) * np.array([[0.3], [1.0], [7.0]])[: shape[0]]
    return torch.tensor(np.abs(values) if kind == "unsigned" else values + 0.2, dtype=torch.float32)


@pytest.mark.parametrize("limit", [0, 3, 20, None])
@pytest.mark.parametrize("rule", ["round", "ceil", "floor"])
def test_every_rule_equals_a_search_through_all_powers(rule, limit):
    bound = 126 if limit is None else limit
    powers = [2.0**exponent for exponent in range(-bound, bound + 1)]
    search = {
        "round": lambda scale: min(powers, key=lambda power: abs(math.log2(scale) - math.log2(power))),
        "ceil": lambda scale: min((power for power in powers if power >= scale), default=powers[-1]),
        "floor": lambda scale: max((power for power in powers if power <= scale), default=powers[0]),
    }[rule]
    exponents = np.random.default_rng(bound).uniform(-min(bound + 3, 30), min(bound + 3, 30), 200)
    scales = [float(np.float32(2.0**exponent)) for exponent in exponents]
    expected = [search(scale) for scale in scales]
    assert [scale_approximate(scale, limit, rule) for scale in scales] == expected
    assert scale_approximate(torch.tensor(scales), limit, rule).tolist() == expected


@pytest.mark.parametrize("rule", ["round", "ceil", "floor"])
def test_exact_powers_stay_under_every_rule_and_their_neighbours_go_the_right_way(rule):
    for exponent in range(-125, 127):
        power = np.float32(2.0**exponent)
        above, below = (float(np.nextafter(power, np.float32(end))) for end in (np.inf, 0))
        assert scale_approximate(float(power), None, rule) == power
        assert scale_approximate(torch.tensor(power), None, rule) == power
        assert scale_approximate(above, None, rule) == power * (2 if rule == "ceil" else 1)
        assert scale_approximate(below, None, rule) == power / (2 if rule == "floor" else 1)


@pytest.mark.parametrize("rule", ["least_error", "none", "nearest", None])
def test_the_approximation_knows_three_rules(rule):
    with pytest.raises(LabError, match="rule must be one of round, ceil, floor, found"):
        scale_approximate(1.0, 8, rule)


@pytest.mark.parametrize("rule", ["round", "ceil", "floor"])
@pytest.mark.parametrize("limit", [3, None])
@pytest.mark.parametrize("kind", KINDS)
def test_the_observers_scale_is_its_raw_scale_rounded_by_the_rule(kind, limit, rule):
    watcher = watched(make(kind, limit=limit, rule=rule), samples(kind))
    scale, _ = watcher.calculate_qparams()
    assert torch.equal(scale, scale_approximate(watcher.raw_scale(), limit, rule))


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_rule_the_scale_is_the_raw_one(kind):
    watcher = watched(make(kind, rule="none", limit=0), samples(kind))
    assert torch.equal(watcher.calculate_qparams()[0], watcher.raw_scale()) and not watcher.clamped().any()


def middle(kind: str, bits: int) -> int:
    return 0 if kind in ("signed", "channel", "unsigned") else 2 ** (bits - 1)


def squared_errors(kind: str, bits: int, given: list[torch.Tensor], exponents: range) -> list[float]:
    """Of one channel, for every exponent, with torch's own fake quantization."""
    low, high = limits(kind, bits).values()
    smallest = min(0.0, min(batch.min().item() for batch in given))
    errors = []
    for exponent in exponents:
        scale, zero_point = 2.0**exponent, middle(kind, bits)
        if kind.endswith("affine"):
            zero_point = int(np.clip(low - np.rint(smallest / scale), low, high))
        rounded = [
            torch.fake_quantize_per_tensor_affine(batch, scale, zero_point, low, high) for batch in given
        ]
        errors.append(
            sum((a.double() - b.double()).square().sum().item() for a, b in zip(rounded, given, strict=True))
        )
    return errors


def assert_least(watcher, kind: str, bits: int, given: list[torch.Tensor], exponents: range) -> None:
    """No exponent has a smaller error than the observer's; the error tells, since two exponents may tie."""
    scale, _ = watcher.calculate_qparams()
    channels = range(len(scale)) if kind.startswith("channel") else [slice(None)]
    assert len(scale) == len(channels)
    for own, channel in zip(scale, channels, strict=True):
        errors = squared_errors(kind, bits, [batch[channel] for batch in given], exponents)
        chosen = errors[exponents.index(int(torch.log2(own)))]
        assert chosen <= min(errors) * (1 + 1e-9)


@pytest.mark.parametrize("outlier", [0, 60])
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_least_error_equals_a_search_through_all_exponents(kind, bits, outlier):
    for seed in range(3):
        values = samples(kind, seed)
        values[:, 0] += outlier
        watcher = watched(make(kind, bits, rule="least_error"), values)
        assert_least(watcher, kind, bits, [values], range(-23, 12))


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.endswith("affine")])
def test_least_error_sums_over_batches(kind, bits):
    given = [samples(kind, seed) * factor for seed, factor in enumerate((1, 2, 0.1))]
    watcher = watched(make(kind, bits, rule="least_error"), *given)
    assert_least(watcher, kind, bits, given, range(-23, 12))


@pytest.mark.parametrize("factors", [(0.01, 1, 1), (0.0, 0.001, 50)], ids=str)
@pytest.mark.parametrize("kind", ["symmetric", "signed", "channel"])
def test_least_error_sums_over_batches_of_very_different_size(kind, factors):
    given = [samples(kind, seed) * factor for seed, factor in enumerate(factors)]
    watcher = watched(make(kind, rule="least_error"), *given)
    assert_least(watcher, kind, 8, given, range(-23, 12))


@pytest.mark.parametrize("outlier", [0, 60])
@pytest.mark.parametrize("bits", [8, 6, 4, 2])
@pytest.mark.parametrize("factors", [(1, 100, 0.001), (0.001, 100, 1)], ids=str)
@pytest.mark.parametrize("kind", ["symmetric", "signed", "channel"])
def test_least_error_of_the_last_batch_alone(kind, factors, bits, outlier):
    given = [samples(kind, seed) * factor for seed, factor in enumerate(factors)]
    for values, factor in zip(given, factors, strict=True):
        values[:, 0] += outlier * factor
    watcher = watched(make(kind, bits, rule="least_error", averaging_constant=1.0), *given)
    assert_least(watcher, kind, bits, given[-1:], range(-33, 12))


@pytest.mark.parametrize("size", [1, 9, 2304, 20_000])
@pytest.mark.parametrize("bits", [8, 4])
def test_candidates_that_are_left_out_are_never_best(size, bits):
    torch.manual_seed(size)
    values = (
        torch.randn(6, size) ** torch.tensor([1, 3, 5, 7, 9, 1])[:, None]
    )  # tails, and in the last one value alone
    values[5] = 0
    values[5, 0] = -1.0
    last = watched(make("channel", bits, rule="least_error", averaging_constant=1.0), values)
    every = watched(make("channel", bits, rule="least_error"), values)
    assert torch.equal(last.calculate_qparams()[0], every.calculate_qparams()[0])
    left_out = last.squared_error.isinf().any()
    assert left_out == (2 * math.sqrt(size) < 0.99 * (2**bits - 1)), (
        "and some are left out where that is sure"
    )


def test_a_tensor_in_channels_last_is_observed_without_a_copy():
    values = torch.randn(2, 3, 4, 5)
    last = values.to(memory_format=torch.channels_last)
    row = observer._in_memory_order(last).reshape(1, -1)
    assert row.data_ptr() == last.data_ptr() and row.sort()[0].equal(values.reshape(1, -1).sort()[0])
    for rule in ("round", "least_error"):
        found, expected = (watched(make("symmetric", rule=rule), x) for x in (last, values))
        assert all(map(torch.equal, found.calculate_qparams(), expected.calculate_qparams()))


@pytest.mark.parametrize("range_", ["percentile", "histogram"])
@pytest.mark.parametrize("tail", [3, 1000])
def test_least_error_is_least_whatever_the_range(range_, tail):
    values = torch.cat([samples("signed").flatten(), torch.tensor([float(tail)])])
    watcher = watched(
        make(
            "signed",
            rule="least_error",
            range=range_,
            **({"percentile": 99} if range_ == "percentile" else {}),
        ),
        values,
    )
    assert_least(watcher, "signed", 8, [values], range(-23, 12))


@pytest.mark.parametrize("limit", [0, 1, 4, 6])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e5])
@pytest.mark.parametrize("kind", ["symmetric", "unsigned", "affine", "channel"])
def test_least_error_takes_the_best_exponent_that_is_allowed(kind, size, limit):
    values = samples(kind) * size
    watcher = watched(make(kind, rule="least_error", limit=limit), values)
    assert_least(watcher, kind, 8, [values], range(-limit, limit + 1))


def test_least_error_clips_an_outlier_that_ceil_does_not():
    values = torch.cat([samples("signed").flatten().clamp(-3, 3), torch.tensor([40.0])])
    least, ceil = (
        watched(make("signed", 4, rule=rule), values).calculate_qparams()[0]
        for rule in ("least_error", "ceil")
    )
    assert least < ceil


@pytest.mark.parametrize("count", [1, 3])
def test_a_histogram_gives_the_raw_scale_of_torchs_observer(count):
    expected = torch_observers.HistogramObserver(dtype=torch.quint8, qscheme=torch.per_tensor_affine)
    watcher = make("affine", range="histogram", rule="none")
    for batch in batches(count):
        watcher(batch), expected(batch)
    scale, zero_point = expected.calculate_qparams()
    assert watcher.raw_scale().item() == scale.item()
    assert abs(watcher.calculate_qparams()[1].item() - zero_point.item()) <= 1


@pytest.mark.parametrize("kind", ["symmetric", "signed", "affine"])
def test_a_histogram_with_a_tail_has_the_scale_and_zero_point_of_torchs_observer(kind):
    values = -samples("signed", shape=(3, 4000)).flatten()
    expected = torch_observers.HistogramObserver(**KINDS[kind], **limits(kind, 4))
    expected.dst_nbins = 16
    expected(values)
    watcher = watched(make(kind, 4, range="histogram", rule="none"), values)
    (scale, zero_point), (own_scale, own_zero_point) = (
        one.calculate_qparams() for one in (expected, watcher)
    )
    assert own_scale.item() == scale.item() < 0.9 * watcher._raw(watcher.min_val, watcher.max_val)
    if kind == "affine":  # torch takes 7 for the middle of 0 ... 15
        assert own_zero_point.item() == zero_point.item()


@pytest.mark.parametrize("percentile", [51, 90, 99, 99.99, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_percentiles_are_numpys(kind, percentile):
    values = samples(kind)
    watcher = watched(make(kind, range="percentile", percentile=percentile), values)
    axis = 1 if kind.startswith("channel") else None
    low, high = np.percentile(values.double().numpy(), [100 - percentile, percentile], axis=axis)
    np.testing.assert_allclose(watcher.min_val, low, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(watcher.max_val, high, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["affine", "channel"])
def test_percentiles_are_averaged_over_batches(kind):
    given = [samples(kind, seed) for seed in range(3)]
    axis = 1 if kind == "channel" else None
    expected = np.mean([np.percentile(batch.numpy(), [10, 90], axis=axis) for batch in given], axis=0)
    watcher = watched(make(kind, range="percentile", percentile=90), *given)
    np.testing.assert_allclose(
        torch.stack([watcher.min_val, watcher.max_val]), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["affine", "channel"])
def test_a_batch_that_is_left_out_does_not_count_in_the_mean_of_percentiles(kind):
    first, last = samples(kind, 0), samples(kind, 1)
    bad = first.clone()
    bad[1, 5] = NAN
    ranges = [
        watched(make(kind, range="percentile", percentile=90), *given).max_val.reshape(-1)[
            -2 if kind == "channel" else 0
        ]
        for given in ((first, bad, last), (first, last))
    ]
    assert ranges[0] == pytest.approx(ranges[1].item())


def test_a_large_tensor_is_sampled_and_stays_near_its_percentile():
    values = torch.randn(3, 500_000, generator=torch.Generator().manual_seed(0))
    watcher = watched(make("channel", range="percentile", percentile=99), values)
    np.testing.assert_allclose(watcher.max_val, np.percentile(values.numpy(), 99, axis=1), rtol=0.02)


@pytest.mark.parametrize("constant", [0.01, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["signed", "affine", "channel"])
def test_a_moving_average_is_torchs_range(kind, constant):
    name = f"MovingAverage{'PerChannel' if kind == 'channel' else ''}MinMaxObserver"
    expected = getattr(torch_observers, name)(averaging_constant=constant, **KINDS[kind])
    watcher = make(kind, averaging_constant=constant)
    for seed in range(4):
        watcher(samples(kind, seed)), expected(samples(kind, seed))
        assert torch.equal(watcher.min_val, expected.min_val) and torch.equal(
            watcher.max_val, expected.max_val
        )


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("range_", RANGES)
def test_values_that_are_never_negative_get_the_whole_unsigned_range(range_, bits):
    values = torch.linspace(0, 3, 1000)
    watcher = watched(make("unsigned", bits, range=range_, percentile=100, rule="none"), values)
    scale, zero_point = watcher.calculate_qparams()
    assert zero_point.item() == 0
    assert scale.item() == pytest.approx(3 / (2**bits - 1), rel=0.01 if range_ == "histogram" else 1e-6)


@pytest.mark.parametrize("range_", RANGES)
@pytest.mark.parametrize("order", [1, -1])
def test_one_negative_value_puts_the_unsigned_zero_point_in_the_middle(range_, order):
    given = [torch.linspace(0, 3, 1000), torch.cat([torch.tensor([-1e-3]), torch.linspace(0, 3, 1999)])]
    watcher = watched(make("unsigned", range=range_, rule="none"), *given[::order])
    scale, zero_point = watcher.calculate_qparams()
    assert zero_point.item() == 128 and scale.item() == pytest.approx(3 / 127.5, rel=0.01)


def test_a_rare_negative_value_below_the_percentile_counts_as_negative():
    values = torch.linspace(0, 3, 1000)
    values[0] = -1.0
    watcher = watched(make("unsigned", range="percentile", percentile=99), values)
    assert watcher.calculate_qparams()[1].item() == 128


@every_combination
def test_every_combination_gives_powers_of_two_unless_the_rule_is_none(range_, rule, kind):
    scale, _ = watched(make(kind, range=range_, rule=rule), samples(kind)).calculate_qparams()
    assert (torch.frexp(scale).mantissa == 0.5).all() == (rule != "none")


@every_combination
def test_twice_the_input_has_twice_the_scale_and_the_same_zero_point(range_, rule, kind):
    given = [samples(kind, seed) for seed in range(2)]
    once, twice = (
        watched(make(kind, range=range_, rule=rule), *(factor * batch for batch in given)).calculate_qparams()
        for factor in (1, 2)
    )
    assert torch.equal(twice[0], 2 * once[0]) and torch.equal(twice[1], once[1])


@pytest.mark.parametrize("limit", [4, None])
@pytest.mark.parametrize("rule", ["round", "ceil", "floor", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_larger_range_never_has_a_smaller_scale(kind, rule, limit):
    watcher, last = make(kind, rule=rule, limit=limit), 0
    rng = np.random.default_rng(3)
    for size in np.logspace(-4, 4, 60):
        low, high = (-size * rng.uniform(0, 1, (2, 1)), size * rng.uniform(0, 1, (2, 1)))
        watcher(torch.tensor(np.hstack([0 * low if kind == "unsigned" else low, high]), dtype=torch.float32))
        scale = watcher.calculate_qparams()[0]
        assert (scale >= last).all()
        last = scale


@every_combination
def test_rounded_values_are_on_the_grid_inside_the_range_and_zero_stays(range_, rule, kind):
    values = samples(kind)
    values[:, 7] = 0
    for bits in (8, 4, 2):
        low, high = limits(kind, bits).values()
        args = {"max_shift_amount": None, "range": range_, "rule": rule} | KINDS[kind] | limits(kind, bits)
        fake = FakeQuantize(observer=PowerOfTwoObserver, **args)
        output = fake(values)
        steps = (output.double() / fake.scale.double()[:, None] + fake.zero_point[:, None]).numpy()
        assert np.abs(steps - np.rint(steps)).max() <= (1e-4 if rule == "none" else 0)
        assert np.rint(steps).min() >= low and np.rint(steps).max() <= high and (output[:, 7] == 0).all()
        assert torch.equal(fake(torch.zeros(3, 2)), torch.zeros(3, 2))


HOSTILE = {
    "zeros": [[0.0, 0.0], [0.0, 0.0]],
    "minus_zero": [[-0.0, 0.0], [0.0, -0.0]],
    "one_element": [[0.7]],
    "constant": [[3.0, 3.0], [3.0, 3.0]],
    "negative_constant": [[-3.0, -3.0], [-3.0, -3.0]],
    "denormal": [[1e-45, 0.0], [-1e-40, 1e-39]],
    "tiny": [[1e-30, -1e-30], [1e-20, 0.0]],
    "huge": [[1e30, 1.0], [-1e30, 0.0]],
    "huge_and_tiny": [[1e30, 1e-30], [-1e-45, 1e30]],
    "inf": [[INF, 1.0], [-1.0, 2.0]],
    "minus_inf": [[-INF, INF], [-1.0, 2.0]],
    "nan": [[NAN, 1.0], [-1.0, 2.0]],
    "all_nan": [[NAN, NAN], [NAN, NAN]],
    "never_seen_channel": [[NAN, NAN], [1.0, 2.0]],
    "no_columns": [[], []],
}


def assert_usable(watcher) -> None:
    scale, zero_point = watcher.calculate_qparams()
    assert torch.isfinite(scale).all() and (scale > 0).all()
    assert (zero_point >= watcher.quant_min).all() and (zero_point <= watcher.quant_max).all()
    assert scale.shape == zero_point.shape


@every_combination
def test_hostile_values_give_usable_parameters(range_, rule, kind):
    slow = range_ == "histogram"  # torch's search takes a second on some of these
    for name, rows in HOSTILE.items():
        if slow and (rule != "round" or kind != "affine"):
            continue
        values = torch.tensor(rows)
        for limit in (8,) if slow else (None, 8):
            watcher = make(kind, limit=limit, range=range_, rule=rule)
            assert watcher(values) is values
            assert watcher.num_skipped == int(not torch.isfinite(values).all()), name
            assert_usable(watcher)
            if not slow and name in ("all_nan", "no_columns"):
                assert set(watcher.calculate_qparams()[0].tolist()) == {1.0}
            if name == "never_seen_channel" and kind.startswith("channel"):
                assert [part[0].item() for part in watcher.calculate_qparams()] == [1, 0]
            if not slow and limit == 8:
                assert watcher.clamped().shape == watcher.calculate_qparams()[0].shape
                watched(watcher, torch.tensor([[0.5, -1.0]] * len(values)), values)
                assert_usable(watcher)


@every_combination
def test_values_after_hostile_ones_are_what_counts(range_, rule, kind):
    """A batch that is left out, or has nothing in it, changes neither scale nor zero point."""
    good = samples(kind)
    bad = [torch.full((3, 4), NAN), torch.empty(3, 0), torch.full((3, 4), INF)]
    found, expected = (
        watched(make(kind, range=range_, rule=rule), *given).calculate_qparams()
        for given in ([*bad, good, *bad], [good])
    )
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("range_", RANGES)
@pytest.mark.parametrize("rule", ["none", "least_error"])
@pytest.mark.parametrize("kind", ["signed", "unsigned", "affine"])
def test_every_float_type_counts_as_its_float32_values(range_, rule, kind, dtype):
    values = samples(kind).to(dtype)
    found, expected = (
        watched(make(kind, range=range_, rule=rule), given).calculate_qparams()
        for given in (values, values.float())
    )
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("range_", ["minmax", "percentile"])
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_histogram_waits_for_the_device(range_, rule, kind):
    watcher, values = make(kind, range=range_, rule=rule), samples(kind)
    with NoHostSync():
        for _ in range(2):
            watcher(values)
            watcher.calculate_qparams(), watcher.clamped()


@every_combination
def test_a_state_dict_brings_everything_into_a_fresh_observer(range_, rule, kind):
    watcher, fresh = (make(kind, range=range_, rule=rule) for _ in range(2))
    watched(watcher, samples(kind))
    fresh.load_state_dict(watcher.state_dict())
    for batch in (samples(kind, 1), samples(kind, 2)):
        assert all(
            torch.equal(*pair)
            for pair in zip(fresh.calculate_qparams(), watcher.calculate_qparams(), strict=True)
        )
        watcher(batch), fresh(batch)


@every_combination
def test_a_forgotten_range_leaves_nothing_behind(range_, rule, kind):
    watcher = watched(make(kind, range=range_, rule=rule), 50 * samples(kind))
    watcher.reset_min_max_vals()
    assert set(watcher.calculate_qparams()[0].tolist()) == {1.0}
    again, fresh = (
        watched(one, samples(kind)).calculate_qparams()
        for one in (watcher, make(kind, range=range_, rule=rule))
    )
    assert torch.equal(again[0], fresh[0]) and torch.equal(again[1], fresh[1])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"range": "min_max"}, "range must be one of minmax, percentile, histogram, found 'min_max'"),
        ({"rule": "nearest"}, "rule must be one of round, ceil, floor, least_error, none, found 'nearest'"),
        ({"percentile": 50}, "percentile must be in (50, 100], found 50"),
        ({"percentile": 100.1}, "percentile must be in (50, 100], found 100.1"),
        ({"percentile": NAN}, "percentile must be in (50, 100], found nan"),
        (
            {"range": "histogram", "qscheme": torch.per_channel_symmetric},
            "works per tensor only; use rule 'least_error'",
        ),
        ({"range": "histogram", "qscheme": torch.per_channel_affine}, "works per tensor only"),
        ({"unsigned": True, "dtype": torch.qint8}, "unsigned needs dtype quint8 and a symmetric scheme"),
        ({"unsigned": True, "qscheme": torch.per_tensor_affine}, "unsigned needs dtype quint8"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(kwargs, message):
    with pytest.raises(LabError) as caught:
        PowerOfTwoObserver(**kwargs)
    assert message in str(caught.value)


@pytest.mark.parametrize("rule", ["round", "ceil", "floor", "least_error"])
def test_the_scales_that_the_clamp_changed_are_counted(rule):
    values = (
        torch.linspace(-1, 1, 255).repeat(5, 1)
        * 127
        * torch.tensor([2.0**-12, 2.0**-3, 1, 2.0**7, 2.0**12])[:, None]
    )
    watcher = watched(make("channel", limit=8, rule=rule), values)
    assert watcher.clamped().tolist() == [True, False, False, False, True]
    assert not watched(make("channel", rule=rule), values).clamped().any()


# Learned exponents


def learned(kind: str, *given, bits: int = 8, **kwargs) -> LearnedFakeQuantize:
    fake = LearnedFakeQuantize(max_shift_amount=None, **KINDS[kind], **limits(kind, bits), **kwargs)
    watched(fake, *given).disable_observer()
    return fake


every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.mark.parametrize("rule", ["round", "ceil", "floor", "least_error"])
@every_kind
def test_a_learned_exponent_starts_at_the_observers(kind, rule):
    fake = learned(kind, samples(kind), samples(kind, 1), rule=rule)
    for own, expected in zip(
        fake.calculate_qparams(), fake.activation_post_process.calculate_qparams(), strict=True
    ):
        assert own.dtype == expected.dtype and torch.equal(own, expected)
    assert torch.equal(fake.log2_scale.data, torch.log2(fake.calculate_qparams()[0]) - 0.5)


@every_kind
def test_learned_fake_quantization_rounds_as_torchs_does(kind):
    values = samples(kind)
    fake = learned(kind, values, bits=4)
    fixed = FakeQuantize(observer=PowerOfTwoObserver, max_shift_amount=None, **KINDS[kind], **limits(kind, 4))
    torch.testing.assert_close(fake(values), fixed(values), rtol=0, atol=0)


def test_a_learned_scale_is_always_an_exact_power_of_two():
    fake = learned("channel", torch.randn(2000, 3))
    fake.log2_scale.data = torch.from_numpy(np.random.default_rng(0).uniform(-200, 200, 2000)).float()
    fake.log2_scale.data[:300] = torch.arange(-150, 150).float()
    scale = fake.calculate_qparams()[0]
    expected = 2.0 ** fake.log2_scale.detach().double().ceil().clamp(-126, 127)
    assert torch.equal(scale.double(), expected)


def reference_gradients(values, scale, zero_point, low, high, upstream) -> tuple[np.ndarray, np.ndarray]:
    """TQT, equations 6 to 8, of one channel: for log2 of the scale, and for the values."""
    values, upstream = values.double().numpy(), upstream.double().numpy()
    codes = np.rint(values / scale) + zero_point
    inside = (codes >= low) & (codes <= high)
    local = np.where(
        inside,
        np.rint(values / scale) - values / scale,
        np.where(codes < low, low - zero_point, high - zero_point),
    )
    return (upstream * local).sum() * scale * math.log(2), upstream * inside


@pytest.mark.parametrize("offset", [-2.0, -1.0, 0.0, 1.0])
@pytest.mark.parametrize("bits", [8, 4, 2])
@every_kind
def test_the_gradients_of_a_learned_exponent_are_those_of_the_paper(kind, bits, offset):
    values = samples(kind).requires_grad_()
    fake = learned(kind, values.detach(), bits=bits)
    fake.log2_scale.data += offset
    upstream = torch.randn(values.shape, generator=torch.Generator().manual_seed(0))
    fake(values).backward(upstream)
    scale, zero_point = fake.calculate_qparams()
    low, high = limits(kind, bits).values()
    if not kind.startswith("channel"):
        parts = [reference_gradients(values.detach(), scale.item(), zero_point.item(), low, high, upstream)]
    else:
        parts = [
            reference_gradients(*one, low, high, gradient)
            for *one, gradient in zip(
                values.detach(), scale.tolist(), zero_point.tolist(), upstream, strict=True
            )
        ]
    np.testing.assert_allclose(fake.log2_scale.grad, [part[0] for part in parts], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(values.grad, np.vstack([part[1] for part in parts]), rtol=1e-6)


@every_kind
def test_a_learned_exponent_survives_a_state_dict(kind):
    fake, fresh = learned(kind, samples(kind)), learned(kind)
    fake.log2_scale.data -= 1
    fresh.load_state_dict(fake.state_dict())
    assert torch.equal(fresh(samples(kind)), fake(samples(kind))) and torch.equal(
        fresh.log2_scale, fake.log2_scale
    )
    assert isinstance(fresh.log2_scale, torch.nn.Parameter) and fresh.observer_enabled.item() == 0


@every_kind
def test_a_step_of_an_optimizer_moves_a_learned_exponent_towards_less_error(kind):
    values = samples(kind)
    fake = learned(kind, values, bits=4)
    fake.log2_scale.data += 4
    optimizer = torch.optim.Adam(fake.parameters(), lr=0.1)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (fake(values) - values).square().sum()
        loss.backward()
        before = fake.log2_scale.detach().clone()
        optimizer.step()
        losses.append(loss.item())
        assert not torch.equal(fake.log2_scale, before)
        assert (torch.frexp(fake.calculate_qparams()[0]).mantissa == 0.5).all()
    assert min(losses) < losses[0] / 4


def test_a_learned_exponent_leaves_values_alone_where_fake_quantization_is_off():
    fake, values = learned("signed", samples("signed")), samples("signed", 1)
    fake.disable_fake_quant()
    assert fake(values) is values
