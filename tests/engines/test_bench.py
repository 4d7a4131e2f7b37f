"""Engines side by side: workers against the same files in this process, tables by hand, and engines that cannot run."""

import copy
import json
import os
import signal
from importlib.util import find_spec

import numpy as np
import pandas as pd
import pytest
import torch
from small import network

from labcore import LabError
from labcore.engines import bench as engines
from labcore.engines import worker as engine_worker
from labcore.engines.bench import ENGINES, FLOAT, FP32, MATRIX, POWER2, Bench, EngineError, Worker
from labcore.engines.export import convert_export, prepare_export, weights_per_channel
from labcore.engines.files import multiply_adds, save_float_onnx, write_images
from labcore.engines.onnx_export import build_onnx, load_onnx, predict_onnx, save_onnx
from labcore.images.transforms import normalize
from labcore.plots import engines as engine_plots
from labcore.qconfig import REFERENCE, has_vnni


@pytest.fixture
def images(tiny_data, tmp_path):
    path = tmp_path / "images.npy"
    write_images(path, tiny_data.test_images, chunk=10)
    return path


def spec(kind: str, path, images, **options) -> dict:
    return {"kind": kind, "path": str(path), "images": str(images), "threads": 1} | options


def test_images_are_those_of_the_evaluation_transform(images, tiny_data):
    expected = normalize(torch.from_numpy(tiny_data.test_images)).contiguous().numpy()
    assert np.array_equal(np.load(images, mmap_mode="r"), expected)
    assert not list(images.parent.glob("*.part"))


def test_multiply_adds_are_those_of_the_layers():
    model, sizes = network(), {}
    hooks = [
        module.register_forward_hook(
            lambda module, inputs, output: sizes.update({module: output.numel() * module.weight[0].numel()})
        )
        for module in model.modules()
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)
    ]
    model(torch.zeros(1, 3, 16, 16))
    for hook in hooks:
        hook.remove()
    assert multiply_adds(model, (3, 16, 16)) == sum(sizes.values()) > 0


@torch.no_grad()
def test_one_scale_written_once_per_channel_changes_no_bit(tiny_data, tiny_split):
    batch = normalize(torch.from_numpy(tiny_data.train_images[:16]))
    prepared = prepare_export(network(), REFERENCE, REFERENCE, batch)
    prepared(batch)
    converted = convert_export(prepared)
    expected, weights = converted(batch), _targets(converted).count("dequantize_per_channel")
    assert weights == 0
    found = weights_per_channel(copy.deepcopy(converted))
    n_layers = sum(isinstance(m, torch.nn.Conv2d | torch.nn.Linear) for m in network().modules())
    assert _targets(found).count("dequantize_per_channel") == n_layers
    assert torch.equal(found(batch), expected)


def _targets(program) -> list[str]:
    return [getattr(node.target, "_opname", "") for node in program.graph.nodes]


class TestWorkers:
    @pytest.fixture
    def files(self, int8, tmp_path):
        save_onnx(tmp_path / "int8.onnx", build_onnx(int8, (3, 16, 16)))
        return tmp_path

    def test_engines_answer_as_their_files_do_in_this_process(self, files, images, tiny_data):
        save_float_onnx(files / "fp32.onnx", network(), torch.zeros(2, 3, 16, 16))
        kinds = ["onnx_runtime"] + (["openvino"] if find_spec("openvino") else [])
        specs = {
            (kind, name): spec(kind, files / f"{name}.onnx", images)
            for kind in kinds
            for name in ("fp32", "int8")
        }
        specs["roof"] = {"kind": "matrix_fp32", "size": 64, "threads": 1}
        specs = {str(title): one for title, one in specs.items()}
        with Bench(specs, [1, 64]) as bench:
            table, logits = bench.answers(tiny_data.test_labels)
            times = bench.times(rounds=3, runs=2, pause=0)
        batch = normalize(torch.from_numpy(tiny_data.test_images))
        with torch.no_grad():
            floats = network()(batch).numpy()
        integers = predict_onnx(load_onnx(files / "int8.onnx"), [batch])
        close = 0.05 * np.abs(integers).max()  # OpenVINO keeps some sums in float where ONNX Runtime rounds
        rounded = np.abs(integers - floats).max()  # the steps of 7-bit activations are larger than that
        for title, found in logits.items():
            if "fp32" in title:
                assert np.allclose(found, floats, atol=1e-4)
            elif "onnx" in title or has_vnni():
                assert np.abs(found - integers).max() <= (0 if "onnx" in title else close), title
            else:
                assert np.abs(found - floats).max() <= 1.1 * rounded, title
        networks = [title for title in specs if title != "roof"]
        assert list(table.index) == networks and (table["n_seen"] == 32).all()
        assert (table["peak_mb"] > table["libraries_mb"]).all() and (table["libraries_mb"] > 10).all()
        expected = {(r, name, b) for r in range(3) for name in networks for b in (1, 64)}
        expected |= {(r, "roof", 1) for r in range(3)}
        assert set(zip(times["round"], times["engine"], times["batch"], strict=True)) == expected
        assert (times["latency_ms"] > 0).all() and len(times) == len(expected)
        assert bench.skipped == {}

    def test_an_engine_that_cannot_run_is_skipped_with_its_reason_and_the_others_go_on(self, files, images):
        (files / "damaged.onnx").write_bytes(b"no network")
        specs = {
            "good": spec("onnx_runtime", files / "int8.onnx", images),
            "damaged": spec("onnx_runtime", files / "damaged.onnx", images),
            "missing": spec("onnx_runtime", files / "missing.onnx", images),
            "foreign": spec(
                "torch_eager", files / "int8.pt", images, kernels="abacus", network=["resnet9", 4, 4, "cifar"]
            ),
        }
        with Bench(specs, [1]) as bench:
            assert set(bench.times(rounds=3, runs=1, pause=0)["engine"]) == {"good"}
        assert set(bench.skipped) == {"damaged", "missing", "foreign"}
        assert bench.skipped["foreign"] == "RuntimeError: torch has no abacus kernels for this processor"
        assert all("\n" not in reason and reason for reason in bench.skipped.values())

    def test_a_killed_process_is_an_error_that_says_so(self, files, images):
        worker = Worker(spec("onnx_runtime", files / "int8.onnx", images))
        try:
            worker.loaded()
            os.kill(worker._process.pid, signal.SIGKILL)
            with pytest.raises(EngineError, match="its process ended with status -9"):
                worker.time(1, 1)
        finally:
            worker.close()

    def test_an_engine_that_stops_loses_its_times_and_the_others_go_on(self, files, images):
        specs = {name: spec("onnx_runtime", files / "int8.onnx", images) for name in ("one", "other")}
        with Bench(specs, [1]) as bench:
            worker, asked = bench._workers["one"], []
            time_of = worker.time
            worker.time = lambda *args: (
                asked.append(len(asked) == 1 and worker._process.kill()) or time_of(*args)
            )
            times = bench.times(rounds=4, runs=1, pause=0)
        assert len(asked) == 2 and set(times["engine"]) == {"other"} and len(times) == 4
        assert bench.skipped["one"].startswith("its process ended with status -9")

    def test_no_process_is_left_behind(self, files, images, monkeypatch):
        started, start = [], engines.subprocess.Popen
        monkeypatch.setattr(
            engines.subprocess, "Popen", lambda *a, **k: started.append(start(*a, **k)) or started[-1]
        )
        with (
            pytest.raises(KeyboardInterrupt),
            Bench({"one": spec("onnx_runtime", files / "int8.onnx", images)}, [1]),
        ):
            raise KeyboardInterrupt
        assert len(started) == 1 and started[0].poll() is not None


def test_a_package_that_is_missing_is_named():
    assert engines._reason("ModuleNotFoundError: No module named 'openvino'") == (
        "openvino is not installed (it stands in requirements.txt)"
    )
    assert engines._reason("RuntimeError: x") == "RuntimeError: x"


def test_memory_is_unknown_where_the_system_does_not_say(monkeypatch):
    assert engine_worker.memory_mb("VmHWM") >= engine_worker.memory_mb("VmRSS") * 0.99 > 1
    assert engine_worker.memory_mb("VmNothing") is None
    monkeypatch.setattr(engine_worker, "Path", lambda _: (_ for _ in ()).throw(FileNotFoundError()))
    assert engine_worker.memory_mb("VmRSS") is None


def test_every_engine_has_a_loader_and_a_title_of_its_own():
    assert len({engine.title for engine in ENGINES}) == len(ENGINES)
    assert {engine.kind for engine in ENGINES} | set(engines.ROOFS.values()) == set(engine_worker.ENGINES)


EAGER, FAST = f"PyTorch eager · {FP32}", f"ONNX Runtime · {FP32}"
OURS, THEIRS = f"ONNX Runtime · {POWER2}", f"ONNX Runtime · {FLOAT}"


@pytest.fixture
def measured():
    """Three rounds; the second is twice as slow for all."""
    base = {EAGER: (4.0, 100.0), FAST: (2.0, 200.0), OURS: (1.0, 50.0), THEIRS: (1.5, 50.0)}
    rows = []
    for number, factor in enumerate((1, 2, 1)):
        for title, both in base.items():
            for batch, ms in zip((1, 64), both, strict=True):
                rows.append((number, title, batch, factor * ms))
        rows += [(number, "FP32", 1, factor * 100.0), (number, "INT8", 1, factor * 25.0)]
    return pd.DataFrame(rows, columns=["round", "engine", "batch", "latency_ms"])


def test_roofs_are_products_per_second(measured):
    found = engines.roofs(measured)
    assert found["FP32"]["rate"] == pytest.approx(MATRIX**3 / 0.1 / 1e9)
    assert found["INT8"]["rate_high"] == pytest.approx(MATRIX**3 / 0.025 / 1e9)
    assert found["INT8"]["rate_low"] == pytest.approx(0.75 * found["INT8"]["rate_high"])
    assert engines.roofs(measured[measured["engine"] != "INT8"])["INT8"] is None


def test_speeds_are_ratios_within_a_round(measured):
    macs = 10_000_000
    table = pd.DataFrame(engines.speeds(measured, macs)).set_index(["batch", "engine"])
    assert len(table) == 8 and "FP32" not in table.index.get_level_values("engine")
    for batch, eager, fastest in ((1, 4.0, FAST), (64, 100.0, EAGER)):
        row = table.loc[(batch, OURS)]
        own = {1: 1.0, 64: 50.0}[batch]
        assert [row["speedup_low"], row["speedup"], row["speedup_high"]] == pytest.approx([eager / own] * 3)
        assert row["fastest_fp32"] == fastest
        assert row["latency_ms"] == own and row["latency_ms_high"] == pytest.approx(1.5 * own)
        assert row["images_per_s"] == pytest.approx(1000 * batch / own)
        rate = MATRIX**3 / 0.025
        assert row["roof_share"] == pytest.approx(1000 * batch / own * macs / rate)
    assert table.loc[(1, OURS), "fp32_speedup"] == pytest.approx(2)
    assert table.loc[(1, FAST), "roof_share"] == pytest.approx(500 * macs / (MATRIX**3 / 0.1))


def test_what_could_not_be_measured_is_none(measured):
    few = measured[~measured["engine"].isin([EAGER, "INT8"])]
    rows = {(row["batch"], row["engine"]): row for row in engines.speeds(few, 1000)}
    ours = rows[1, OURS]
    assert ours["speedup"] is ours["speedup_low"] is ours["roof_share"] is None
    assert ours["fp32_speedup"] == pytest.approx(2) and rows[1, FAST]["roof_share"] > 0
    none = engines.speeds(few[few["engine"].isin([OURS, "FP32"])], 1000)
    assert [row["fastest_fp32"] for row in none] == [None, None] and none[0]["fp32_speedup"] is None


def test_the_best_is_the_fastest_int8_engine_of_each_batch(measured):
    measured.loc[(measured["engine"] == THEIRS) & (measured["batch"] == 64), "latency_ms"] /= 2
    found = engines.best(engines.speeds(measured, 1000))
    assert {batch: row["engine"] for batch, row in found.items()} == {"1": OURS, "64": THEIRS}
    assert engines.best(engines.speeds(measured[measured["engine"] == EAGER], 1000)) == {}


def test_records_are_json_with_none_for_what_is_unknown():
    table = pd.DataFrame({"peak_mb": [1.5, np.nan], "n_seen": [3, 4]}, index=["a", "b"])
    assert json.loads(json.dumps(engines.records(table), allow_nan=False)) == [
        {"engine": "a", "peak_mb": 1.5, "n_seen": 3},
        {"engine": "b", "peak_mb": None, "n_seen": 4},
    ]


def test_a_batch_is_filled_up_where_there_are_fewer_images(images):
    engine = engine_worker.Engine.__new__(engine_worker.Engine)
    engine.images = np.load(images, mmap_mode="r")  # 32 of them
    found = engine.batch(80)
    assert found.shape == (80, 3, 16, 16) and found.flags.c_contiguous
    assert np.array_equal(found[32:64], found[:32]) and np.array_equal(found[:32], engine.images)
    assert np.array_equal(engine.batch(5), engine.images[:5])


def test_pairs_hold_powers_of_two_against_float_scales(measured):
    found = engines.pairs(measured)
    assert found["engine"].tolist() == ["ONNX Runtime"] * 2 and found["batch"].tolist() == [1, 64]
    assert found["speedup"].tolist() == pytest.approx([1.5, 1.0])
    assert engines.pairs(measured[measured["engine"] != OURS]).empty


def test_agreement_counts_answers_and_bits():
    eager = np.array([[1, 2], [3, 1], [0, 5]], np.float32)
    found = np.array([[1, 2], [3, 1.5], [6, 5]], np.float32)
    assert engines.agreement(found, eager) == {
        "agree": pytest.approx(2 / 3),
        "identical": pytest.approx(1 / 3),
        "largest_difference": 6.0,
    }


def test_answers_come_back_as_they_were_saved(tmp_path):
    logits = {EAGER: np.float32([[1, 2]]), OURS: np.float32([[3, 4]])}
    engines.save_answers(tmp_path / "answers.npz", logits, np.array([1]))
    found, labels = engines.load_answers(tmp_path / "answers.npz")
    assert list(found) == list(logits) and labels.tolist() == [1]
    assert all(np.array_equal(found[title], logits[title]) for title in logits)
    (tmp_path / "answers.npz").write_bytes(b"none")
    with pytest.raises(LabError, match="run notebook 09 again"):
        engines.load_answers(tmp_path / "answers.npz")


def test_figures_are_drawn_from_the_tables(measured, tmp_path):
    table = pd.DataFrame(engines.speeds(measured, 10_000_000))
    panels = {"one": table[table["batch"] == 1], "many": table[table["batch"] == 64]}
    bounds = dict.fromkeys(panels, {"FP32": 2000.0, "INT8": 8000.0})
    engine_plots.engine_bars(panels, bounds).savefig(tmp_path / "bars.png")
    front = panels["one"].assign(acc=0.5, size_mb=[1.0, 2.0, 3.0, 4.0])
    engine_plots.engine_front(front).savefig(tmp_path / "front.png")
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in ("bars", "front"))
