"""The training study: recipes that differ in one thing, seeds, and what training hides."""

import dataclasses
import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from small import network

from labcore.config import PROFILES, Recipe, get_profile
from labcore.data import calibration_batches
from labcore.files.artifacts import ROOT
from labcore.qconfig import CustomQConfig
from labcore.quantize import calibrate, prepare_qat
from labcore.run import Run
from labcore.studies import trainings
from labcore.studies.study import Cell
from labcore.studies.trainings import EPOCHS, Trainings, recipes_of
from labcore.training.optim import learning_rate
from labcore.training.steps import Diverged

OPTIONS = (ROOT / "docs/options.md").read_text(encoding="utf-8")
BASE = Recipe(epochs=EPOCHS, epoch_images=512, batch_size=128, lr=0.15, small_share=2 / 3)


def flat(recipe) -> dict:
    values = dataclasses.asdict(recipe)
    return values | {f"augment.{name}": value for name, value in values.pop("augment").items()}


# What each question may change.
FIELDS = {
    "schedule": {"schedule", "warmup", "restart_epochs", "restart_mult"},
    "batch": {"batch_size", "lr"},
    "init": {"init", "bias_lr", "augment.crop_padding", "augment.padding_mode"},
    "resizing": {"small_share", "epochs"},
    "regularisation": {"label_smoothing", "weight_decay", "clip_norm", "ema_decay"},
}


@pytest.mark.parametrize("question", recipes_of(BASE))
def test_a_recipe_differs_in_what_is_asked_and_from_every_other(question):
    recipes = recipes_of(BASE)[question]
    base = dataclasses.replace(BASE, small_share=0.0) if question == "schedule" else BASE
    assert base in recipes.values()
    for first, second in itertools.combinations(recipes.values(), 2):
        assert first != second
    for recipe in recipes.values():
        changed = {name for name, value in flat(recipe).items() if value != flat(base)[name]}
        allowed = FIELDS.get(question)
        if allowed:
            assert changed <= allowed
        else:
            assert all(name.startswith(("augment.", "mixup_", "cutmix_")) for name in changed)


def test_six_epochs_hold_the_references_curve_in_small():
    small, reference = recipes_of(BASE)["schedule"], PROFILES["reference"].fp32
    stopped, ending = (small[f"restarts, {name}"] for name in ("stopped in mid-cycle", "ending with a cycle"))
    steps = 100
    for share in np.linspace(0, 0.999, 50):
        there = learning_rate(reference, int(share * reference.epochs * steps), steps)
        here = learning_rate(stopped, int(share * EPOCHS * steps), steps)
        assert here / stopped.lr == pytest.approx(there / reference.lr, abs=0.03)
    assert learning_rate(ending, EPOCHS * steps - 1, steps) == pytest.approx(
        ending.lr_min, abs=1e-4 * ending.lr
    )


def test_a_fifth_of_the_references_epochs_holds_its_curve_too():
    whole, share = PROFILES["reference"].fp32, 5
    values = {"fp32.epochs": whole.epochs // share, "fp32.restart_epochs": whole.restart_epochs // share}
    assert " ".join(f"{name}={value}" for name, value in values.items()) in OPTIONS
    short = get_profile("reference", **values).fp32
    for step in range(0, whole.epochs * 100, 997):
        assert learning_rate(short, step // share, 100) == pytest.approx(
            learning_rate(whole, step, 100), rel=0.02
        )


def test_a_training_that_diverges_counts_as_guessing(run_of_smoke, capsys, monkeypatch):
    def diverging(*args, **options):
        raise Diverged("the training loss is no longer finite", 0)

    monkeypatch.setattr(trainings, "fit", diverging)
    study = Trainings.__new__(Trainings)
    study.run, study.stage, study.data, study.split = (
        run_of_smoke,
        "training",
        run_of_smoke.data,
        run_of_smoke.split,
    )
    study.prepare(run_of_smoke, len(study.split.train))
    row = study.cells({"x": study.trained(study.recipe, 0)}, "").loc["x"]
    assert row.to_dict() == {"acc": 0.1, "loss": pytest.approx(np.log(10))}
    assert "seed 0: the training loss is no longer finite; lower lr" in capsys.readouterr().out


@pytest.fixture
def run_of_smoke(tmp_path):
    return Run(PROFILES["smoke"], None, 0, tmp_path)


def test_the_linear_rule_and_the_references_rate_are_both_there():
    found = [(recipe.batch_size, recipe.lr) for recipe in recipes_of(BASE)["batch"].values()]
    assert [size for size, _ in found] == [128] * 3 + [256] * 3
    assert [rate / BASE.lr for _, rate in found] == pytest.approx([1, 2, 3] * 2)


class Known(Trainings):
    """A study whose trainings give known accuracies."""

    def __init__(self, accuracies: dict[str, list[float]]):
        self.run = dataclasses.make_dataclass("Run", ["seed"])(seed=5)
        self.seeds, self.verdict_seeds = [5, 6, 7], [5, 6, 7, 8]
        self.accuracies, self.trainings = accuracies, set()

    def trained(self, recipe, seed: int) -> Cell:
        return Cell({}, lambda: self.accuracies[recipe][seed - 5])

    def cells(self, todo, description: str) -> pd.DataFrame:
        return pd.DataFrame({name: {"acc": cell.compute()} for name, cell in todo.items()}).T


def test_only_what_is_close_gets_more_seeds_and_differences_are_paired():
    accuracies = {"base": [0.80, 0.82, 0.84], "close": [0.805, 0.80, 0.83], "far": [0.85, 0.86, None]}
    study = Known(accuracies)
    table = study.compare({name: name for name in accuracies}, "")
    assert table["seeds"].tolist() == [3, 3, 2] and len(study.trainings) == 8
    assert table.loc["base", ["diff_pp", "diff_pp_std"]].tolist() == [0, 0]
    for name, count in (("close", 3), ("far", 2)):
        differences = 100 * np.subtract(accuracies[name][:count], accuracies["base"][:count])
        assert table.loc[name, "diff_pp"] == pytest.approx(differences.mean())
        assert table.loc[name, "diff_pp_std"] == pytest.approx(differences.std(ddof=1))


def test_what_a_verdict_rests_on_gets_its_seeds_whatever_they_show():
    study = Known({"base": [0.80, 0.82, 0.84, 0.81], "far": [0.95, 0.96, 0.97, 0.98]})
    table = study.compare({name: name for name in study.accuracies}, "", verdict=True)
    assert table["seeds"].tolist() == [4, 4] and len(study.trainings) == 8
    assert table.loc["far", "diff_pp"] == pytest.approx(14.75)


@pytest.mark.parametrize("profile", PROFILES)
def test_no_two_recipes_of_a_question_are_the_same_in_any_profile(profile):
    run = Run(PROFILES[profile], None, 0)
    study = Trainings.__new__(Trainings)
    study.prepare(run, 45_000)
    for recipes in recipes_of(study.recipe).values():
        assert len(set(recipes.values())) == len(recipes)
        assert all(recipe.epoch_images // recipe.batch_size > 0 for recipe in recipes.values())


def test_what_training_hides_is_counted_on_the_same_images(tiny_data, tiny_split):
    study = Known({})
    study.data, study.split = tiny_data, tiny_split
    study.run.profile = PROFILES["smoke"]
    model = prepare_qat(network(), CustomQConfig.POWER2.qat)
    calibrate(model, calibration_batches(tiny_data, tiny_split))
    table = study.hidden_by_training(model.apply(torch.ao.quantization.disable_observer), batch_size=7)
    assert table.shape == (6, 2) and ((table >= 0) & (table <= 1)).all(axis=None)
    spread = tiny_split.train[
        [63 * step // 31 for step in range(32)]
    ]  # as many as validation images, first and last among them
    images = trainings.normalize(torch.from_numpy(tiny_data.train_images[spread]))
    labels = torch.from_numpy(tiny_data.train_labels[spread])
    with torch.no_grad():
        expected = (model(images).argmax(1) == labels).float().mean().item()
    assert table.loc["as they are", "with"] == pytest.approx(expected)
    assert table.equals(study.hidden_by_training(model, batch_size=7)), "the same draws again"
    mixed, partner, share = trainings.mix(images, PROFILES["reference"].qat, np.random.default_rng(5))
    with torch.no_grad():
        answers = model(mixed).argmax(1)
    own, other = (answers == labels).float(), (answers == labels[partner]).float()
    expected = (share * own + (1 - share) * other).mean().item()
    at_once = study.hidden_by_training(model, batch_size=len(images))
    assert at_once.loc["mixup alone, counted by shares", "with"] == pytest.approx(expected)
    expected = torch.where(share >= 0.5, own, other).mean().item()
    assert at_once.loc["mixup alone", "with"] == pytest.approx(expected)
