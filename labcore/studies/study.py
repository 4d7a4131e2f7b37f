"""Many small experiments on one trained network: each depends on its key and the study's `base` alone."""

import contextlib
import copy
import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from timeit import timeit

import numpy as np
import pandas as pd
from torch import Tensor, nn

from labcore import LabError, train
from labcore.config import NOTEBOOKS, Recipe
from labcore.data import calibration_batches, evenly_spaced
from labcore.engines.eager import load_float
from labcore.evaluate import predict
from labcore.files.artifacts import load_logits, read_json, save_logits, sha256_json, write_json
from labcore.files.code import modules_hash, notebook_sources
from labcore.files.progress import progress
from labcore.files.provenance import versions
from labcore.files.tensors import state_hash
from labcore.qconfig import CustomQConfig, Scheme, has_vnni, make_qconfig
from labcore.quantize import calibrate, convert, layers, prepare_ptq, prepare_qat, recalibrate, simulate
from labcore.run import Run
from labcore.stats import by_image, paired_error, summarize_paired
from labcore.studies.errors import count_clamped
from labcore.studies.kernels import on_onednn, predict_ptq, run_exactly
from labcore.studies.mixed import overrides, save_packed
from labcore.train import fit
from labcore.training.device import multiplies_bfloat16

# What decides the result of a cell.
MODULES = ("data", "model", "observer", "qconfig", "quantize", "evaluate", "stats")
MODULES += ("images.transforms", "quantizers.bias", "quantizers.learned", "quantizers.least_error")
MODULES += tuple(f"studies.{name}" for name in ("errors", "kernels", "mixed", "refine", "study"))


@dataclass(frozen=True)
class Cell:
    """One experiment: what decides its result, and the function that gives it as JSON values."""

    key: dict
    compute: Callable[[], dict]
    cleanup: Callable[[], object] = lambda: None  # once the result is kept


def run_cells(cells: dict[str, Cell], folder: Path, base: dict, description: str) -> pd.DataFrame:
    """Return the results of all cells, one row each by name: read where they are kept, else computed.

    Files are named after `base`, which decides all cells, and a cell's key, so that a killed study goes on.
    A cell whose file is damaged is computed again.
    """
    rows = {}
    with progress(len(cells), description, unit="cell") as bar:
        for name, cell in cells.items():
            path = folder / f"{sha256_json(base | cell.key)[:24]}.json"
            with contextlib.suppress(LabError, KeyError, TypeError):  # missing or damaged
                rows[name] = read_json(path)["result"]
            if name not in rows:
                write_json(path, {"cell": name, "key": cell.key, "result": cell.compute()})
                cell.cleanup()
                rows[name] = read_json(path)["result"]
            bar.update()
    return pd.DataFrame(rows).T.infer_objects()


class Study:
    """The experiments of one stage of a run, on the FP32 network that the run trained.

    Validation images judge: `images` of them, evenly spaced, or all; none by which study `without` judges.
    """

    def __init__(self, run: Run, stage: str, images: int | None = None, without: "Study | None" = None):
        self.run, self.stage = run, stage
        self.data, self.split = run.data, run.split
        self.model = load_float(run.path("fp32", "weights.pt"), run.model())
        judges = np.setdiff1d(self.split.validation, without.judges if without else [])
        self.judges = judges = evenly_spaced(judges, images or len(judges))
        self.images, self.labels = self.data.train_images[judges], self.data.train_labels[judges]
        self._calibrated: dict[Scheme | str, nn.Module] = {}
        self._answers: dict[tuple[Scheme, Scheme], np.ndarray] = {}
        self.base = {
            "weights": state_hash(self.model.state_dict()),
            "images": [self.data.sha256, self.split.sha256, sha256_json(judges.tolist()), run.seed],
            "code": [modules_hash(*MODULES), versions()["torch"]],
            "numbers": [has_vnni(), multiplies_bfloat16()],
        }

    def redrawn(self, draw: int) -> "Study":
        """Return the study with other images for calibration: as many training images, drawn by a seed."""
        other, rng = copy.copy(self), np.random.default_rng([self.run.seed, draw])
        drawn = np.sort(rng.choice(self.split.train, len(self.split.calibration), replace=False))
        other.split, other._calibrated, other._answers = replace(self.split, calibration=drawn), {}, {}
        other.base = self.base | {"calibration": other.split.sha256}
        other.__dict__.pop("batches", None)
        return other

    @cached_property
    def reference(self) -> np.ndarray:
        """FP32's logits on the validation images, (N, classes)."""
        return predict(self.model, self.images, description="FP32, validation")

    @cached_property
    def batches(self) -> list[Tensor]:
        """The calibration images, normalised, (B, 3, H, W) each."""
        return calibration_batches(self.data, self.split)

    def cells(self, todo: dict[str, Cell], description: str) -> pd.DataFrame:
        """Return the results of all cells, one row each by name (see `run_cells`)."""
        return run_cells(todo, self.run.path(self.stage, "cells"), self.base, description)

    def logits(self, model: nn.Module) -> np.ndarray:
        """Return a network's logits on the validation images, (N, classes)."""
        return predict(model, self.images, description="validation")

    def judge(self, logits: np.ndarray, reference: np.ndarray | None = None) -> dict:
        """Compare a quantized network's logits on the validation images with FP32's."""
        before = self.reference if reference is None else reference
        error = float(np.square(logits - before).mean())
        return summarize_paired(before, logits, self.labels) | {"logit_mse": error}

    def test(self, todo: dict[str, Callable[[], nn.Module]]) -> pd.DataFrame:
        """Judge networks that were chosen before on the test images; keep logits_<name>.npz."""
        before, labels = load_logits(self.run.path("fp32", "logits.npz"))
        rows = {}
        for name, build in todo.items():
            logits = predict(build(), self.data.test_images, description=f"{name}, test")
            save_logits(self.run.path(self.stage, f"logits_{name}.npz"), logits, labels)
            rows[name] = summarize_paired(before, logits, labels)
        return pd.DataFrame(rows).T.infer_objects()

    def prepared(self, weight: Scheme, activation: Scheme, model=None, **options) -> nn.Module:
        """Calibrate the FP32 network, or `model`, for PTQ in simulation; `options` are prepare_ptq's."""
        qconfig = make_qconfig(weight, activation, "simulated")
        if model is not None or options:
            return calibrate(prepare_ptq(model or self.model, qconfig, **options), self.batches)
        # It runs in float, so that one serves all weights, and all activations that are observed alike.
        is_own = activation.rule == "least_error" or activation.range == "histogram"
        alike = activation if is_own else activation.range
        if alike not in self._calibrated:
            self._calibrated[alike] = calibrate(prepare_ptq(self.model, qconfig), self.batches)
        return recalibrate(self._calibrated[alike], self.model, qconfig)

    def allocated(self, bits: dict[str, int], weight: Scheme, activation: Scheme) -> nn.Module:
        """Calibrate for PTQ in simulation, these layers' weights with bits of their own."""
        network = self.prepared(weight, activation)
        for name, qconfig in overrides(bits, weight, activation).items():
            layers(network)[name].qconfig = qconfig
        return network

    def packed_mb(self, bits: dict[str, int], weight: Scheme, activation: Scheme) -> float:
        """Return the size of the packed file of an allocation, in MB of 10^6 bytes."""
        path = self.run.path(self.stage, "cells/size.npz")
        size = save_packed(path, simulate(self.allocated(bits, weight, activation))) / 1e6
        path.unlink()
        return size

    def quantized(self, weight: Scheme, activation: Scheme, **options) -> nn.Module:
        """Quantize after training (PTQ), computed exactly; `options` as in `prepared`."""
        return run_exactly(simulate(self.prepared(weight, activation, **options)), activation.bits)

    def eager(self, weight: Scheme, activation: Scheme, **options) -> nn.Module:
        """Calibrate for PTQ by torch's eager mode, to be converted; `options` are prepare_ptq's."""
        return calibrate(prepare_ptq(self.model, make_qconfig(weight, activation), **options), self.batches)

    def torch_default(self, model: nn.Module | None = None) -> nn.Module:
        """Quantize with torch's own configuration, whose 7-bit activations never saturate; int8 kernels."""
        return convert(calibrate(prepare_ptq(model or self.model, CustomQConfig.DEFAULT.value), self.batches))

    def train(self, network: nn.Module, recipe: Recipe, folder: str, title: str) -> nn.Module:
        """Train on the run's images; go on in this folder of the stage where it was killed."""
        path, seed = self.run.path(self.stage, folder), self.run.seed
        quick = replace(self.split, validation=self.split.validation[::5])  # they choose the epoch
        return fit(network, recipe, self.data, quick, seed, path, description=title).model.cpu()

    def after_qat(self, weight: Scheme, activation: Scheme, mode: str, recipe: Recipe) -> nn.Module:
        """Train on with fake quantization, in a mode of `make_qconfig`; convert where kernels add exactly."""
        key = sha256_json(self.base | _key("qat", weight, activation, mode, recipe))
        prepared = prepare_qat(self.model, make_qconfig(weight, activation, mode, full_range=True))
        folder, title = f"qat/{key[:24]}", f"{mode} W{weight.bits}A{activation.bits}"
        model = self.train(calibrate(prepared, self.batches), recipe, folder, title)
        return convert(model) if has_vnni() and weight.bits == activation.bits == 8 else model

    def judged(self, key: dict, build: Callable[[], nn.Module]) -> Cell:
        """Make a cell: the network that `build` gives, judged on validation images."""
        return Cell(key, lambda: self.judge(self.logits(build())))

    def _answered(self, weight: Scheme, activation: Scheme) -> np.ndarray:
        """Return the logits after PTQ on the validation images, computed once."""
        if (weight, activation) not in self._answers:
            self._answers[weight, activation] = self.logits(self.quantized(weight, activation))
        return self._answers[weight, activation]

    def ptq(self, weight: Scheme, activation: Scheme) -> Cell:
        """Make a cell: PTQ, judged, and how many scales the clamp changed."""

        def compute() -> dict:
            judged = self.judge(self._answered(weight, activation))
            return judged | count_clamped(self.prepared(weight, activation))

        return Cell(_key("ptq", weight, activation), compute)

    def mixed(self, bits: dict[str, int], weight: Scheme, activation: Scheme) -> Cell:
        """Make a cell: PTQ, these layers with bits of their own, judged; `losses` and `right` by image."""

        def compute() -> dict:
            logits = self.logits(run_exactly(simulate(self.allocated(bits, weight, activation))))
            return self.judge(logits) | by_image(logits, self.labels)

        return Cell(_key("mixed", bits, weight, activation), compute)

    def kernels(self, weight: Scheme, activation: Scheme, isa: str) -> Cell:
        """Make a cell: PTQ on oneDNN's kernels, limited to an instruction set (see `on_onednn`), judged."""
        key = _key("kernels", weight, activation, isa)
        args = self.model, weight, activation, self.batches, self.images
        return Cell(key, lambda: self.judge(on_onednn(predict_ptq, *args, isa=isa)))

    def fusing(self, weight: Scheme, activation: Scheme) -> Cell:
        """Make a cell: the logits' error, Conv-BN-ReLU fused against the three apart (`paired_error`)."""

        def compute() -> dict:
            apart, fused = (convert(self.eager(weight, activation, fused=fused)) for fused in (False, True))
            return paired_error(self.reference, self.logits(apart), self.logits(fused))

        return Cell(_key("fusing", weight, activation), compute)

    def against(self, first: tuple[Scheme, Scheme], second: tuple[Scheme, Scheme]) -> Cell:
        """Make a cell: PTQ by the second schemes judged, and its logits' error against that of the first."""

        def compute() -> dict:
            logits = [self._answered(*schemes) for schemes in (first, second)]
            return self.judge(logits[1]) | paired_error(self.reference, *logits)

        return Cell(_key("against", *first, *second), compute)

    def qat(self, weight: Scheme, activation: Scheme, mode: str, recipe: Recipe) -> Cell:
        """Make a cell: QAT, judged (see `after_qat`)."""
        key = _key("qat", weight, activation, mode, recipe) | {"training": modules_hash(*train.MODULES)}
        return self.judged(key, lambda: self.after_qat(weight, activation, mode, recipe))

    def other(self, name: str, build: Callable[[], nn.Module]) -> Cell:
        """Make a cell: a network that the stage's notebook builds, whose code counts too, judged."""
        code, _ = notebook_sources(self.run.root / "notebooks" / f"{NOTEBOOKS[self.stage]}.ipynb")
        return self.judged({"other": name, "notebook": sha256_json(code)}, build)


def _key(kind: str, *parts) -> dict:
    """Return what decides a cell, as JSON values."""
    return {kind: [asdict(part) if is_dataclass(part) else part for part in parts]}


def grid(scheme: Scheme, **values) -> list[Scheme]:
    """Return all combinations of some fields' values, such as bits=(8, 4), rule=("round", "ceil")."""
    combinations = itertools.product(*values.values())
    return [replace(scheme, **dict(zip(values, chosen, strict=True))) for chosen in combinations]


def step_seconds(networks: dict[str, nn.Module], images: Tensor, rounds: int = 7) -> pd.DataFrame:
    """Time a training step on `images`, side by side: seconds; one row per round, one column per network."""
    networks = {name: copy.deepcopy(network).train() for name, network in networks.items()}
    rng, rows = np.random.default_rng(0), []
    for _ in range(rounds + 1):
        order = rng.permutation(list(networks)).tolist()
        steps = {name: lambda name=name: networks[name](images).square().mean().backward() for name in order}
        rows.append({name: timeit(step, number=1) for name, step in steps.items()})
    return pd.DataFrame(rows[1:])[list(networks)]  # the first round warms up
