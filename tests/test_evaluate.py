"""Answers and times of a network, and the file that keeps answers."""

import gc
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from labcore import LabError
from labcore.evaluate import latency, predict
from labcore.files.artifacts import load_logits, save_logits
from labcore.images.transforms import MEAN, STD


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 3))
    model[1].running_mean.fill_(0.3)
    return model


@pytest.mark.parametrize("batch_size", [1, 5, 16, 500])
def test_predictions_are_those_of_one_pass_in_eval_mode(batch_size, tiny_data):
    found = predict(network().train(), tiny_data.test_images, batch_size)
    pixels = torch.from_numpy(tiny_data.test_images).double() / 255
    normal = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        expected = network().eval()(normal.float())
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)
    assert found.dtype == np.float32 and found.std() > 0.01


def test_prediction_keeps_no_graph_and_leaves_eval_mode_and_statistics(tiny_data):
    model, has_graph = network().train(), []
    model.register_forward_hook(lambda module, given, output: has_graph.append(output.requires_grad))
    predict(model, tiny_data.test_images)
    assert has_graph == [False] and not model.training
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in network().state_dict().items())


class Counting(nn.Module):
    """Counts its calls, and those with a gradient or in train mode."""

    calls = wrong = 0

    def forward(self, x):
        self.calls += 1
        self.wrong += torch.is_grad_enabled() or self.training
        return x


def test_latency_calls_every_model_equally_often_in_eval_mode_without_gradients():
    models = {name: Counting() for name in "abc"}
    table = latency(models, torch.zeros(1, 3, 4, 4), rounds=8, runs=3, warmup=5)
    assert [(model.calls, model.wrong) for model in models.values()] == [(29, 0)] * 3
    assert list(table.columns) == ["round", "model", "latency_ms"] and (table["latency_ms"] > 0).all()
    rows = sorted(zip(table["round"], table["model"], strict=True))
    assert rows == [(number, name) for number in range(8) for name in "abc"]
    assert table.groupby("round")["model"].agg("".join).nunique() > 1, "the order changes"


def test_latency_is_the_median_in_milliseconds(monkeypatch):
    clock = iter([0.0, 0.001, 1.0, 1.002, 2.0, 2.9])
    monkeypatch.setattr("labcore.evaluate.time.perf_counter", lambda: next(clock))
    found = latency({"a": Counting()}, torch.zeros(1), rounds=1, runs=3, warmup=0)
    assert found["latency_ms"].tolist() == pytest.approx([2.0])


def saved_logits(folder):
    """A file of logits, and what is in it."""
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(200, 5)).astype(np.float32), rng.integers(0, 5, 200)
    save_logits(folder / "logits.npz", logits, labels)
    return folder / "logits.npz", (logits, labels)


def test_logits_survive_the_file(tmp_path):
    path, saved = saved_logits(tmp_path)
    for stored, expected in zip(load_logits(path), saved, strict=True):
        np.testing.assert_array_equal(stored, expected, strict=True)


def cut(share: float):
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def flip(offset: int, start: bytes = b"PK"):
    """A changed byte, counted from where `start` is found first."""

    def damage(path):
        content = bytearray(path.read_bytes())
        content[content.index(start) + offset] ^= 0x55
        path.write_bytes(content)

    return damage


def save_array(path):
    with open(path, "wb") as stream:
        np.save(stream, np.zeros(3))


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": cut(0),
    "stub": cut(0.01),
    "half": cut(0.5),
    "end": cut(0.999),
    "magic": flip(0),
    "data": flip(300),
    "header": flip(0, b"NUMPY"),
    "version": flip(6, b"PK\1\2"),
    "flags": flip(8, b"PK\1\2"),
    "method": flip(10, b"PK\1\2"),
    "array": save_array,
    "names": lambda path: np.savez(path, values=np.zeros(3)),
    "objects": lambda path: np.savez(path, logits=np.array([{}]), labels=np.zeros(1)),
    "html": lambda path: path.write_text("<html>404 Not Found</html>"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_logits_are_refused_in_one_line_that_names_the_file(damage, tmp_path):
    path, _ = saved_logits(tmp_path)
    damage(path)
    with pytest.raises(LabError) as caught:
        load_logits(path)
    assert "logits.npz" in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_logits_leave_no_file_open(tmp_path):
    path, _ = saved_logits(tmp_path)
    cut(0.5)(path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(LabError):
            load_logits(path)
        gc.collect()
    assert [str(warning.message) for warning in caught] == []
