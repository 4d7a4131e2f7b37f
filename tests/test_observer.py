"""The power-of-two observer against torch's observers, Python's floats and numbers worked out by hand."""

import contextlib
import math

import numpy as np
import pytest
import torch
from observers import arguments, assert_same_qparams, every_combination, every_kind, make, samples, shown
from torch.ao.quantization import FakeQuantize
from torch.ao.quantization import observer as torch_observers
from torch.utils._python_dispatch import TorchDispatchMode

from labcore import LabError
from labcore.observer import RANGES, RULES, CusQuantObserver, PowerOfTwoObserver, sample, scale_approximate
from labcore.qconfig import observer_class

INF, NAN = float("inf"), float("nan")
ROUNDING = ["round", "ceil", "floor"]


@pytest.mark.parametrize("limit", [0, 3, 20, None])
@pytest.mark.parametrize("rule", ROUNDING)
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


@pytest.mark.parametrize("exponent", [-9, -1, 0, 1, 5])
def test_floats_next_to_the_geometric_middle_go_to_the_right_side(exponent):
    middle = np.float32(2.0 ** (exponent + 0.5))
    for scale in (np.nextafter(middle, np.float32(0)), middle, np.nextafter(middle, np.float32(1e9))):
        is_above = math.log2(scale) >= exponent + 0.5
        assert scale_approximate(float(scale), 20) == 2.0 ** (exponent + is_above)


@pytest.mark.parametrize("rule", ROUNDING)
def test_exact_powers_stay_under_every_rule_and_their_neighbours_go_the_right_way(rule):
    for exponent in range(-126, 128):
        power = np.float32(2.0**exponent)
        assert scale_approximate(float(power), None, rule) == power
        assert scale_approximate(torch.tensor(power), None, rule) == power
        if -126 < exponent < 127:
            above, below = (float(np.nextafter(power, np.float32(end))) for end in (np.inf, 0))
            assert scale_approximate(above, None, rule) == power * (2 if rule == "ceil" else 1)
            assert scale_approximate(below, None, rule) == power / (2 if rule == "floor" else 1)


@pytest.mark.parametrize(
    ("limit", "expected", "scales"),
    [
        (8, 2.0**8, [2.0**9, 3e38, 1e300, INF]),
        (8, 2.0**-8, [2.0**-9, 1e-30, 1e-45, 1e-320]),
        (None, 2.0**127, [INF]),
        (None, 2.0**-100, [1e-30]),
        (None, 2.0**-126, [1e-45]),
        (0, 1.0, [3.3, 0.01]),
    ],
)
def test_the_exponent_is_clamped(limit, expected, scales):
    assert {scale_approximate(scale, limit) for scale in scales} == {expected}
    tensor = torch.tensor(scales).clamp(min=1e-45)  # in float32 the smallest of them would be zero
    assert set(scale_approximate(tensor, limit).tolist()) == {expected}


@pytest.mark.parametrize("kind", [float, torch.tensor])
@pytest.mark.parametrize("scale", [0.0, -0.0, -1.5, -INF, NAN])
def test_what_is_no_positive_scale_comes_back_as_it_is(scale, kind):
    result = float(scale_approximate(kind(scale)))
    assert math.copysign(1, result) == math.copysign(1, scale)
    assert result == scale or (math.isnan(result) and math.isnan(scale))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (4,), (2, 3, 1)])
def test_shape_and_type_are_kept(shape):
    result = scale_approximate(torch.full(shape, 0.3))
    assert (result.shape, result.dtype) == (shape, torch.float32)
    assert type(scale_approximate(0.3)) is float


@pytest.mark.parametrize("averaging", [None, 0.01, 0.7, 1.0])
@pytest.mark.parametrize("dtype", [torch.qint8, torch.quint8])
@pytest.mark.parametrize("symmetry", ["symmetric", "affine"])
@pytest.mark.parametrize("axis", [None, 0, 1, 3, -1])
def test_range_raw_scale_and_zero_point_are_torchs_to_the_bit(axis, symmetry, dtype, averaging):
    layout, args = ("tensor", {}) if axis is None else ("channel", {"ch_axis": axis})
    args |= {"dtype": dtype, "qscheme": getattr(torch, f"per_{layout}_{symmetry}")}
    if averaging:
        args["averaging_constant"] = averaging
    name = f"{'MovingAverage' if averaging else ''}{'' if axis is None else 'PerChannel'}MinMaxObserver"
    expected, observer = getattr(torch_observers, name)(**args), PowerOfTwoObserver(**args, rule="none")
    for size in range(1, 5):
        batch = torch.randn(5, 3, 4, 2, generator=torch.Generator().manual_seed(size)) * size + 0.4
        observer(batch), expected(batch)
        assert torch.equal(observer.min_val, expected.min_val)
        assert torch.equal(observer.max_val, expected.max_val)
        assert torch.equal(observer.raw_scale(), expected.calculate_qparams()[0])
        assert observer.calculate_qparams()[1].tolist() == expected.calculate_qparams()[1].tolist()


SYMMETRIC, AFFINE = torch.per_tensor_symmetric, torch.per_tensor_affine


@pytest.mark.parametrize(
    ("batch", "scheme", "args", "scale", "zero_point"),
    [
        ([-1.0, 2.984375], AFFINE, {}, 2.0**-6, 64),  # 3.984375 / 255 = 2^-6; 0 + 1 * 64
        ([-1.0, 2.984375], AFFINE, {"dtype": torch.qint8}, 2.0**-6, -64),
        ([0.5, 3.984375], AFFINE, {}, 2.0**-6, 0),  # the range is widened to hold zero
        ([-3.984375, -0.5], AFFINE, {}, 2.0**-6, 255),
        ([-1.0, 1.8], AFFINE, {}, 2.0**-7, 128),  # 2.8 / 255 = 2^-6.51
        ([-5.0, 0.1], AFFINE, {}, 2.0**-6, 255),  # 5.1 / 255 = 2^-5.64; 5 * 64 = 320 is clamped
        ([-0.3, 5.0], SYMMETRIC, {}, 2.0**-5, 128),  # 5 / 127.5 = 2^-4.67
        ([-0.3, 5.0], SYMMETRIC, {"quant_min": 0, "quant_max": 127}, 2.0**-4, 64),  # 5 / 63.5
        ([-0.3, 5.0], SYMMETRIC, {"quant_min": 0, "quant_max": 255}, 2.0**-5, 128),
        ([-0.3, 5.0], SYMMETRIC, {"dtype": torch.qint8}, 2.0**-5, 0),
        ([-0.3, 5.0], SYMMETRIC, {"dtype": torch.qint8, "quant_min": -128, "quant_max": 127}, 2.0**-5, 0),
        ([0.0, 0.0], SYMMETRIC, {}, 2.0**-8, 128),
        ([0.0, 0.0], AFFINE, {}, 2.0**-8, 0),
        ([51.0], AFFINE, {}, 2.0**-2, 0),
        ([-51.0], AFFINE, {}, 2.0**-2, 204),
        ([51.0, 51.0, 51.0], SYMMETRIC, {}, 2.0**-1, 128),  # 51 / 255 = 0.2, 51 / 127.5 = 0.4
        (7.0, SYMMETRIC, {}, 2.0**-4, 128),
        ([1e30], SYMMETRIC, {}, 2.0**8, 128),
        ([-1e30], AFFINE, {}, 2.0**8, 255),
        ([-3e38, 3e38], AFFINE, {}, 2.0**8, 255),
        ([1e-45], SYMMETRIC, {}, 2.0**-8, 128),
        ([-1e-45], AFFINE, {}, 2.0**-8, 0),
    ],
)
def test_scale_and_zero_point_are_those_worked_out_by_hand(batch, scheme, args, scale, zero_point):
    found = shown(PowerOfTwoObserver(qscheme=scheme, **args), batch).calculate_qparams()
    assert [part.tolist() for part in found] == [[scale], [zero_point]]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("limit", [3, None])
@every_kind
def test_the_scale_is_the_raw_scale_rounded_by_the_rule(kind, limit, rule):
    observer = shown(make(kind, limit=limit, rule=rule), samples(kind))
    raw, (scale, _) = observer.raw_scale(), observer.calculate_qparams()
    assert torch.equal(scale, raw if rule == "none" else scale_approximate(raw, limit, rule))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", ["symmetric", "signed", "affine"])
def test_a_histogram_has_the_scale_and_zero_point_of_torchs_observer(kind, bits, count):
    given = [-samples("signed", seed, (3, 4000)) for seed in range(count)]
    names = ("dtype", "qscheme", "quant_min", "quant_max")
    expected = torch_observers.HistogramObserver(**{name: arguments(kind, bits)[name] for name in names})
    expected.dst_nbins = 2**bits
    observer = make(kind, bits, range="histogram", rule="none")
    (scale, zero_point), (own_scale, own_zero_point) = (
        shown(one, *given).calculate_qparams() for one in (expected, observer)
    )
    assert own_scale.item() == scale.item()
    if bits == 4:
        assert own_scale < 0.9 * observer._raw(observer.min_val, observer.max_val), "the tail is clipped"
    if kind == "affine":  # torch takes 7 for the middle of 0 ... 15
        assert own_zero_point.item() == zero_point.item()


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("percentile", [51, 90, 99, 99.99, 100])
@every_kind
def test_percentiles_are_numpys_averaged_over_batches(kind, percentile, count):
    given = [samples(kind, seed) for seed in range(count)]
    observer = shown(make(kind, range="percentile", percentile=percentile), *given)
    axis, shares = 1 if kind.startswith("channel") else None, [100 - percentile, percentile]
    low, high = np.mean([np.percentile(batch.double(), shares, axis=axis) for batch in given], axis=0)
    np.testing.assert_allclose(observer.min_val, low, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(observer.max_val, high, rtol=1e-4, atol=1e-5)


def test_a_large_tensor_is_sampled_and_stays_near_its_percentile():
    values = torch.randn(1500, 1000, generator=torch.Generator().manual_seed(0))
    observer = shown(make("signed", range="percentile", percentile=99), values)
    assert observer.max_val == pytest.approx(np.percentile(values.numpy(), 99), rel=0.02)
    assert sample(values.reshape(1, -1)).numel() <= 2**20 and torch.equal(sample(values), values)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("range_", RANGES)
@pytest.mark.parametrize(("lowest", "order"), [(0.0, 1), (-1e-3, 1), (-1e-3, -1)])
def test_only_what_was_never_negative_gets_the_whole_unsigned_range(lowest, order, range_, bits):
    given = [torch.linspace(0, 3, 1000), torch.cat([torch.tensor([lowest]), torch.linspace(0, 3, 1999)])]
    observer = make("unsigned", bits, range=range_, percentile=100, rule="none")
    scale, zero_point = shown(observer, *given[::order]).calculate_qparams()
    steps, middle = (2**bits - 1, 0) if lowest == 0 else ((2**bits - 1) / 2, 2 ** (bits - 1))
    assert zero_point.item() == middle
    assert scale.item() == pytest.approx(3 / steps, rel=0.01 if range_ == "histogram" else 1e-6)


def test_a_rare_negative_value_below_the_percentile_counts_as_negative():
    values = torch.linspace(0, 3, 1000)
    values[0] = -1.0
    observer = shown(make("unsigned", range="percentile", percentile=99), values)
    assert observer.calculate_qparams()[1].item() == 128


def test_a_tensor_in_channels_last_is_observed_without_a_copy():
    values = torch.randn(2, 3, 4, 5)
    last = values.to(memory_format=torch.channels_last)
    row = make()._rows(last)
    assert row.data_ptr() == last.data_ptr() and row.sort()[0].equal(values.reshape(1, -1).sort()[0])
    for rule in ("round", "least_error"):
        assert_same_qparams(shown(make(rule=rule), last), shown(make(rule=rule), values))


@pytest.mark.parametrize("rule", [*ROUNDING, "least_error"])
def test_the_scales_that_the_clamp_changed_are_counted(rule):
    sizes = torch.tensor([2.0**-12, 2.0**-3, 1, 2.0**7, 2.0**12])[:, None]
    values = torch.linspace(-1, 1, 255) * 127 * sizes
    clamped = shown(make("channel", limit=8, rule=rule), values).clamped()
    assert clamped.tolist() == [True, False, False, False, True]
    assert not shown(make("channel", rule=rule), values).clamped().any()
    assert not shown(make("channel", limit=0, rule="none"), values).clamped().any()


def test_the_assignments_name_is_the_observer():
    assert CusQuantObserver is PowerOfTwoObserver


@every_combination
def test_twice_the_input_has_twice_the_scale_and_the_same_zero_point(range_, rule, kind):
    given = [samples(kind, seed) for seed in range(2)]
    once, twice = (
        shown(make(kind, range=range_, rule=rule), *(factor * batch for batch in given)).calculate_qparams()
        for factor in (1, 2)
    )
    assert torch.equal(twice[0], 2 * once[0]) and torch.equal(twice[1], once[1])


@every_combination
def test_rounded_values_are_on_a_grid_of_a_power_of_two_inside_the_range_and_zero_stays(range_, rule, kind):
    values = samples(kind)
    values[:, 7] = 0
    for bits in (8, 4, 2):
        args = arguments(kind, bits, range=range_, rule=rule)
        fake = FakeQuantize(observer=observer_class(rule), **args)
        output = fake(values)
        assert (torch.frexp(fake.scale).mantissa == 0.5).all() == (rule != "none")
        steps = (output.double() / fake.scale.double()[:, None] + fake.zero_point[:, None]).numpy()
        assert np.abs(steps - np.rint(steps)).max() <= (1e-4 if rule == "none" else 0)
        assert np.rint(steps).min() >= args["quant_min"] and np.rint(steps).max() <= args["quant_max"]
        assert (output[:, 7] == 0).all() and torch.equal(fake(torch.zeros(3, 2)), torch.zeros(3, 2))


HOSTILE = {
    "zeros": [[0.0, 0.0], [0.0, 0.0]],
    "minus_zero": [[-0.0, 0.0], [0.0, -0.0]],
    "one_element": [[0.7]],
    "constant": [[3.0, 3.0], [3.0, 3.0]],
    "negative_constant": [[-3.0, -3.0], [-3.0, -3.0]],
    "denormal": [[1e-45, 0.0], [-1e-40, 1e-39]],
    "tiny": [[1e-8, -1e-30], [1e-20, 0.0]],
    "huge": [[1e30, 1.0], [-1e30, 0.0]],
    "huge_and_tiny": [[1e30, 1e-30], [-1e-45, 1e30]],
    "inf": [[INF, 1.0], [-1.0, 2.0]],
    "minus_inf": [[-INF, INF], [-1.0, 2.0]],
    "nan": [[NAN, 1.0], [-1.0, 2.0]],
    "all_nan": [[NAN, NAN], [NAN, NAN]],
    "never_seen_channel": [[NAN, NAN], [1.0, 2.0]],
    "no_columns": [[], []],
}


def assert_usable(observer) -> None:
    scale, zero_point = observer.calculate_qparams()
    assert torch.isfinite(scale).all() and (scale >= observer.eps).all()
    assert (zero_point >= observer.quant_min).all() and (zero_point <= observer.quant_max).all()
    assert scale.shape == zero_point.shape


@every_combination
def test_hostile_values_give_usable_parameters(range_, rule, kind):
    slow = range_ == "histogram"  # torch's search takes a second on some of these
    for name, rows in HOSTILE.items():
        if slow and (rule != "round" or kind != "affine"):
            continue
        values = torch.tensor(rows)
        for limit in (8,) if slow else (None, 8):
            observer = make(kind, limit=limit, range=range_, rule=rule)
            assert observer(values) is values
            assert observer.num_skipped == int(not torch.isfinite(values).all()), name
            assert_usable(observer)
            if not slow and name in ("zeros", "minus_zero"):
                smallest = 2.0**-8 if limit and rule != "none" else 2.0**-23
                assert set(observer.calculate_qparams()[0].tolist()) == {smallest}
            if not slow and name in ("all_nan", "no_columns"):
                assert [part.unique().tolist() for part in observer.calculate_qparams()] == [[1.0], [0]]
            if name == "never_seen_channel" and kind.startswith("channel"):
                assert [part[0].item() for part in observer.calculate_qparams()] == [1, 0]
            if not slow and limit == 8:
                assert observer.clamped().shape == observer.calculate_qparams()[0].shape
                assert_usable(shown(observer, [[0.5, -1.0]] * len(values), values))


@pytest.mark.parametrize("averaging", [None, 0.1])
@every_combination
def test_what_is_left_out_changes_neither_scale_nor_zero_point(range_, rule, kind, averaging):
    """NaN, infinity and batches with nothing in them, before, between and after good ones."""
    good = samples(kind), 2 * samples(kind, 1)
    bad = [torch.full((3, 4), NAN), torch.empty(3, 0), torch.full((3, 4), -INF)]
    found, expected = (
        shown(make(kind, range=range_, rule=rule, averaging_constant=averaging), *given)
        for given in ([*bad, good[0], *bad, good[1], *bad], good)
    )
    assert_same_qparams(found, expected)
    assert found.num_skipped == 6


@pytest.mark.parametrize("rule", ["none", "least_error"])
@pytest.mark.parametrize("range_", ["minmax", "percentile"])
def test_only_the_channels_that_are_not_finite_are_left_out(range_, rule):
    first, second, last = (samples("channel", seed) for seed in range(3))
    bad = second.clone()
    bad[1, 5] = NAN
    scale, without, whole = (
        shown(make("channel", range=range_, percentile=90, rule=rule), *given).calculate_qparams()[0]
        for given in ((first, bad, last), (first, last), (first, second, last))
    )
    assert torch.equal(scale, torch.where(torch.tensor([False, True, False]), without, whole))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("range_", RANGES)
@pytest.mark.parametrize("rule", ["none", "least_error"])
@pytest.mark.parametrize("kind", ["signed", "unsigned", "affine"])
def test_every_float_type_counts_as_its_float32_values(range_, rule, kind, dtype):
    values = samples(kind).to(dtype)
    observers = [shown(make(kind, range=range_, rule=rule), given) for given in (values, values.float())]
    assert_same_qparams(*observers)


class NoHostSync(TorchDispatchMode):
    """Fails on the operators by which the host waits for a device's value."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waiting = ("_local_scalar_dense", "aten.item", "aten.is_nonzero", "aten.equal")
        assert not any(name in str(function) for name in waiting), function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("averaging", [None, 0.01, 1.0])
@every_combination
def test_only_the_histogram_waits_for_the_device(range_, rule, kind, averaging):
    observer, values = make(kind, range=range_, rule=rule, averaging_constant=averaging), samples(kind)
    is_noticed = pytest.raises(AssertionError, match="_local_scalar_dense")
    with is_noticed if range_ == "histogram" else contextlib.nullcontext(), NoHostSync():
        for _ in range(2):
            observer(values)
            observer.calculate_qparams(), observer.clamped()


@every_kind
def test_the_observer_runs_on_a_device_without_values(kind):
    observer = make(kind).to("meta")
    observer(torch.empty(3, 4, device="meta"))
    assert [part.device.type for part in observer.calculate_qparams()] == ["meta", "meta"]


@every_combination
def test_a_state_dict_brings_everything_into_a_fresh_observer(range_, rule, kind):
    observer, fresh = (make(kind, range=range_, rule=rule) for _ in range(2))
    shown(observer, samples(kind), torch.full((3, 4), NAN))
    fresh.load_state_dict(observer.state_dict())
    assert fresh.num_skipped == 1
    for batch in (samples(kind, 1), samples(kind, 2)):
        assert_same_qparams(fresh, observer)
        observer(batch), fresh(batch)


@every_combination
def test_a_forgotten_range_leaves_nothing_behind(range_, rule, kind):
    observer, fresh = (make(kind, range=range_, rule=rule) for _ in range(2))
    shown(observer, 50 * samples(kind)).reset_min_max_vals()
    assert set(observer.calculate_qparams()[0].tolist()) == {1.0}
    assert_same_qparams(shown(observer, samples(kind)), shown(fresh, samples(kind)))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"range": "min_max"}, "range must be one of minmax, percentile, histogram, found 'min_max'"),
        ({"rule": "nearest"}, "rule must be one of round, ceil, floor, none"),
        ({"rule": None}, "found None"),
        ({"rule": "least_error"}, "(see LeastErrorObserver), found 'least_error'"),
        ({"percentile": 50}, "percentile must be in (50, 100], found 50"),
        ({"percentile": 100.1}, "percentile must be in (50, 100], found 100.1"),
        ({"percentile": NAN}, "percentile must be in (50, 100], found nan"),
        *(({"averaging_constant": c}, "averaging_constant must be in (0, 1]") for c in (0, -0.1, 1.1, NAN)),
        *(({"max_shift_amount": bad}, "must be in 0 … 126 or None") for bad in (-1, 127, 1000, NAN)),
        ({"range": "histogram", "qscheme": torch.per_channel_symmetric}, "must be per tensor"),
        ({"range": "histogram", "qscheme": torch.per_channel_affine}, "must be per tensor"),
        ({"unsigned": True, "dtype": torch.qint8}, "unsigned must be False except for symmetric quint8"),
        ({"unsigned": True, "qscheme": torch.per_tensor_affine}, "unsigned must be False"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(args, message):
    with pytest.raises(LabError) as caught:
        PowerOfTwoObserver(**args)
    assert message in str(caught.value)


@pytest.mark.parametrize("rule", ["least_error", "none", "nearest", None])
def test_the_approximation_knows_three_rules(rule):
    with pytest.raises(LabError, match="rule must be one of round, ceil, floor, found"):
        scale_approximate(1.0, 8, rule)
