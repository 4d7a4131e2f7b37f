"""Measurements on a network: its logits, and the time of a call."""

import time

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from labcore.files.progress import progress
from labcore.images.transforms import normalize


@torch.no_grad()
def predict(
    model: nn.Module, images: np.ndarray, batch_size: int = 64, description: str = "evaluate"
) -> np.ndarray:
    """Return logits (N, classes) in float32 for uint8 images (N, 3, H, W), on the model's own device."""
    model.eval()
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    if device.type == "cpu":
        batch_size = min(batch_size, 32)  # more fall out of its caches
    logits = []
    no_tf32 = torch.backends.cudnn.flags(True, allow_tf32=False)  # float32 on a GPU too
    with progress(len(images), description, unit="image") as bar, no_tf32:
        for start in range(0, len(images), batch_size):
            batch = torch.from_numpy(images[start : start + batch_size]).to(device)
            logits.append(model(normalize(batch)).float().cpu().numpy())  # (B, classes)
            bar.update(len(batch))
    return np.concatenate(logits)


@torch.no_grad()
def latency(
    models: dict[str, nn.Module], images: Tensor, rounds: int, runs: int, warmup: int = 10
) -> pd.DataFrame:
    """Return the time of a call, measured side by side, in columns round, model, latency_ms.

    In every round each model runs `runs` times on `images` (B, 3, H, W); the median counts. The order changes
    from round to round, so that a slow moment of the machine hits all of them.
    """
    for model in models.values():
        model.eval()
        for _ in range(warmup):
            model(images)
    rng, rows = np.random.default_rng(0), []
    with progress(rounds, "latency", unit="round") as bar:
        for number in range(rounds):
            for name in rng.permutation(list(models)):
                seconds = []
                for _ in range(runs):
                    began = time.perf_counter()
                    models[name](images)
                    seconds.append(time.perf_counter() - began)
                latency_ms = 1000 * float(np.median(seconds))
                rows.append({"round": number, "model": str(name), "latency_ms": latency_ms})
            bar.update()
    return pd.DataFrame(rows)
