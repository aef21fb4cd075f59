"""What the tests decorate every function with finds what is wrong, and finds it at the call."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import TypeCheckError

from tests.typechecking import check_package

SOURCE = '''
"""A module like those of the package."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    from nowhere import Unknown

Pair = tuple[Float[np.ndarray, "rows"], Float[np.ndarray, "rows"]]


def double(number: int, *, times: float = 1) -> int:
    return "two" if number == 2 else 2 * number


def added(left: Float[np.ndarray, "rows 3"], right: Float[np.ndarray, "rows 3"]):
    return left[: len(right)] + right[: len(left)]


def halved(whole: Float[np.ndarray, "rows"], keep: int) -> Float[np.ndarray, "rows"]:
    return whole[:keep]


def both(pair: Pair) -> list[Float[np.ndarray, "rows"]]:
    return [pair[0], pair[1]]


def counted(number: int) -> Iterator[int]:
    yield from range(number)


def listed(rows: Float[np.ndarray, "rows"]) -> Iterator[float]:
    yield from rows.tolist()


def nested(rows: Float[np.ndarray, "rows"]) -> Float[np.ndarray, "rows"]:
    halved(rows[:1], 1)  # other sizes, in a call of its own
    return rows


def unknown(one: Unknown, two: int) -> Unknown:
    def inner(three: int) -> None: ...

    inner(one)
    return one


@dataclass(frozen=True)
class Record:
    number: int
    names: list[str] = field(default_factory=list)

    def more(self, number: int) -> Self:
        return type(self)(number)

    @property
    def name(self) -> str:
        return self.names[0] if self.names else None

    @classmethod
    def of(cls, number: int) -> Record:
        return cls(number)

    @staticmethod
    def twice(number: int) -> int:
        return 2 * number
'''


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    folder = tmp_path_factory.mktemp("checked")
    (folder / "a_checked_module.py").write_text(SOURCE)
    before = list(sys.meta_path)
    sys.path.insert(0, str(folder))
    check_package("a_checked_module")
    try:
        yield importlib.import_module("a_checked_module")
    finally:
        sys.path.remove(str(folder))
        sys.meta_path[:] = before
        del sys.modules["a_checked_module"]


WRONG: dict[str, Callable[[Any], object]] = {
    "argument": lambda m: m.double("one"),
    "keyword": lambda m: m.double(1, times="one"),
    "result": lambda m: m.double(2),
    "dtype": lambda m: m.nested(np.zeros(3, dtype=np.int64)),
    "number of axes": lambda m: m.nested(np.zeros((3, 1))),
    "size of an axis": lambda m: m.added(np.zeros((2, 4)), np.zeros((2, 4))),
    "sizes of two arguments": lambda m: m.added(np.zeros((2, 3)), np.zeros((1, 3))),
    "sizes of argument and result": lambda m: m.halved(np.zeros(4), 2),
    "sizes in a tuple": lambda m: m.both((np.zeros(2), np.zeros(3))),
    "argument of a generator": lambda m: next(m.counted("one")),
    "axes of a generator": lambda m: m.listed(np.zeros((2, 2))),
    "argument beside one of unknown type": lambda m: m.unknown(1, "two"),
    "argument of an inner function": lambda m: m.unknown("one", 2),
    "field": lambda m: m.Record("one"),
    "field with a default": lambda m: m.Record(1, [2]),
    "argument of a method that returns Self": lambda m: m.Record(1).more("two"),
    "property": lambda m: m.Record(1).name,
    "argument of a class method": lambda m: m.Record.of("one"),
    "argument of a static method": lambda m: m.Record.twice("one"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_found(module: ModuleType, wrong: str) -> None:
    with pytest.raises((BeartypeCallHintViolation, TypeCheckError)):
        WRONG[wrong](module)


def test_what_is_right_is_as_without_checks(module: ModuleType) -> None:
    assert module.double(1) == module.double(1, times=2) == 2  # an int is a float
    np.testing.assert_array_equal(module.added(np.ones((2, 3)), np.ones((2, 3))), 2.0)
    assert len(module.halved(np.zeros(4), 4)) == len(module.nested(np.zeros(4))) == 4
    assert len(module.both((np.zeros(2), np.zeros(2)))) == 2
    assert list(module.counted(2)) == list(module.listed(np.arange(2.0))) == [0, 1]
    assert module.unknown(1, 2) == 1
    record = module.Record(1, ["a"])
    assert (record.name, record.more(2), module.Record.twice(1)) == ("a", module.Record(2), 2)
    assert module.Record.of(1) == module.Record(1)


def test_a_checked_function_is_inspected_as_it_was_written(module: ModuleType) -> None:
    for function in (module.double, module.halved, module.counted):
        original = inspect.unwrap(function)
        assert function is not original
        assert inspect.signature(function) == inspect.signature(original)
        assert function.__annotations__ == original.__annotations__
        assert (function.__module__, function.__name__) == (module.__name__, original.__name__)


def test_the_package_is_checked() -> None:
    from mctd_diffusers.search.budget import Budget

    with pytest.raises(BeartypeCallHintViolation):
        Budget(nfe="many")  # type: ignore[arg-type]
