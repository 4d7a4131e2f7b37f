"""One run of the lab as a notebook sees it: profile, seed, images, split, and the files of every stage."""

import io
import os
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from IPython.display import Image
from matplotlib.figure import Figure

from labcore import LabError
from labcore.config import NOTEBOOKS, Profile, check_seed, get_profile, parse_overrides
from labcore.data import ImageData, Split, evenly_spaced, load_data, make_split
from labcore.files.artifacts import (
    RESTORED,
    ROOT,
    read_json,
    sha256_json,
    write_bytes,
    write_json,
    write_npz,
)
from labcore.files.provenance import provenance
from labcore.model import QuantizableResNet, build_model
from labcore.training.device import multiplies_bfloat16
from labcore.training.first_weights import initialize


@dataclass(frozen=True)
class Run:
    """Files of stage S of profile P lie in runs/P/S below `root`, figures in figures/P.

    `weights` is what WEIGHTS= says: where FP32 weights lie that were trained before.
    """

    profile: Profile
    source: str | None
    seed: int
    root: Path = ROOT
    weights: str | None = None

    @cached_property
    def data(self) -> ImageData:
        """Return the images, read on first use."""
        return load_data(self.source or self.profile.data, self.profile.image_size, root=self.root)

    @cached_property
    def split(self) -> Split:
        """Return the split that follows from images and seed, and write it into its file."""
        sizes = self.profile.validation_fraction, self.profile.calibration_images
        split = make_split(self.data.train_labels, *sizes, self.seed)
        write_npz(self.folder / "split.npz", **vars(split), sha256=np.array(split.sha256))
        return split

    @property
    def folder(self) -> Path:
        """Return where all stages keep their files."""
        return self.root / "runs" / self.profile.name

    def path(self, stage: str, name: str = "") -> Path:
        """Return where a stage keeps a file, or all of them; LabError for an unknown stage."""
        if stage not in NOTEBOOKS:
            raise LabError(f"unknown stage {stage!r}: expected one of {', '.join(NOTEBOOKS)}; correct it.")
        return self.folder / stage / name

    def model(self) -> QuantizableResNet:
        """Return the profile's network with fresh weights that follow from the seed."""
        torch.manual_seed(self.seed)
        return build_model(self.profile.arch, len(self.data.classes), self.profile.width, self.profile.stem)

    def fresh_model(self) -> QuantizableResNet:
        """Return the network as its FP32 training starts, with the first weights of the recipe."""
        model = self.model()
        self.initialize(model, self.profile.fp32.init)
        return model

    def initialize(self, model: QuantizableResNet, init: str) -> None:
        """Replace first weights as the recipe's `init` says, by 500 to 999 evenly spaced images, or all."""
        spaced = self.split.train[:: max(1, len(self.split.train) // 500)]
        initialize(model, init, torch.from_numpy(self.data.train_images[spaced]))

    def judges(self, indices: np.ndarray) -> np.ndarray:
        """Return the images that judge what is only compared: all, or compared_images of them."""
        return evenly_spaced(indices, self.profile.compared_images or len(indices))

    def save_figure(self, figure: Figure, name: str) -> Image:
        """Write figures/P/NAME.png with the data set named at its foot; return that picture for display."""
        from labcore.plots.style import plain

        foot = plain(f"{self.data.label} · profile {self.profile.name}")
        figure.text(0.995, 0.005, foot, ha="right", va="bottom", fontsize=7, color="0.4")
        path = self.root / "figures" / self.profile.name / f"{name}.png"
        picture = io.BytesIO()  # given a path, Pillow would hide a full disk's error
        figure.savefig(picture, format="png", dpi=150, metadata={"Software": None})
        write_bytes(path, picture.getvalue())
        return Image(data=picture.getvalue(), width=round(100 * figure.get_figwidth()))

    def save_metrics(self, stage: str, metrics: dict) -> dict:
        """Write what the stage measured, and beside it what the numbers depend on; return the former."""
        facts = {
            "data": {
                **{name: getattr(self.data, name) for name in ("label", "sha256", "notice", "classes")},
                **{f"n_{name}": len(indices) for name, indices in vars(self.split).items()},
                "n_test": len(self.data.test_labels),
                "split_sha256": self.split.sha256,
            },
            "profile": self.profile.name,
            "seed": self.seed,
            "training_numbers": "bfloat16" if multiplies_bfloat16() else "float32",
        }
        write_json(self.path(stage, "metrics.json"), metrics)
        if stage == "fp32":
            facts["weights"] = self.weights
        write_json(self.path(stage, "provenance.json"), provenance() | facts)
        return metrics

    def metrics(self, stage: str) -> dict:
        """Return what an earlier stage measured; LabError says which stage to run where it is missing."""
        return read_json(self.path(stage, "metrics.json"))

    def restored_from(self) -> str:
        """Return a hash of what restored results belong to: profile, seed, images and FP32 weights."""
        weights = self.metrics("fp32")["weights_sha256"]
        return sha256_json([asdict(self.profile), self.seed, self.data.sha256, weights])

    def is_restored(self, stage: str) -> bool:
        """Return whether a stage's results are those committed with the report, of this run and network."""
        note = self.path(stage, RESTORED)
        return note.exists() and read_json(note) == self.restored_from()


def open_run(
    profile: str | None = None,
    data: str | None = None,
    seed: int | None = None,
    overrides: str | None = None,
    weights: str | None = None,
    root: Path = ROOT,
) -> Run:
    """Return the run that a notebook starts with: profile by name, DATA, SEED, SET, WEIGHTS as given to make.

    Where no profile is named, what is None is what `make lab` was given (LAB_PROFILE, LAB_DATA, …), then the
    default: profile cpu, seed 0. With a profile, as make names one, the environment is not read.

    Raises LabError for an unknown profile or parameter (with the nearest name) and for values out of range.
    """
    given = {"PROFILE": profile, "DATA": data, "SEED": seed, "SET": overrides, "WEIGHTS": weights}
    if profile is None:
        given = {
            name: os.environ.get(f"LAB_{name}") if value is None else value for name, value in given.items()
        }
    chosen = get_profile(given["PROFILE"] or "cpu", **parse_overrides(given["SET"]))
    return Run(chosen, given["DATA"] or None, check_seed(given["SEED"] or 0), root, given["WEIGHTS"] or None)
