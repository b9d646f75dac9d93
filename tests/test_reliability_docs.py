"""docs/reliability.md names tests that there are."""

import re
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "reliability.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\|[^|]*\|[^|]*\|(?P<tests>[^|]*)\|$", re.MULTILINE)


def named() -> Iterator[tuple[str, str]]:
    """File and function of each test; the function may be empty."""
    for row in ROW.finditer(PAGE):
        file = ""
        for word in re.findall(r"`([^`]+)`", row["tests"]):
            given, _, function = word.partition("::")
            file = given or file
            yield file, function


def test_each_row_names_a_test() -> None:
    rows = [row["tests"].strip() for row in ROW.finditer(PAGE)]
    told = [tests for tests in rows if tests not in ("test", "---")]
    assert len(told) > 30
    for tests in told:
        assert re.search(r"::test_\w+`", tests), tests


def test_what_is_named_is_there() -> None:
    for file, function in named():
        source = (TESTS / f"{file}.py").read_text(encoding="utf-8")
        assert not function or f"def {function}(" in source, (file, function)
