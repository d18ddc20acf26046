"""The report of a run: failures at once and again at the end, repeats listed and limited, times kept."""

from __future__ import annotations

import json

import pytest

from tests.reporting import MAX_REPEATS, RESULTS

pytest_plugins = ["pytester"]

CONFTEST = """
import pytest
from tests.reporting import RESULTS, Report

def pytest_addoption(parser):
    parser.addoption("--results", default=RESULTS)

def pytest_configure(config):
    config.pluginmanager.register(Report(config))

def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.flaky(reruns=2))
"""
FAILS_ONCE = """
import pytest
failed = set()

@pytest.mark.parametrize("number", range({count}))
def test_flaky(number):
    if number not in failed:
        failed.add(number)
        raise RuntimeError("not this time")
"""


@pytest.fixture
def run(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeconftest(CONFTEST)
    return pytester


def test_a_failure_is_named_at_once_and_at_the_end(run: pytest.Pytester) -> None:
    run.makepyfile(
        test_a="def test_wrong():\n    assert 1 == 2, 'sums differ'\n", test_b="def test_right():\n    pass\n"
    )
    done = run.runpytest_inprocess("-p", "no:rerunfailures", "-o", "addopts=-rN")
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    failed = [line for line in done.outlines if line.startswith("FAILED test_a.py::test_wrong: AssertionError: sums")]
    assert len(failed) == 2
    done.stdout.fnmatch_lines(
        ["*100 %  test_b.py: 1 passed,*", "tests    1 passed, 1 failed, 0 skipped", "repeats  none"]
    )


def test_a_repeat_is_listed_and_kept(run: pytest.Pytester) -> None:
    run.makepyfile(test_a=FAILS_ONCE.format(count=1))
    done = run.runpytest_inprocess()
    assert done.ret == pytest.ExitCode.OK
    done.stdout.fnmatch_lines(["REPEATED test_a.py::test_flaky[[]0]: *not this time*", "repeats  test_a.py::*(1)"])
    assert "not this time" in (run.path / RESULTS / "repeats.txt").read_text()


def test_too_many_repeats_fail_a_run_in_which_everything_passed(run: pytest.Pytester) -> None:
    run.makepyfile(test_a=FAILS_ONCE.format(count=MAX_REPEATS))
    assert run.runpytest_inprocess().ret == pytest.ExitCode.OK
    run.makepyfile(test_a=FAILS_ONCE.format(count=MAX_REPEATS + 1))
    done = run.runpytest_inprocess()
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    done.stdout.fnmatch_lines([f"tests    {MAX_REPEATS + 1} passed, 0 failed, 0 skipped", "FAILED   4 repeats, *"])


def test_times_and_reasons_of_skips_are_kept(run: pytest.Pytester) -> None:
    run.makepyfile(
        test_a="import pytest\n\ndef test_skipped():\n    pytest.skip('needs a moon')\n\ndef test_run():\n    pass\n"
    )
    done = run.runpytest_inprocess()
    done.stdout.fnmatch_lines(["tests    1 passed, 0 failed, 1 skipped", "skipped  1 needs a moon"])
    times = json.loads((run.path / RESULTS / "times.json").read_text())
    assert set(times["tests"]) == {"test_a.py::test_skipped", "test_a.py::test_run"}
