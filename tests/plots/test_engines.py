"""Figures of engines: every engine is named, and no name covers another."""

import numpy as np
import pandas as pd

from labcore.engines.bench import ENGINES, parts
from labcore.plots.engines import engine_bars, engine_front

TITLES = [engine.title for engine in ENGINES]


def test_engines_of_one_speed_are_told_apart(drawn):
    rng = np.random.default_rng(0)
    latency = 1 + 0.02 * rng.integers(0, 5, len(TITLES))
    columns = {"latency_ms": latency, "acc": 0.9 + 0.001 * rng.integers(0, 4, len(TITLES)), "size_mb": 4.0}
    texts = drawn(engine_front(pd.DataFrame({"engine": TITLES} | columns)))
    key = [text.split("  ") for text in texts if "  " in text]
    assert sorted(name for _, name in key) == sorted(parts(title)[0] for title in TITLES)
    assert {number for number, _ in key} <= set(texts), "every number of the key stands at a point"


def test_bars_have_their_rates_and_kinds(drawn):
    latency = np.linspace(1.013, 4.017, len(TITLES))  # no rate is a tick
    table = pd.DataFrame({"engine": TITLES, "images_per_s": 1000 / latency, "latency_ms": latency})
    table = table.assign(latency_ms_low=0.9 * latency, latency_ms_high=1.1 * latency)
    figure = engine_bars({"a": table, "b": table}, {"a": {"FP32": 500}, "b": {"FP32": 500, "INT8": 2000}})
    texts = drawn(figure)
    assert {parts(title)[1] for title in TITLES} <= set(texts)
    rates = [f"{rate:,.0f}" for rate in table["images_per_s"]]
    assert sorted(text for text in texts if text in set(rates))[::2] == sorted(rates), "in both panels"
    assert len(figure.axes[0].patches) == len(TITLES)
