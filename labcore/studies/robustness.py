"""What quantization costs on corrupted images.

Below, `predictions` is the table that `answers` returns, and `labels` are the true classes, int64 (N,).
`clean` is what `clean_losses` returns: what is lost on all test images, of which the N are `chosen`.
"""

import hashlib
import itertools
import math
from collections.abc import Iterable
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import t as student
from torch import nn

from labcore import LabError
from labcore.data import evenly_spaced
from labcore.evaluate import predict
from labcore.files.artifacts import UNREADABLE, read_npz, sha256_file, write_npz
from labcore.files.code import modules_hash
from labcore.stats import (
    beyond_chance,
    compare_paired,
    mean_over_images,
    normal_p_value,
)
from labcore.studies.corruptions import CORRUPTIONS, GROUPS, SEVERITIES, corrupt, group_of
from labcore.studies.study import Cell, Study

IMAGES = 1_000  # test images that are corrupted, evenly spaced
QUANTIZED = ("ptq", "qat")


def chosen(n_test: int) -> np.ndarray:
    """Return which of so many test images are corrupted: (N,) of them, evenly spaced."""
    return evenly_spaced(np.arange(n_test), IMAGES)


def clean_losses(logits: dict[str, np.ndarray], labels: np.ndarray) -> dict[str, np.ndarray]:
    """Return what quantized networks lose on each clean test image, in points: 100, 0 or -100, by network.

    `logits` (n_test, classes) are those of the stages by name; `labels` are of all test images.
    """
    right = {name: (each.argmax(1) == labels).astype(float) for name, each in logits.items()}
    return {name: 100.0 * (right["fp32"] - right[name]) for name in QUANTIZED}


def answers(
    study: Study, networks: dict[str, nn.Module], images: np.ndarray, corruptions: Iterable[str] = CORRUPTIONS
) -> pd.DataFrame:
    """Return what networks of the run, by stage, answer on clean and on corrupted images.

    Images are uint8 (N, 3, H, W), the run's seed decides the draws, and cells that are known are read.
    Columns: corruption ("clean" or a name), severity (0 where clean), per network its classes, int64 (N,).
    """
    run = study.run
    files = {name: run.path(name, "weights.pt" if name == "fp32" else "int8.pt") for name in networks}
    common = {
        "corruption seed": run.seed,
        "images": hashlib.sha256(images.tobytes()).hexdigest(),
        "networks": {name: sha256_file(path) for name, path in files.items()},
        "corruptions": modules_hash("studies.corruptions"),
        "versions": [metadata.version(name) for name in ("torchvision", "kornia", "pillow")],
    }

    def answer(name: str, severity: int) -> dict:
        spoilt, classes = corrupt(images, name, severity, run.seed) if severity else images, {}
        for network, model in networks.items():
            title = f"{network}, {name} {severity}".removesuffix(" 0")
            logits = predict(model, spoilt, run.profile.eval_batch_size, title)
            classes[network] = logits.argmax(1).tolist()
        return classes

    kinds = [("clean", 0), *itertools.product(corruptions, SEVERITIES)]
    cells = {kind: Cell(common | {"robustness": kind}, partial(answer, *kind)) for kind in kinds}
    classes = study.cells(cells, "corruptions")[list(networks)].map(np.array)
    return classes.rename_axis(["corruption", "severity"]).reset_index()


def save_answers(path: Path, predictions: pd.DataFrame, labels: np.ndarray) -> None:
    """Write what `answers` returned, with the labels: from there every number of the study follows."""
    networks = predictions.columns.drop(["corruption", "severity"])
    stacked = {name: np.stack(list(predictions[name])).astype(np.int16) for name in networks}
    stacked["corruption"] = predictions["corruption"].to_numpy().astype(str)
    stacked["severity"] = predictions["severity"].to_numpy()
    write_npz(path, labels=labels, **stacked)


def load_answers(path: Path) -> tuple[pd.DataFrame, np.ndarray]:
    """Return (answers, labels) as `save_answers` took them; LabError where the file is missing or damaged."""
    try:
        stored = read_npz(path)
        labels = stored.pop("labels")
        columns = {name: list(values) if values.ndim > 1 else values for name, values in stored.items()}
        return pd.DataFrame(columns), labels
    except UNREADABLE as error:
        raise LabError(f"{path} cannot be read ({error}): run notebook 10 again.") from None


def _hits(predictions: pd.DataFrame, network: str, labels: np.ndarray) -> np.ndarray:
    """Return whether a network is right, float (cells, N)."""
    return (np.stack(list(predictions[network])) == labels).astype(float)


def cell_table(predictions: pd.DataFrame, labels: np.ndarray, classes: int) -> pd.DataFrame:
    """Return one row per corruption and severity: accuracies, and what PTQ and QAT lose against FP32.

    Columns group, corruption, severity, acc_fp32, acc_ptq, acc_qat (fractions), and for ptq and qat
    drop_pp_<network>, drop_pp_low_<network>, drop_pp_high_<network>, p_value_<network> (`compare_paired`).
    """
    table = predictions[["corruption", "severity"]]
    table.insert(0, "group", table["corruption"].map(group_of))
    for network in ("fp32", *QUANTIZED):
        table[f"acc_{network}"] = _hits(predictions, network, labels).mean(axis=1)
    one_hot = np.eye(classes)  # an answer as logits
    for network in QUANTIZED:
        pairs = zip(predictions["fp32"], predictions[network], strict=True)
        paired = pd.DataFrame([compare_paired(one_hot[a], one_hot[b], labels) for a, b in pairs])
        for end in ("", "_low", "_high"):
            table[f"drop_pp{end}_{network}"] = paired[f"acc_drop_pp{end}"]
        table[f"p_value_{network}"] = paired["p_value"]
    return table


def corruption_cost(
    predictions: pd.DataFrame, labels: np.ndarray, clean: dict[str, np.ndarray], network: str
) -> dict:
    """Return what a quantized network loses on clean images and on corrupted ones, and the difference.

    The same images are in every cell, so images are what is sampled, not cells. With d_i the mean over the
    corrupted cells of 100 (FP32 right - network right) on image i, corrupted_drop_pp is the mean of d_i over
    the chosen images, clean_drop_pp that of `clean` over all, extra_drop_pp the difference of both: each
    {"mean", "low", "high"}, a t interval over images; positive is worse. fp32_acc and acc are means over
    corrupted cells.
    """
    spoilt = predictions[predictions["corruption"] != "clean"]
    fp32, quantized = _hits(spoilt, "fp32", labels), _hits(spoilt, network, labels)
    on_corrupted, everywhere = 100.0 * (fp32 - quantized).mean(0), clean[network]  # (N,), (n_test,)
    return {
        "fp32_acc": float(fp32.mean()),
        "acc": float(quantized.mean()),
        "clean_drop_pp": mean_over_images(everywhere),
        "corrupted_drop_pp": mean_over_images(on_corrupted),
        "extra_drop_pp": _mean_minus_all(on_corrupted, everywhere, chosen(len(everywhere))),
    }


def _mean_minus_all(part: np.ndarray, everywhere: np.ndarray, rows: np.ndarray) -> dict[str, float]:
    """Return the mean of one value per image of a sample, less the mean of another over all images.

    `part` (n,) belongs to the images `rows` of all, of which `everywhere` (N,) has a value each: mean, low,
    high, a t interval over images. Its variance is var(part) / n + var(all) / N - 2 cov / N, since the sample
    is among all; where the sample is all, this is the paired difference.
    """
    n, count = len(part), len(everywhere)
    mean_over_images(part)  # checks how many there are
    covariance = np.cov(part, everywhere[rows])[0, 1]
    variance = part.var(ddof=1) / n + (everywhere.var(ddof=1) - 2 * covariance) / count
    mean = float(part.mean() - everywhere.mean())
    half = float(student.ppf(0.975, n - 1) * math.sqrt(max(variance, 0.0)))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def severity_table(predictions: pd.DataFrame, labels: np.ndarray) -> pd.DataFrame:
    """Return accuracies and drops per group and severity, clean images being severity 0 of every group.

    Columns group, severity, network ("fp32", "ptq", "qat"), acc (fraction), and drop_pp, drop_pp_low,
    drop_pp_high over images (t intervals), which are 0 for FP32 itself.
    """
    groups, rows = predictions["corruption"].map(group_of), []
    for group, severity in itertools.product(GROUPS, (0, *SEVERITIES)):
        cells = predictions[groups.isin([group, "clean"]) & (predictions["severity"] == severity)]
        fp32 = _hits(cells, "fp32", labels)
        for network in ("fp32", *QUANTIZED):
            hits = _hits(cells, network, labels)
            drop = mean_over_images(100.0 * (fp32 - hits).mean(0))
            rows.append((group, severity, network, float(hits.mean()), *drop.values()))
    columns = ["group", "severity", "network", "acc", "drop_pp", "drop_pp_low", "drop_pp_high"]
    return pd.DataFrame(rows, columns=columns)


def verdict(cost: dict) -> str:
    """Return the answer in words, from `corruption_cost`."""
    extra = cost["extra_drop_pp"]
    if extra["low"] > 0:
        return "costs more on corrupted images than on clean ones"
    if extra["high"] < 0:
        return "costs less on corrupted images than on clean ones"
    return "shows no difference in cost between corrupted and clean images"


def compare_networks(
    predictions: pd.DataFrame, labels: np.ndarray, clean: dict[str, np.ndarray], classes: int
) -> dict:
    """Return what quantization costs on corrupted images, for PTQ and QAT.

    Rows of `cell_table` (cells) and `severity_table` (levels); cost and verdict, by network; group_cost, by
    group; corruption_cost, a row for each; changed, the groups, corruptions and cells on which the cost
    differs from that on clean images `beyond_chance`, all of them one family, as rows part ("group",
    "corruption" or "cell"), name, network, mean (points), p_value.
    """
    names, is_clean = predictions["corruption"], predictions["corruption"] == "clean"
    groups, cells = names.map(group_of), names + " " + predictions["severity"].astype(str)

    def cost(rows: pd.Series) -> dict[str, dict]:
        cells_of = predictions[rows]
        return {network: corruption_cost(cells_of, labels, clean, network) for network in QUANTIZED}

    everywhere = cost(~is_clean)
    by_group = {group: cost(groups == group) for group in sorted(GROUPS)}
    by_corruption = {name: cost(names == name) for name in CORRUPTIONS}
    by_cell = {cell: cost(cells == cell) for cell in cells[~is_clean]}
    parts = {"group": by_group, "corruption": by_corruption, "cell": by_cell}
    return {
        "cells": cell_table(predictions, labels, classes).to_dict("records"),
        "levels": severity_table(predictions, labels).to_dict("records"),
        "cost": everywhere,
        "verdict": {network: verdict(of_network) for network, of_network in everywhere.items()},
        "group_cost": by_group,
        "corruption_cost": [{"corruption": name} | costs for name, costs in by_corruption.items()],
        "changed": beyond_chance([row for part, costs in parts.items() for row in _extra_costs(part, costs)]),
    }


def _extra_costs(part: str, costs: dict[str, dict[str, dict]]) -> list[dict]:
    """Return what corruption adds to the cost, a row per name and network."""
    extra = {pair: costs[pair[0]][pair[1]]["extra_drop_pp"] for pair in itertools.product(costs, QUANTIZED)}
    return [
        {"part": part, "name": name, "network": network}
        | {"mean": interval["mean"], "p_value": normal_p_value(interval)}
        for (name, network), interval in extra.items()
    ]


def lost_images(before: np.ndarray, after: np.ndarray, labels: np.ndarray, count: int = 24) -> pd.DataFrame:
    """Return images that the first network gets right and the second wrong, those it was surest of first.

    `before` and `after` are logits (N, classes). Columns image (position), true, before, after (classes),
    margin_before, margin_after: the largest logit minus the second largest. Ties are sorted by position.
    """
    table = pd.DataFrame({"image": np.arange(len(labels)), "true": labels})
    table["before"], table["after"] = before.argmax(1), after.argmax(1)
    for name, logits in (("before", before), ("after", after)):
        second, first = np.partition(logits, -2, axis=1)[:, -2:].T
        table[f"margin_{name}"] = (first - second).astype(float)
    lost = table[(table["before"] == table["true"]) & (table["after"] != table["true"])]
    return lost.nlargest(count, "margin_before").reset_index(drop=True)
