"""What code does, as hashes: modules of labcore and cells of notebooks."""

import ast
import contextlib
import hashlib
import json
from functools import lru_cache
from pathlib import Path

from labcore import LabError
from labcore.files.artifacts import ROOT, sha256_json


def code_hash(path: Path) -> str:
    """SHA-256 of what a Python file does: comments, blank lines and docstrings do not count."""
    return _hash_of_code(path.read_text(encoding="utf-8"), path.name)


def parse(code: str, name: str) -> ast.Module:
    """Python code, or a notebook's cell with IPython's magics, as a tree.

    A cell in another language ("%%bash") is an empty tree. LabError names the line of an error.
    """
    try:
        return ast.parse(code)
    except SyntaxError as error:
        from IPython.core.inputtransformer2 import TransformerManager  # takes half a second

        magic, _, body = code.partition("\n") if code.startswith("%%") else ("", "", code)
        with contextlib.suppress(SyntaxError):
            return ast.parse(TransformerManager().transform_cell(body))
        if magic:
            return ast.Module([], [])
        where = f"line {error.lineno} ({(error.text or '').strip()})"
        raise LabError(f"{name} is no Python: {error.msg} in {where}; correct it.") from None


@lru_cache(maxsize=256)  # studies ask for the same modules with every training
def _hash_of_code(text: str, name: str) -> str:
    tree = parse(text, name)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and body:
            first = body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                body.pop(0)
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def modules_hash(*names: str) -> str:
    """Return one hash for what several modules of labcore do, named as in "images.transforms"."""
    return sha256_json(
        {name: code_hash(ROOT.joinpath("labcore", *name.split(".")).with_suffix(".py")) for name in names}
    )


def notebook_sources(path: Path) -> tuple[list[str], list[str]]:
    """The sources of a notebook's code cells, and of its other cells. Raises LabError where it is missing or no notebook."""
    code, prose = [], []
    try:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            (code if cell["cell_type"] == "code" else prose).append("".join(cell["source"]))
    except FileNotFoundError:
        raise LabError(f"{path} is missing: restore it from git.") from None
    except (ValueError, KeyError, TypeError) as error:  # no text, no JSON, or JSON of another kind
        raise LabError(f"{path} is no notebook ({error}): restore it from git.") from None
    return code, prose
