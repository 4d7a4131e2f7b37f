"""What notebook 09 says of its engines: from the answers and times that it saved to statistics.

The notebook calls these functions before it saves its metrics, labcore.report.verify calls them again. Each
takes the folder with a profile's stages (runs/<profile>, or report/<profile>/results) and what was measured.
"""

from pathlib import Path

import pandas as pd

from labcore.engines import bench, tables
from labcore.files.artifacts import load_logits
from labcore.stats import compare_paired, summarize


def answers(folder: Path, metrics: dict) -> dict:
    """Return how the engines of notebook 09 answer, beside PyTorch's eager INT8 network.

    answers has a row for each; paired, by title, those that should compute its integers and do not.
    """
    logits, labels = tables.load_answers(folder / "engines" / "answers.npz")
    eager = load_logits(folder / "ptq" / "logits.npz")[0]
    rows = [
        {"engine": title} | summarize(values, labels) | tables.agreement(values, eager)
        for title, values in logits.items()
    ]
    differing = [row["engine"] for row in rows if row["identical"] < 1]
    return {
        "answers": rows,
        "paired": {
            title: compare_paired(eager, logits[title], labels)
            for title in differing
            if title.endswith(bench.POWER2)
        },
    }


def speeds(folder: Path, metrics: dict) -> dict:
    """Return how fast the engines of notebook 09 are; `metrics` has the network's `macs`.

    By number of threads: roofs, speeds, best, and ties, the engines that are as fast as the best. And pairs.
    """
    found: dict[str, dict] = {"roofs": {}, "speeds": {}, "best": {}, "ties": {}}
    pairs = []
    for threads, rows in pd.read_csv(folder / "engines" / "latency.csv").groupby("threads"):
        rounds, count = rows.drop(columns="threads"), f"{threads}"
        table = tables.speeds(rounds, metrics["macs"])
        found["roofs"][count], found["speeds"][count] = tables.roofs(rounds), table
        found["best"][count] = best = tables.best(table)
        found["ties"][count] = {
            batch: [row["engine"] for row in table if f"{row['batch']}" == batch and _is_tied(row, fastest)]
            for batch, fastest in best.items()
        }
        pairs += [row | {"threads": int(threads)} for row in tables.pairs(rounds).to_dict("records")]
    return found | {"pairs": pairs}


def _is_tied(row: dict, fastest: dict) -> bool:
    """Return whether the quartiles of an engine's latency overlap those of the fastest."""
    return row["engine"] != fastest["engine"] and row["latency_ms_low"] <= fastest["latency_ms_high"]
