"""Several trainings: what each gives, and what holds over them."""

import numpy as np
import pytest
import torch
from small import network

from labcore.config import get_profile
from labcore.files.artifacts import write_npz
from labcore.files.tensors import save_tensors
from labcore.quantize import simulate
from labcore.run import Run
from labcore.studies import over_trainings, seeds
from labcore.studies.seeds import PTQ, VIEWS, Starts


@pytest.fixture
def study(tiny_data, tiny_split, tmp_path, monkeypatch):
    """The study of a run whose FP32 network is the small one, as if it had been trained."""
    sizes = {"image_size": 16, "width": 4, "calibration_images": 16}
    recipe = {"epochs": 1, "batch_size": 32, "epoch_images": 64, "small_share": 0.0}
    values = sizes | {f"{part}.{name}": value for part in ("fp32", "qat") for name, value in recipe.items()}
    run = Run(get_profile("cpu", **values), None, 0, tmp_path)
    monkeypatch.setitem(run.__dict__, "data", tiny_data)
    monkeypatch.setitem(run.__dict__, "split", tiny_split)
    save_tensors(run.path("fp32", "weights.pt"), network().state_dict())
    return Starts(run)


def test_another_start_is_another_network_and_the_first_is_the_runs_own(study):
    other = study.start(1)
    assert study.start(0) is study and other.seed == 1
    assert other.base != study.base, "cells of one start are not those of another"
    assert not study.run.path("seeds", "starts").exists(), "nothing is trained before a cell asks for it"
    assert not torch.equal(other.model.conv1.weight, study.model.conv1.weight)
    again = study.start(1)
    assert all(
        torch.equal(a, b) for a, b in zip(other.model.parameters(), again.model.parameters(), strict=True)
    )
    assert not np.array_equal(other.reference, study.reference)


def test_the_networks_of_a_start_answer_every_test_image(study, tiny_data):
    cells = study.experiments()
    table = study.cells({name: cells[name] for name in ("fp32", "ptq", "additions", "fp32_on", "qat")}, "few")
    n_test = len(tiny_data.test_labels)
    for name, column in (("fp32", "right"), ("ptq", "right"), ("additions", "floats"), ("qat", "last")):
        assert len(table.loc[name, column]) == n_test
    assert len(table.loc["qat", "train"]) == len(study.split.train_sample)
    assert not list(study.run.path("seeds", "fits").glob("*")), "what the cells came from is removed"
    assert study.recipe.epochs == 2 and study.recipe.freeze_at == 0.5, (
        "one epoch more, frozen after the first"
    )
    assert set(cells) >= {*PTQ, "best_qat", "qat_folded", "qat_theirs", "fusing, reference"}


def test_float_additions_leave_every_other_rounding(study):
    simulated = simulate(study.prepared(*PTQ["ptq"]))
    seen = []
    study._right = lambda model: seen.append(
        {name for name, part in model.named_modules() if getattr(part, "fake_quant_enabled", [0])[0]}
    )
    study._additions()
    every = {name for name, part in simulated.named_modules() if hasattr(part, "fake_quant_enabled")}
    off = {f"layer{n}.{part}" for n in ("2.2", "4.2") for part in ("add_relu", "conv2")}
    assert seen[0] == every
    assert {name.removesuffix(".activation_post_process") for name in every - seen[1]} == off


def test_hits_are_those_of_the_same_images_and_a_mixed_one_counts_by_shares(study, tiny_data, monkeypatch):
    labels = torch.from_numpy(tiny_data.train_labels)

    class Perfect(torch.nn.Module):
        """Knows what it is shown first: the labels of the rows of a batch, in their order."""

        def forward(self, x):
            return torch.nn.functional.one_hot(self.rows, 4).float()

    model, mixing = Perfect(), seeds.mix

    def in_order(images, augmentation, rng):
        model.rows = next(batches)
        return images.float()

    sample = np.random.default_rng(study.seed).permutation(study.split.train_sample)
    batches = iter([labels[rows] for rows in np.array_split(sample, max(1, len(sample) // 64))])
    monkeypatch.setattr(seeds, "augment", in_order)
    shares = []

    def mixed(x, recipe, rng):
        images, partner, share = mixing(x, recipe, rng)
        shares.append(torch.where(labels[sample][partner] == labels[sample], 1.0, share))
        return images, partner, share

    monkeypatch.setattr(seeds, "mix", mixed)
    hits = study._hits(model)["hits"]
    assert set(hits) == set(VIEWS) and all(len(values) == len(sample) for values in hits.values())
    assert np.mean(hits["plain"]) == np.mean(hits["augmented"]) == np.mean(hits["unrounded"]) == 1
    assert hits["mixed"] == pytest.approx(torch.cat(shares).tolist(), abs=1e-4)
    assert all(perfect >= own for perfect, own in zip(hits["counted"], hits["mixed"], strict=True))


def test_drops_add_up_gaps_and_causes_are_those_of_the_arrays(tmp_path):
    rng = np.random.default_rng(0)
    kinds = {name for pair in over_trainings.PAIRS for name in pair} | {"fp32"}
    right = {kind: rng.choice([0, 0.5, 1], (3, 40), p=[0.1, 0.1, 0.8]) for kind in sorted(kinds)}
    train = {kind: rng.random((3, 60)) < 0.9 for kind in seeds.UNROUNDED}
    hits = {view: rng.integers(0, 2, (3, 30)).astype(float) for view in VIEWS}
    named = {"right": right, "train": train, "hits": hits}
    arrays = {f"{part}_{kind}": values for part, each in named.items() for kind, values in each.items()}
    write_npz(tmp_path / "seeds/hits.npz", **arrays)
    fusing = {"reference": {"each": [-0.1, -0.2, -0.3]}}
    found = over_trainings.compare_starts(tmp_path, {"fusing": fusing})
    drops = {(row["before"], row["after"]): row["mean"] for row in found["pairs"]}
    assert set(drops) == {("fp32", kind) for kind in kinds - {"fp32"}} | set(over_trainings.PAIRS)
    acc = found["accuracy"]
    assert acc["qat"] == right["qat"].mean(axis=1).tolist()
    assert drops["ptq", "qat"] == pytest.approx(100 * (np.mean(acc["ptq"]) - np.mean(acc["qat"])))
    assert drops["ptq", "qat"] == pytest.approx(drops["fp32", "qat"] - drops["fp32", "ptq"])
    assert found["fp32"]["mean"] == pytest.approx(100 * np.mean(acc["fp32"]))
    gap = {kind: 100 * (train[kind].mean(1) - acc[kind]) for kind in seeds.UNROUNDED}
    assert found["gap"]["fp32_on_last"]["each"] == pytest.approx(gap["fp32_on_last"].tolist())
    change = gap["qat_unrounded"] - gap["fp32_on_last"]
    assert found["gap_change"]["each"] == pytest.approx(change.tolist())
    expected = 100 * (hits["unrounded"] - hits["plain"]).mean()
    assert found["hidden"]["rounding"]["mean"] == pytest.approx(expected)
    rise = found["fusing"]["reference"]  # t of two degrees of freedom is 4.303
    assert (rise["mean"], rise["high"]) == pytest.approx((-0.2, -0.2 + 4.303 * 0.1 / 3**0.5), abs=1e-4)
