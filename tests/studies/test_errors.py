"""The tables of scales against the networks they describe, and the errors against NumPy."""

import numpy as np
import pytest
import torch
from small import network, snapshot, unchanged

from labcore.data import calibration_batches
from labcore.observer import PowerOfTwoObserver
from labcore.qconfig import FLOAT, REFERENCE, CustomQConfig, Scheme, make_qconfig
from labcore.quantize import calibrate, convert, layers, prepare_ptq, simulate
from labcore.studies.errors import count_clamped, errors_alone, inspect_qparams, qparams, values_and_grid

POWER2, DEFAULT = CustomQConfig.POWER2, CustomQConfig.DEFAULT


def observed(prepared, data, split):
    return inspect_qparams(prepared, calibration_batches(data, split))


def test_every_scale_of_the_power_configuration_is_a_power_of_two_within_the_limits(int8):
    table = qparams(int8)
    assert (table["exponent"] == table["exponent"].round()).all() and table["exponent"].between(-8, 8).all()
    assert (table["scale"] == 2.0 ** table["exponent"]).all()


def test_the_table_of_scales_has_a_row_for_every_quantized_tensor(int8):
    table = qparams(int8)
    layers = [
        "conv1",
        "layer2.0.0",
        "layer2.2.conv1",
        "layer2.2.conv2",
        "layer3.0.0",
        "layer4.0.0",
        "layer4.2.conv1",
        "layer4.2.conv2",
        "fc",
    ]
    others = ["quant", "layer2.2.add_relu", "layer4.2.add_relu"]
    assert sorted(table[table["tensor"] == "weight"]["layer"]) == sorted(layers)
    assert sorted(table[table["tensor"] == "activation"]["layer"]) == sorted(layers + others)


def test_the_table_of_scales_tells_what_the_layers_hold(int8):
    table = qparams(int8).set_index(["layer", "tensor"])
    assert table.loc[("conv1", "activation"), ["scale", "zero_point"]].tolist() == [
        int8.conv1.scale,
        int8.conv1.zero_point,
    ]
    assert table.loc[("fc", "weight"), "scale"] == int8.fc.weight().q_scale()


@pytest.mark.parametrize(("wanted", "given"), [(-12, -8), (-10, -8), (-8, -8), (-3, -3), (8, 8), (9, 8)])
def test_a_tensor_counts_as_clamped_where_the_limits_change_its_scale(wanted, given, tiny_data, tiny_split):
    model = network()
    weight = model.fc.weight.data
    weight.mul_(127.5 * 2.0**wanted / weight.abs().max())
    row = (
        observed(
            calibrate(prepare_ptq(model, POWER2.value), calibration_batches(tiny_data, tiny_split)),
            tiny_data,
            tiny_split,
        )
        .set_index(["layer", "tensor"])
        .loc[("fc", "weight")]
    )
    assert (row["clamped"], row["scale"], row["raw_scale"]) == (
        wanted != given,
        2.0**given,
        pytest.approx(2.0**wanted),
    )


def test_clamped_tensors_are_those_whose_raw_scale_lies_beyond_the_limits(tiny_data, tiny_split):
    table = observed(
        calibrate(prepare_ptq(network(), POWER2.value), calibration_batches(tiny_data, tiny_split)),
        tiny_data,
        tiny_split,
    )
    beyond = ~np.log2(table["raw_scale"]).between(-8.5, 8.5)
    assert table["clamped"].tolist() == beyond.tolist() and 0 < beyond.sum() < len(table)


def test_without_a_limit_nothing_is_clamped(tiny_data, tiny_split):
    model = network()
    model.fc.weight.data.mul_(2.0**-12)
    assert not observed(calibrated_without_limit(model, tiny_data, tiny_split), tiny_data, tiny_split)[
        "clamped"
    ].any()


def test_the_observed_scales_are_those_that_the_int8_network_gets(tiny_data, tiny_split):
    prepared = calibrate(prepare_ptq(network(), POWER2.value), calibration_batches(tiny_data, tiny_split))
    planned, got = observed(prepared, tiny_data, tiny_split), qparams(convert(prepared))
    assert len(planned) == len(got)
    for tensor in ("weight", "activation"):
        columns = [
            table[table["tensor"] == tensor][["scale", "zero_point"]].to_numpy().tolist()
            for table in (planned, got)
        ]
        assert columns[0] == columns[1]


def test_the_observed_range_of_a_weight_is_the_weights(tiny_data, tiny_split):
    prepared = calibrate(prepare_ptq(network(), POWER2.value), calibration_batches(tiny_data, tiny_split))
    row = observed(prepared, tiny_data, tiny_split).set_index(["layer", "tensor"]).loc[("fc", "weight")]
    assert (row["min"], row["max"]) == (prepared.fc.weight.min().item(), prepared.fc.weight.max().item())


def test_looking_at_the_observers_leaves_them_as_they_are(tiny_data, tiny_split):
    prepared = calibrate(prepare_ptq(network(), POWER2.value), calibration_batches(tiny_data, tiny_split))
    before = snapshot(prepared)
    observed(prepared, tiny_data, tiny_split)
    assert unchanged(prepared, before)


def test_networks_without_power_of_two_observers_have_nothing_to_report(tiny_data, tiny_split):
    prepared = calibrate(prepare_ptq(network(), DEFAULT.value), calibration_batches(tiny_data, tiny_split))
    assert len(observed(prepared, tiny_data, tiny_split)) == 0 and not any(
        isinstance(module, PowerOfTwoObserver) for module in prepared.modules()
    )


COLUMNS = [
    *("layer", "tensor", "bits", "channels", "min", "max", "raw_scale", "scale", "exponent", "exponent_max"),
    *("clamped", "zero_point", "share_clipped", "snr_db", "mse_clipping", "mse_rounding"),
]


def calibrated_without_limit(model, data, split):
    return calibrate(prepare_ptq(model, make_qconfig(Scheme(), Scheme())), calibration_batches(data, split))


def calibrated(data, split, weight=REFERENCE, activation=REFERENCE, mode="ptq"):
    return calibrate(
        prepare_ptq(network(), make_qconfig(weight, activation, mode)), calibration_batches(data, split)
    )


def by_numpy(rows: np.ndarray, scale: np.ndarray, low: int, high: int, zero_point: int = 0) -> dict:
    """Rounding error inside the range, clipping error outside; axis 0 has the channels."""
    rows, scale = rows.reshape(len(rows), -1).astype(np.float64), scale.reshape(-1, 1).astype(np.float64)
    inside = np.clip(rows, (low - zero_point) * scale, (high - zero_point) * scale)
    rounding, clipping = np.rint(inside / scale) * scale - inside, rows - inside
    error = (rounding**2).mean() + (clipping**2).mean()
    return {
        "min": rows.min(),
        "max": rows.max(),
        "share_clipped": (np.abs(clipping) > scale / 2).mean(),
        "mse_clipping": (clipping**2).mean(),
        "mse_rounding": (rounding**2).mean(),
        "snr_db": 10 * np.log10((rows**2).mean() / error),
    }


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("rule", ["round", "ceil", "floor", "least_error", "none"])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_errors_of_a_weight_are_numpys(bits, rule, per_channel, tiny_data, tiny_split):
    scheme = Scheme(bits, rule=rule, per_channel=per_channel)
    prepared = calibrated(tiny_data, tiny_split, scheme, mode="simulated")
    row = observed(prepared, tiny_data, tiny_split).set_index(["layer", "tensor"]).loc["layer2.0.0", "weight"]
    layer = layers(prepared)["layer2.0.0"]
    watcher = PowerOfTwoObserver(**scheme.observer_args("weight"))
    watcher(layer.weight)
    scale = watcher.calculate_qparams()[0].numpy()
    rows = layer.weight.detach().numpy()
    half = 2 ** (bits - 1)
    expected = by_numpy(rows if per_channel else rows.reshape(1, -1), scale, -half, half - 1)
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, rel=1e-6), name
    assert (row["bits"], row["channels"]) == (bits, len(rows) if per_channel else 1)
    assert (row["exponent"], row["exponent_max"]) == (np.log2(scale.min()), np.log2(scale.max()))


@pytest.mark.parametrize("mode", ["ptq", "simulated"])
@pytest.mark.parametrize("zero_point", ["symmetric", "unsigned", "affine"])
def test_the_errors_of_the_input_are_numpys(zero_point, mode, tiny_data, tiny_split):
    activation = Scheme(4, rule="floor", zero_point=zero_point)
    prepared = calibrated(tiny_data, tiny_split, activation=activation, mode=mode)
    row = observed(prepared, tiny_data, tiny_split).set_index(["layer", "tensor"]).loc["quant", "activation"]
    images = torch.cat(calibration_batches(tiny_data, tiny_split)).numpy().reshape(1, -1)
    expected = by_numpy(images, np.array([row["scale"]]), 0, 15, row["zero_point"])
    assert expected["share_clipped"] > 0
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, rel=1e-6), name


def test_the_mean_squared_error_of_what_is_really_quantized_is_the_sum_of_both_parts(tiny_data, tiny_split):
    scheme = Scheme(4, rule="floor")
    prepared = calibrated(tiny_data, tiny_split, weight=scheme, mode="simulated")
    row = observed(prepared, tiny_data, tiny_split).set_index(["layer", "tensor"]).loc["fc", "weight"]
    weight = prepared.fc.weight.detach()
    error = torch.fake_quantize_per_tensor_affine(weight, row["scale"], 0, -8, 7) - weight
    # Inside half a step of the last code rounding and clipping share the error, which is at most their sum.
    assert error.double().square().mean().item() == pytest.approx(
        row["mse_clipping"] + row["mse_rounding"], rel=1e-4
    )


def test_the_columns_are_those_of_the_documentation(tiny_data, tiny_split):
    table = observed(calibrated(tiny_data, tiny_split), tiny_data, tiny_split)
    assert list(table.columns) == COLUMNS and not table.isna().any().any()
    assert not table.duplicated(["layer", "tensor"]).any()


@pytest.mark.parametrize("limit", [0, 4, 8, None])
def test_the_clamped_channels_are_counted(limit, tiny_data, tiny_split):
    scheme = Scheme(per_channel=True, max_shift_amount=limit)
    prepared = prepare_ptq(network(), make_qconfig(scheme, Scheme()))
    factors = torch.tensor([2.0**-12, 1, 1, 2.0**12])
    prepared.fc.weight.data *= (factors / prepared.fc.weight.detach().abs().amax(1))[:, None]
    prepared = calibrate(prepared, calibration_batches(tiny_data, tiny_split))
    before = snapshot(prepared)
    table = observed(prepared, tiny_data, tiny_split)
    row = table.set_index(["layer", "tensor"]).loc["fc", "weight"]
    exponents = np.round(np.log2(factors.numpy() / 127.5))
    expected = 0 if limit is None else int((np.abs(exponents) > limit).sum())
    assert (row["clamped"], row["channels"]) == (expected, 4)
    assert count_clamped(prepared) == {"clamped": table["clamped"].sum(), "scales": table["channels"].sum()}
    assert unchanged(prepared, before)


def test_fewer_bits_have_a_worse_ratio_and_float_scales_clip_nothing(tiny_data, tiny_split):
    ratios = []
    for bits in (8, 6, 4, 2):
        scheme = Scheme(bits, rule="ceil")
        table = observed(
            calibrated(tiny_data, tiny_split, scheme, scheme, "simulated"), tiny_data, tiny_split
        )
        ratios.append(table["snr_db"].to_numpy())
    assert (np.diff(ratios, axis=0) < 0).all()
    table = observed(calibrated(tiny_data, tiny_split, FLOAT, FLOAT, "simulated"), tiny_data, tiny_split)
    assert (table["share_clipped"] < 0.01).all() and (table["clamped"] == 0).all()


@pytest.mark.parametrize("mode", ["ptq", "simulated"])
def test_other_images_than_those_that_calibrated_change_no_scale_in_the_table(mode, tiny_data, tiny_split):
    prepared = calibrated(tiny_data, tiny_split, mode=mode)
    given = calibration_batches(tiny_data, tiny_split)
    columns = ["raw_scale", "scale", "exponent", "zero_point", "clamped"]
    own, other = (
        inspect_qparams(prepared, part)[columns] for part in (given, [100 * batch for batch in given])
    )
    assert own.equals(other)


def test_other_images_are_clipped_more(tiny_data, tiny_split):
    prepared = calibrated(tiny_data, tiny_split)
    given = calibration_batches(tiny_data, tiny_split)
    own, other = (
        inspect_qparams(prepared, part).set_index(["layer", "tensor"]).loc["quant", "activation"]
        for part in (given, [100 * batch for batch in given])
    )
    assert own["share_clipped"] < 0.2 < 0.9 < other["share_clipped"] and own["snr_db"] > other["snr_db"]


@pytest.mark.parametrize("mode", ["ptq", "simulated"])
def test_inspecting_changes_nothing_in_the_network(mode, tiny_data, tiny_split):
    prepared = calibrated(tiny_data, tiny_split, mode=mode)
    before = snapshot(prepared)
    observed(prepared, tiny_data, tiny_split)
    assert unchanged(prepared, before)


def test_the_grid_of_a_tensor_is_the_one_that_rounds_it(tiny_data, tiny_split):
    model, weight = network(), Scheme(bits=4, per_channel=True)
    qconfig = make_qconfig(weight, Scheme(bits=4, zero_point="unsigned"), "simulated")
    calibrated = calibrate(prepare_ptq(model, qconfig), calibration_batches(tiny_data, tiny_split))
    batch = calibration_batches(tiny_data, tiny_split)[0]
    before = snapshot(calibrated)
    name = "conv1"
    layer = layers(calibrated)[name]
    values, scale, zero_point, (low, high) = values_and_grid(calibrated, name, "weight", batch)
    channels = layer.weight.detach().flatten(1)
    smallest = channels[channels.abs().amax(1).argmin()].numpy()
    assert np.array_equal(values, smallest) and (low, high) == (-8, 7) and zero_point == 0
    assert abs(values).max() / scale <= 8 * 2**0.5
    simulated, seen = simulate(calibrated), []
    simulated.get_submodule(name).register_forward_hook(lambda *args: seen.append(args[2]))
    with torch.no_grad():
        simulated(batch)
    _, scale, zero_point, (low, high) = values_and_grid(calibrated, name, "activation", batch)
    codes = seen[0] / scale + zero_point
    assert torch.equal(codes, codes.round()) and low <= codes.min() and codes.max() <= high
    assert unchanged(calibrated, before)


@pytest.mark.parametrize("arch", ["resnet9", "resnet50"])
def test_a_tensor_that_is_rounded_alone_moves_the_logits_as_a_rounded_input_does(arch, tiny_data, tiny_split):
    prepared = calibrate(
        prepare_ptq(network(arch), make_qconfig(REFERENCE, REFERENCE, "simulated")),
        calibration_batches(tiny_data, tiny_split),
    )
    model, images = simulate(prepared), calibration_batches(tiny_data, tiny_split)[0]
    before = snapshot(model)
    table = errors_alone(model, images)
    assert unchanged(model, before)
    assert (
        table["logit_mse"].is_monotonic_decreasing and table["layer"].is_unique and (table["width"] > 0).all()
    )
    quantized = {name for name, module in model.named_modules() if hasattr(module, "activation_post_process")}
    assert set(table["layer"]) <= quantized and len(table) > len(layers(model))
    watcher = model.quant.activation_post_process
    rounded = torch.fake_quantize_per_tensor_affine(
        images, watcher.scale, watcher.zero_point.int(), watcher.quant_min, watcher.quant_max
    )
    model.apply(torch.ao.quantization.disable_fake_quant)
    with torch.no_grad():
        expected = (model(rounded) - model(images)).square().mean().item()
    row = table.set_index("layer").loc["quant"]
    assert row["logit_mse"] == pytest.approx(expected, rel=1e-4) and row["scale"] == float(watcher.scale)
    assert row["width"] == pytest.approx(((images.max() - images.min()) / images.std()).item())
