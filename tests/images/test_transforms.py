"""Every transform equals torchvision's function of that name, with a draw of its own for every image."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torchvision.transforms import RandomErasing
from torchvision.transforms import functional as TF
from torchvision.transforms.v2 import CutMix

from labcore import LabError
from labcore.config import PROFILES, Augment, Recipe
from labcore.images.policy import trivial_augment
from labcore.images.transforms import adjust_hue, affine, augment, color_jitter, crop_flip, mix, normalize

REFERENCE = PROFILES["reference"].fp32.augment
SIDES = pytest.mark.parametrize(("height", "width"), [(32, 32), (31, 31), (20, 33)])


def off(**switched_on) -> Augment:
    return Augment(**{"crop_padding": 0, "flip_prob": 0.0} | switched_on)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def noise(count: int, height: int = 32, width: int = 32) -> Tensor:
    return torch.from_numpy(rng(99).integers(0, 256, (count, 3, height, width), dtype=np.uint8))


def white(count: int, height: int = 32, width: int = 32) -> Tensor:
    return torch.full((count, 3, height, width), 255, dtype=torch.uint8)


def each(function, x: Tensor, *arguments) -> Tensor:
    """One image at a time, each with arguments of its own."""
    return torch.stack([function(image, *own) for image, *own in zip(x, *arguments, strict=True)])


def boxes(x: Tensor, value: Tensor | float) -> np.ndarray:
    """(B, 4): top, left, height, width of the box where x has the value; a full box in every channel."""
    held = torch.isclose(x, torch.as_tensor(value, dtype=x.dtype), atol=1e-5)
    assert torch.equal(held.all(1), held.any(1))
    held = held.all(1).numpy()
    rows, columns = held.any(2), held.any(1)
    assert (held == rows[:, :, None] & columns[:, None, :]).all()
    found = np.stack([rows.argmax(1), columns.argmax(1), rows.sum(1), columns.sum(1)], 1)
    ends = [side.shape[1] - side[:, ::-1].argmax(1) for side in (rows, columns)]
    filled = held.any((1, 2))
    assert (found[filled, 2:] == np.stack(ends, 1)[filled] - found[filled, :2]).all()
    return found


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_normalize_equals_torchvisions(dtype):
    x = noise(4).to(dtype)
    expected = TF.normalize(x.float() / 255, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    torch.testing.assert_close(normalize(x), expected, atol=1e-5, rtol=0)
    assert normalize(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_flip_is_certain_or_never_happens_and_keeps_the_dtype(dtype):
    x = noise(5, 8, 12).to(dtype)
    for flip_prob, expected in (0.0, x), (1.0, TF.hflip(x)):
        found = crop_flip(x, off(flip_prob=flip_prob), rng())
        assert found.dtype == dtype and torch.equal(found, expected)


@pytest.mark.parametrize("mode", ["constant", "reflect"])
@pytest.mark.parametrize(("height", "width"), [(9, 9), (7, 12)])
def test_crop_and_flip_give_every_crop_of_the_padded_image_and_nothing_else(height, width, mode):
    padded = TF.pad(noise(1, height, width), 2, padding_mode=mode)
    crops = [TF.crop(padded, top, left, height, width) for top in range(5) for left in range(5)]
    candidates = torch.cat(crops + [TF.hflip(crop) for crop in crops])
    config = off(crop_padding=2, padding_mode=mode, flip_prob=0.25)
    found = crop_flip(noise(1, height, width).repeat(1000, 1, 1, 1), config, rng())
    equal = (found[:, None] == candidates).all((2, 3, 4))
    assert (equal.sum(1) == 1).all()
    uses = equal.sum(0)
    assert (uses > 0).all() and 200 < uses[25:].sum() < 300


def test_more_reflection_than_an_image_has_is_refused():
    crop_flip(noise(3, 5, 9), off(crop_padding=4, padding_mode="reflect"), rng())
    with pytest.raises(LabError, match="crop_padding must be below 5 pixels .* found 5; lower it"):
        crop_flip(noise(3, 5, 9), off(crop_padding=5, padding_mode="reflect"), rng())


JITTERS = [off(**{name: 0.4}) for name in ("brightness", "contrast", "saturation", "hue")]
JITTERS.append(off(brightness=0.3, contrast=0.4, saturation=0.5, hue=0.2))


def test_adjust_hue_equals_torchvisions_with_a_shift_for_every_image():
    corners = torch.tensor([[r, g, b] for r in (0, 0.5, 1) for g in (0, 0.5, 1) for b in (0, 0.5, 1)])
    shifts = [-0.5, -0.3, -0.1, 0.0, 1e-3, 0.2, 0.5]
    colours = [noise(7).float().flatten(2) / 255, corners.T.expand(7, 3, 27)]
    x = torch.cat(colours, 2)[..., None]
    found = adjust_hue(x, np.array(shifts))
    torch.testing.assert_close(found, each(TF.adjust_hue, x, shifts), atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", JITTERS)
def test_adjustments_are_torchvisions_with_strengths_and_order_drawn_for_every_image(config):
    x, draws = noise(60, 8, 8).float() / 255, rng(3)
    orders = draws.random((60, 4)).argsort(axis=1)
    amounts = np.array([[config.brightness, config.contrast, config.saturation, config.hue]]).T
    strengths = np.array([[1.0, 1.0, 1.0, 0.0]]).T + amounts * draws.uniform(-1, 1, (4, 60))
    functions = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    expected = x.clone()
    for position, order in enumerate(orders):
        for number in order:
            expected[position] = functions[number](expected[position], float(strengths[number][position]))
    torch.testing.assert_close(color_jitter(x, config, rng(3)), expected, atol=1e-4, rtol=0)
    assert len({tuple(order) for order in orders}) > 12


def assert_nearly_all_pixels_equal(found: Tensor, expected: Tensor):
    """Nearest-pixel lookups may differ where a point lies between two pixels."""
    assert found.shape == expected.shape
    assert (found != expected).any(1).float().mean() <= 0.005


@SIDES
def test_affine_turns_shifts_and_scales_as_torchvision_does(height, width):
    x, draws, still = noise(20, height, width).float(), rng(), np.zeros(20)
    angles, scales = draws.uniform(-180, 180, 20), draws.uniform(0.5, 2, 20)
    right, down = draws.integers(-9, 10, (2, 20))

    def expected(*drawn):
        return each(lambda image, a, r, d, s: TF.affine(image, -a, [r, d], s, [0.0]), x, *drawn)

    assert torch.equal(affine(x), x)
    assert torch.equal(affine(x, right=right, down=down), expected(still, right, down, still + 1))
    assert_nearly_all_pixels_equal(affine(x, angles), expected(angles, still, still, still + 1))
    drawn = angles, right, down, scales
    assert_nearly_all_pixels_equal(affine(x, *drawn), expected(*drawn))


def test_rotation_draws_an_angle_for_every_image():
    draws, config = rng(1), off(rotation_degrees=20.0)
    crop_flip(noise(30), config, draws)
    expected = each(TF.rotate, noise(30), draws.uniform(-20, 20, 30))
    assert_nearly_all_pixels_equal(augment(noise(30), config, rng(1)), normalize(expected))


def test_translation_moves_by_whole_pixels_up_to_its_share_of_each_side():
    found = boxes(augment(white(2000, 16, 40), off(translate=0.25), rng()), normalize(white(1, 1, 1)))
    assert found.min(0).tolist() == [0, 0, 16 - 4, 40 - 10]
    assert found.max(0).tolist() == [4, 10, 16, 40]


def test_scaling_keeps_the_middle_and_stays_within_its_range():
    middle = boxes(augment(white(3), off(scale_min=0.5, scale_max=0.5), rng()), normalize(white(1, 1, 1)))
    assert middle.tolist() == [[8, 8, 16, 16]] * 3
    found = boxes(augment(white(500), off(scale_min=0.5, scale_max=0.75), rng()), normalize(white(1, 1, 1)))
    assert (found[:, 2].min(), found[:, 2].max()) == (16, 24)


@pytest.mark.parametrize("side", [1, 5, 8, 16])
def test_cutout_erases_a_square_cut_only_by_the_border(side):
    top, left, height, width = boxes(augment(white(2000), off(cutout=side), rng()), 0.0).T
    for start, length in ((top, height), (left, width)):
        inside = (start > 0) & (start + length < 32)
        assert (length[inside] == side).all()
        assert length.min() == (side + 1) // 2
        assert length.max() == side


def test_cutout_reaches_every_pixel_and_erases_all_of_a_small_image():
    assert (augment(white(2000), off(cutout=4), rng()) == 0).all(1).any(0).all()
    assert not augment(white(4, 16, 16), off(cutout=100), rng()).any()


def erased(**options) -> np.ndarray:
    found = boxes(augment(white(2000), off(**{"erasing_prob": 1.0} | options), rng()), 0.0)
    return found[found[:, 2] > 0]


def test_erasing_happens_with_its_probability():
    assert len(erased()) == 2000
    assert stats.binomtest(len(erased(erasing_prob=0.6)), 2000, 0.6).pvalue > 1e-3
    never_fits = {"erasing_scale": (0.99, 0.995), "erasing_ratio": (3.0, 3.3)}
    assert len(erased(**never_fits)) == 0


@pytest.mark.parametrize("scale", [(0.02, 0.4), (0.1, 0.2), (0.1, 0.1)])
@pytest.mark.parametrize("ratio", [(0.3, 3.3), (0.5, 0.6), (1.0, 1.0)])
def test_erased_boxes_are_in_range_and_distributed_as_torchvisions(scale, ratio):
    torch.manual_seed(0)
    theirs = [RandomErasing.get_params(torch.zeros(3, 32, 32), scale, ratio, [0.0])[:4] for _ in range(2000)]
    found = erased(erasing_scale=scale, erasing_ratio=ratio)
    for mine, other in zip(found.T, np.array(theirs).T, strict=True):
        assert stats.ks_2samp(mine, other, method="asymp").pvalue > 1e-3
    assert found[:, :2].min(0).tolist() == [0, 0]
    assert (found[:, :2] + found[:, 2:]).max(0).tolist() == [32, 32]
    height, width = found[:, 2:].T
    assert ((height + 0.5) * (width + 0.5) >= scale[0] * 1024).all()
    assert ((height - 0.5) * (width - 0.5) <= scale[1] * 1024).all()
    assert ((height + 0.5) / (width - 0.5) >= ratio[0]).all()
    assert ((height - 0.5) / (width + 0.5) <= ratio[1]).all()


GEOMETRIES = [off(crop_padding=4), off(rotation_degrees=180.0), off(scale_min=0.5, scale_max=1.5)]


@pytest.mark.parametrize("config", [*JITTERS, *GEOMETRIES, off(policy="trivial"), REFERENCE])
def test_images_of_a_batch_get_draws_of_their_own_which_follow_from_the_seed(config):
    x = noise(1).repeat(5, 1, 1, 1)
    found, again, other = (augment(x, config, rng(seed)) for seed in (4, 4, 5))
    assert len({image.numpy().tobytes() for image in found}) == 5
    assert torch.equal(found, again)
    assert not torch.equal(found, other)
    assert torch.equal(x, noise(1).repeat(5, 1, 1, 1))


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (64, 3, 32, 32), (2, 3, 8, 8), (3, 3, 20, 33)])
def test_augmented_images_are_floats_of_the_same_shape_between_black_and_white(name, shape):
    found = augment(noise(shape[0], *shape[2:]), PROFILES[name].fp32.augment, rng())
    assert (found.shape, found.dtype) == (shape, torch.float32)
    assert found.is_contiguous(memory_format=torch.channels_last)
    black, white = (normalize(torch.full((1, 3, 1, 1), colour)) for colour in (0.0, 255.0))
    assert ((found >= black - 1e-5) & (found <= white + 1e-5)).all()


def test_a_policy_follows_crop_and_flip_and_everything_switched_off_leaves_normalisation():
    draws, config = rng(1), Augment(policy="trivial")
    expected = trivial_augment(crop_flip(noise(30), config, draws), draws)
    assert torch.equal(augment(noise(30), config, rng(1)), normalize(expected))
    assert torch.equal(augment(noise(3), off(), rng()), normalize(noise(3)))


def mixing(**kinds: tuple[float, float]) -> Recipe:
    """A recipe from the alpha and the probability of mixup, of cutmix, or of both."""
    alphas = {f"{kind}_alpha": alpha for kind, (alpha, _) in kinds.items()}
    probs = {f"{kind}_prob": prob for kind, (_, prob) in kinds.items()}
    return Recipe(epochs=1, batch_size=8, lr=0.1, **alphas, **probs)


KINDS = pytest.mark.parametrize("kind", ["mixup", "cutmix"])


def numbered(count: int, height: int = 32, width: int = 32) -> Tensor:
    """Every pixel holds the number of its image."""
    return torch.arange(count).float().view(-1, 1, 1, 1).expand(count, 3, height, width)


def test_mixup_is_the_weighted_sum_of_pairs():
    x = normalize(noise(9, 8, 8))
    mixed, partner, share = mix(x, mixing(mixup=(0.2, 0.7)), rng())
    own = share.double().view(-1, 1, 1, 1)
    torch.testing.assert_close(mixed.double(), own * x + (1 - own) * x[partner], atol=1e-5, rtol=0)
    assert (mixed.dtype, share.dtype) == (torch.float32, torch.float32)
    assert mixed.is_contiguous(memory_format=torch.channels_last)


@KINDS
def test_partners_are_neighbours_and_stay_in_any_even_part_of_the_batch(kind):
    x = normalize(noise(6, 4, 4))
    recipe = mixing(**{kind: (1.0, 1.0)})
    assert mix(x, recipe, rng())[1].tolist() == [1, 0, 3, 2, 5, 4]
    assert mix(x[:5], recipe, rng())[1].tolist() == [1, 0, 3, 2, 4]


@pytest.mark.parametrize(("alpha", "prob"), [(0.2, 0.0), (0.0, 0.0), (0.0, 1.0)])
@KINDS
def test_mixing_without_a_probability_or_an_alpha_changes_nothing(kind, alpha, prob):
    x = normalize(noise(9, 8, 8))
    mixed, _, share = mix(x, mixing(**{kind: (alpha, prob)}), rng())
    assert torch.equal(mixed, x)
    assert (share == 1).all()


@KINDS
@pytest.mark.parametrize("count", [0, 1])
def test_mixing_without_a_neighbour_changes_nothing(kind, count):
    x = normalize(noise(count, 8, 8))
    mixed = mix(x, mixing(**{kind: (0.2, 1.0)}), rng())[0]
    torch.testing.assert_close(mixed, x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_shares_of_mixup_follow_the_beta_distribution(alpha):
    share = mix(torch.zeros(3000, 3, 1, 1), mixing(mixup=(alpha, 1.0)), rng())[2].numpy()
    assert 0 <= share.min() <= share.max() <= 1
    assert stats.kstest(share, stats.beta(alpha, alpha).cdf).pvalue > 1e-3


@SIDES
def test_cutmix_pastes_one_box_of_the_partner_and_counts_its_pixels(height, width):
    x = numbered(200, height, width)
    mixed, partner, share = mix(x, mixing(cutmix=(1.0, 1.0)), rng())
    own = mixed == x
    assert torch.equal(mixed[~own], x[partner][~own])
    boxes((~own).float(), 1.0)  # asserts that the others form one full box
    torch.testing.assert_close(share, own.float().mean((1, 2, 3)), atol=1e-6, rtol=0)
    assert mixed.is_contiguous(memory_format=torch.channels_last)


def test_boxes_of_cutmix_are_distributed_as_torchvisions():
    torch.manual_seed(0)
    cut, theirs = CutMix(alpha=1.0, num_classes=1), []
    for _ in range(2000):
        drawn = cut.make_params([torch.zeros(2, 3, 32, 32)])
        left, top, right, bottom = drawn["box"]
        theirs.append((top, left, bottom - top, right - left, drawn["lam_adjusted"]))
    theirs = np.array(theirs, dtype=float)
    mixed, _, share = mix(numbered(2000), mixing(cutmix=(1.0, 1.0)), rng())
    found = boxes((mixed != numbered(2000)).float(), 1.0)
    full = theirs[theirs[:, 2:4].min(1) > 0, :4]  # where an empty box lies cannot be seen
    for mine, other in zip(found[found[:, 2] > 0].T, full.T, strict=True):
        assert stats.ks_2samp(mine, other).pvalue > 1e-3
    assert stats.ks_2samp(share.numpy(), theirs[:, 4]).pvalue > 1e-3


def test_every_image_draws_its_kind_of_mixing_with_its_probability():
    # Nearly always even halves, so that no box is empty and no share is 1 by chance.
    recipe = mixing(mixup=(100.0, 0.3), cutmix=(100.0, 0.5))
    x = numbered(3000, 8, 8)
    mixed, partner, _ = mix(x, recipe, rng())
    own, other = (mixed == x).all((1, 2, 3)), ((mixed == x) | (mixed == x[partner])).all((1, 2, 3))
    counts = [(~other).sum(), (other & ~own).sum(), own.sum()]
    assert stats.chisquare(counts, np.array([0.3, 0.5, 0.2]) * 3000).pvalue > 1e-3


def test_a_seed_gives_one_mixture_and_the_images_stay_as_they_were():
    recipe = mixing(mixup=(1.0, 0.5), cutmix=(1.0, 0.5))
    x = normalize(noise(8))
    for first, second in zip(mix(x, recipe, rng(4)), mix(x, recipe, rng(4)), strict=True):
        assert torch.equal(first, second)
    assert torch.equal(x, normalize(noise(8)))
