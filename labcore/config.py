"""Profiles: every hyperparameter of the lab, on one page. A profile shows only how it differs."""

import dataclasses
from dataclasses import dataclass, field, replace

from labcore import LabError, nearest

ARCHITECTURES = ("resnet9", "resnet18", "resnet34", "resnet50")
STEMS = ("cifar", "imagenet")
SCHEDULES = ("cosine", "warm_restarts")
POLICIES = ("none", "trivial", "rand")
PADDING_MODES = ("constant", "reflect")
INITS = ("he", "identity", "whitened")
SEED_MAX = 2**32 - 1
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
    "claims": "08_claims",  # made last, from all the others
}
# Those that `make studies` runs, and `make report` only reports.
STUDIES = ("observers", "mixed", "training", "engines", "robustness")


def _check(name: str, value, ok: bool, expected: str) -> None:
    if not ok:
        raise LabError(f"{name} must be {expected}, found {value!r}; change it and run again.")


def _fraction(name: str, value: float) -> None:
    _check(name, value, 0 <= value < 1, "in [0, 1)")


@dataclass(frozen=True)
class Augment:
    """Training transforms, in the order in which they are applied. Zero switches one off.

    The names and meanings are torchvision's; `padding_mode` is RandomCrop's, "constant" (black) or "reflect". `cutout` is
    the side in pixels of a square set to the mean colour (DeVries and Taylor, 2017); `erasing_*` is torchvision's RandomErasing (Zhong et al., 2017). `policy` is "trivial"
    (TrivialAugmentWide, Müller and Hutter, 2021), "rand" (RandAugment, Cubuk et al., 2020) or "none".
    """

    crop_padding: int = 4
    padding_mode: str = "constant"
    flip_prob: float = 0.5
    policy: str = "none"
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    rotation_degrees: float = 0.0
    translate: float = 0.0
    scale_min: float = 1.0
    scale_max: float = 1.0
    cutout: int = 0
    erasing_prob: float = 0.0
    erasing_scale: tuple[float, float] = (0.02, 0.4)
    erasing_ratio: tuple[float, float] = (0.3, 3.3)

    def __post_init__(self):
        _check("augment.crop_padding", self.crop_padding, 0 <= self.crop_padding <= 32, "in 0 … 32 pixels")
        _check(
            "augment.padding_mode",
            self.padding_mode,
            self.padding_mode in PADDING_MODES,
            f"one of {', '.join(PADDING_MODES)}",
        )
        _check("augment.flip_prob", self.flip_prob, 0 <= self.flip_prob <= 1, "a probability in [0, 1]")
        _check("augment.policy", self.policy, self.policy in POLICIES, f"one of {', '.join(POLICIES)}")
        _check(
            "augment.erasing_prob", self.erasing_prob, 0 <= self.erasing_prob <= 1, "a probability in [0, 1]"
        )
        _check("augment.hue", self.hue, 0 <= self.hue <= 0.5, "in [0, 0.5]")
        for name in ("brightness", "contrast", "saturation"):
            _check(f"augment.{name}", getattr(self, name), 0 <= getattr(self, name) <= 1, "in [0, 1]")
        _check(
            "augment.translate", self.translate, 0 <= self.translate <= 1, "a share of the image in [0, 1]"
        )
        _check(
            "augment.rotation_degrees",
            self.rotation_degrees,
            0 <= self.rotation_degrees <= 180,
            "in [0, 180]",
        )
        _check(
            "augment.scale_min",
            self.scale_min,
            0 < self.scale_min <= self.scale_max,
            "above 0, at most scale_max",
        )
        _check("augment.scale_max", self.scale_max, self.scale_max <= 10, "at most 10")
        _check("augment.cutout", self.cutout, 0 <= self.cutout <= 512, "0 or a side in pixels, at most 512")
        for name, top in (("erasing_scale", 1), ("erasing_ratio", 100)):
            pair = getattr(self, name)
            ok = len(pair) == 2 and 0 < pair[0] <= pair[1] <= top
            _check(f"augment.{name}", pair, ok, f"two numbers, low,high, above 0 and at most {top}")


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of one training run; the same loop reads them for FP32 and for QAT.

    `init` names the first weights (see labcore.model.initialize). `bias_lr` multiplies the learning rate of BatchNorm's biases, and
    divides their weight decay, so that the two together stay (Page, 2018, "How to train your ResNet"; Jordan, 2024, "94% on
    CIFAR-10 in 3.29 seconds on a single GPU", section 3.4). `epoch_images` shortens an epoch to that many training images, drawn anew every time; 0 takes all of them.
    `schedule` is "cosine" (linear warm-up over `warmup` of the steps, then half a cosine to `lr_min`) or "warm_restarts"
    (SGDR, Loshchilov and Hutter, 2017: cycles of `restart_epochs`, each `restart_mult` times the one before, from
    `lr` down to `lr_min`). `freeze_at` is the share of the epochs after which QAT stops observing and stops updating
    BatchNorm statistics (Jacob et al., 2018, section 3.1; Krishnamoorthi, 2018, section 3.2). `scale_lr` is the learning
    rate of learned thresholds, in powers of two, where QAT has any; it follows the same schedule. An image is mixed with
    another by mixup with probability `mixup_prob`, by CutMix (Yun et al., 2019) with `cutmix_prob`, else not at all.
    `ema_decay` averages the weights (see labcore.optim.Average); the average is what is scored and kept. `micro_batch` sends
    a batch through the network in parts of so many images; BatchNorm then averages over a part. In the first `small_share` of
    the epochs images are trained on at `small_size` of their side, which is quicker (progressive resizing; Tan and Le, 2021,
    "EfficientNetV2", section 4).
    """

    epochs: int
    batch_size: int
    lr: float
    init: str = "he"
    bias_lr: float = 1.0
    epoch_images: int = 0
    lr_min: float = 0.0
    schedule: str = "cosine"
    warmup: float = 0.2
    restart_epochs: int = 50
    restart_mult: int = 2
    momentum: float = 0.9
    weight_decay: float = 1e-3
    label_smoothing: float = 0.1
    mixup_alpha: float = 0.0
    mixup_prob: float = 0.0
    cutmix_alpha: float = 0.0
    cutmix_prob: float = 0.0
    clip_norm: float = 0.0
    ema_decay: float = 0.0
    micro_batch: int = 0
    small_share: float = 0.0
    small_size: float = 0.75
    freeze_at: float = 1.0
    scale_lr: float = 0.01
    augment: Augment = field(default_factory=Augment)

    def __post_init__(self):
        _check("epochs", self.epochs, 1 <= self.epochs <= 100_000, "in 1 … 100000")
        _check("batch_size", self.batch_size, 1 <= self.batch_size <= 65_536, "in 1 … 65536")
        _check("epoch_images", self.epoch_images, self.epoch_images >= 0, "0 (all) or a number of images")
        _check("lr", self.lr, 0 < self.lr <= 100, "in (0, 100]")
        _check("init", self.init, self.init in INITS, f"one of {', '.join(INITS)}")
        _check("bias_lr", self.bias_lr, 0 < self.bias_lr <= 1000, "a factor in (0, 1000]")
        _check("scale_lr", self.scale_lr, 0 < self.scale_lr <= 1, "in (0, 1]")
        _check("lr_min", self.lr_min, 0 <= self.lr_min <= self.lr, "between 0 and lr")
        _check("schedule", self.schedule, self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}")
        _check("restart_epochs", self.restart_epochs, self.restart_epochs >= 1, "at least 1")
        _check("restart_mult", self.restart_mult, self.restart_mult >= 1, "at least 1")
        for kind in ("mixup", "cutmix"):
            prob, alpha = getattr(self, f"{kind}_prob"), getattr(self, f"{kind}_alpha")
            _check(f"{kind}_prob", prob, 0 <= prob <= 1, "a probability in [0, 1]")
            _check(f"{kind}_alpha", alpha, 0 <= alpha <= 100, "in [0, 100]")
        mixed = self.mixup_prob + self.cutmix_prob
        _check("mixup_prob + cutmix_prob", mixed, mixed <= 1, "at most 1")
        _check("weight_decay", self.weight_decay, 0 <= self.weight_decay <= 100, "in [0, 100]")
        _check("clip_norm", self.clip_norm, self.clip_norm >= 0, "0 (off) or a norm")
        _check("freeze_at", self.freeze_at, 0 < self.freeze_at <= 1, "a share of the epochs in (0, 1]")
        _check("micro_batch", self.micro_batch, self.micro_batch >= 0, "0 (whole) or a number of images")
        _check("small_size", self.small_size, 0 < self.small_size <= 1, "a share of the side in (0, 1]")
        for name in ("warmup", "momentum", "label_smoothing", "ema_decay", "small_share"):
            _fraction(name, getattr(self, name))

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
    arch: str = "resnet9"
    width: int = 32
    stem: str = "cifar"
    image_size: int = 32
    data: str | None = None
    validation_fraction: float = 0.1
    calibration_images: int = 1024
    eval_batch_size: int = 64  # images at a time where nothing trains; small ones stay in a CPU's caches
    latency_rounds: int = 20
    latency_runs: int = 10
    study_seeds: int = 3
    verdict_seeds: int = 5  # where a claim's verdict rests on the differences between trainings
    processes: int = 0  # that train together; 0 means one for every GPU, or one on a CPU

    def __post_init__(self):
        _check("arch", self.arch, self.arch in ARCHITECTURES, f"one of {', '.join(ARCHITECTURES)}")
        _check("stem", self.stem, self.stem in STEMS, f"one of {', '.join(STEMS)}")
        _check("width", self.width, 4 <= self.width <= 1024, "in 4 … 1024 channels")
        _check("image_size", self.image_size, 8 <= self.image_size <= 512, "in 8 … 512 pixels")
        _check("calibration_images", self.calibration_images, self.calibration_images >= 1, "at least 1")
        _check("eval_batch_size", self.eval_batch_size, self.eval_batch_size >= 1, "at least 1")
        _check("latency_rounds", self.latency_rounds, self.latency_rounds >= 3, "at least 3")
        _check("latency_runs", self.latency_runs, self.latency_runs >= 1, "at least 1")
        for name in ("study_seeds", "verdict_seeds"):
            _check(name, getattr(self, name), 2 <= getattr(self, name) <= 100, "in 2 … 100")
        _check("processes", self.processes, 0 <= self.processes <= 1024, "0 (one per GPU) … 1024")
        _fraction("validation_fraction", self.validation_fraction)
        _check("validation_fraction", self.validation_fraction, self.validation_fraction > 0, "above 0")
        if self.arch in ("resnet18", "resnet34"):
            # oneDNN's gradient of their 1x1 convolutions with a stride writes past its memory (torch 2.15, AVX2, channels_last).
            _check("width", self.width, self.width >= 8, f"at least 8 channels for {self.arch}")
        if self.arch == "resnet9":  # three poolings, two more steps of two in the stem for large images
            least = 8 if self.stem == "cifar" else 32
            small = [round(r.small_size * self.image_size) for r in (self.fp32, self.qat) if r.small_share]
            side = min(small, default=self.image_size)
            expected = f"such that ResNet-9 sees at least {least} pixels to a side, small_size ({side} pixels) included"
            _check("image_size", self.image_size, side >= least, expected)


# QAT takes the crops of FP32 training: BatchNorm would learn the statistics of others within a hundred steps.
_reflected = Augment(crop_padding=2, padding_mode="reflect")
_cpu = Profile(
    name="cpu",
    fp32=Recipe(
        epochs=17,
        batch_size=128,
        lr=0.15,
        init="whitened",
        bias_lr=16.0,
        small_share=0.7,
        augment=_reflected,
    ),
    qat=Recipe(
        epochs=2,
        epoch_images=10_240,
        batch_size=128,
        lr=0.001,
        warmup=0.1,
        freeze_at=0.67,
        augment=_reflected,
    ),
)
_smoke = replace(
    _cpu,
    name="smoke",
    data="digits",
    image_size=16,  # the digits have 8
    width=8,
    fp32=replace(
        _cpu.fp32,
        epochs=3,
        batch_size=64,
        lr=0.2,
        small_share=0.0,
        augment=replace(_reflected, flip_prob=0.0),
    ),
    qat=Recipe(
        epochs=1,
        epoch_images=640,
        batch_size=64,
        lr=0.02,
        freeze_at=0.67,
        augment=replace(_reflected, flip_prob=0.0),
    ),
    calibration_images=128,
    latency_rounds=3,
    latency_runs=3,
    study_seeds=2,
    verdict_seeds=2,
)
# A wider network and more epochs, up to two hours on two cores that multiply bfloat16 (benchmarks/README.md).
_cpu_long = replace(
    _cpu,
    name="cpu-long",
    width=64,
    fp32=replace(_cpu.fp32, epochs=28, weight_decay=6e-4, augment=replace(_reflected, cutout=8)),
    qat=replace(_cpu.qat, augment=replace(_reflected, cutout=8)),
)
_full = replace(
    _cpu,
    name="full",
    arch="resnet50",
    width=64,
    fp32=Recipe(
        epochs=60,
        batch_size=512,
        lr=0.4,
        weight_decay=5e-4,
        warmup=0.05,
        cutmix_alpha=1.0,
        cutmix_prob=0.5,
        ema_decay=0.999,
        augment=Augment(policy="trivial", cutout=8),
    ),
    qat=Recipe(epochs=6, batch_size=512, lr=0.002, weight_decay=5e-4, warmup=0.1, freeze_at=0.67),
    eval_batch_size=500,
)
# The reference's own hyperparameters, to the letter (its 300 epochs end in the middle of the third cycle).
_reference_fp32 = Recipe(
    epochs=300,
    batch_size=256,
    lr=0.3,
    lr_min=1e-4,
    schedule="warm_restarts",
    restart_epochs=50,
    restart_mult=2,
    warmup=0.0,
    weight_decay=1e-4,
    label_smoothing=0.05,
    mixup_alpha=0.2,
    mixup_prob=0.5,
    clip_norm=1.0,
    augment=Augment(
        brightness=0.3,
        contrast=0.3,
        saturation=0.3,
        hue=0.1,
        rotation_degrees=20.0,
        translate=0.1,
        scale_min=0.9,
        scale_max=1.1,
        erasing_prob=0.6,
    ),
)
_reference = replace(
    _full,
    name="reference",
    fp32=_reference_fp32,
    qat=replace(_reference_fp32, epochs=20, lr=1e-3, lr_min=1e-5, schedule="cosine", freeze_at=0.75),
)
PROFILES = {profile.name: profile for profile in (_smoke, _cpu, _cpu_long, _full, _reference)}


def _convert(name: str, text, current):
    """Text from the command line -> the type of the value it replaces."""
    kind = type(current)
    if current is None or isinstance(text, str) and kind is str:
        return text
    if not isinstance(text, str):
        _check(name, text, isinstance(text, (int, float) if kind is float else kind), kind.__name__)
        return text
    try:
        if kind is tuple:
            return tuple(float(part) for part in text.strip("()").split(","))
        return kind(text)
    except ValueError:
        raise LabError(f"{name} must be {kind.__name__}, found {text!r}; change it and run again.") from None


def override(config, values: dict):
    """A copy of a profile with some values replaced; a dotted name reaches inside ("fp32.augment.cutout").

    Raises LabError for an unknown name (with the nearest one), a wrong type or a value out of range.
    """
    changes, inner_values = {}, {}
    for dotted, value in values.items():
        name, _, rest = dotted.partition(".")
        known = [f.name for f in dataclasses.fields(config) if f.name != "name"]
        if name not in known:
            raise LabError(f"unknown parameter {dotted!r}: {nearest(name, known)}")
        current = getattr(config, name)
        if dataclasses.is_dataclass(current) != bool(rest):
            inner = [f.name for f in dataclasses.fields(current)] if dataclasses.is_dataclass(current) else []
            hint = f"it holds {', '.join(inner)}" if inner else "it holds one value"
            raise LabError(f"unknown parameter {dotted!r}: {name} is not written like this; {hint}.")
        if rest:
            inner_values.setdefault(name, {})[rest] = value
        else:
            changes[name] = _convert(dotted, value, current)
    changes |= {name: override(getattr(config, name), part) for name, part in inner_values.items()}
    return replace(config, **changes)  # at once: a check may compare two of them


def get_profile(name: str, /, **overrides) -> Profile:
    """The profile of that name, with overrides (dotted names allowed through a dict: get_profile("cpu", **{...}))."""
    if name not in PROFILES:
        raise LabError(f"unknown profile {name!r}: {nearest(name, PROFILES)}")
    return override(PROFILES[name], overrides)


def parse_overrides(text: str | None) -> dict[str, str]:
    """Return what SET= says: "fp32.epochs=2 width=16" -> {"fp32.epochs": "2", "width": "16"}."""
    pairs = {}
    for part in (text or "").split():
        name, sign, value = part.partition("=")
        if not sign or not name or not value:
            raise LabError(
                f"SET= takes name=value pairs separated by blanks, found {part!r}; example: SET='width=16'."
            )
        pairs[name] = value
    return pairs


def check_seed(seed) -> int:
    """The seed as an integer in 0 … 2^32 - 1; LabError otherwise."""
    try:
        value = int(str(seed))
    except ValueError:
        value = -1
    _check("SEED", seed, 0 <= value <= SEED_MAX, f"a whole number in 0 … {SEED_MAX}")
    return value
