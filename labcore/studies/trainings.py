"""The training study: many short trainings under recipes that differ in a thing or two, and what lowers QAT's training accuracy."""

import math
import shutil
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.ao import quantization as tq

from labcore.config import PROFILES, Recipe
from labcore.evaluate import predict
from labcore.files.artifacts import sha256_json
from labcore.files.code import modules_hash
from labcore.files.progress import progress
from labcore.images.transforms import augment, mix, normalize
from labcore.model import build_model
from labcore.qconfig import CustomQConfig
from labcore.quantize import prepare_qat
from labcore.run import Run
from labcore.stats import over_seeds, summarize
from labcore.studies.study import Cell, Study
from labcore.train import Result, fit, training_identity
from labcore.training.steps import Diverged

EPOCHS = 6
CLOSE_PP = 1.0  # recipes less than so many points from the baseline with two seeds get more
FIRST_SEEDS = 2
LONGER = 4  # so many times the epochs of the profile's QAT


class Trainings(Study):
    """Short trainings on a run's images: its network at half the width, six epochs of a quarter of the images.

    The recipe that all others are held against has a warm-up, one cosine to zero, crops and flips, and small images in its
    first four epochs, which makes it quicker; schedules are held against each other on whole images. It has nothing else that
    the study asks for; batch size, learning rate, weight decay and label smoothing are the profile's. Six epochs hold the
    reference's learning-rate curve in small: its 300 epochs end at three quarters of the third of the cycles of 50, 100 and
    200 epochs, as six do of 1, 2 and 4.
    """

    def __init__(self, run: Run):
        super().__init__(run, "training")
        self.prepare(run, len(run.split.train))

    def prepare(self, run: Run, train_images: int) -> None:
        """The recipe and the seeds, which follow from the profile and the number of training images."""
        # What decides a training stands in its cell's key; one from scratch depends on no network that was trained before.
        self.base = {"code": modules_hash("studies.trainings")}
        fp32 = run.profile.fp32
        self.recipe = Recipe(
            epochs=EPOCHS,
            batch_size=fp32.batch_size,
            # twice the batch must fit
            epoch_images=max(2 * fp32.batch_size, train_images // 4),
            lr=fp32.lr,
            weight_decay=fp32.weight_decay,
            label_smoothing=fp32.label_smoothing or 0.1,
            small_share=2 / 3,
        )
        self.seeds = [run.seed + step for step in range(run.profile.study_seeds)]
        self.verdict_seeds = [run.seed + step for step in range(run.profile.verdict_seeds)]
        self.trainings: set[tuple[Recipe, int]] = set()

    def network(self, seed: int, init: str) -> nn.Module:
        """Fresh weights that follow from the seed."""
        profile = self.run.profile
        torch.manual_seed(seed)
        model = build_model(profile.arch, len(self.data.classes), max(4, profile.width // 2), profile.stem)
        self.run.initialize(model, init)
        return model

    def trained(self, recipe: Recipe, seed: int) -> Cell:
        """A cell: training from scratch. The last epoch counts, not the best one; one that diverges is as good as guessing."""
        return self._fit(recipe, seed, lambda: self.network(seed, recipe.init), "short")

    def continued(self, kind: str, seed: int, times: int = 1) -> Cell:
        """A cell: the run's FP32 network trained on by the profile's QAT recipe, nothing frozen; its best epoch, in float32.
        `times` multiplies the recipe's epochs.

        `acc` is that of the network as it trained, `acc_last` that of its last epoch. For what the training did to the weights, `acc_unrounded` and, on training images,
        `train_acc_unrounded` are scored with fake quantization off.

        Kinds: "fp32" goes on as it was; "qat" is fake-quantized by the reference's scheme, BatchNorm kept; "qat_folded" the
        same with BatchNorm folded away before.
        """
        builds = {
            "fp32": lambda: self.model,
            "qat": lambda: prepare_qat(self.model, CustomQConfig.POWER2.qat),
            "qat_folded": lambda: prepare_qat(self.model, CustomQConfig.POWER2.qat, keep_batchnorm=False),
        }
        qat = self.run.profile.qat
        recipe = replace(qat, freeze_at=1.0, epochs=times * qat.epochs)
        return self._fit(recipe, seed, builds[kind], kind, self._with_and_without_rounding)

    def longer(self) -> pd.DataFrame:
        """QAT, and FP32 that trains on, as long as the profile's QAT and LONGER times as long, as `over_seeds` gives them.

        The last epoch counts: the best of more epochs would be better by choice alone.
        """
        todo = {
            (name if times == 1 else f"{name}, {times} times as long", seed): self.continued(
                kind, seed, times
            )
            for kind, name in {"fp32": "FP32", "qat": "QAT"}.items()
            for times in (1, LONGER)
            for seed in self.seeds[:FIRST_SEEDS]
        }
        table = self.cells(todo, "longer QAT")["acc_last"].astype(float).unstack()
        return over_seeds(table.loc[list(dict.fromkeys(name for name, _ in todo))])

    def _with_and_without_rounding(self, result: Result) -> dict:
        found = summarize(self.logits(result.model), self.labels)
        model, sample = result.model.apply(tq.disable_fake_quant), self.split.train_sample
        seen = predict(model, self.data.train_images[sample], description="training images")
        return {
            "acc": found["acc"],
            "acc_last": result.history.iloc[-1]["val_acc"],
            "loss": found["loss"],
            "acc_unrounded": summarize(self.logits(model), self.labels)["acc"],
            "train_acc_unrounded": summarize(seen, self.data.train_labels[sample])["acc"],
        }

    def _fit(
        self,
        recipe: Recipe,
        seed: int,
        build: Callable[[], nn.Module],
        kind: str,
        judge: Callable[[Result], dict] | None = None,
    ) -> Cell:
        model = build()
        key = {kind: training_identity(recipe, self.data, self.split, seed, model)}
        folder = self.run.path(self.stage, f"fits/{sha256_json(key)[:24]}")

        def compute() -> dict:
            try:
                result = fit(
                    model, recipe, self.data, self.split, seed, folder, description=f"{kind}, seed {seed}"
                )
            except Diverged as error:
                print(f"note: {kind}, seed {seed}: {error}")
                classes = len(self.data.classes)
                return {"acc": 1 / classes, "loss": math.log(classes)}
            if judge:
                return judge(result)
            last = result.history.iloc[-1]
            return {"acc": last["val_acc"], "loss": last["val_loss"]}

        return Cell(key, compute, cleanup=lambda: shutil.rmtree(folder, ignore_errors=True))

    def compare(self, recipes: dict[str, Recipe], description: str, verdict: bool = False) -> pd.DataFrame:
        """Train by every recipe with two seeds and hold it against the first; those less than a point away with more seeds.

        Args:
            verdict: a claim's verdict rests on these differences, so that every recipe gets the profile's `verdict_seeds`. Their
                number does not depend on what was found, since seeds until something shows would show something by chance.

        Returns:
            One row per recipe, as `over_seeds` gives it.
        """
        baseline, first = next(iter(recipes)), self.verdict_seeds if verdict else self.seeds[:FIRST_SEEDS]
        table = self.seed_table(recipes, first, description)
        away = 100 * (table - table.loc[baseline]).mean(axis=1).abs()
        close = {name: recipe for name, recipe in recipes.items() if away[name] < CLOSE_PP}
        if more := self.seeds[len(first) :]:
            table = table.join(self.seed_table(close, more, f"{description}, more seeds"))
        return over_seeds(table)

    def seed_table(self, recipes: dict[str, Recipe], seeds: list[int], description: str) -> pd.DataFrame:
        """Validation accuracies; rows are recipes, columns seeds."""
        todo = {
            (name, seed): self.trained(recipe, seed) for name, recipe in recipes.items() for seed in seeds
        }
        self.trainings |= {(recipe, seed) for recipe in recipes.values() for seed in seeds}
        return self.cells(todo, description)["acc"].astype(float).unstack().loc[list(recipes)]

    def hidden_by_training(self, fake_quantized: nn.Module, batch_size: int = 64) -> pd.DataFrame:
        """Accuracy of one fake-quantized network on training images, as they are and as trainings show them (claim R14).

        Rows: the images as they are, with the augmentation that this network was trained with, with the reference's, with its mixup
        too, and with its mixup alone. The larger share's label counts; "counted by shares", each of the two labels as much as its
        share. Columns: with fake quantization, and with it switched off.
        """
        own, recipe = self.run.profile.qat.augment, PROFILES["reference"].qat
        place = next(fake_quantized.parameters()).device
        index = self.split.train_sample
        images, labels = (
            torch.from_numpy(part[index]).to(place)
            for part in (self.data.train_images, self.data.train_labels)
        )
        views: dict[
            str, tuple[Callable[[Tensor, np.random.Generator], Tensor], bool]
        ] = {  # and whether images are mixed then
            "as they are": (lambda x, rng: normalize(x), False),
            "augmented as here": (lambda x, rng: augment(x, own, rng), False),
            "augmented as in the reference": (lambda x, rng: augment(x, recipe.augment, rng), False),
            "… and its mixup": (lambda x, rng: augment(x, recipe.augment, rng), True),
            "mixup alone": (lambda x, rng: normalize(x), True),
        }
        rows = {}
        for view, (see, mixes) in views.items():
            for column, switch in (("with", tq.enable_fake_quant), ("without", tq.disable_fake_quant)):
                fake_quantized.apply(switch)
                rng, by_larger, by_shares = np.random.default_rng(self.run.seed), 0.0, 0.0
                with torch.no_grad(), progress(len(images), f"{view}, {column}", unit="image") as bar:
                    for start in range(0, len(images), batch_size):
                        rows_of = slice(start, start + batch_size)
                        x, y = see(images[rows_of], rng), labels[rows_of]
                        partner, share = y, torch.ones(len(y), device=place)
                        if mixes:
                            x, other, share = mix(x, recipe, rng)
                            partner = y[other]
                        answer = fake_quantized.eval()(x).argmax(1)
                        own_hits, other_hits = (answer == y).float(), (answer == partner).float()
                        by_larger += torch.where(share >= 0.5, own_hits, other_hits).sum().item()
                        by_shares += (share * own_hits + (1 - share) * other_hits).sum().item()
                        bar.update(len(x))
                rows.setdefault(view, {})[column] = by_larger / len(images)
                if view == "mixup alone":
                    rows.setdefault(f"{view}, counted by shares", {})[column] = by_shares / len(images)
        fake_quantized.apply(tq.enable_fake_quant)
        return pd.DataFrame(rows).T


def recipes_of(base: Recipe) -> dict[str, dict[str, Recipe]]:
    """The recipes of the study by question; the first of each is what the others are held against."""
    reference = PROFILES["reference"].fp32

    def with_augment(**values) -> Recipe:
        return replace(base, augment=replace(base.augment, **values))

    same, batch = {"as it is": base}, base.batch_size
    whole = replace(
        base, small_share=0.0
    )  # else a schedule would also decide the rate at which whole images are first seen
    reflected = with_augment(crop_padding=base.augment.crop_padding // 2, padding_mode="reflect")
    restarts = replace(whole, schedule="warm_restarts", warmup=0.0, restart_mult=2)
    return {
        "schedule": {
            "one cosine": replace(whole, warmup=0.0),
            "one cosine after a warm-up": whole,
            "restarts, stopped in mid-cycle": replace(restarts, restart_epochs=1),
            "restarts, ending with a cycle": replace(restarts, restart_epochs=2),
        },
        "batch": same
        | {
            f"batch {size}, rate times {factor}": replace(base, batch_size=size, lr=factor * base.lr)
            for size in (batch, 2 * batch)
            for factor in (1, 2, 3)
            if (size, factor) != (batch, 1)
        },
        "augmentation": same
        | {
            "none": with_augment(crop_padding=0, flip_prob=0.0),
            "no crop": with_augment(crop_padding=0),
            "no flip": with_augment(flip_prob=0.0),
            "crop of half the padding, reflected": reflected,
            "and cutout": with_augment(cutout=8),
            "and TrivialAugment": with_augment(policy="trivial"),
            "and mixup": replace(base, mixup_alpha=0.2, mixup_prob=0.5),
            "and CutMix": replace(base, cutmix_alpha=1.0, cutmix_prob=0.5),
            "all of the reference's": replace(
                base,
                augment=reference.augment,
                mixup_alpha=reference.mixup_alpha,
                mixup_prob=reference.mixup_prob,
            ),
        },
        "init": same
        | {
            "identity": replace(base, init="identity"),
            "identity, and a whitened stem": replace(base, init="whitened"),
            "BatchNorm's biases at 16 times the rate": replace(base, bias_lr=16.0),
            "all three, and the reflected crop": replace(reflected, init="whitened", bias_lr=16.0),
        },
        "resizing": same
        | {
            "whole images throughout": whole,
            "whole images, a third fewer epochs": replace(whole, epochs=2 * base.epochs // 3),
        },
        "regularisation": same
        | {
            "no label smoothing": replace(base, label_smoothing=0.0),
            "no weight decay": replace(base, weight_decay=0.0),
            "clipping at 1": replace(base, clip_norm=1.0),
            "average of weights": replace(base, ema_decay=0.99),
        },
    }
