"""Corruptions against Pillow, scipy and matplotlib; draws that follow from the image alone."""

import io

import numpy as np
import pytest
import torch
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from PIL import Image
from scipy import ndimage

from labcore import LabError
from labcore.studies.corruptions import CORRUPTIONS, SEVERITIES, corrupt, parameters_table


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
    return {(name, level): corrupt(photos, name, level) for name in CORRUPTIONS for level in SEVERITIES}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_neither_neighbours_nor_order_nor_memory_nor_earlier_draws_change_an_image(name, photos, spoilt):
    torch.manual_seed(99)
    before, kept = torch.random.get_rng_state(), photos.copy()
    other_layout = np.asfortranarray(photos)
    alone = np.concatenate([corrupt(other_layout[i : i + 1], name, 3) for i in (4, 0, 3)])
    assert np.array_equal(alone, spoilt[name, 3][[4, 0, 3]])
    assert torch.equal(torch.random.get_rng_state(), before), "torch's generator is given back"
    assert np.array_equal(kept, photos), "the images given are not written to"


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
def test_every_image_changes_more_with_severity(name, photos, spoilt):
    changes = []
    for severity in SEVERITIES:
        image = spoilt[name, severity]
        assert image.dtype == np.uint8 and image.shape == photos.shape
        assert (image != photos).any(axis=(1, 2, 3)).all()
        changes.append(np.square(image.astype(float) - photos).mean())
    if name != "pixelate":  # its blocks first move edges, then grow
        assert np.all(np.diff(changes) > 0), changes


@pytest.mark.parametrize("side", [(8, 8), (48, 48), (16, 24)])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_extreme_images_of_other_sizes_and_none_at_all(name, side):
    black_and_white = np.stack([np.zeros((3, *side)), np.full((3, *side), 255)]).astype(np.uint8)
    image = corrupt(black_and_white, name, 5)
    assert image.dtype == np.uint8 and image.shape == black_and_white.shape
    assert corrupt(black_and_white[:0], name, 5).shape == (0, 3, *side)
    if CORRUPTIONS[name].group == "blur":
        assert np.array_equal(image, black_and_white), "a blur keeps a plain image"


def test_noise_has_the_spread_it_says():
    grey = np.full((1, 3, 256, 256), 128, dtype=np.uint8)
    kinds = [f"{name} noise" for name in ("gaussian", "shot", "impulse")]
    for severity in SEVERITIES:
        sigma, photons, amount = (CORRUPTIONS[kind].parameters[severity - 1] for kind in kinds)
        gaussian, shot, impulse = (corrupt(grey, kind, severity) for kind in kinds)
        assert gaussian.std() == pytest.approx(255 * sigma, rel=0.02)
        assert shot.std() == pytest.approx(255 * np.sqrt(128 / 255 / photons), rel=0.02)
        assert (impulse != 128).mean() == pytest.approx(amount, rel=0.15)


def scipys_blur(x: np.ndarray, s: float) -> np.ndarray:
    return ndimage.gaussian_filter(x.astype(float), (0, 0, s, s), mode="mirror", truncate=4)


def scipys_zooms(x: np.ndarray, largest: float) -> np.ndarray:
    centre, zooms = np.array([15.5, 15.5]), 1 + np.arange(round(100 * largest) - 99) / 100
    moved = [
        [ndimage.affine_transform(plane, np.eye(2) / z, centre - centre / z, order=1) for z in zooms]
        for plane in x.reshape(-1, 32, 32).astype(float)
    ]
    return np.mean(moved, axis=1).reshape(x.shape)


def matplotlibs_value(x: np.ndarray, shift: float) -> np.ndarray:
    hsv = rgb_to_hsv(x.transpose(0, 2, 3, 1) / 255)
    hsv[..., 2] = np.minimum(hsv[..., 2] + shift, 1)
    return 255 * hsv_to_rgb(hsv).transpose(0, 3, 1, 2)


def contrast_by_hand(x: np.ndarray, factor: float) -> np.ndarray:
    grey = np.tensordot(x.astype(float), [0.299, 0.587, 0.114], axes=(1, 0)).mean((1, 2))
    return factor * x + (1 - factor) * grey[:, None, None, None]


def pillows_blocks(x: np.ndarray, share: float) -> np.ndarray:
    small, box = (int(share * 32), int(share * 32)), Image.Resampling.BOX
    pictures = [Image.fromarray(image).resize(small, box) for image in x.transpose(0, 2, 3, 1)]
    return np.stack([np.asarray(one.resize((32, 32), box), int) for one in pictures]).transpose(0, 3, 1, 2)


def pillows_jpeg(x: np.ndarray, quality: int) -> np.ndarray:
    files = [io.BytesIO() for _ in x]
    for image, file in zip(x.transpose(0, 2, 3, 1), files, strict=True):
        Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.stack([np.asarray(Image.open(file), int) for file in files]).transpose(0, 3, 1, 2)


ORACLES = {"gaussian blur": scipys_blur, "zoom blur": scipys_zooms, "brightness": matplotlibs_value}
ORACLES |= {"contrast": contrast_by_hand, "pixelate": pillows_blocks, "jpeg": pillows_jpeg}


@pytest.mark.parametrize("name", ORACLES)
def test_a_corruption_is_that_of_another_library_or_by_hand(name, photos, spoilt):
    for severity, parameter in zip(SEVERITIES, CORRUPTIONS[name].parameters, strict=True):
        assert np.abs(spoilt[name, severity] - ORACLES[name](photos, parameter)).max() < 0.7


def test_fog_is_a_grey_fractal_of_full_range(photos, spoilt):
    top = (photos / 255).max((1, 2, 3))[:, None, None, None]
    plasma = spoilt["fog", 4] / 255 * (top + 1) / top - photos / 255  # severity 4 is of thickness 1
    assert np.allclose(plasma.min((2, 3)), 0, atol=0.01) and np.allclose(plasma.max((2, 3)), 1, atol=0.01)
    assert np.abs(plasma - plasma.mean(1, keepdims=True)).max() < 0.01


def test_motion_blur_spreads_a_point_along_a_short_line():
    point = np.zeros((1, 3, 33, 33), dtype=np.uint8)
    point[..., 16, 16] = 255
    for severity, length in zip(SEVERITIES, CORRUPTIONS["motion blur"].parameters, strict=True):
        rows, columns = np.nonzero(corrupt(point, "motion blur", severity)[0, 0])
        assert 0 < np.hypot(rows - 16, columns - 16).max() <= length // 2 + 1


def test_rain_draws_light_drops_and_nothing_else(photos, spoilt):
    changed = spoilt["rain", 5] != photos
    assert set(spoilt["rain", 5][changed]) == {200}
    assert 0 < changed.any(1).sum((1, 2)).max() <= 7 * CORRUPTIONS["rain"].parameters[-1]


UNKNOWN = [("gausian noise", 1, "did you mean 'gaussian noise'"), ("hail of stones", 1, "known: ")]
UNKNOWN += [("fog", severity, f"1 … 5, found {severity!r}") for severity in (0, 6, 2.5, "3")]


@pytest.mark.parametrize(("name", "severity", "message"), UNKNOWN)
def test_an_unknown_corruption_or_severity_is_refused_in_one_line(photos, name, severity, message):
    with pytest.raises(LabError, match=message) as error:
        corrupt(photos, name, severity)
    assert "\n" not in str(error.value)


OTHER_SHAPES = [np.zeros(shape, np.uint8) for shape in ((2, 8, 8, 3), (2, 1, 8, 8), (3, 8, 8), ())]
TENSOR = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize("images", [None, np.uint8(1), np.zeros((2, 3, 8, 8)), TENSOR, *OTHER_SHAPES])
def test_other_images_are_refused(images):
    with pytest.raises(LabError, match=r"uint8 array \(N, 3, H, W\), found"):
        corrupt(images, "fog", 1)


def test_the_table_names_every_parameter():
    table = parameters_table()
    assert list(table.index) == list(CORRUPTIONS)
    assert set(table["group"]) == {"noise", "blur", "weather", "digital"}
    assert table.loc["jpeg", ["1", "2", "3", "4", "5"]].tolist() == [80, 65, 58, 50, 40]
    assert all(len(one.parameters) == 5 for one in CORRUPTIONS.values())
