"""Tables of the engines study, from times and logits: notebook 09 makes them, `make verify` once more."""

import math
from pathlib import Path

import numpy as np
import pandas as pd

from labcore import LabError
from labcore.engines.bench import DOT, FIRST, FLOAT, FP32, MATRIX, POWER2, ROOFS, parts
from labcore.files.artifacts import UNREADABLE, read_npz, write_npz


def roofs(measured: pd.DataFrame) -> dict[str, dict[str, float] | None]:
    """Return multiply-adds per second in 10^9, from the times of the matrix products.

    {"FP32": {"rate", "rate_low", "rate_high"}, "INT8": …}; None where a product could not be measured.
    """
    times = _by_round(measured[measured["engine"].isin(ROOFS)])
    rates = _quartiles("rate", MATRIX**3 / times / 1e6)
    return {name: rates.loc[name].to_dict() if name in rates.index else None for name in ROOFS}


def speeds(measured: pd.DataFrame, macs: int) -> list[dict]:
    """Return latency and speed-up of every engine for one number of threads, from `Bench.times`.

    `macs` are the multiply-adds of the network for one image. One row per batch and engine, slowest first:
    engine, batch, latency_ms, images_per_s, speedup over PyTorch eager FP32, fp32_speedup over the fastest
    FP32 engine at that batch (fastest_fp32), all with quartiles (_low, _high), ratios within a round;
    roof_share of the rate of matrix products of the same numbers. None stands for what was not measured.
    """
    rates, rows = roofs(measured), []
    for batch, part in measured[~measured["engine"].isin(ROOFS)].groupby("batch"):
        times = _by_round(part)
        order = times.median().sort_values(ascending=False).index
        fp32 = [title for title in order if _is_fp32(title)]
        fastest = fp32[-1] if fp32 else None
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
    """Compare every engine with powers of two and with float scales, within a round (claim R5).

    Returns one row per engine and batch: engine, batch, speedup (time with float scales over time with powers
    of two) and its quartiles; 1 means no difference.
    """
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
    """Compare an engine's logits (N, classes) with those of the eager INT8 network.

    Returns agree: share of images with the same answer; identical: share whose logits are equal to the bit;
    largest_difference: of any logit.
    """
    return {
        "agree": float((logits.argmax(1) == eager.argmax(1)).mean()),
        "identical": float((logits == eager).all(axis=1).mean()),
        "largest_difference": float(np.abs(logits - eager).max()),
    }


def records(table: pd.DataFrame) -> list[dict]:
    """Return the rows as JSON values, the index as "engine"; None where there is none."""
    rows = table.rename_axis("engine").reset_index().astype(object)
    return rows.where(rows.notna(), None).to_dict("records")


def save_answers(path: Path, logits: dict[str, np.ndarray], labels: np.ndarray) -> None:
    """Write the logits of all engines by their titles, and the labels."""
    write_npz(path, labels=labels, engines=np.array(list(logits)), logits=np.stack(list(logits.values())))


def load_answers(path: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Read (logits by title, labels) as `save_answers` took them; LabError where that fails."""
    try:
        stored = read_npz(path)
        return dict(zip(stored["engines"].tolist(), stored["logits"], strict=True)), stored["labels"]
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
