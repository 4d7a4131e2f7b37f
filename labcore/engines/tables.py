"""Tables and statistics of the engines study, from the times and logits that notebook 09 saves.

The notebook calls summarize_answers and summarize_speeds, labcore.report.verify calls them again. They take
the folder with a profile's stages, and the metrics of this one.
"""

import math
from pathlib import Path

import numpy as np
import pandas as pd

from labcore import LabError
from labcore.engines.bench import DOT, FIRST, FLOAT, FP32, MATRIX, POWER2, ROOFS, parts
from labcore.files.artifacts import UNREADABLE, load_logits, read_npz, write_npz
from labcore.stats import compare_paired, summarize


def summarize_answers(folder: Path, metrics: dict) -> dict:
    """Return how the engines answer, beside PyTorch's eager INT8 network: answers has a row for each.

    paired has, by title, those with powers of two that should compute its integers and do not.
    """
    logits, labels, chosen = load_answers(folder / "engines" / "answers.npz")
    eager = load_logits(folder / "ptq" / "logits.npz")[0][chosen]
    rows = [
        {"engine": title} | summarize(values, labels) | agreement(values, eager)
        for title, values in logits.items()
    ]
    paired = {
        row["engine"]: compare_paired(eager, logits[row["engine"]], labels)
        for row in rows
        if row["identical"] < 1 and row["engine"].endswith(POWER2)
    }
    return {"answers": rows, "paired": paired}


def summarize_speeds(folder: Path, metrics: dict) -> dict:
    """Return roofs, speeds and best by number of threads, and pairs; `metrics` has `macs`."""
    by_threads: dict[str, dict] = {"roofs": {}, "speeds": {}, "best": {}}
    pair_rows = []
    for threads, part in pd.read_csv(folder / "engines" / "latency.csv").groupby("threads"):
        rounds, count = part.drop(columns="threads"), f"{threads}"
        by_threads["roofs"][count] = roofs(rounds)
        by_threads["speeds"][count] = rows = speeds(rounds, metrics["macs"])
        by_threads["best"][count] = best(rows)
        pair_rows += [row | {"threads": int(threads)} for row in pairs(rounds).to_dict("records")]
    return by_threads | {"pairs": pair_rows}


def roofs(measured: pd.DataFrame) -> dict[str, dict[str, float] | None]:
    """Return by ROOFS rate, rate_low, rate_high in 10^9 multiply-adds per second; None if not measured."""
    times = _by_round(measured[measured["engine"].isin(ROOFS)])
    rates = _quartiles("rate", MATRIX**3 / times / 1e6)
    return {name: rates.loc[name].to_dict() if name in rates.index else None for name in ROOFS}


def speeds(measured: pd.DataFrame, macs: int) -> list[dict]:
    """Return latency and speed-up of every engine for one number of threads, from `Bench.times`.

    `macs` are the multiply-adds for one image. One row per batch and engine, slowest first; times and ratios
    with quartiles (_low, _high), ratios within a round: speedup over PyTorch eager FP32, fp32_speedup over
    fastest_fp32 at that batch. roof_share is of the rate of matrix products. None was not measured.
    """
    rates, rows = roofs(measured), []
    for batch, part in measured[~measured["engine"].isin(ROOFS)].groupby("batch"):
        times = _by_round(part)
        order = times.median().sort_values(ascending=False).index
        fastest = next(filter(_is_fp32, reversed(order)), None)
        table = _quartiles("latency_ms", times).loc[order]
        table = table.join(_quartiles("speedup", _speedups(times, FIRST)))
        table = table.join(_quartiles("fp32_speedup", _speedups(times, fastest)))
        table["batch"], table["fastest_fp32"] = batch, fastest
        table["images_per_s"] = 1000 * batch / table["latency_ms"]
        roof = [rates["FP32" if _is_fp32(title) else "INT8"] or {"rate": math.nan} for title in order]
        table["roof_share"] = table["images_per_s"] * macs / 1e9 / [rate["rate"] for rate in roof]
        rows += records(table)
    return rows


def best(rows: list[dict]) -> dict[str, dict]:
    """Return the row of the fastest INT8 engine by batch size: the last of these rows, from `speeds`."""
    return {f"{row['batch']}": row for row in rows if not _is_fp32(row["engine"])}


def pairs(measured: pd.DataFrame) -> pd.DataFrame:
    """Return the speedup of powers of two over float scales by engine and batch, with quartiles (R5)."""
    rows, titles = [], measured["engine"].unique()
    for floats in titles:
        name, numbers = parts(floats)
        powers = f"{name}{DOT}{POWER2}"
        if numbers == FLOAT and powers in titles:
            for batch, part in measured[measured["engine"].isin([floats, powers])].groupby("batch"):
                speedup = _quartiles("speedup", _speedups(_by_round(part), floats)).loc[powers]
                rows.append({"engine": name, "batch": int(batch)} | speedup.to_dict())
    return pd.DataFrame(rows)


def agreement(logits: np.ndarray, eager: np.ndarray) -> dict[str, float]:
    """Return the shares of images with the same answer and with the same logits as the eager INT8 network."""
    return {
        "agree": float((logits.argmax(1) == eager.argmax(1)).mean()),
        "identical": float((logits == eager).all(axis=1).mean()),
        "largest_difference": float(np.abs(logits - eager).max()),
    }


def far_off(logits: dict[str, np.ndarray], fp32: np.ndarray, eager: np.ndarray) -> list[str]:
    """Return the engines that do not compute what their titles say, by their logits (N, classes).

    FP32 should be within a thousandth of PyTorch's, `fp32`. Powers of two should be nearer to the eager INT8
    network, `eager`, than half the distance from there to `fp32`. Distances are root mean squares over all
    logits, so weak and diverged networks are judged by the same measure. NaN is far off.
    """

    def size(values: np.ndarray) -> float:
        return float(np.sqrt(np.square(values, dtype=np.float64).mean()))

    near = {FP32: (fp32, size(fp32) / 1000), POWER2: (eager, size(eager - fp32) / 2 + size(eager) / 1000)}
    expected = {title: near[parts(title)[1]] for title in logits if parts(title)[1] in near}
    return [title for title, (values, most) in expected.items() if not size(logits[title] - values) <= most]


def records(table: pd.DataFrame) -> list[dict]:
    """Return the rows as JSON values, the index as "engine"; None where there is none."""
    rows = table.rename_axis("engine").reset_index().astype(object)
    return rows.where(rows.notna(), None).to_dict("records")


def save_answers(path: Path, logits: dict[str, np.ndarray], labels: np.ndarray, chosen: np.ndarray) -> None:
    """Write the logits of all engines by their titles, the labels, and which of the test images these are."""
    by_title = {"engines": np.array(list(logits)), "logits": np.stack(list(logits.values()))}
    write_npz(path, labels=labels, chosen=chosen, **by_title)


def load_answers(path: Path) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Read (logits by title, labels, images) as `save_answers` took them; LabError where that fails."""
    try:
        stored = read_npz(path)
        by_title = dict(zip(stored["engines"].tolist(), stored["logits"], strict=True))
        return by_title, stored["labels"], stored["chosen"]
    except UNREADABLE as error:
        raise LabError(f"{path} cannot be read ({error}): run notebook 09 again.") from None


def _by_round(measured: pd.DataFrame) -> pd.DataFrame:
    """Return milliseconds with a row per round and a column per engine."""
    return measured.pivot(index="round", columns="engine", values="latency_ms")


def _speedups(times: pd.DataFrame, baseline: str | None) -> pd.DataFrame:
    """Return the baseline's time over that of each engine, round by round; NaN where there is no baseline."""
    return times.rdiv(times[baseline], axis=0) if baseline in times else times * math.nan


def _quartiles(name: str, values: pd.DataFrame) -> pd.DataFrame:
    """Return the median and the quartiles of every column."""
    low, high = values.quantile(0.25), values.quantile(0.75)
    return pd.DataFrame({name: values.median(), f"{name}_low": low, f"{name}_high": high})


def _is_fp32(title: str) -> bool:
    return parts(title)[1] == FP32
