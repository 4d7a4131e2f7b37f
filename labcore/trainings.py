"""The training study: many short trainings under recipes that differ in one thing, and what lowers QAT's training accuracy."""

import shutil
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.ao import quantization as tq

from labcore.artifacts import modules_hash, sha256_json
from labcore.config import PROFILES, Recipe
from labcore.model import build_model
from labcore.progress import progress
from labcore.qconfig import CustomQConfig
from labcore.quantize import prepare_qat
from labcore.run import Run
from labcore.study import Cell, Study
from labcore.train import about, fit
from labcore.transforms import augment, mix, normalize

EPOCHS, EPOCH_IMAGES = 6, 15_360
CLOSE_PP = 1.0  # differences below so many points need more than one seed


class Trainings(Study):
    """Short trainings on a run's images: its network at half the width, six epochs of a third of the images, at most 15,360.

    Six epochs hold the reference's learning-rate curve in small: its 300 epochs end at three quarters of the third of the
    cycles of 50, 100 and 200 epochs, as six do of 1, 2 and 4.
    """

    def __init__(self, run: Run):
        super().__init__(run, "training")
        # What decides a training stands in its cell's key; one from scratch depends on no network that was trained before.
        self.base = {"code": modules_hash("trainings")}
        self.recipe = replace(
            run.profile.fp32,
            epochs=EPOCHS,
            # twice the profile's batch must fit
            epoch_images=min(EPOCH_IMAGES, max(2 * run.profile.fp32.batch_size, len(run.split.train) // 3)),
            ema_decay=0.0,
        )
        self.seeds = [run.seed + step for step in range(run.profile.study_seeds)]

    def network(self, seed: int) -> nn.Module:
        """Fresh weights that follow from the seed."""
        profile = self.run.profile
        torch.manual_seed(seed)
        return build_model(profile.arch, len(self.data.classes), max(4, profile.width // 2), profile.stem)

    def trained(self, recipe: Recipe, seed: int) -> Cell:
        """A cell: training from scratch. The last epoch counts, not the best one."""
        return self._fit(recipe, seed, lambda: self.network(seed), "short")

    def continued(self, kind: str, seed: int) -> Cell:
        """A cell: the run's FP32 network trained on by the profile's QAT recipe.

        Kinds: "fp32" goes on as it was; "qat" is fake-quantized by the reference's scheme, BatchNorm kept; "qat_folded" the
        same with BatchNorm folded away before.
        """
        builds = {
            "fp32": lambda: self.model,
            "qat": lambda: prepare_qat(self.model, CustomQConfig.POWER2.qat),
            "qat_folded": lambda: prepare_qat(self.model, CustomQConfig.POWER2.qat, keep_batchnorm=False),
        }
        return self._fit(self.run.profile.qat, seed, builds[kind], kind)

    def _fit(self, recipe: Recipe, seed: int, build: Callable[[], nn.Module], kind: str) -> Cell:
        model = build()
        key = {kind: about(recipe, self.data, self.split, seed, model)}

        def compute() -> dict:
            folder = self.run.path(self.stage, f"fits/{sha256_json(key)[:24]}")
            history = fit(
                model, recipe, self.data, self.split, seed, folder, 500, f"{kind}, seed {seed}"
            ).history
            row = history.iloc[-1]
            shutil.rmtree(folder)  # the cell keeps what counts
            return {
                "acc": row["val_acc"],
                "loss": row["val_loss"],
                "train_acc": row["train_acc"],
                "train_clean_acc": row["train_clean_acc"],
                "train_clean_loss": row["train_clean_loss"],
                "seconds": history["train_seconds"].sum(),
            }

        return Cell(key, compute)

    def compare(self, recipes: dict[str, Recipe], baseline: str, description: str) -> pd.DataFrame:
        """Train by every recipe and hold it against `baseline`; those less than a point away with more seeds.

        Returns:
            One row per recipe: seeds, acc (mean), acc_std, and the difference to the baseline in points, paired by seed:
            diff_pp (mean) and diff_pp_std.
        """
        first = self.seed_table(recipes, [self.run.seed], description)
        away = 100 * (first[self.run.seed] - first.loc[baseline, self.run.seed]).abs()
        close = {name: recipe for name, recipe in recipes.items() if away[name] < CLOSE_PP}
        table = first.join(self.seed_table(close, self.seeds[1:], f"{description}, more seeds"))
        difference = 100 * (table - table.loc[baseline])
        return pd.DataFrame(
            {
                "seeds": table.notna().sum(axis=1),
                "acc": table.mean(axis=1),
                "acc_std": table.std(axis=1),
                "diff_pp": difference.mean(axis=1),
                "diff_pp_std": difference.std(axis=1),
            }
        )

    def seed_table(self, recipes: dict[str, Recipe], seeds: list[int], description: str) -> pd.DataFrame:
        """Validation accuracies; rows are recipes, columns seeds."""
        todo = {
            (name, seed): self.trained(recipe, seed) for name, recipe in recipes.items() for seed in seeds
        }
        return self.cells(todo, description)["acc"].unstack().loc[list(recipes)]

    def hidden_by_training(self, fake_quantized: nn.Module, batch_size: int = 500) -> pd.DataFrame:
        """Accuracy of one fake-quantized network on training images, as training sees them and as they are (claim R14).

        Rows: the images as they are, with the reference's augmentation, and with its mixup too, where the larger share's label
        counts. Columns: with fake quantization, and with it switched off.
        """
        recipe = PROFILES["reference"].qat
        index = self.split.train[:: max(1, len(self.split.train) // len(self.split.validation))]
        images, labels = (
            torch.from_numpy(part[index]) for part in (self.data.train_images, self.data.train_labels)
        )
        views: dict[str, Callable[[Tensor, Tensor, np.random.Generator], tuple[Tensor, Tensor]]] = {
            "as they are": lambda x, y, rng: (normalize(x), y),
            "augmented": lambda x, y, rng: (augment(x, recipe.augment, rng), y),
            "augmented, mixup": lambda x, y, rng: _mixed(augment(x, recipe.augment, rng), y, recipe, rng),
        }
        rows = {}
        for view, see in views.items():
            for column, switch in (("with", tq.enable_fake_quant), ("without", tq.disable_fake_quant)):
                fake_quantized.apply(switch)
                rng, hits = np.random.default_rng(self.run.seed), 0
                with torch.no_grad(), progress(len(images), f"{view}, {column}", unit="image") as bar:
                    for start in range(0, len(images), batch_size):
                        rows_of = slice(start, start + batch_size)
                        x, target = see(images[rows_of], labels[rows_of], rng)
                        hits += (fake_quantized.eval()(x).argmax(1) == target).sum().item()
                        bar.update(len(x))
                rows.setdefault(view, {})[column] = hits / len(images)
        fake_quantized.apply(tq.enable_fake_quant)
        return pd.DataFrame(rows).T


def _mixed(x: Tensor, labels: Tensor, recipe: Recipe, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Mixed images and the label of the larger share."""
    x, partner, share = mix(x, recipe, rng)
    return x, torch.where(share >= 0.5, labels, labels[partner])


def recipes_of(base: Recipe) -> dict[str, dict[str, Recipe]]:
    """The recipes of the study by question; "as it is" is the baseline of each."""
    reference = PROFILES["reference"].fp32

    def with_augment(**values) -> Recipe:
        return replace(base, augment=replace(base.augment, **values))

    restarts = {"schedule": "warm_restarts", "warmup": 0.0, "lr_min": min(reference.lr_min, base.lr)}
    same = {"as it is": base}
    batch = base.batch_size
    return {
        "schedule": same
        | {
            "restarts, stopped in mid-cycle": replace(base, **restarts, restart_epochs=1, restart_mult=2),
            "restarts, ending with a cycle": replace(base, **restarts, restart_epochs=2, restart_mult=2),
            "no warm-up": replace(base, warmup=0.0),
        },
        "batch": same
        | {
            f"batch {2 * batch}, rate times {factor}": replace(
                base, batch_size=2 * batch, lr=factor * base.lr
            )
            for factor in (1, 2, 3)
        },
        "augmentation": same
        | {
            "none": with_augment(crop_padding=0, flip_prob=0.0),
            "no crop": with_augment(crop_padding=0),
            "no flip": with_augment(flip_prob=0.0),
            "and cutout": with_augment(cutout=8),
            "and TrivialAugment": with_augment(policy="trivial"),
            "and RandAugment": with_augment(policy="rand"),
            "and mixup": replace(base, mixup_alpha=0.2, mixup_prob=0.5),
            "and CutMix": replace(base, cutmix_alpha=1.0, cutmix_prob=0.5),
            "the reference's": replace(
                base,
                augment=reference.augment,
                mixup_alpha=reference.mixup_alpha,
                mixup_prob=reference.mixup_prob,
            ),
        },
        "regularisation": same
        | {
            "no label smoothing": replace(base, label_smoothing=0.0),
            "no weight decay": replace(base, weight_decay=0.0),
            "clipping at 1": replace(base, clip_norm=1.0),
            "average of weights": replace(base, ema_decay=0.99),
        },
    }
