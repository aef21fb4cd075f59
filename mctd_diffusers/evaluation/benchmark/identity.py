"""Hashes of the code that results depend on (those of weights are in `models.weights`).

A search runs through its strategy, what that imports, and what every search shares. So editing one
strategy leaves the results of the others good. Comments, docstrings and layout do not count.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import mctd_diffusers

_PACKAGE: Final = Path(mctd_diffusers.__file__).parent
_TABLES: Final = ("mctd_diffusers", "mctd_diffusers.search.strategies")
"""Modules that name others without running through them: tables of names."""


def code_hash(modules: Iterable[str]) -> str:
    """Hash the code of modules and of all that they import from this package.

    Args:
        modules: by name; those of other packages are hashed alone, without what they import.
    """
    return _hash(frozenset(modules))


@functools.cache
def _hash(modules: frozenset[str]) -> str:
    digest = hashlib.sha256()
    for name in sorted(_reached(modules)):
        digest.update(f"{name}\n{_code(name)}\n".encode())
    return digest.hexdigest()[:16]


def _reached(modules: Iterable[str]) -> set[str]:
    """The modules, and all that they import from this package, at any depth."""
    reached: set[str] = set()
    ahead = list(modules)
    while ahead:
        name = ahead.pop()
        if name in reached or name in _TABLES or _source(name) is None:
            continue
        reached.add(name)
        if name.startswith("mctd_diffusers."):
            ahead.extend(_imports(name))
    return reached


@functools.cache
def _imports(name: str) -> tuple[str, ...]:
    """What a module imports from this package, anywhere in it."""
    found: list[str] = []
    for node in ast.walk(ast.parse(_code(name))):
        if isinstance(node, ast.Import):
            found.extend(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
            found.extend(f"{node.module}.{alias.name}" for alias in node.names)
    return tuple(each for each in found if each.startswith("mctd_diffusers."))


@functools.cache
def _code(name: str) -> str:
    """The code of a module in one layout, without comments and docstrings."""
    path = _source(name)
    assert path is not None
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        body: list[ast.stmt] = getattr(node, "body", None) or []
        if isinstance(body, list):
            node.body = list(_without_strings(body)) or [ast.Pass()]  # type: ignore[attr-defined]  # it has one
    return ast.unparse(tree)


def forget() -> None:
    """Read every module again when it is asked for next."""
    _hash.cache_clear()
    _imports.cache_clear()
    _code.cache_clear()


def _without_strings(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that are more than a string that stands by itself."""
    for statement in body:
        value = statement.value if isinstance(statement, ast.Expr) else None
        if not (isinstance(value, ast.Constant) and isinstance(value.value, str)):
            yield statement


def _source(name: str) -> Path | None:
    """The file of a module; ``None`` for names that are no module with a source."""
    if not name.startswith("mctd_diffusers."):
        file = getattr(sys.modules.get(name), "__file__", None)
        return Path(file) if file and file.endswith(".py") else None
    path = _PACKAGE.joinpath(*name.split(".")[1:])
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None
