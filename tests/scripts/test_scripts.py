"""The tests of *.test.mjs in this folder: scripts of the page that need no page."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scripts.node import Results, listed_in

HERE = Path(__file__).resolve().parent
RESULTS = Results(HERE, {})


@pytest.mark.parametrize("file, name", [pytest.param(*test, id=": ".join(test)) for test in listed_in(HERE)])
def test_script(file: str, name: str) -> None:
    RESULTS.expect_passed(file, name)
