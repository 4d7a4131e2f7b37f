"""Study 7: PTQ, QAT, and FP32 trained on for as long, from several FP32 networks of one recipe.

The unit is the training of an FP32 network: what continues the same one says nothing about another.
"""

import copy
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
from torch.ao import quantization as tq

from labcore import LabError
from labcore.config import PROFILES, Recipe
from labcore.evaluate import predict
from labcore.files.artifacts import sha256_json
from labcore.files.code import modules_hash
from labcore.files.provenance import versions
from labcore.images.transforms import augment, mix, normalize
from labcore.model import QuantizableBasicBlock, QuantizableBottleneck, build_model
from labcore.qconfig import FLOAT, RECOMMENDED, REFERENCE, Scheme, has_vnni, make_qconfig
from labcore.quantize import calibrate, convert, prepare_qat, simulate
from labcore.run import Run
from labcore.stats import shared_hits
from labcore.studies.study import Cell, Study
from labcore.train import MODULES, QAT_MODULES, fit, training_identity
from labcore.training.checkpoint import Checkpoints

# What decides the hits of a network.
CODE = ("data", "evaluate", "quantizers.bias", "studies.kernels", "studies.seeds", "studies.study")
CODE += (*MODULES, *QAT_MODULES)
# Post-training quantization, of weights and of activations.
PTQ = {
    "ptq": (REFERENCE, REFERENCE),
    "no_clamp": (Scheme(), Scheme()),
    "float_same": (FLOAT, FLOAT),
    "least_alone": (Scheme(rule="least_error"), Scheme(rule="least_error")),
    "best_ptq": RECOMMENDED,
    "float_best": tuple(replace(one, rule="none") for one in RECOMMENDED),
}
# What the weights after the last epoch answer without rounding.
UNROUNDED = ("fp32_on_last", "qat_unrounded")
# How training images are shown to QAT that was trained as in the reference (`Starts._hits`).
VIEWS = ("plain", "unrounded", "augmented", "mixed", "counted")


class Starts(Study):
    """The run's FP32 network as a start, and by `start` others: trained alike, from another seed."""

    def __init__(self, run: Run):
        super().__init__(run, "seeds")
        self.seed, qat = run.seed, run.profile.qat
        # Frozen after its first epoch, so that one more than the profile's is chosen among frozen ones.
        self.recipe = replace(qat, epochs=qat.epochs + 1, freeze_at=1 / (qat.epochs + 1))
        self.base["code"] = [modules_hash(*CODE), versions()["torch"]]

    def start(self, number: int) -> "Starts":
        """Return the study on another FP32 network; number 0 is the run's own.

        It is trained by the profile's recipe on the same images, once a cell needs it, or goes on where it
        was killed.
        """
        if number == 0:
            return self
        run, profile, other = self.run, self.run.profile, copy.copy(self)
        if profile.fp32.init == "weights":
            found = "found fp32.init=weights; leave notebook 12 out."
            raise LabError(f"other trainings need an init that draws fresh weights, {found}")
        other.seed = run.seed + number
        torch.manual_seed(other.seed)
        other._first = build_model(profile.arch, len(self.data.classes), profile.width, profile.stem)
        run.initialize(other._first, profile.fp32.init)
        other._calibrated, other._answers = {}, {}
        identity = training_identity(profile.fp32, self.data, self.split, other.seed, other._first)
        other.base = self.base | {"weights": identity}  # which decides them
        for name in ("model", "reference"):
            other.__dict__.pop(name, None)
        return other

    @cached_property
    def model(self) -> nn.Module:
        """The FP32 network of this start, trained when a cell first asks for it."""
        args = self.run.profile.fp32, self.data, self.split, self.seed
        path, title = self.run.path(self.stage, f"starts/{self.seed}"), f"FP32, seed {self.seed}"
        return fit(self._first, *args, path, description=title).model.cpu()

    def experiments(self) -> dict[str, Cell]:
        """Return a cell per network of this start: its hits on the test images, and what else it says."""
        reference = PROFILES["reference"].qat
        theirs = {name: getattr(reference, name) for name in ("augment", "mixup_alpha", "mixup_prob")}
        qat, reference_qat = self._prepared, lambda: self._prepared(*PTQ["ptq"])
        todo = {"fp32": self._cell("fp32", lambda: {"right": self._right(self.model)})}
        for name, schemes in PTQ.items():
            build = lambda schemes=schemes: self.quantized(*schemes)  # noqa: E731
            todo[name] = self._cell(name, lambda build=build: {"right": self._right(build())})
        todo["additions"] = self._cell("additions", self._additions)
        for name, schemes in {"reference": PTQ["ptq"], "recommended": RECOMMENDED}.items():
            fusing = lambda schemes=schemes: self._fusing(*schemes)  # noqa: E731
            todo[f"fusing, {name}"] = self._cell(f"fusing, {name}", fusing)
        # Without rounding, but prepared for QAT: BatchNorm is then frozen with it, and nothing else differs.
        floats = lambda: reference_qat().apply(tq.disable_fake_quant)  # noqa: E731
        todo["fp32_on"] = self._trained("fp32_on", floats, self.recipe, self._unrounded)
        todo["qat"] = self._trained("qat", reference_qat, self.recipe, self._unrounded)
        todo["best_qat"] = self._trained("best_qat", lambda: qat(*RECOMMENDED), self.recipe)
        folded = lambda: qat(*PTQ["ptq"], keep_batchnorm=False)  # noqa: E731
        todo["qat_folded"] = self._trained("qat_folded", folded, self.recipe)
        recipe = replace(self.recipe, **theirs)
        todo["qat_theirs"] = self._trained("qat_theirs", reference_qat, recipe, self._hits)
        return todo

    def _cell(self, name: str, compute: Callable[[], dict], **more) -> Cell:
        return Cell({"start": self.seed, "network": name, **more}, compute)

    def _right(self, model: nn.Module) -> list[float]:
        """Return the `shared_hits` of the test images, so that no order of the classes decides."""
        logits = predict(model, self.data.test_images, self.run.profile.eval_batch_size, "test")
        return shared_hits(logits, self.data.test_labels).tolist()

    def _prepared(self, weight: Scheme, activation: Scheme, **options) -> nn.Module:
        qconfig = make_qconfig(weight, activation, "qat", full_range=True)
        return calibrate(prepare_qat(self.model, qconfig, **options), self.batches)

    def _trained(self, name: str, build, recipe: Recipe, more: Callable = lambda *_: {}) -> Cell:
        """Make a cell: a network trained on, converted where kernels add exactly; `more` says what else.

        It is given the network of the best epoch, and the weights after the last one.
        """
        folder = f"fits/{sha256_json([self.base, name, asdict(recipe)])[:24]}"
        path, title = self.run.path(self.stage, folder), f"{name}, seed {self.seed}"

        def compute() -> dict:
            split = replace(self.split, validation=self.split.validation[::5])  # they choose the epoch
            prepared, args = build(), (recipe, self.data, split, self.seed)
            model = fit(prepared, *args, path, description=title).model.cpu()
            last = Checkpoints(path, training_identity(*args, prepared)).load()["model"]
            is_int8 = name != "fp32_on" and has_vnni()
            return {"right": self._right(convert(model) if is_int8 else model)} | more(model, last)

        cell = self._cell(name, compute, recipe=asdict(recipe))
        return replace(cell, cleanup=lambda: shutil.rmtree(path, ignore_errors=True))

    def _fusing(self, weight: Scheme, activation: Scheme) -> dict:
        """Return how much larger the logits' squared error is fused than apart, on validation images."""
        networks = [convert(self.eager(weight, activation, fused=fused)) for fused in (False, True)]
        apart, fused = (np.square(self.logits(one) - self.reference).mean() for one in networks)
        return {"error_rise": float(fused - apart), "apart": float(apart), "fused": float(fused)}

    def _additions(self) -> dict:
        """Return the hits of the reference's scheme, simulated, with int8 and with float additions.

        In the second neither the sums nor the branch that was computed for them are rounded.
        """
        simulated = simulate(self.prepared(*PTQ["ptq"]))
        right = {"right": self._right(simulated)}
        for block in simulated.modules():
            if isinstance(block, QuantizableBasicBlock | QuantizableBottleneck):
                last = block.conv3 if isinstance(block, QuantizableBottleneck) else block.conv2
                for part in (block.add_relu, last, block.downsample or nn.Identity()):
                    part.apply(tq.disable_fake_quant)
        return right | {"floats": self._right(simulated)}

    def _unrounded(self, model: nn.Module, last: dict[str, Tensor]) -> dict:
        """Return the hits of the weights after the last epoch, which no image chose, without rounding.

        last: on the test images; train: on training images.
        """
        model.load_state_dict(last)
        model.apply(tq.disable_fake_quant)
        sample = self.split.train_sample
        logits = predict(model, self.data.train_images[sample], description="training images")
        return {
            "last": self._right(model),
            "train": shared_hits(logits, self.data.train_labels[sample]).tolist(),
        }

    @torch.no_grad()
    def _hits(self, model: nn.Module, _=None, batch_size: int = 64) -> dict:
        """Return hits on training images, one number per image, as they are shown: see `VIEWS`.

        plain, as they are; unrounded, without fake quantization; augmented and mixed as in the reference, a
        mixed image's answer counted by its labels' shares; counted, what a perfect answer would get of these.
        """
        reference, rng = PROFILES["reference"].qat, np.random.default_rng(self.seed)
        # In mixed order: neighbours are mixed, and those of a data set sorted by class would share theirs.
        sample, hits = rng.permutation(self.split.train_sample), {view: [] for view in VIEWS}
        for rows in np.array_split(sample, max(1, len(sample) // batch_size)):
            images = torch.from_numpy(self.data.train_images[rows])
            labels = torch.from_numpy(self.data.train_labels[rows])
            augmented = augment(images, reference.augment, rng)
            mixed, partner, share = mix(augmented, reference, rng)
            with_rounding = {"plain": normalize(images), "augmented": augmented, "mixed": mixed}
            answers = {view: model(x).argmax(1) for view, x in with_rounding.items()}
            model.apply(tq.disable_fake_quant)
            answers["unrounded"] = model(with_rounding["plain"]).argmax(1)
            model.apply(tq.enable_fake_quant)
            right = {view: (answer == labels).float() for view, answer in answers.items()}
            other = labels[partner]
            right["mixed"] = share * right["mixed"] + (1 - share) * (answers["mixed"] == other).float()
            right["counted"] = torch.where(other == labels, 1.0, torch.maximum(share, 1 - share))
            for view in VIEWS:
                hits[view] += [round(value, 4) for value in right[view].tolist()]
        return {"hits": hits}
