"""Saved artifacts to report.md, report.pdf and report.html. No number is typed: an undefined value stops the build.

What the numbers come from is kept beside the report, in report/<profile>/results, where it can be committed: the report can be
written again from there, and checked (labcore.verify).
"""

import ast
import itertools
import math
import shutil
from pathlib import Path
import jinja2
import numpy as np
import pandas as pd
from statsmodels.stats.proportion import confint_proportions_2indep
from labcore import LabError
from labcore.files.artifacts import ROOT, atomic_path, read_json, sha256_file, write_json, write_text
from labcore.config import NOTEBOOKS, PROFILES, STUDIES, get_profile, parse_overrides
from labcore.files.artifacts import load_logits
from labcore.stats import calibration, median_interval, paired_by_class
from labcore.report.studies import study_values
from labcore.report.tables import STAGE_NAMES, escaped, formatted, markdown_table


TEMPLATE = ROOT / "report" / "template.md"
STYLE = ROOT / "report" / "template.typ"
CSS = ROOT / "report" / "template.css"
# Pipe tables, figures and math as the template writes them; "@" and "[1]" are no citations.
MARKDOWN = "markdown-citations+lists_without_preceding_blankline"
REFERENCE = ROOT / "report" / "template_reference.json"
# What the results folder takes of each stage.
KEPT = ("metrics.json", "provenance.json", "*.csv", "logits*.npz", "answers.npz")
LATENCY_NAMES = {
    "fp32": "FP32",
    "fp32_fused": "FP32, fused",
    "float_scales": "PTQ, float scales",
    "affine": "PTQ, affine activations",
    "default": "PTQ, torch's default",
    "recommended": "PTQ, the recommended scheme",
    "ptq": "PTQ",
    "qat": "QAT",
}


def source_of(module: str, name: str) -> str:
    """The source of "Class.method" or "function" of a module of labcore, without its docstring and indentation."""
    text = (ROOT / "labcore" / f"{module}.py").read_text(encoding="utf-8")
    node = ast.parse(text)
    for part in name.split("."):
        found = [child for child in node.body if getattr(child, "name", None) == part]
        if not found:
            raise LabError(f"labcore/{module}.py defines no {name}: correct the report's template.")
        node = found[0]
    lines = text.splitlines()
    body = node.body
    start = min(part.lineno for part in [node, *node.decorator_list]) - 1
    if ast.get_docstring(node):
        kept = lines[start : body[0].lineno - 1] + lines[body[0].end_lineno : node.end_lineno]
    else:
        kept = lines[start : node.end_lineno]
    return "\n".join(line[node.col_offset :] for line in kept)


def _merged(provenance: dict[str, dict], *keys: str) -> str:
    """A fact of all stages; where they differ, each value with its stages."""
    values: dict[str, list[str]] = {}
    for stage, facts in provenance.items():
        for key in keys:
            facts = facts[key]
        values.setdefault(str(facts), []).append(stage)
    return (
        next(iter(values))
        if len(values) == 1
        else "; ".join(f"{value} ({', '.join(stages)})" for value, stages in values.items())
    )


def _if_recorded(provenance: dict[str, dict], name: str, key: str) -> dict[str, str]:
    """A row of a fact that stages run before it was recorded do not have; none where no stage has it."""
    if not any(key in facts for facts in provenance.values()):
        return {}
    return {name: _merged({stage: {key: "not recorded"} | facts for stage, facts in provenance.items()}, key)}


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def results_folder(profile: str) -> Path:
    """Where the report of a profile keeps what its numbers come from."""
    return ROOT / "report" / profile / "results"


def collect(profile: str, overrides: str, wall_seconds: dict[str, float]) -> list[Path]:
    """Copy what a report's numbers come from out of runs/ into its results folder; returns the copies.

    run.json there holds the overrides of the profile (SET), the stages with the seconds that each took, and the hash of every
    copy and figure.

    Raises LabError where a stage has left no metrics.
    """
    folder, runs = results_folder(profile), ROOT / "runs" / profile
    partial = folder.with_name(".results.part")
    shutil.rmtree(partial, ignore_errors=True)
    for stage in wall_seconds:
        for name in ("metrics.json", "provenance.json"):
            read_json(runs / stage / name)
        for path in sorted(path for pattern in KEPT for path in (runs / stage).glob(pattern)):
            (partial / stage).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, partial / stage / path.name)
    copies = sorted(path for path in partial.rglob("*") if path.is_file())
    prefixes = tuple(NOTEBOOKS[stage][:2] for stage in wall_seconds)
    figures = sorted((ROOT / "figures" / profile).glob("*.png"))
    facts = {
        "overrides": overrides,
        "wall_seconds": wall_seconds,
        "files": {path.relative_to(partial).as_posix(): sha256_file(path) for path in copies},
        "figures": {path.name: sha256_file(path) for path in figures if path.name.startswith(prefixes)},
    }
    write_json(partial / "run.json", facts)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def context(name: str) -> dict:
    """Everything the template may name, from the results folder of a profile.

    Raises LabError where an artifact is missing or damaged.
    """
    folder = results_folder(name)
    facts = read_json(folder / "run.json")
    profile, wall_seconds = get_profile(name, **parse_overrides(facts["overrides"])), facts["wall_seconds"]
    reported = [stage for stage in NOTEBOOKS if stage in wall_seconds or stage not in STUDIES]
    stages = {stage: read_json(folder / stage / "metrics.json") for stage in reported}
    provenance = {stage: read_json(folder / stage / "provenance.json") for stage in reported}
    names = list(STAGE_NAMES)
    latency = pd.DataFrame(stages["compare"]["latency"]).T
    results = pd.DataFrame(
        {
            STAGE_NAMES[name]: {
                "test accuracy": f"{stages[name]['test']['acc']:.2%}",
                "95 % interval": f"{stages[name]['test']['acc_low']:.2%} – {stages[name]['test']['acc_high']:.2%}",
                "accuracy drop (points)": f"{stages['compare']['paired'][name]['acc_drop_pp']:+.2f}"
                if name != "fp32"
                else "–",
                "test loss (nats)": f"{stages[name]['test']['loss']:.4f}",
                "file size (MB)": f"{stages['compare']['size_mb'][name]:.2f}",
                "latency, one image (ms)": f"{latency.loc[name, 'latency_ms']:.2f}",
                "speed-up": f"{latency.loc[name, 'speedup']:.2f}",
            }
            for name in names
        }
    )
    machine = {
        "commit": _merged(provenance, "commit"),
        "processor": _merged(provenance, "cpu"),
        **_if_recorded(provenance, "vector instructions used by torch", "instructions"),
        "device for training": _merged(provenance, "device"),
        **_if_recorded(provenance, "training multiplies in", "training_numbers"),
        "threads": _merged(provenance, "threads"),
        "system": _merged(provenance, "system"),
        "int8 engine": _merged(provenance, "quantized_engine"),
        "seed": _merged(provenance, "seed"),
        "images": escaped(_merged(provenance, "data", "label")),
        "hash of the images": f"`{_merged(provenance, 'data', 'sha256')}`",
        "hash of the split": f"`{_merged(provenance, 'data', 'split_sha256')}`",
        "profile": profile.name,
    } | {f"{name}": _merged(provenance, "versions", name) for name in provenance["fp32"]["versions"]}
    machine |= {
        f"wall time of {NOTEBOOKS[stage]}": _duration(wall_seconds[stage])
        for stage in reported
        if stage in wall_seconds
    }
    recipes = pd.DataFrame(
        {
            name: {key: str(value) for key, value in vars(recipe).items() if key != "augment"}
            for name, recipe in (
                ("FP32", profile.fp32),
                ("QAT", profile.qat),
                ("reference, FP32", PROFILES["reference"].fp32),
            )
        }
    )
    augments = pd.DataFrame(
        {
            name: {key: str(value) for key, value in vars(recipe.augment).items()}
            for name, recipe in (("this profile", profile.fp32), ("reference", PROFILES["reference"].fp32))
        }
    )
    return {
        **dict.fromkeys(STUDIES),
        **stages,
        **study_values(stages, folder, profile.arch),
        **_from_logits(folder, list(stages["compare"]["per_class"])),
        "profile": profile,
        "data": provenance["fp32"]["data"],
        "training_numbers": provenance["fp32"].get("training_numbers"),
        "gap": _gap(stages["fp32"], provenance["fp32"]["data"]),
        "middle_zero_point": _middle_zero_point(pd.read_csv(folder / "compare" / "latency.csv")),
        "qat_epochs": _chosen(pd.read_csv(folder / "qat" / "history.csv"), stages["qat"]["best_epoch"]),
        "threads": provenance["compare"]["threads"],
        "cpu": provenance["compare"]["cpu"],
        "latency": latency.T.to_dict(),
        "reference_profile": PROFILES["reference"].fp32,
        "normalization": _normalization(),
        "reference": read_json(REFERENCE),
        "results_table": markdown_table(results),
        "paired_table": markdown_table(_paired(stages["compare"]["paired"]), "pair"),
        "bootstrap_table": markdown_table(_resampled(stages["compare"]), "pair"),
        "latency_table": markdown_table(_latency(latency), "network"),
        "ablation_table": markdown_table(_ablation(stages["ptq"]["ablation"]), "scheme"),
        "ablation_worse": [
            f"*{escaped(row['scheme'])}* ({row['acc_drop_pp_low']:+.2f} to {row['acc_drop_pp_high']:+.2f})"
            for row in stages["ptq"]["ablation"]
            if row["acc_drop_pp_low"] > 0 or row["acc_drop_pp_high"] < 0
        ],
        "ablation_meets": _meets(stages["ptq"]["ablation"], read_json(REFERENCE)["target_drop_pp"]),
        **_errors(folder),
        "history_table": markdown_table(_history(folder / "fp32" / "history.csv"), "epoch"),
        "recipe_table": markdown_table(recipes, "hyperparameter"),
        "augment_table": markdown_table(augments, "transform"),
        "provenance_table": markdown_table(
            pd.DataFrame({"value": {name: str(value) for name, value in machine.items()}}), "fact"
        ),
        "notebooks": NOTEBOOKS,
        "duration": _duration,
        "ledger_table": markdown_table(
            _ledger(stages["claims"]["rows"], profile.name), "id", (5, 23, 13, 40, 19)
        ),
    }


def _gap(fp32: dict, data: dict) -> dict:
    """95 % interval of the gap between training and validation accuracy, in points, and of how many images each is."""
    n_validation = data["n_validation"]
    n_train = min(data["n_train"], n_validation)  # Split.train_sample
    low, high = confint_proportions_2indep(
        round(fp32["train_clean_acc"] * n_train), n_train, round(fp32["val_acc"] * n_validation), n_validation, method="wald"
    )
    return {"low": 100 * low, "high": 100 * high, "n_train": n_train, "n_validation": n_validation}


def _middle_zero_point(rounds: pd.DataFrame) -> dict:
    """How fast networks with zero point 128 are beside affine activations, whose zero point behind a ReLU is 0; three of each round.

    Each with the 95 % interval of the median of its ratios; `slower` counts the intervals that lie below 1.
    """
    wide = rounds.pivot(index="round", columns="model", values="latency_ms")
    found = {}
    for name in ("ptq", "qat", "float_scales"):
        ratios = (wide["affine"] / wide[name]).to_numpy()
        low, high = median_interval(ratios)
        found[LATENCY_NAMES[name]] = {"speed": float(np.median(ratios)), "low": low, "high": high}
    return {
        "rows": found,
        "known": all(math.isfinite(row["high"] - row["low"]) for row in found.values()),
        "slower": sum(row["high"] < 1 for row in found.values()),
    }


def _chosen(history: pd.DataFrame, best_epoch: int) -> dict[str, float]:
    """Validation accuracy and loss of the epoch that was chosen, and of the last one."""
    rows = {"best": history.set_index("epoch").loc[best_epoch], "last": history.iloc[-1]}
    return {f"{name}_{key}": float(row[f"val_{key}"]) for name, row in rows.items() for key in ("acc", "loss")}


def _from_logits(folder: Path, classes: list[str]) -> dict:
    """What the saved logits say of each class, and how sure each network is on the average."""
    logits = {name: load_logits(folder / name / "logits.npz")[0] for name in STAGE_NAMES}
    labels = load_logits(folder / "fp32" / "logits.npz")[1]
    by_class = {name: paired_by_class(logits["fp32"], logits[name], labels, classes) for name in ("ptq", "qat")}
    n_tests = sum(map(len, by_class.values()))
    changed = [
        f"*{escaped(label)}* with {STAGE_NAMES[name]} ({row['only_before']:.0f} lost, {row['only_after']:.0f} won)"
        for name, table in by_class.items()
        for label, row in table[table["p_value"] < 0.05 / n_tests].iterrows()
    ]
    bins = {name: calibration(logits[name], labels)[1] for name in STAGE_NAMES}
    confidence = {
        name: float(np.average(table["confidence"], weights=table["count"])) for name, table in bins.items()
    }
    return {"classes_changed": changed, "class_tests": n_tests, "confidence": confidence}


def _meets(rows: list[dict], drop_pp: float) -> dict[str, int]:
    """How many schemes of the ablation drop no more than that, and how many of these are worse than FP32 by more than chance."""
    met = [row for row in rows if row["acc_drop_pp"] <= drop_pp]
    return {"all": len(met), "worse": sum(row["acc_drop_pp_low"] > 0 for row in met)}


def _errors(folder: Path) -> dict:
    """The tensors of the PTQ network with the lowest ratio of signal to error; what is clipped of the images, None where nothing is."""
    found = pd.read_csv(folder / "ptq" / "qparams.csv").sort_values("snr_db", kind="stable")
    table = pd.DataFrame(
        {
            f"`{row.layer}`, {row.tensor}": {
                "scale asked for": f"{row.raw_scale:.4g}",
                "exponent": f"{row.exponent}",
                "clipped": f"{row.share_clipped:.2%}",
                "signal to error (dB)": f"{row.snr_db:.1f}",
            }
            for row in found.head(5).itertuples()
        }
    ).T
    images = found[found["layer"] == "quant"].iloc[0]
    clipped = None
    if images["share_clipped"] > 0.001:
        clipped = {
            "raw_scale": images["raw_scale"],
            "exponent": int(images["exponent"]),
            "share_clipped": images["share_clipped"],
            "is_worst": found.iloc[0]["layer"] == "quant",
            "is_normalization": np.allclose([images["min"], images["max"]], _normalized_range(), atol=1e-4),
        }
        study = folder / "observers" / "qparams.csv"
        if study.exists():
            best = pd.read_csv(study).set_index("layer").loc["quant"]
            clipped |= {
                "best_exponent": int(best["exponent"]),
                "best_share_clipped": best["share_clipped"],
            }
    return {"noisiest_table": markdown_table(table, "tensor"), "clipped_input": clipped}


def _normalized_range() -> tuple[float, float]:
    """What normalisation makes of the darkest and the brightest pixel of any channel."""
    mean, std = (np.array(text.split(","), float) for text in _normalization().values())
    return float((-mean / std).min()), float(((1 - mean) / std).max())


def _normalization() -> dict[str, str]:
    """The constants of labcore/transforms.py as text, without importing torch."""
    tree = ast.parse((ROOT / "labcore/images/transforms.py").read_text(encoding="utf-8"))
    values = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign)}
    return {name.lower(): ", ".join(map(str, ast.literal_eval(values[name]))) for name in ("MEAN", "STD")}


PAIRS = {"ptq": "FP32 → PTQ", "qat": "FP32 → QAT", "ptq_qat": "PTQ → QAT"}


def _resampled(compare: dict) -> pd.DataFrame:
    rows = {}
    for name, title in PAIRS.items():
        low, high = compare["bootstrap"][name]
        row = compare["paired"][name]
        needed = row["images_needed"]
        rows[title] = {
            "both right": f"{row['both']:,}",
            "both wrong": f"{row['neither']:,}",
            "95 % interval by resampling": f"{low:+.2f} … {high:+.2f}",
            "images to see 0.05 points": "–" if needed is None else f"{needed:,}",
        }
    return pd.DataFrame(rows).T


def _ledger(rows: list[dict], profile: str) -> pd.DataFrame:
    """The claims with links to the notebook, the entry of its metrics and the figure."""
    table = {}
    for row in rows:
        notebook = NOTEBOOKS[row["stage"]]
        links = [f"[{notebook[:2]}](notebooks/{notebook}.ipynb)"] if row["data"] else []
        if row["data"]:
            links.append(f"[`{row['data']}`](results/{row['stage']}/metrics.json)")
        if row["figure"]:
            links.append(f"[figure](../../figures/{profile}/{row['figure']}.png)")
        table[row["id"]] = {
            "the reference says": row["claim"],
            "verdict": f"**{row['verdict']}**",
            "what was found": row["value"],
            "evidence": ", ".join(links) or "–",
        }
    return pd.DataFrame(table).T


def _paired(paired: dict) -> pd.DataFrame:
    return pd.DataFrame(
        {
            PAIRS[name]: {
                "drop (points)": f"{row['acc_drop_pp']:+.2f}",
                "95 % interval": f"{row['acc_drop_pp_low']:+.2f} … {row['acc_drop_pp_high']:+.2f}",
                "right before only": f"{row['only_before']}",
                "right after only": f"{row['only_after']}",
                "same answer": f"{row['agree']:.2%}",
                "McNemar p": f"{row['p_value']:.2g}",
            }
            for name, row in ((name, paired[name]) for name in PAIRS)
        }
    ).T


def _latency(latency: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame(
        {
            LATENCY_NAMES[name]: {
                "median (ms)": f"{row['latency_ms']:.2f}",
                "quartiles (ms)": f"{row['latency_ms_low']:.2f} … {row['latency_ms_high']:.2f}",
                "speed-up": f"{row['speedup']:.2f}",
                "its quartiles": f"{row['speedup_low']:.2f} … {row['speedup_high']:.2f}",
            }
            for name, row in latency.reindex(LATENCY_NAMES).dropna().iterrows()
        }
    ).T


def _ablation(rows: list[dict]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            row["scheme"]: {
                "validation accuracy": f"{row['acc']:.2%}",
                "drop (points)": f"{row['acc_drop_pp']:+.2f}",
                "95 % interval": f"{row['acc_drop_pp_low']:+.2f} … {row['acc_drop_pp_high']:+.2f}",
                "loss": f"{row['loss']:.4f}",
            }
            for row in rows
        }
    ).T


def _history(path: Path) -> pd.DataFrame:
    columns = {
        "lr": "learning rate",
        "train_acc": "training, augmented",
        "train_clean_acc": "training",
        "val_acc": "validation",
        "val_loss": "validation loss",
    }
    history = pd.read_csv(path)
    shown = (
        history
        if len(history) <= 20
        else history.iloc[sorted({*range(0, len(history), len(history) // 15), len(history) - 1})]
    )
    return formatted(shown.set_index("epoch")[list(columns)]).rename(columns=columns)


def render(values: dict, with_captions: bool = False) -> str:
    """The report as Markdown, from what `context` gives; LabError names the value that the template wants and no artifact holds.

    Markdown viewers hide a picture's caption, so it stands below the picture as well, unless what comes next sets it itself
    (`with_captions`).
    """
    numbers = itertools.count(1)

    def figure(name: str, caption: str) -> str:
        path = ROOT / "figures" / values["profile"].name / f"{name}.png"
        if not path.exists():
            raise LabError(f"{path.relative_to(ROOT)} is missing: run the notebook that draws it again.")
        picture = f"![{caption}](../../{path.relative_to(ROOT).as_posix()})"
        return picture if with_captions else f"{picture}\n\n*Figure {next(numbers)}: {caption}*"

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters |= {
        "pct": lambda value: f"{value:.2%}",
        "md": escaped,
        "signed": lambda value: f"{value:+.2f}",
        "n": lambda value: f"{value:,}",
        "f1": lambda value: f"{value:.1f}",
        "f2": lambda value: f"{value:.2f}",
        "g2": lambda value: f"{value:.2g}",
    }
    environment.globals |= {"source_of": source_of, "figure": figure, "sqrt": math.sqrt}
    try:
        return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(values)
    except jinja2.TemplateError as error:
        raise LabError(
            f"the report's template cannot be filled: {error}; the value must come from an artifact."
        ) from error


def write_pdf(markdown: str, pdf: Path) -> None:
    """Markdown through pandoc to Typst to PDF, with the fonts of the typst package alone: the same bytes everywhere."""
    import pypandoc
    import typst

    text = pypandoc.convert_text(
        markdown,
        "typst",
        format=MARKDOWN,
        extra_args=[f"--template={STYLE}", "--columns=1000"],
    )
    source = pdf.with_name("report.typ")
    write_text(source, text)
    try:
        # Figures lie outside the report's folder, so Typst's root is the project.
        content = typst.compile(str(source), root=str(ROOT), ignore_system_fonts=True, timestamp=0)
    except typst.TypstError as error:
        raise LabError(f"{pdf} could not be made: {error}") from error
    finally:
        source.unlink(missing_ok=True)
    with atomic_path(pdf) as partial:
        partial.write_bytes(content)


def write_html(markdown: str, html: Path) -> None:
    """Markdown through pandoc to one HTML file that holds its figures, its style and its formulas (MathML): the same bytes
    everywhere, and nothing to load.
    """
    import pypandoc

    title, _, body = markdown.partition("\n")
    text = pypandoc.convert_text(
        body,
        "html5",
        format=MARKDOWN,
        extra_args=[
            "--standalone",
            "--embed-resources",
            "--mathml",
            "--toc",
            "--toc-depth=2",
            "--columns=1000",
            f"--css={CSS}",
            f"--resource-path={html.parent}",
            f"--metadata=title:{title.lstrip('# ')}",
            "--metadata=lang:en",
        ],
    )
    write_text(html, text)


def build(profile: str, folder: Path | None = None) -> list[Path]:
    """Write report.md, report.pdf and report.html from the results folder of a profile; returns their paths.

    They go beside it, or into another folder of the project.
    """
    folder = folder or ROOT / "report" / profile
    markdown, pdf, html = (folder / f"report.{kind}" for kind in ("md", "pdf", "html"))
    values = context(profile)
    write_text(markdown, render(values))
    text = render(values, with_captions=True)
    write_pdf(text, pdf)
    write_html(text, html)
    return [markdown, pdf, html]
