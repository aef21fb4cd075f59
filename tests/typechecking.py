"""Shapes and types are checked where code runs: what the tests decorate every function with."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, Self, get_args, get_type_hints

import jaxtyping
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray, jaxtyped

# An int will do for a float, as type checkers have it (PEP 484).
_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check_package(name: str) -> None:
    """Check every call of a package that is not imported yet against its signature.

    The import hook writes ``@jaxtyping.jaxtyped(...)`` over all functions and classes. That
    decorator checks a call twice and binds its arguments once more, which took most of the time of
    tests on small arrays; ours checks as much at once.
    """
    jaxtyping.jaxtyped = lambda **_: checked
    jaxtyping.install_import_hook(name, None)


def checked(decorated: Any) -> Any:
    """A function that checks its arguments and result, or a dataclass that checks its fields."""
    if not inspect.isclass(decorated):
        return _checked_function(decorated)
    made = vars(decorated).get("__init__")
    if dataclasses.is_dataclass(decorated) and made and not hasattr(made, "__wrapped__"):
        decorated.__init__ = _checked_function(made)
    return decorated


def _checked_function(function: types.FunctionType) -> Callable[..., Any]:
    hints = {name: _resolved(hint, function) for name, hint in function.__annotations__.items()}
    calls = functools.wraps(function)(_check(_annotated(function, hints)))
    if not any(_holds_shapes(hint) for hint in hints.values()):
        return calls
    if inspect.isgeneratorfunction(function):  # its arguments meet beartype at the first `next`
        return jaxtyped(function, typechecker=_check)

    @functools.wraps(function)
    def one_call(*args: Any, **kwargs: Any) -> Any:
        with jaxtyped("context"):  # an axis has one size in all that a call takes and returns
            return calls(*args, **kwargs)

    return one_call


def _annotated(function: types.FunctionType, hints: dict[str, Any]) -> types.FunctionType:
    """The function with other annotations; who inspects the original sees its own."""
    copy = types.FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__annotations__ = hints
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__module__ = function.__module__
    copy.__qualname__ = function.__qualname__
    return copy


def _resolved(hint: Any, function: types.FunctionType) -> Any:
    """What an annotation means; anything where that is not known yet, or only inside a class."""

    def annotated() -> None: ...

    annotated.__annotations__ = {"hint": hint}
    try:
        resolved = get_type_hints(annotated, function.__globals__, include_extras=True)["hint"]
    except Exception:  # an import for type checkers alone, a class that is still being made
        return Any
    return Any if _holds(resolved, lambda part: part is Self) else resolved


def _holds_shapes(hint: Any) -> bool:
    return _holds(hint, lambda part: inspect.isclass(part) and issubclass(part, AbstractArray))


def _holds(hint: Any, condition: Callable[[Any], bool]) -> bool:
    """Whether the condition holds for a hint or any part of it."""
    parts = hint if isinstance(hint, list) else get_args(hint)  # a list: arguments of a callable
    return condition(hint) or any(_holds(part, condition) for part in parts)
