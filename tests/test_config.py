"""Profiles hold the reference's values; overrides reach inside; what does not fit is refused in one line."""

import copy
import dataclasses

import pytest

from labcore import LabError
from labcore.config import PROFILES, check_seed, get_profile, override, parse_overrides


def message_of(action) -> str:
    """The text of the LabError that the action raises; it must be one line."""
    with pytest.raises(LabError) as caught:
        action()
    text = str(caught.value)
    assert text and "\n" not in text
    return text


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("cup", "cpu"), ("smok", "smoke"), ("referense", "reference"), ("resnet", "resnet50")],
)
def test_a_mistyped_profile_names_the_nearest_one(typed, meant):
    assert f"did you mean {meant!r}?" in message_of(lambda: get_profile(typed))


def test_a_profile_like_no_other_lists_all_of_them():
    text = message_of(lambda: get_profile("zzzzzz"))
    assert all(name in text for name in PROFILES)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("widht", "width"), ("fp32.epoch", "epochs"), ("qat.augment.cutuot", "cutout"), ("fp23", "fp32")],
)
def test_a_mistyped_parameter_names_the_nearest_one(typed, meant):
    assert f"did you mean {meant!r}?" in message_of(lambda: get_profile("cpu", **{typed: "2"}))


NOWHERE = "name fp32 fp32. fp32.augment width.epochs fp32.lr.x .epochs . fp32..lr __class__ fp32.__init__"


@pytest.mark.parametrize("dotted", NOWHERE.split())
def test_a_name_that_leads_to_no_single_value_is_refused(dotted):
    assert "unknown parameter" in message_of(lambda: get_profile("cpu", **{dotted: "2"}))


WORDS = [("arch", "resnet18"), ("data", "digits"), ("fp32.augment.policy", "trivial")]
NUMBERS = [("width", 16), ("fp32.epochs", 2), ("fp32.augment.cutout", 4)]
# The ends of intervals that hold them.
NUMBERS += [("width", 4), ("width", 1024), ("image_size", 512), ("latency_rounds", 3)]
READ = [(name, str(value), value) for name, value in WORDS + NUMBERS]
READ += [("qat.lr", "1e-3", 1e-3), ("fp32.momentum", "0", 0.0), ("fp32.scale_lr", "1", 1.0)]
READ += [("qat.augment.erasing_scale", "0.1,0.2", (0.1, 0.2))]
READ += [("studies", "engines,parts", ("engines", "parts")), ("studies", ",", ())]
READ += [("qat.augment.erasing_ratio", "(0.5,2)", (0.5, 2.0))]


@pytest.mark.parametrize(("dotted", "text", "value"), READ)
def test_an_override_arrives_with_the_type_of_what_it_replaces(dotted, text, value):
    found = get_profile("cpu", **{dotted: text})
    for name in dotted.split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


def test_an_override_changes_nothing_else():
    before = copy.deepcopy(PROFILES)
    changed = get_profile("cpu", **{"fp32.augment.cutout": "4"})
    assert before == PROFILES
    assert changed != PROFILES["cpu"]
    fp32 = dataclasses.replace(changed.fp32, augment=PROFILES["cpu"].fp32.augment)
    assert dataclasses.replace(changed, fp32=fp32) == PROFILES["cpu"]


@pytest.mark.parametrize(
    ("one", "other"),
    [("fp32.lr=0.9", "fp32.lr_min=0.8"), ("fp32.augment.scale_min=1.2", "fp32.augment.scale_max=1.5")],
)
def test_the_order_of_overrides_does_not_matter(one, other):
    forward, backward = (parse_overrides(text) for text in (f"{one} {other}", f"{other} {one}"))
    assert get_profile("cpu", **forward) == get_profile("cpu", **backward)


NO_WHOLE_NUMBERS = ["", "abc", "1.5", "1e2", "nan", "0x10", "--1", "9" * 5000, None, [16], 16.5, {"a": 1}]


@pytest.mark.parametrize("value", NO_WHOLE_NUMBERS)
def test_what_is_no_whole_number_is_no_width(value):
    assert "width must be int" in message_of(lambda: get_profile("cpu", width=value))


OUT_OF_RANGE = """
    width=3 width=2000 width=-8 image_size=7 image_size=4096 arch=resnet99 stem=Cifar calibration_images=0
    eval_batch_size=0 latency_rounds=2 latency_runs=0 study_seeds=1 study_seeds=101 processes=-1
    validation_fraction=0 validation_fraction=1 fp32.epochs=0 fp32.epochs=100001 fp32.batch_size=0
    fp32.epoch_images=-1 fp32.micro_batch=-1 fp32.lr=0 fp32.lr=-0.1 fp32.lr=inf fp32.lr_min=0.5
    fp32.init=dirac fp32.bias_lr=0 fp32.schedule=linear fp32.restart_epochs=0 fp32.restart_mult=0
    fp32.warmup=1 fp32.momentum=1 fp32.label_smoothing=-0.1 fp32.weight_decay=-1 fp32.weight_decay=inf
    fp32.mixup_alpha=inf fp32.mixup_prob=1.1 fp32.cutmix_alpha=-1 fp32.cutmix_prob=1.1 fp32.clip_norm=-1
    fp32.small_size=0 qat.freeze_at=1.01 fp32.augment.crop_padding=33 fp32.augment.padding_mode=edge
    fp32.augment.policy=auto fp32.augment.policy=Trivial fp32.augment.hue=0.6 fp32.augment.brightness=1.5
    fp32.augment.translate=-0.1 fp32.augment.rotation_degrees=181 fp32.augment.scale_min=0
    fp32.augment.scale_min=1.1 fp32.augment.scale_max=0.9 fp32.augment.scale_max=inf fp32.augment.cutout=-1
    fp32.augment.erasing_prob=2 compared_images=-1 studies=enginez
"""


@pytest.mark.parametrize("pair", OUT_OF_RANGE.split())
def test_a_value_out_of_range_is_refused_by_name(pair):
    name = pair.partition("=")[0].split(".")[-1]
    assert name in message_of(lambda: get_profile("cpu", **parse_overrides(pair)))


@pytest.mark.parametrize("group", ["", "fp32.", "qat.augment."])
def test_no_number_may_be_nan(group):
    config = PROFILES["cpu"]
    for name in group.split(".")[:-1]:
        config = getattr(config, name)
    numbers = [name for name, value in vars(config).items() if isinstance(value, float)]
    assert numbers
    for name in numbers:
        with pytest.raises(LabError, match=f"{name} must be .*, found nan"):
            get_profile("cpu", **{f"{group}{name}": "nan"})


def test_an_image_cannot_be_mixed_more_than_always():
    both = {"fp32.mixup_prob": "0.6", "fp32.cutmix_prob": "0.5"}
    assert "mixup_prob + cutmix_prob must be at most 1" in message_of(lambda: get_profile("cpu", **both))
    get_profile("cpu", **both | {"fp32.cutmix_prob": "0.4"})


@pytest.mark.parametrize("name", ["erasing_scale", "erasing_ratio"])
@pytest.mark.parametrize("value", ["0.1", "0.1,0.2,0.3", "0.4,0.1", "-1,2", "nan,nan", "0.1,inf", "a,b", ","])
def test_an_erasing_range_needs_two_ordered_positive_numbers(name, value):
    assert name in message_of(lambda: get_profile("cpu", **{f"fp32.augment.{name}": value}))


def test_resnet9_gets_images_that_survive_its_poolings():
    assert get_profile("cpu", **{"image_size": 11}).image_size == 11, "8 of 11 pixels are left at first"
    assert get_profile("cpu", **{"image_size": 8, "fp32.small_share": 0.0}).image_size == 8
    assert get_profile("cpu", **{"image_size": 8, "arch": "resnet18"}).image_size == 8
    for values in ({"image_size": 9}, {"image_size": 31, "stem": "imagenet", "fp32.small_share": 0.0}):
        with pytest.raises(LabError, match="image_size must be such that ResNet-9 sees at least"):
            get_profile("cpu", **values)


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        (None, {}),
        ("  \t ", {}),
        (" fp32.epochs=2\twidth=16 ", {"fp32.epochs": "2", "width": "16"}),
        ("data=a=b", {"data": "a=b"}),
    ],
)
def test_overrides_are_pairs_between_blanks(text, pairs):
    assert parse_overrides(text) == pairs


@pytest.mark.parametrize("text", ["width", "width=", "=16", "=", "width = 16", "width=16 epochs", "width:16"])
def test_an_override_that_is_no_pair_is_refused_with_an_example(text):
    assert "example: SET=" in message_of(lambda: parse_overrides(text))


@pytest.mark.parametrize(("seed", "value"), [(0, 0), ("0", 0), ("42", 42), (str(2**32 - 1), 2**32 - 1)])
def test_a_seed_is_a_whole_number(seed, value):
    assert check_seed(seed) == value


@pytest.mark.parametrize("seed", [-1, 2**32, "-1", "abc", 1.5, "", None, True, "nan", "1e3", "9" * 5000])
def test_anything_else_is_no_seed(seed):
    assert message_of(lambda: check_seed(seed)).startswith("SEED must be a whole number")


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_has_its_name_and_stays_valid(name):
    assert PROFILES[name].name == name
    assert override(PROFILES[name], {"width": PROFILES[name].width}) == PROFILES[name]


REFERENCE = """
    arch=resnet50 stem=cifar width=64 image_size=32
    fp32.epochs=300 fp32.batch_size=256 fp32.epoch_images=0 fp32.momentum=0.9 fp32.weight_decay=1e-4
    fp32.lr=0.3 fp32.schedule=warm_restarts fp32.restart_epochs=50 fp32.restart_mult=2 fp32.lr_min=1e-4
    fp32.warmup=0 fp32.label_smoothing=0.05 fp32.mixup_alpha=0.2 fp32.mixup_prob=0.5 fp32.cutmix_prob=0
    fp32.clip_norm=1 fp32.init=he fp32.bias_lr=1
"""
REFERENCE_AUGMENT = """
    crop_padding=4 padding_mode=constant flip_prob=0.5 policy=none brightness=0.3 contrast=0.3 saturation=0.3
    hue=0.1 rotation_degrees=20 translate=0.1 scale_min=0.9 scale_max=1.1 cutout=0 erasing_prob=0.6
    erasing_scale=0.02,0.4 erasing_ratio=0.3,3.3
"""


GROUPS = [("", REFERENCE), ("fp32.augment.", REFERENCE_AUGMENT), ("qat.augment.", REFERENCE_AUGMENT)]


@pytest.mark.parametrize(("group", "text"), GROUPS)
def test_the_reference_is_trained_as_its_report_says(group, text):
    values = {group + name: value for name, value in parse_overrides(text).items()}
    assert get_profile("reference", **values) == PROFILES["reference"]
