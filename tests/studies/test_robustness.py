"""Corruptions against Pillow, scipy and colorsys; costs and lost images by hand."""

import colorsys
import io
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from PIL import Image
from scipy import ndimage, stats

from labcore import LabError
from labcore.files.artifacts import write_json
from labcore.plots import robustness as robustness_plots
from labcore.studies import robustness as corruptions
from labcore.studies.robustness import (
    CORRUPTIONS,
    GROUPS,
    SEVERITIES,
    answers,
    cell_table,
    corrupt,
    corruption_cost,
    evenly_spaced,
    load_answers,
    lost_images,
    mean_over_images,
    parameters_table,
    save_answers,
    severity_table,
    verdict,
)
from labcore.studies.study import Study


@pytest.fixture(scope="module")
def photos() -> np.ndarray:
    """Six smooth coloured images with edges, 32×32, with neither black nor white."""
    rng = np.random.default_rng(0)
    smooth = ndimage.gaussian_filter(rng.normal(size=(6, 3, 32, 32)), (0, 0, 3, 3))
    smooth = (smooth - smooth.min()) / np.ptp(smooth)
    smooth[:, :, 8:20, 10:24] *= 0.5
    return (30 + 190 * smooth).astype(np.uint8)


@pytest.fixture(scope="module")
def spoilt(photos) -> dict:
    return {
        (name, severity): corrupt(photos, name, severity) for name in CORRUPTIONS for severity in SEVERITIES
    }


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_neither_neighbours_nor_order_nor_time_change_an_image(name, photos, spoilt):
    torch.manual_seed(99)  # what was drawn before does not matter
    before = torch.random.get_rng_state()
    alone = np.concatenate([corrupt(photos[place : place + 1], name, 3) for place in (4, 0, 3)])
    assert np.array_equal(alone, spoilt[name, 3][[4, 0, 3]])
    assert torch.equal(torch.random.get_rng_state(), before), "torch's generator is given back"


def test_every_image_has_its_own_draw_and_equal_images_share_it():
    plain = np.full((3, 3, 32, 32), 128, dtype=np.uint8)
    plain[1, 0, 0, 0] = 129
    for name in ("gaussian noise", "impulse noise", "rain", "fog"):
        first, other, again = corrupt(plain, name, 3).astype(int)
        assert np.array_equal(first, again)
        assert (first != other).mean() > 0.02, "one byte differs, and so does the whole draw"


def test_another_seed_draws_other_noise_and_threads_stay(photos, spoilt):
    threads = torch.get_num_threads()
    for name in ("gaussian noise", "shot noise", "impulse noise", "motion blur", "rain", "fog"):
        assert not np.array_equal(corrupt(photos, name, 5, seed=1), spoilt[name, 5])
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_bytes_come_back_and_change_more_with_severity(name, photos, spoilt):
    kept = photos.copy()
    changes = []
    for severity in SEVERITIES:
        image = spoilt[name, severity]
        assert image.dtype == np.uint8 and image.shape == photos.shape
        assert (image != photos).reshape(len(photos), -1).any(axis=1).all(), "every image changes"
        changes.append(np.square(image.astype(float) - photos).mean())
    if name != "pixelate":  # its blocks first move edges, then grow
        assert np.all(np.diff(changes) > 0), changes
    assert np.array_equal(kept, photos), "the images given are not written to"


@pytest.mark.parametrize("side", [(8, 8), (48, 48), (16, 24)])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_extreme_images_of_other_sizes(name, side):
    black_and_white = np.stack([np.zeros((3, *side)), np.full((3, *side), 255)]).astype(np.uint8)
    image = corrupt(black_and_white, name, 5)
    assert image.dtype == np.uint8 and image.shape == black_and_white.shape
    if CORRUPTIONS[name].group == "blur":
        assert np.array_equal(image, black_and_white), "a blur keeps a plain image"


def test_noise_has_the_spread_it_says():
    grey = np.full((1, 3, 256, 256), 128, dtype=np.uint8)
    for severity, sigma in zip(SEVERITIES, CORRUPTIONS["gaussian noise"].parameters, strict=True):
        assert corrupt(grey, "gaussian noise", severity).std() == pytest.approx(255 * sigma, rel=0.02)
    for severity, photons in zip(SEVERITIES, CORRUPTIONS["shot noise"].parameters, strict=True):
        expected = 255 * np.sqrt(128 / 255 / photons)
        assert corrupt(grey, "shot noise", severity).std() == pytest.approx(expected, rel=0.02)
    for severity, amount in zip(SEVERITIES, CORRUPTIONS["impulse noise"].parameters, strict=True):
        struck = corrupt(grey, "impulse noise", severity) != 128
        assert struck.mean() == pytest.approx(amount, rel=0.15)


def test_gaussian_blur_is_scipys(photos, spoilt):
    for severity, sigma in zip(SEVERITIES, CORRUPTIONS["gaussian blur"].parameters, strict=True):
        expected = ndimage.gaussian_filter(photos / 255, (0, 0, sigma, sigma), mode="mirror", truncate=4)
        assert np.abs(spoilt["gaussian blur", severity] - 255 * expected).max() < 0.6


def test_zoom_blur_is_the_mean_of_scipys_zooms(photos, spoilt):
    centre = np.array([15.5, 15.5])
    zooms = [1 + step / 100 for step in range(11)]  # severity 2
    expected = np.zeros(photos[0].shape)
    for channel in range(3):
        for zoom in zooms:
            moved = ndimage.affine_transform(
                photos[0, channel].astype(float), np.eye(2) / zoom, centre - centre / zoom, order=1
            )
            expected[channel] += moved / len(zooms)
    assert np.abs(spoilt["zoom blur", 2][0] - expected).max() < 0.6


def test_jpeg_is_pillows(photos, spoilt):
    for severity, quality in zip(SEVERITIES, CORRUPTIONS["jpeg"].parameters, strict=True):
        file = io.BytesIO()
        Image.fromarray(photos[0].transpose(1, 2, 0)).save(file, "JPEG", quality=quality)
        expected = np.asarray(Image.open(file)).transpose(2, 0, 1).astype(int)
        assert np.abs(spoilt["jpeg", severity][0] - expected).mean() < 0.5


def test_brightness_contrast_and_fog_by_hand(photos, spoilt):
    hsv = rgb_to_hsv(photos.transpose(0, 2, 3, 1) / 255)
    hsv[..., 2] = np.minimum(hsv[..., 2] + 0.15, 1)
    expected = 255 * hsv_to_rgb(hsv).transpose(0, 3, 1, 2)
    assert np.abs(spoilt["brightness", 3] - expected).max() < 0.6
    grey = np.tensordot(photos.astype(float), [0.299, 0.587, 0.114], axes=(1, 0)).mean((1, 2))
    grey = grey[:, None, None, None]
    assert np.abs(spoilt["contrast", 2] - (grey + 0.5 * (photos - grey))).max() < 0.7
    fog = spoilt["fog", 4] / 255
    top = (photos / 255).max((1, 2, 3))[:, None, None, None]
    plasma = fog * (top + 1) / top - photos / 255  # severity 4 is of thickness 1
    assert np.allclose(plasma.min((2, 3)), 0, atol=0.01) and np.allclose(plasma.max((2, 3)), 1, atol=0.01)
    assert np.abs(plasma - plasma.mean(1, keepdims=True)).max() < 0.01, "fog is grey"


def test_brightness_of_one_pixel_by_colorsys():
    pixel = np.array([200, 100, 50], dtype=np.uint8)
    image = np.broadcast_to(pixel[:, None, None], (1, 3, 8, 8)).copy()
    hue, saturation, value = colorsys.rgb_to_hsv(*(pixel / 255))
    expected = [round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value + 0.1)]
    assert corrupt(image, "brightness", 2)[0, :, 3, 5].tolist() == expected


def test_pixelate_by_hand():
    checks = np.indices((20, 20)).sum(0) % 2 * 200
    image = np.broadcast_to(checks, (1, 3, 20, 20)).astype(np.uint8)
    small = Image.fromarray(image[0].transpose(1, 2, 0)).resize((13, 13), Image.Resampling.BOX)
    expected = np.asarray(small.resize((20, 20), Image.Resampling.BOX)).transpose(2, 0, 1)
    assert np.array_equal(corrupt(image, "pixelate", 5)[0], expected)


def test_motion_blur_spreads_a_point_along_a_short_line():
    point = np.zeros((1, 3, 33, 33), dtype=np.uint8)
    point[..., 16, 16] = 255
    for severity, length in zip(SEVERITIES, CORRUPTIONS["motion blur"].parameters, strict=True):
        rows, columns = np.nonzero(corrupt(point, "motion blur", severity)[0, 0])
        reach = np.hypot(rows - 16, columns - 16).max()
        assert 0 < reach <= length // 2 + 1


def test_rain_draws_light_drops_and_nothing_else(photos, spoilt):
    changed = spoilt["rain", 5] != photos
    assert set(spoilt["rain", 5][changed]) == {200}
    drops = CORRUPTIONS["rain"].parameters[-1]
    assert 0 < changed.any(1).sum((1, 2)).max() <= 7 * drops


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("gausian noise", 1), "did you mean 'gaussian noise'"),
        (("hail of stones", 1), "known: "),
        (("fog", 0), "1 … 5"),
        (("fog", 6), "found 6"),
        (("fog", 2.5), "found 2.5"),
        (("fog", "3"), "found '3'"),
    ],
)
def test_unknown_corruptions_and_severities_are_refused(photos, arguments, words):
    with pytest.raises(LabError, match=words) as error:
        corrupt(photos, *arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 3, 8, 8), dtype=np.float32),
        np.zeros((2, 8, 8, 3), dtype=np.uint8),
        np.zeros((2, 1, 8, 8), dtype=np.uint8),
        np.zeros((3, 8, 8), dtype=np.uint8),
        np.uint8(1),
        torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
        None,
    ],
)
def test_other_images_are_refused(images):
    with pytest.raises(LabError, match=r"uint8 array \(N, 3, H, W\), found"):
        corrupt(images, "fog", 1)


def test_no_images_give_no_images():
    assert corrupt(np.zeros((0, 3, 8, 8), dtype=np.uint8), "fog", 1).shape == (0, 3, 8, 8)


def test_the_table_names_every_parameter():
    table = parameters_table()
    assert list(table.index) == list(CORRUPTIONS) and set(table["group"]) == {
        "noise",
        "blur",
        "weather",
        "digital",
    }
    assert table.loc["jpeg", ["1", "2", "3", "4", "5"]].tolist() == [80, 65, 58, 50, 40]
    assert all(len(one.parameters) == 5 for one in CORRUPTIONS.values())


def test_evenly_spaced_reaches_all_classes_of_sorted_images():
    labels = np.repeat(np.arange(10), 1000)  # as some archives are ordered
    chosen = evenly_spaced(len(labels))
    assert np.array_equal(np.bincount(labels[chosen]), np.full(10, 100))
    assert chosen[0] == 0 and chosen[-1] == 9999 and len(set(chosen)) == 1000
    assert np.array_equal(evenly_spaced(7), np.arange(7))


@pytest.fixture
def found() -> pd.DataFrame:
    """Answers of three networks on four images: clean, and two corruptions at five severities. Class 3 has no image."""
    labels = np.array([0, 1, 2, 0])
    rows = [
        {"corruption": "clean", "severity": 0, "fp32": labels, "ptq": labels, "qat": np.array([0, 1, 2, 3])}
    ]
    for name in ("rain", "jpeg"):
        for severity in SEVERITIES:
            ptq = np.array([3, 1, 3, 0]) if name == "rain" else np.array([0, 1, 3, 0])
            fp32 = np.array([0, 1, 2, 1])  # the last image is wrong, which ptq gets right
            rows.append({"corruption": name, "severity": severity, "fp32": fp32, "ptq": ptq, "qat": fp32})
    return pd.DataFrame(rows)


LABELS = np.array([0, 1, 2, 0])


def test_costs_by_hand(found):
    cost = corruption_cost(found, LABELS, "ptq")
    assert cost["fp32_acc"] == 0.75 and cost["acc"] == pytest.approx((2 + 3) / 8)
    lost = np.array([50.0, 0, 100, -100])  # of each image, over the ten cells
    low, high = stats.t.interval(0.95, 3, loc=lost.mean(), scale=stats.sem(lost))
    assert cost["corrupted_drop_pp"] == pytest.approx({"mean": 12.5, "low": low, "high": high})
    assert cost["clean_drop_pp"] == {"mean": 0, "low": 0, "high": 0}
    assert cost["extra_drop_pp"] == pytest.approx(cost["corrupted_drop_pp"])
    qat = corruption_cost(found, LABELS, "qat")
    assert qat["clean_drop_pp"]["mean"] == 25 and qat["corrupted_drop_pp"]["mean"] == 0
    lost = np.array([0, 0, 0, -100.0])
    low, high = stats.t.interval(0.95, 3, loc=-25, scale=stats.sem(lost))
    assert qat["extra_drop_pp"] == pytest.approx({"mean": -25, "low": low, "high": high})


def test_more_cells_of_the_same_images_make_no_narrower_interval(found):
    corrupted = found[found["corruption"] != "clean"]
    twice = pd.concat([found, corrupted], ignore_index=True)
    for key, value in corruption_cost(found, LABELS, "ptq").items():
        assert corruption_cost(twice, LABELS, "ptq")[key] == pytest.approx(value)


def test_tables_by_hand(found):
    table = cell_table(found, LABELS, 4).set_index(["corruption", "severity"])
    assert table.loc[("clean", 0), ["acc_fp32", "acc_ptq", "acc_qat"]].tolist() == [1, 1, 0.75]
    assert table.loc[("rain", 2), ["acc_ptq", "drop_pp_ptq"]].tolist() == [0.5, 25]
    assert table.loc[("clean", 0), "group"] == "clean" and table.loc[("jpeg", 1), "group"] == "digital"
    both = found[found["corruption"].isin(["clean", "rain"])]
    both = pd.concat(
        [
            both.assign(corruption=both["corruption"].map({"rain": name, "clean": "clean"}))
            for name in CORRUPTIONS
        ]
    ).drop_duplicates(["corruption", "severity"])
    levels = severity_table(both, LABELS).set_index(["group", "severity", "network"])
    assert len(levels) == len(GROUPS) * 6 * 3
    assert levels.loc[("noise", 0, "qat"), ["acc", "drop_pp"]].tolist() == [0.75, 25]
    assert levels.loc[("blur", 5, "ptq"), ["acc", "drop_pp"]].tolist() == [0.5, 25]
    assert levels.loc[("blur", 5, "fp32"), ["drop_pp", "drop_pp_low", "drop_pp_high"]].tolist() == [0, 0, 0]


def test_an_interval_needs_two_images():
    with pytest.raises(LabError, match="at least 2 images, found 1"):
        mean_over_images(np.array([1.0]))
    assert mean_over_images(np.full(3, 2.0)) == {"mean": 2, "low": 2, "high": 2}


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(0.1, 2, "costs more"), (-2, -0.1, "costs less"), (-1, 1, "shows no difference")],
)
def test_the_verdict_follows_the_interval(low, high, words):
    assert verdict({"extra_drop_pp": {"mean": 0, "low": low, "high": high}}).startswith(words)


def test_lost_images_by_hand():
    labels = np.array([0, 1, 2, 0, 1])
    before = np.array(
        [[5, 1, 0, 0], [0, 3, 2, 0], [0, 1, 9, 0], [0, 4, 0, 0], [1, 4, 0, 0]], dtype=np.float32
    )
    after = np.array(
        [[1, 4, 0, 0], [0, 3, 2, 0], [0, 5, 4.5, 0], [9, 0, 0, 0], [6, 4, 0, 0]], dtype=np.float32
    )
    lost = lost_images(before, after, labels)  # image 1 stays right, image 3 was wrong before
    assert lost["image"].tolist() == [2, 0, 4], "the surest first"
    assert lost[["true", "before", "after"]].to_numpy().tolist() == [[2, 2, 1], [0, 0, 1], [1, 1, 0]]
    assert lost["margin_before"].tolist() == [8, 4, 3] and lost["margin_after"].tolist() == [0.5, 3, 2]
    assert lost_images(before, after, labels, count=1)["image"].tolist() == [2]
    assert lost_images(before, before, labels).empty


def test_figures_take_no_lost_images_and_foreign_names(photos, spoilt, tmp_path):
    empty = lost_images(np.eye(3), np.eye(3), np.arange(3))
    names = ("a$b", "a name that is far too long", "c_$")
    robustness_plots.lost_image_grid(empty, photos, names).savefig(tmp_path / "empty.png")
    lost = lost_images(np.eye(3), np.roll(np.eye(3), 1, axis=0), np.arange(3))
    assert len(lost) == 3
    robustness_plots.lost_image_grid(lost, photos, names).savefig(tmp_path / "lost.png")
    examples = {
        name: np.stack([spoilt[name, level][0] for level in (1, *SEVERITIES)]) for name in CORRUPTIONS
    }
    robustness_plots.corruption_examples(examples).savefig(tmp_path / "examples.png")


@pytest.fixture
def study(tmp_path):
    """A study of the stage whose weights are files of a few bytes."""
    study = Study.__new__(Study)
    study.stage, study.base = "robustness", {"torch": "x"}
    profile = SimpleNamespace(eval_batch_size=4)
    study.run = SimpleNamespace(path=lambda stage, name="": tmp_path / stage / name, seed=0, profile=profile)
    for name, file in {"fp32": "weights.pt", "ptq": "int8.pt", "qat": "int8.pt"}.items():
        write_json(study.run.path(name, file), name)
    return study


def test_cells_are_kept_and_follow_the_weights_and_the_images(study, photos, monkeypatch):
    calls = []

    def predict(model, images, batch_size, description):
        calls.append((model, images))
        return np.eye(4)[images[:, 0, 0, 0] % 4]

    monkeypatch.setattr(corruptions, "predict", predict)
    monkeypatch.setattr(
        corruptions, "CORRUPTIONS", {name: CORRUPTIONS[name] for name in ("brightness", "jpeg")}
    )
    networks = {name: name for name in ("fp32", "ptq", "qat")}
    found = answers(study, networks, photos)
    assert len(calls) == 3 * (1 + 2 * 5) and found["severity"].tolist() == [0, *SEVERITIES, *SEVERITIES]
    assert (
        np.array_equal(calls[0][1], photos) and found["fp32"][0].tolist() == (photos[:, 0, 0, 0] % 4).tolist()
    )
    assert np.array_equal(calls[-1][1], corrupt(photos, "jpeg", 5))
    calls.clear()
    again = answers(study, networks, photos)
    assert not calls and all(np.array_equal(a, b) for a, b in zip(again["qat"], found["qat"], strict=True))
    write_json(study.run.path("ptq", "int8.pt"), "other weights")
    answers(study, networks, photos)
    assert {model for model, _ in calls} == {"ptq"} and len(calls) == 11
    calls.clear()
    answers(study, networks, photos[:5])
    assert len(calls) == 33, "other images"
    calls.clear()
    study.run.seed = 1
    answers(study, networks, photos)
    assert len(calls) == 33, "another seed"


def test_answers_come_back_from_their_file_and_give_the_same_tables(found, tmp_path):
    path = tmp_path / "answers.npz"
    save_answers(path, found, LABELS)
    again, own = load_answers(path)
    assert np.array_equal(own, LABELS)
    assert cell_table(again, LABELS, 4).equals(cell_table(found, LABELS, 4))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(LabError, match="answers.npz cannot be read"):
        load_answers(path)
