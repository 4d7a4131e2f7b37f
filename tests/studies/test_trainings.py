"""The training study: recipes that differ in one thing, seeds, and what training hides."""

import dataclasses

import numpy as np
import pytest

from labcore.config import PROFILES, Recipe, get_profile
from labcore.files.artifacts import ROOT
from labcore.files.tensors import save_tensors
from labcore.run import Run
from labcore.studies import trainings
from labcore.studies.study import Cell
from labcore.studies.trainings import EPOCHS, Trainings, base_recipe, recipes_of
from labcore.train import Diverged
from labcore.training.optim import learning_rate

OPTIONS = (ROOT / "docs/options.md").read_text(encoding="utf-8")
BASE = Recipe(epochs=EPOCHS, epoch_images=512, batch_size=128, lr=0.15, small_share=2 / 3)


def flat(recipe: Recipe) -> dict:
    values = dataclasses.asdict(recipe)
    return values | {f"augment.{name}": value for name, value in values.pop("augment").items()}


# What each question may change.
FIELDS = {
    "schedule": {"schedule", "warmup", "restart_epochs", "restart_mult"},
    "batch": {"batch_size", "lr"},
    "augmentation": {name for name in flat(BASE) if name.startswith(("augment.", "mixup_", "cutmix_"))},
    "init": {"init", "bias_lr", "augment.crop_padding", "augment.padding_mode"},
    "resizing": {"small_share", "epochs"},
    "regularisation": {"label_smoothing", "weight_decay", "clip_norm", "ema_decay"},
}


@pytest.mark.parametrize("question", recipes_of(BASE))
def test_a_recipe_differs_in_what_is_asked(question):
    base = dataclasses.replace(BASE, small_share=0.0) if question == "schedule" else BASE
    recipes = recipes_of(BASE)[question].values()
    assert base in recipes
    for recipe in recipes:
        changed = {name for name, value in flat(recipe).items() if value != flat(base)[name]}
        assert changed <= FIELDS[question]


@pytest.mark.parametrize("profile", PROFILES.values())
def test_no_two_recipes_of_a_question_are_the_same_in_any_profile(profile):
    for recipes in recipes_of(base_recipe(profile, 45_000)).values():
        assert len(set(recipes.values())) == len(recipes)
        assert all(recipe.epoch_images // recipe.batch_size > 0 for recipe in recipes.values())


def test_six_epochs_hold_the_references_curve_in_small():
    small, reference, steps = recipes_of(BASE)["schedule"], PROFILES["reference"].fp32, 100
    stopped, ending = (small[f"restarts, {name}"] for name in ("stopped in mid-cycle", "ending with a cycle"))
    for share in np.linspace(0, 0.999, 50):
        there = learning_rate(reference, int(share * reference.epochs * steps), steps)
        here = learning_rate(stopped, int(share * EPOCHS * steps), steps)
        assert here / stopped.lr == pytest.approx(there / reference.lr, abs=0.03)
    last = learning_rate(ending, EPOCHS * steps - 1, steps)
    assert last == pytest.approx(ending.lr_min, abs=1e-4 * ending.lr)


def test_a_fifth_of_the_references_epochs_holds_its_curve_too():
    whole, share = PROFILES["reference"].fp32, 5
    values = {"fp32.epochs": whole.epochs // share, "fp32.restart_epochs": whole.restart_epochs // share}
    assert " ".join(f"{name}={value}" for name, value in values.items()) in OPTIONS
    short = get_profile("reference", **values).fp32
    for step in range(0, whole.epochs * 100, 997):
        expected = learning_rate(whole, step, 100)
        assert learning_rate(short, step // share, 100) == pytest.approx(expected, rel=0.02)


def test_the_linear_rule_and_the_references_rate_are_both_there():
    recipes = recipes_of(BASE)["batch"].values()
    assert [recipe.batch_size for recipe in recipes] == [128] * 3 + [256] * 3
    assert [recipe.lr / BASE.lr for recipe in recipes] == pytest.approx([1, 2, 3] * 2)


@pytest.fixture
def study(tmp_path) -> Trainings:
    profile = dataclasses.replace(PROFILES["smoke"], study_seeds=3, verdict_seeds=4)
    run = Run(profile, None, 5, tmp_path)
    save_tensors(run.path("fp32", "weights.pt"), run.model().state_dict())
    return Trainings(run)


def test_cells_are_kept_by_the_code_that_judges_them_and_by_numpy(study, monkeypatch):
    for name, changed in (("versions", lambda: {"numpy": "another"}), ("modules_hash", lambda *names: names)):
        monkeypatch.setattr(trainings, name, changed)
        assert Trainings(study.run).base != study.base
    assert set(Trainings(study.run).base["code"]) == {"studies.trainings", "data"}


def test_a_training_that_diverges_counts_as_guessing(study, capsys, monkeypatch):
    def diverging(*args, **options):
        raise Diverged("the training loss is no longer finite", 0)

    monkeypatch.setattr(trainings, "fit", diverging)
    row = study.cells({"x": study.trained(study.recipe, 0)}, "").loc["x"]
    assert row.to_dict() == {"acc": 0.1, "loss": pytest.approx(np.log(10))}
    assert "seed 0: the training loss is no longer finite; lower lr" in capsys.readouterr().out


def compare(study: Trainings, accuracies: dict[str, list[float]], **options):
    """Compare recipes whose trainings give these accuracies."""

    def trained(recipe: str, seed: int) -> Cell:
        return Cell({recipe: seed}, lambda: {"acc": accuracies[recipe][seed - study.run.seed]})

    study.trained = trained
    return study.compare({name: name for name in accuracies}, "", **options)


def test_only_what_is_close_gets_more_seeds_and_differences_are_paired(study):
    accuracies = {"base": [0.80, 0.82, 0.84], "far": [0.85, 0.86, None], "close": [0.805, 0.80, 0.83]}
    table = compare(study, accuracies)
    assert table["seeds"].to_dict() == {"base": 3, "far": 2, "close": 3} and len(study.trainings) == 8
    assert table.loc["base", ["diff_pp", "diff_pp_std"]].tolist() == [0, 0]
    for name, count in (("close", 3), ("far", 2)):
        differences = 100 * np.subtract(accuracies[name][:count], accuracies["base"][:count])
        assert table.loc[name, "diff_pp"] == pytest.approx(differences.mean())
        assert table.loc[name, "diff_pp_std"] == pytest.approx(differences.std(ddof=1))


def test_what_a_verdict_rests_on_gets_its_seeds_whatever_they_show(study):
    accuracies = {"base": [0.80, 0.82, 0.84, 0.81], "far": [0.95, 0.96, 0.97, 0.98]}
    table = compare(study, accuracies, verdict=True)
    assert table["seeds"].tolist() == [4, 4] and len(study.trainings) == 8
    assert table.loc["far", "diff_pp"] == pytest.approx(14.75)
