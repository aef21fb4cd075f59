"""The table of families says what is tested, and of every family."""

from __future__ import annotations

from mctd_diffusers.pipeline import FAMILIES
from tests.conformance import test_families
from tests.conformance.checks import ConformanceChecks
from tests.conformance.family_table import DOCUMENT, SHORT, checks, rendered
from tests.conformance.not_applicable import NOT_APPLICABLE


def classes() -> list[type[ConformanceChecks]]:
    found = vars(test_families).values()
    return [each for each in found if isinstance(each, type) and each.__name__.startswith("Test")]


def test_the_document_has_the_table() -> None:
    assert DOCUMENT.read_text("utf-8") == rendered(DOCUMENT.read_text("utf-8"))


def test_every_family_is_checked_once() -> None:
    assert sorted(each.name for each in classes()) == sorted(FAMILIES)
    assert sorted(SHORT) == sorted(FAMILIES)


def test_no_family_has_checks_of_its_own() -> None:
    for each in classes():
        assert not [name for name in vars(each) if name.startswith("test_")]
        assert each.__base__ is ConformanceChecks


def test_what_does_not_apply_are_checks_of_families() -> None:
    assert set(NOT_APPLICABLE) <= set(checks())
    assert all(set(reasons) <= set(FAMILIES) for reasons in NOT_APPLICABLE.values())
