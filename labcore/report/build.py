"""Saved artifacts to report.md, report.pdf and report.html. An undefined value stops the build.

What the numbers come from is kept beside the report, in report/<profile>/results, where it can be committed.
The report can be written again from there, and checked (labcore.report.verify).
"""

import ast
import itertools
import json
import shutil
from functools import partial
from pathlib import Path

from labcore import LabError
from labcore.config import NOTEBOOKS
from labcore.files.artifacts import ROOT, atomic_path, read_json, sha256_file, write_json, write_text
from labcore.report.context import context
from labcore.report.tables import fill_template

# Pipe tables, figures and math as the template writes them; "@" and "[1]" are no citations.
MARKDOWN = "markdown-citations+lists_without_preceding_blankline"
# What the results folder takes of each stage.
KEPT = (
    "metrics.json",
    "provenance.json",
    "training.json",
    "histograms.json",
    "*.csv",
    "logits*.npz",
    "answers.npz",
    "hits.npz",
    "front.npz",
)


def collect(profile: str, overrides: str, wall_seconds: dict[str, float], root: Path = ROOT) -> list[Path]:
    """Copy what a report's numbers come from out of runs/ into its results folder; returns the copies.

    run.json there holds the overrides of the profile (SET), the stages with the seconds that each took, and
    the hash of every copy and figure.

    Raises LabError where a stage has left no metrics.
    """
    folder, runs = root / "report" / profile / "results", root / "runs" / profile
    unfinished = folder.with_name(".results.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    for stage in wall_seconds:
        for name in ("metrics.json", "provenance.json"):
            read_json(runs / stage / name)
        (unfinished / stage).mkdir(parents=True)
        for path in (path for pattern in KEPT for path in (runs / stage).glob(pattern)):
            shutil.copyfile(path, unfinished / stage / path.name)
    prefixes = tuple(NOTEBOOKS[stage][:2] for stage in wall_seconds)
    copies = sorted(path for path in unfinished.rglob("*") if path.is_file())
    figures = sorted((root / "figures" / profile).glob("*.png"))
    facts = {
        "overrides": overrides,
        "wall_seconds": wall_seconds,
        "files": {path.relative_to(unfinished).as_posix(): sha256_file(path) for path in copies},
        "figures": {path.name: sha256_file(path) for path in figures if path.name.startswith(prefixes)},
    }
    write_json(unfinished / "run.json", facts)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def source_of(module: str, name: str, root: Path = ROOT) -> str:
    """Return the source of "Class.method" or "function", without its docstring and indentation.

    Args:
        module: of labcore, named as in "training.first_weights".

    Raises LabError where the module does not define it.
    """
    path = root.joinpath("labcore", *module.split(".")).with_suffix(".py")
    text = path.read_text(encoding="utf-8")
    node = ast.parse(text)
    for part in name.split("."):
        named = [child for child in node.body if getattr(child, "name", None) == part]
        if not named:
            raise LabError(f"{path.relative_to(root)} defines no {name}: correct the report's template.")
        node = named[0]
    lines, start = text.splitlines(), min(part.lineno for part in [node, *node.decorator_list]) - 1
    if ast.get_docstring(node):
        docstring = node.body[0]
        kept = lines[start : docstring.lineno - 1] + lines[docstring.end_lineno : node.end_lineno]
    else:
        kept = lines[start : node.end_lineno]
    return "\n".join(line[node.col_offset :] for line in kept)


def widget(results: Path, root: Path = ROOT) -> str:
    """Return the part of the page that can be moved, as a raw block that pandoc hands to HTML alone.

    Empty where stage ptq of a results folder has no histograms, as in older reports.
    """
    path = results / "ptq" / "histograms.json"
    tensors = read_json(path) if path.exists() else None
    if not tensors:
        return ""
    page = (root / "report" / "template_widget.html").read_text(encoding="utf-8")
    data = json.dumps(tensors, separators=(",", ":"), sort_keys=True).replace("<", "\\u003c")
    return f"``````{{=html}}\n{page.replace('[[histograms]]', data)}``````\n"


def render(values: dict, with_captions: bool = False, root: Path = ROOT) -> str:
    """Return the report as Markdown, from what `context` gives.

    Markdown viewers hide a picture's caption, so it stands below the picture as well, unless what comes next
    sets it itself (`with_captions`). Only then is the widget in it.

    Raises LabError with the name of a value that the template wants and no artifact holds.
    """
    numbers = itertools.count(1)

    def figure(name: str, caption: str, percent: int = 100) -> str:  # of the text's width, where it is set
        path = Path("figures") / values["profile"].name / f"{name}.png"
        if not (root / path).exists():
            raise LabError(f"{path} is missing: run the notebook that draws it again.")
        picture = f"![{caption}](../../{path.as_posix()})"
        if with_captions:
            return f"{picture}{{width={percent}%}}"
        return f"{picture}\n\n*Figure {next(numbers)}: {caption}*"

    results = root / "report" / values["profile"].name / "results"
    functions = {
        "figure": figure,
        "source_of": partial(source_of, root=root),
        "page_break": lambda: "```{=typst}\n#pagebreak(weak: true)\n```" if with_captions else "",
        "widget": lambda: widget(results, root) if with_captions else "",
    }
    return fill_template(("template.md", "template_appendix.md"), values | functions, root)


def write_pdf(markdown: str, pdf: Path, root: Path = ROOT) -> None:
    """Write Markdown through pandoc and Typst as PDF, with Typst's own fonts: the same bytes everywhere."""
    import pypandoc
    import typst

    options = [f"--template={root / 'report' / 'template.typ'}", "--columns=1000"]
    source = pdf.with_name("report.typ")
    write_text(source, pypandoc.convert_text(markdown, "typst", format=MARKDOWN, extra_args=options))
    try:
        # Figures lie outside the report's folder, so Typst's root is the project.
        content = typst.compile(str(source), root=str(root), ignore_system_fonts=True, timestamp=0)
    except typst.TypstError as error:
        raise LabError(f"{pdf} could not be made: {error}") from error
    finally:
        source.unlink(missing_ok=True)
    with atomic_path(pdf) as partial:
        partial.write_bytes(content)


def write_html(markdown: str, html: Path, root: Path = ROOT) -> None:
    """Write Markdown through pandoc as one HTML file that holds its figures, style and formulas (MathML)."""
    import pypandoc

    title, _, body = markdown.partition("\n")
    options = [
        "--standalone",
        "--embed-resources",
        "--mathml",
        "--toc",
        "--toc-depth=2",
        "--columns=1000",
        f"--css={root / 'report' / 'template.css'}",
        f"--resource-path={html.parent}",
        f"--metadata=title:{title.lstrip('# ')}",
        "--metadata=lang:en",
    ]
    write_text(html, pypandoc.convert_text(body, "html5", format=MARKDOWN, extra_args=options))


def build(profile: str, folder: Path | None = None, root: Path = ROOT) -> list[Path]:
    """Write report.md, report.pdf and report.html from the results folder of a profile; returns their paths.

    They go beside it, or into another folder of report/.
    """
    folder = folder or root / "report" / profile
    markdown, pdf, html = (folder / f"report.{kind}" for kind in ("md", "pdf", "html"))
    values = context(profile, root)
    write_text(markdown, render(values, root=root))
    with_captions = render(values, with_captions=True, root=root)
    write_pdf(with_captions, pdf, root)
    write_html(with_captions, html, root)
    return [markdown, pdf, html]
