"""Train a stage of a run: in this process, or in one process per GPU where there are several."""

import copy
import dataclasses
import pickle
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record

from labcore import LabError
from labcore.config import Recipe
from labcore.files.artifacts import RECORD, RESTORED, copy_file, weights_folder
from labcore.files.tensors import load_tensors, load_weights, state_hash
from labcore.lab.checks import check_recipes
from labcore.run import Run
from labcore.train import Result, finished, fit, n_judges, training_identity
from labcore.training.device import device
from labcore.training.distributed import World, first_on_machine, launch, process_group
from labcore.training.earlier import HISTORY, Earlier, identity, read_earlier, write_record


def train_stage(run: Run, stage: str, model: nn.Module) -> Result:
    """Train a stage from `model`, in as many processes as the profile says; load it where it is finished.

    `stage` names the recipe and the folder. FP32 weights that WEIGHTS= names are taken instead, or trained
    on. Raises LabError as `check_recipes`, `fit`, `launch` and `earlier` do; before FP32 for QAT as well.
    """
    if stage == "fp32" and run.profile.reuses(run.weights):
        return _trained_before(run, model)
    arguments = _arguments(run, stage)
    start = _load_start(run, model) if stage == "fp32" else None
    if not finished(model, *arguments):
        check_recipes(run, ["fp32", "qat"] if stage == "fp32" else [stage])
        if note := gpu_note():
            print(note)
        processes = run.profile.processes or _one_per_gpu(arguments[0])
        if processes > 1:
            images_left_out = dataclasses.replace(run)
            launch(processes, train_worker, images_left_out, stage, partial(unpack, pack(model)))
            if not finished(model, *arguments):  # or one process would quietly train it all again
                raise LabError(
                    f"{processes} processes left no finished checkpoint of this training in {arguments[-1]}; "
                    "give them and this process the same images, code and versions."
                )
    result = fit(model, *arguments, run.profile.eval_batch_size, stage.upper())
    run.path(stage, RESTORED).unlink(missing_ok=True)  # these results are of here
    if stage == "fp32":
        decided = training_identity(*arguments[:-1], model) | identity(*arguments[:-1])
        best = result.state, result.best_epoch, result.made
        write_record(run.path("fp32"), decided, run.data.label, *best, start)
    return result


def earlier(run: Run, same: Collection[str]) -> Earlier:
    """Return the training that WEIGHTS= names, which has these entries of the run's `identity`.

    Raises LabError as `weights_folder` and `read_earlier` do, and where training would overwrite it.
    """
    folder = weights_folder(run.weights, run.profile.name, run.root)
    if not run.profile.reuses(run.weights):
        _refuse_own(run, folder)
    expected = identity(run.profile.fp32, run.data, run.split, run.seed)
    return read_earlier(folder, {name: expected[name] for name in same})


def _refuse_own(run: Run, folder: Path) -> None:
    if folder == run.path("fp32").resolve():
        raise LabError(f"WEIGHTS: {folder} is where this training writes: name a copy of it.")


def first_model(run: Run) -> nn.Module:
    """Return the network as its FP32 training starts; LabError as `earlier`, or where none trains."""
    if run.profile.reuses(run.weights):
        raise LabError("WEIGHTS stands for this training: leave it out, or set fp32.init=weights.")
    model = run.fresh_model()
    _load_start(run, model)
    return model


def _load_start(run: Run, model: nn.Module) -> dict | None:
    """Load the weights that training starts from, and return their record; None where none are named.

    Of a lone file, whose training nobody knows, the record has the name and the weights' hash.
    """
    if not run.weights:
        return None
    path = weights_folder(run.weights, run.profile.name, run.root, or_file=True)
    if path.is_file():
        _refuse_own(run, path.parent)
        load_weights(model, load_tensors(path), f"WEIGHTS={run.weights}")
        return {"file": path.name, "weights_sha256": state_hash(model.state_dict())}
    start = earlier(run, ("data", "split"))
    load_weights(model, start.weights, "WEIGHTS")
    return start.record


def _trained_before(run: Run, model: nn.Module) -> Result:
    """Return what WEIGHTS= names as if it had been trained here, and keep its history and record."""
    found = earlier(run, ("recipe", "data", "split", "seed"))
    record, where = found.record, found.record["provenance"]
    told = f"commit {where['commit']}, {where['cpu']}, {record['finished']}"
    print(f"The weights were not trained here: they are those in WEIGHTS={run.weights} ({told}).")
    load_weights(model, found.weights, "WEIGHTS")
    for name in (HISTORY, RECORD):
        copy_file(found.folder / name, run.path("fp32", name))
    model = model.to(device(), memory_format=torch.channels_last).eval()
    judges = n_judges(run.profile.fp32, run.split)
    made = {name: record[name] for name in ("finished", "provenance")}
    return Result(model, found.history, record["best_epoch"], found.weights, judges, made)


def pack(model: nn.Module) -> bytes:
    """Return a network for other processes; without qconfigs, which are no data and serve no training."""
    model = copy.deepcopy(model)
    for module in model.modules():
        module.qconfig = None
    return pickle.dumps(model)


def unpack(packed: bytes, run: Run) -> nn.Module:
    """Return the network that `pack` was given, whatever the run."""
    return pickle.loads(packed)


@record
def train_worker(run: Run, stage: str, build: Callable[[Run], nn.Module]) -> None:
    """Train in each process; an error is written down for the process that started it."""
    with process_group():
        first_on_machine(lambda: run.split)  # images are downloaded, read and cached, the split is written
        fit(build(run), *_arguments(run, stage), run.profile.eval_batch_size, stage.upper())


def _arguments(run: Run, stage: str) -> tuple:
    """Return what `fit` and `finished` take after the network: recipe, images, split, seed and folder."""
    return getattr(run.profile, stage), run.data, run.split, run.seed, run.path(stage)


def gpu_note(gpu: Path = Path("/dev/nvidia0")) -> str:
    """Return what to say before a training on the CPU of a machine that has a GPU; empty without one."""
    if torch.cuda.is_available() or not gpu.exists():
        return ""
    used = f"torch {torch.__version__} cannot use (is its driver older than CUDA {torch.version.cuda}?)"
    return f"note: this machine has an NVIDIA GPU that {used}; training on the CPU."


def _one_per_gpu(recipe: Recipe) -> int:
    """Return as many processes as there are GPUs, or as can share a batch."""
    gpus = max(1, torch.cuda.device_count())
    processes = max(count for count in range(1, gpus + 1) if World(size=count).can_share(recipe))
    if processes < gpus:
        shared = f"{recipe.batch_size} images" + (" in pairs" if recipe.mixes else "")
        print(f"note: {processes} of {gpus} GPUs are used: more cannot share {shared}.")
    return processes
