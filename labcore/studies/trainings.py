"""Study 3: many short trainings, by recipes that differ in a thing or two, and longer QAT."""

import itertools
import math
import shutil
from dataclasses import replace

import pandas as pd
import torch
from torch import nn

from labcore.config import PROFILES, Profile, Recipe
from labcore.files.artifacts import sha256_json
from labcore.files.code import modules_hash
from labcore.files.provenance import versions
from labcore.model import build_model
from labcore.qconfig import CustomQConfig
from labcore.quantize import prepare_qat
from labcore.run import Run
from labcore.studies.over_trainings import over_seeds
from labcore.studies.study import Cell, Study
from labcore.train import Diverged, fit, training_identity

EPOCHS = 6
FIRST_SEEDS = 2
CLOSE_PP = 1.0  # recipes less than so many points from the baseline with these get more
LONGER = 4  # so many times the epochs of the profile's QAT


def base_recipe(profile: Profile, train_images: int) -> Recipe:
    """Return the recipe that all others are held against: six epochs of a quarter of the images.

    It has a warm-up, one cosine to zero, crops and flips, and at first small images, to be quicker. Six
    epochs hold the reference's curve in small: its 300 end at three quarters of the third of its cycles (50,
    100, 200), six at that of 1, 2 and 4.
    """
    fp32 = profile.fp32
    return Recipe(
        **{name: getattr(fp32, name) for name in ("batch_size", "lr", "weight_decay")},
        epochs=EPOCHS,
        epoch_images=max(2 * fp32.batch_size, train_images // 4),  # twice the batch must fit
        label_smoothing=fp32.label_smoothing or 0.1,
        small_share=2 / 3,
    )


class Trainings(Study):
    """Short trainings of a run's network at half the width, on its images."""

    def __init__(self, run: Run):
        super().__init__(run, "training")
        # What decides a training is in its cell's key; from scratch, no network that was trained before.
        # Beside that count the code that chooses the images which judge it, and what draws their order.
        self.base = {"code": modules_hash("studies.trainings", "data"), "numpy": versions()["numpy"]}
        self.recipe = base_recipe(run.profile, len(self.split.train))
        self.seeds = [run.seed + step for step in range(run.profile.study_seeds)]
        self.verdict_seeds = [run.seed + step for step in range(run.profile.verdict_seeds)]
        self.trainings: set[tuple[Recipe, int]] = set()

    def trained(self, recipe: Recipe, seed: int) -> Cell:
        """Return a cell: training from scratch, judged after its last epoch; if it diverges, as guessing."""
        profile = self.run.profile
        torch.manual_seed(seed)
        model = build_model(profile.arch, len(self.data.classes), max(4, profile.width // 2), profile.stem)
        self.run.initialize(model, recipe.init)
        return self._fit("short", model, recipe, seed)

    def continued(self, kind: str, seed: int, times: int = 1) -> Cell:
        """Return a cell: the run's FP32 network trained on by the QAT recipe, `times` its epochs, unfrozen.

        Of kind "fp32" it goes on as it was; "qat" is fake-quantized by the reference's scheme.
        """
        model, qat = self.model, self.run.profile.qat
        if kind == "qat":
            model = prepare_qat(model, CustomQConfig.POWER2.qat)
        recipe = replace(qat, freeze_at=1.0, epochs=times * qat.epochs)
        return self._fit(kind, model, recipe, seed)

    def _fit(self, kind: str, model: nn.Module, recipe: Recipe, seed: int) -> Cell:
        key = {kind: training_identity(recipe, self.data, self.split, seed, model)}
        folder, title = self.run.path(self.stage, f"fits/{sha256_json(key)[:24]}"), f"{kind}, seed {seed}"

        def compute() -> dict:
            try:
                result = fit(model, recipe, self.data, self.split, seed, folder, description=title)
            except Diverged as error:
                print(f"note: {title}: {error}")
                classes = len(self.data.classes)
                return {"acc": 1 / classes, "loss": math.log(classes)}
            last = result.history.iloc[-1]
            return {"acc": last["val_acc"], "loss": last["val_loss"]}

        return Cell(key, compute, cleanup=lambda: shutil.rmtree(folder, ignore_errors=True))

    def compare(self, recipes: dict[str, Recipe], description: str, verdict: bool = False) -> pd.DataFrame:
        """Return `over_seeds` of recipes held against the first; those less than a point away get more seeds.

        Where a claim's `verdict` rests on it, all get the profile's `verdict_seeds`, whatever is found: seeds
        until something shows would show something by chance.
        """
        first = self.verdict_seeds if verdict else self.seeds[:FIRST_SEEDS]
        table = self._seed_table(recipes, first, description)
        away = 100 * (table - table.iloc[0]).mean(axis=1).abs()
        close = {name: recipe for name, recipe in recipes.items() if away[name] < CLOSE_PP}
        if more := self.seeds[len(first) :]:
            table = table.join(self._seed_table(close, more, f"{description}, more seeds"))
        return over_seeds(table)

    def _seed_table(self, recipes: dict[str, Recipe], seeds: list[int], description: str) -> pd.DataFrame:
        """Return validation accuracies; rows are recipes, columns seeds."""
        self.trainings |= set(itertools.product(recipes.values(), seeds))
        pairs = itertools.product(recipes, seeds)
        cells = {(name, seed): self.trained(recipes[name], seed) for name, seed in pairs}
        return self.cells(cells, description)["acc"].astype(float).unstack(sort=False)


def recipes_of(base: Recipe) -> dict[str, dict[str, Recipe]]:
    """Return the recipes of the study by question; the first of each is what the others are held against."""
    reference = PROFILES["reference"].fp32
    theirs = {name: getattr(reference, name) for name in ("augment", "mixup_alpha", "mixup_prob")}

    def augmented(**values) -> Recipe:
        return replace(base, augment=replace(base.augment, **values))

    # Whole images throughout: else a schedule would also decide the rate at which these are first seen.
    whole = replace(base, small_share=0.0)
    restarts = replace(whole, schedule="warm_restarts", warmup=0.0, restart_mult=2)
    schedules = {
        "one cosine": replace(whole, warmup=0.0),
        "one cosine after a warm-up": whole,
        "restarts, stopped in mid-cycle": replace(restarts, restart_epochs=1),
        "restarts, ending with a cycle": replace(restarts, restart_epochs=2),
    }
    reflected = augmented(crop_padding=base.augment.crop_padding // 2, padding_mode="reflect")
    size, rate = base.batch_size, base.lr
    questions = {
        "batch": {
            f"batch {count * size}, rate times {factor}": replace(
                base, batch_size=count * size, lr=factor * rate
            )
            for count, factor in ((1, 2), (1, 3), (2, 1), (2, 2), (2, 3))
        },
        "augmentation": {
            "none": augmented(crop_padding=0, flip_prob=0.0),
            "no crop": augmented(crop_padding=0),
            "no flip": augmented(flip_prob=0.0),
            "crop of half the padding, reflected": reflected,
            "and cutout": augmented(cutout=8),
            "and TrivialAugment": augmented(policy="trivial"),
            "and mixup": replace(base, mixup_alpha=0.2, mixup_prob=0.5),
            "and CutMix": replace(base, cutmix_alpha=1.0, cutmix_prob=0.5),
            "all of the reference's": replace(base, **theirs),
        },
        "init": {
            "identity": replace(base, init="identity"),
            "identity, and a whitened stem": replace(base, init="whitened"),
            "BatchNorm's biases at 16 times the rate": replace(base, bias_lr=16.0),
            "all three, and the reflected crop": replace(reflected, init="whitened", bias_lr=16.0),
        },
        "resizing": {
            "whole images throughout": whole,
            "whole images, a third fewer epochs": replace(whole, epochs=2 * base.epochs // 3),
        },
        "regularisation": {
            "no label smoothing": replace(base, label_smoothing=0.0),
            "no weight decay": replace(base, weight_decay=0.0),
            "clipping at 1": replace(base, clip_norm=1.0),
            "average of weights": replace(base, ema_decay=0.99),
        },
    }
    questions = {question: {"as it is": base} | recipes for question, recipes in questions.items()}
    return {"schedule": schedules} | questions
