"""Profiles: every hyperparameter of the lab, on one page. A profile shows only how it differs.

Its type says what a parameter may be: in an interval, whose round bracket leaves the end out, or a name.
"""

import contextlib
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

from labcore import LabError, nearest

Count = Annotated[int, "[1, inf)"]
CountOrZero = Annotated[int, "[0, inf)"]
Probability = Annotated[float, "[0, 1]"]
Share = Annotated[float, "[0, 1)"]
PositiveShare = Annotated[float, "(0, 1]"]

# Every stage and its notebook, in their order.
NOTEBOOKS = {
    "fp32": "01_fp32_train",
    "ptq": "02_ptq",
    "qat": "03_qat",
    "compare": "04_compare",
    "observers": "05_observers",
    "mixed": "06_mixed_precision",
    "training": "07_training_study",
    "engines": "09_engines",
    "robustness": "10_robustness",
    "parts": "11_parts",
    "seeds": "12_seeds",
    "explore": "13_explore",
    "claims": "08_claims",  # made last, from all the others
}
# Those that `make studies` runs. `make report` only reports them, but for a profile's own `studies`.
STUDIES = ("observers", "mixed", "training", "engines", "robustness", "parts", "seeds", "explore")


def _check(name: str, value, ok: bool, expected: str) -> None:
    if not ok:
        raise LabError(f"{name} must be {expected}, found {value!r}; change it and run again.")


def _inside(value: float, interval: str) -> bool:
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = low < value if interval[0] == "(" else low <= value
    below = value < high if interval[-1] == ")" else value <= high
    return above and below


def _check_types(config, prefix: str = "") -> None:
    """Raise LabError for the first value that is not in the interval, or none of the names, of its type."""
    for name, kind in get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        if get_origin(kind) is Annotated:
            (interval,) = kind.__metadata__
            _check(prefix + name, value, _inside(value, interval), f"in {interval}")
        elif get_origin(kind) is Literal:
            _check(prefix + name, value, value in get_args(kind), f"one of {', '.join(get_args(kind))}")


@dataclass(frozen=True)
class Augment:
    """Training transforms in their order, with torchvision's names. Zero switches one off."""

    crop_padding: Annotated[int, "[0, 32]"] = 4  # pixels
    padding_mode: Literal["constant", "reflect"] = "constant"  # constant: black
    flip_prob: Probability = 0.5
    policy: Literal["none", "trivial"] = "none"  # TrivialAugmentWide (Müller and Hutter, 2021)
    brightness: Probability = 0.0
    contrast: Probability = 0.0
    saturation: Probability = 0.0
    hue: Annotated[float, "[0, 0.5]"] = 0.0
    rotation_degrees: Annotated[float, "[0, 180]"] = 0.0
    translate: Probability = 0.0  # a share of the image
    scale_min: Annotated[float, "(0, 10]"] = 1.0
    scale_max: Annotated[float, "(0, 10]"] = 1.0
    cutout: Annotated[int, "[0, 512]"] = 0  # pixels: a square in the mean colour (DeVries and Taylor, 2017)
    erasing_prob: Probability = 0.0  # RandomErasing (Zhong et al., 2017)
    erasing_scale: tuple[float, float] = (0.02, 0.4)
    erasing_ratio: tuple[float, float] = (0.3, 3.3)

    def __post_init__(self):
        _check_types(self, "augment.")
        _check("augment.scale_min", self.scale_min, self.scale_min <= self.scale_max, "at most scale_max")
        for name, top in (("erasing_scale", 1), ("erasing_ratio", 100)):
            pair = getattr(self, name)
            ok = len(pair) == 2 and 0 < pair[0] <= pair[1] <= top
            _check(f"augment.{name}", pair, ok, f"two numbers, low,high, above 0 and at most {top}")


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of one training run; the same loop reads them for FP32 and for QAT."""

    epochs: Annotated[int, "[1, 100000]"]
    batch_size: Annotated[int, "[1, 65536]"]
    lr: Annotated[float, "(0, 100]"]
    # The first weights (labcore/training/first_weights.py), or those that WEIGHTS= names, to be trained on.
    init: Literal["he", "identity", "whitened", "weights"] = "he"
    # Of BatchNorm's biases: multiplies the learning rate, divides weight decay (Page, 2018; Jordan, 2024).
    bias_lr: Annotated[float, "(0, 1000]"] = 1.0
    epoch_images: CountOrZero = 0  # images of an epoch, drawn anew every time; 0 takes all
    lr_min: float = 0.0
    # A linear warm-up, then half a cosine from `lr` to `lr_min`; or cycles of `restart_epochs`, each
    # `restart_mult` times as long as the one before (Loshchilov and Hutter, 2017).
    schedule: Literal["cosine", "warm_restarts"] = "cosine"
    warmup: Share = 0.2  # of the steps
    restart_epochs: Count = 50
    restart_mult: Count = 2
    momentum: Share = 0.9
    weight_decay: Annotated[float, "[0, 100]"] = 1e-3
    label_smoothing: Share = 0.1
    # An image is mixed with another by mixup (Zhang et al., 2018) or by CutMix (Yun et al., 2019), or stays.
    mixup_alpha: Annotated[float, "[0, 100]"] = 0.0
    mixup_prob: Probability = 0.0
    cutmix_alpha: Annotated[float, "[0, 100]"] = 0.0
    cutmix_prob: Probability = 0.0
    clip_norm: Annotated[float, "[0, inf]"] = 0.0  # 0 does not clip
    ema_decay: Share = 0.0  # of an average of the weights, which is then scored and kept
    micro_batch: CountOrZero = 0  # images that go through the network together; BatchNorm averages over these
    # In the first `small_share` of the epochs, images have `small_size` of their side (Tan and Le, 2021).
    small_share: Share = 0.0
    small_size: PositiveShare = 0.75
    # After this share of the epochs QAT keeps ranges and BatchNorm's statistics (Krishnamoorthi, 2018, 3.2).
    freeze_at: PositiveShare = 1.0
    scale_lr: PositiveShare = 0.01  # learning rate of learned thresholds, in powers of two; scheduled as `lr`
    augment: Augment = field(default_factory=Augment)

    def __post_init__(self):
        _check_types(self)
        _check("lr_min", self.lr_min, 0 <= self.lr_min <= self.lr, "between 0 and lr")
        mixed = self.mixup_prob + self.cutmix_prob
        _check("mixup_prob + cutmix_prob", mixed, mixed <= 1, "at most 1")

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in pairs."""
        return bool(self.mixup_prob or self.cutmix_prob)


@dataclass(frozen=True)
class Profile:
    """One way to run the whole lab."""

    name: str
    fp32: Recipe
    qat: Recipe
    arch: Literal["resnet9", "resnet18", "resnet34", "resnet50"] = "resnet9"
    width: Annotated[int, "[4, 1024]"] = 32  # channels of the stem
    stem: Literal["cifar", "imagenet"] = "cifar"
    image_size: Annotated[int, "[8, 512]"] = 32  # pixels to a side
    data: str | None = None
    validation_fraction: Annotated[float, "(0, 1)"] = 0.1
    calibration_images: Count = 1024
    eval_batch_size: Count = 32  # images at a time where nothing trains; small ones stay in a CPU's caches
    latency_rounds: Annotated[int, "[3, inf)"] = 20
    latency_runs: Count = 10
    compared_images: CountOrZero = 0  # that judge what is only compared, where all take long; 0 takes all
    study_seeds: Annotated[int, "[2, 100]"] = 3
    verdict_seeds: Annotated[int, "[2, 100]"] = 5  # where a verdict rests on differences between trainings
    studies: tuple[str, ...] = ()  # that belong to its report: make report runs them too
    processes: Annotated[int, "[0, 1024]"] = 0  # that train together; 0 is one for every GPU, or one on a CPU

    def reuses(self, weights: str | None) -> bool:
        """Return whether WEIGHTS= stands for the FP32 training, instead of being what it starts from.

        Raises LabError where the recipe starts from weights and none are named.
        """
        if self.fp32.init == "weights" and not weights:
            raise LabError("fp32.init=weights starts from weights trained before: give WEIGHTS= as well.")
        return bool(weights) and self.fp32.init != "weights"

    def __post_init__(self):
        _check_types(self)
        for name in self.studies:
            _check("studies", self.studies, name in STUDIES, f"some of {', '.join(STUDIES)}")
        if self.arch in ("resnet18", "resnet34"):
            # oneDNN's gradient of 1x1 convolutions with a stride writes past its memory (torch 2.15, AVX2).
            _check("width", self.width, self.width >= 8, f"at least 8 channels for {self.arch}")
        if self.arch == "resnet9":  # three poolings, two more steps of two in the stem for large images
            least = 8 if self.stem == "cifar" else 32
            small = [round(r.small_size * self.image_size) for r in (self.fp32, self.qat) if r.small_share]
            side = min(small, default=self.image_size)
            expected = f"such that ResNet-9 sees at least {least} pixels to a side ({side} with small_size)"
            _check("image_size", self.image_size, side >= least, expected)


def _convert(name: str, value, current):
    """Return the value with the type of the one it replaces; LabError where it has another and is no text."""
    kind = type(current)
    if current is None:
        return value
    if isinstance(value, str):
        with contextlib.suppress(ValueError):  # what stays text is refused below
            if kind is tuple:
                parts = [part.strip() for part in value.strip("()").split(",") if part.strip()]
                value = tuple(map(type(current[0]), parts)) if current else tuple(parts)
            else:
                value = kind(value)
    _check(name, value, isinstance(value, (int, float) if kind is float else kind), kind.__name__)
    return value


def override(config, values: dict):
    """Return a copy with some values replaced; a dotted name reaches inside ("fp32.augment.cutout").

    Raises LabError for an unknown name (with the nearest one), a wrong type or a value out of range.
    """
    names = [f.name for f in fields(config) if f.name != "name"]
    changes, inner_values = {}, {}
    for dotted, value in values.items():
        name, _, rest = dotted.partition(".")
        if name not in names:
            raise LabError(f"unknown parameter {dotted!r}: {nearest(name, names)}")
        current = getattr(config, name)
        if is_dataclass(current) != bool(rest):
            content = ", ".join(vars(current)) if is_dataclass(current) else "one value"
            raise LabError(f"unknown parameter {dotted!r}: {name} holds {content}; correct the name.")
        if rest:
            inner_values.setdefault(name, {})[rest] = value
        else:
            changes[name] = _convert(dotted, value, current)
    changes |= {name: override(getattr(config, name), part) for name, part in inner_values.items()}
    return replace(config, **changes)  # at once: a check may compare two of them


# QAT takes the crops of FP32 training: BatchNorm would learn the statistics of others within a hundred steps.
_crops = Augment(crop_padding=2, padding_mode="reflect")
_cpu_fp32 = Recipe(epochs=17, batch_size=128, lr=0.15, init="whitened", bias_lr=16.0, small_share=0.7)
_cpu_qat = Recipe(epochs=2, epoch_images=10_240, batch_size=128, lr=0.001, warmup=0.1, freeze_at=0.67)
_cpu = Profile("cpu", fp32=replace(_cpu_fp32, augment=_crops), qat=replace(_cpu_qat, augment=_crops))
_cpu = replace(_cpu, studies=("explore",))

_few = replace(_cpu, calibration_images=128, latency_rounds=3, latency_runs=3, study_seeds=2, verdict_seeds=2)
_upright = replace(_crops, flip_prob=0.0)  # digits
_smoke_fp32 = replace(_cpu_fp32, epochs=3, batch_size=64, lr=0.2, small_share=0.0, augment=_upright)
_smoke_qat = Recipe(epochs=1, epoch_images=640, batch_size=64, lr=0.02, freeze_at=0.67, augment=_upright)
_smoke = replace(_few, name="smoke", data="digits", image_size=16, width=8, fp32=_smoke_fp32, qat=_smoke_qat)

# The reference's network, by a recipe for hours on two cores that multiply bfloat16, or minutes on a GPU.
_resnet50_crops = Augment(padding_mode="reflect", cutout=8)
_resnet50_recipe = Recipe(epochs=30, batch_size=128, lr=0.15, warmup=0.15, weight_decay=5e-4)
_resnet50_fp32 = replace(_resnet50_recipe, small_share=0.666, small_size=0.5, augment=_resnet50_crops)
_resnet50_qat = replace(_cpu_qat, epochs=4, epoch_images=1_280, batch_size=64, freeze_at=0.5)
_large = replace(_cpu, arch="resnet50", width=64)
_resnet50 = replace(_large, name="resnet50", fp32=_resnet50_fp32, qat=_resnet50_qat, compared_images=1_000)
_resnet50 = replace(_resnet50, latency_rounds=5, latency_runs=3, studies=("engines", "parts"))

# The reference's own hyperparameters, to the letter (its 300 epochs end in the middle of the third cycle).
_colours = Augment(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1, erasing_prob=0.6)
_affine = replace(_colours, rotation_degrees=20.0, translate=0.1, scale_min=0.9, scale_max=1.1)
_restarts = Recipe(epochs=300, batch_size=256, lr=0.3, lr_min=1e-4, schedule="warm_restarts", warmup=0.0)
_mixup = replace(_restarts, label_smoothing=0.05, mixup_alpha=0.2, mixup_prob=0.5, augment=_affine)
_reference_fp32 = replace(_mixup, weight_decay=1e-4, clip_norm=1.0)
_reference_qat = replace(_reference_fp32, epochs=20, lr=1e-3, lr_min=1e-5, schedule="cosine", freeze_at=0.75)
_reference = replace(_large, name="reference", eval_batch_size=500, fp32=_reference_fp32, qat=_reference_qat)

PROFILES = {profile.name: profile for profile in (_smoke, _cpu, _resnet50, _reference)}


def get_profile(name: str, /, **overrides) -> Profile:
    """Return a profile by name, with overrides; dotted names, such as "fp32.lr", go through a dict."""
    if name not in PROFILES:
        raise LabError(f"unknown profile {name!r}: {nearest(name, PROFILES)}")
    return override(PROFILES[name], overrides)


def parse_overrides(text: str | None) -> dict[str, str]:
    """Return what SET= says: "fp32.epochs=2 width=16" -> {"fp32.epochs": "2", "width": "16"}."""
    pairs = {}
    for part in (text or "").split():
        name, _, value = part.partition("=")
        if not name or not value:
            raise LabError(f"SET= takes name=value pairs, found {part!r}; write for example: SET='width=16'.")
        pairs[name] = value
    return pairs


def check_seed(seed) -> int:
    """Return the seed as an integer in 0 … 2^32 - 1; LabError otherwise."""
    text = str(seed)
    ok = text.isdecimal() and len(text) <= 10 and int(text) < 2**32
    _check("SEED", seed, ok, "a whole number in 0 … 4294967295")
    return int(text)
