"""What code does, as hashes: modules of labcore and cells of notebooks."""

import ast
import contextlib
import hashlib
import json
from functools import lru_cache
from pathlib import Path

from labcore import LabError
from labcore.files.artifacts import ROOT, sha256_json


def parse(code: str, name: str) -> ast.Module:
    """Return Python code, or a notebook's cell with IPython's magics, as a tree.

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
        line = f"line {error.lineno} ({(error.text or '').strip()})"
        raise LabError(f"{name} is no Python: {error.msg} in {line}; correct it.") from None


@lru_cache(maxsize=256)  # studies ask for the same modules with every training
def _hash_of_code(text: str, name: str, functions_only: bool) -> str:
    tree = parse(text, name)
    for node in ast.walk(tree):
        may_have_docstring = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if may_have_docstring and ast.get_docstring(node, clean=False) is not None:
            node.body.pop(0)
    parts = (
        [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)] if functions_only else [tree]
    )
    return hashlib.sha256("".join(map(ast.dump, parts)).encode()).hexdigest()


def code_hash(path: Path, functions_only: bool = False) -> str:
    """Return the SHA-256 of what a Python file does: comments, blank lines and docstrings do not count.

    `functions_only`: of its functions and methods, and of none of the values beside them.
    """
    return _hash_of_code(path.read_text(encoding="utf-8"), path.name, functions_only)


def module_file(dotted: str, root: Path = ROOT) -> Path | None:
    """Return the file of a module or package of labcore, named as in "labcore.images"; None without one."""
    base = root.joinpath(*dotted.split("."))
    return next((path for path in (base / "__init__.py", base.with_suffix(".py")) if path.is_file()), None)


def modules_hash(*names: str) -> str:
    """Return one hash for what several modules of labcore do, named as in "images.transforms".

    Raises LabError for one that is not there.
    """
    paths = {name: module_file(f"labcore.{name}") for name in names}
    for name, path in paths.items():
        if not path:
            raise LabError(f"expected module labcore.{name} in {ROOT}, found none; correct the name.")
    return sha256_json({name: code_hash(path) for name, path in paths.items()})


def notebook_sources(path: Path) -> tuple[list[str], list[str]]:
    """Return the sources of a notebook's code cells, and of its others. Raises LabError where it is none."""
    code, prose = [], []
    try:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            (code if cell["cell_type"] == "code" else prose).append("".join(cell["source"]))
    except FileNotFoundError:
        raise LabError(f"{path} is missing: restore it from git.") from None
    except (ValueError, KeyError, TypeError) as error:  # no text, no JSON, or JSON of another kind
        raise LabError(f"{path} is no notebook ({error}): restore it from git.") from None
    return code, prose
