"""How a run of the tests is reported.

While it runs: a line for each file that is done, and each failure at once. At its end: what failed, and five lines.
A run leaves two files in `RESULTS`, or in the folder that `--results` names: times.json (seconds of every test, read by
`python -m tests.times`) and repeats.txt (tests that failed and were repeated, with what they said).
"""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

RESULTS = Path("build/tests")  # in the folder that pytest is started in
MAX_REPEATS = 3  # more in one run fail it: then it is not chance
SLOWEST = 5  # files that the summary names


class Report:
    """Follows a run in the process that the user started; pytest-xdist hands it the reports of all workers."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._results = Path(config.getoption("results"))
        self._began = time.monotonic()
        self._seconds: Counter[str] = Counter()  # by test
        self._left: Counter[str] = Counter()  # tests still to be run, by file
        self._total = self._done = 0
        self._outcomes: dict[str, Counter[str]] = {}  # by file
        self._failures: list[tuple[str, str]] = []  # test, and the line that says why
        self._repeats: list[tuple[str, str]] = []
        self._skipped: Counter[str] = Counter()  # by reason

    # --- while it runs ------------------------------------------------------------------------------------------------

    def pytest_sessionstart(self) -> None:
        self._terminal.showfspath = False  # our lines name the files

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.items:
            self._expect([item.nodeid for item in session.items])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        if not self._total:  # every worker collects the same tests
            self._expect(ids)

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: Any) -> tuple[str, str, str] | None:
        """No letter for a test: it counts in its file's line."""
        if self._config.get_verbosity() > 0 or not isinstance(report, pytest.TestReport):
            return None
        if report.outcome == "passed":
            return ("passed" if report.when == "call" else ""), "", ""
        if report.outcome == "failed":
            return ("failed" if report.when == "call" else "error"), "", ""
        return report.outcome, "", ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[report.nodeid] += report.duration
        file = file_of(report.nodeid)
        outcomes = self._outcomes.setdefault(file, Counter())
        outcome: str = report.outcome  # pytest-rerunfailures adds "rerun"
        if outcome == "rerun":
            self._repeats.append((report.nodeid, report.longreprtext))
            self._print(f"REPEATED {report.nodeid}: {reason(report)}")
            return
        if outcome == "failed":
            outcomes["failed"] += 1
            self._failures.append((report.nodeid, reason(report)))
            self._print(f"FAILED {report.nodeid}: {reason(report)}", red=True)
        elif outcome == "skipped":
            outcomes["skipped"] += 1
            if isinstance(report.longrepr, tuple):
                self._skipped[report.longrepr[2].removeprefix("Skipped: ")] += 1
        elif report.when == "call":
            outcomes["passed"] += 1
        if report.when == "teardown":
            self._done += 1
            self._left[file] -= 1
            if not self._left[file]:
                self._print_file(file)

    def _expect(self, ids: list[str]) -> None:
        self._total = len(ids)
        self._left.update(file_of(nodeid) for nodeid in ids)

    def _print_file(self, file: str) -> None:
        counts = self._outcomes[file]
        told = ", ".join(f"{counts[word]} {word}" for word in ("failed", "passed", "skipped") if counts[word])
        share = f"{100 * self._done // max(1, self._total)} %"
        self._print(
            f"{share:>5}  {file}: {told}, {seconds_by_file(self._seconds)[file]:.1f} s", red=bool(counts["failed"])
        )

    # --- at its end ---------------------------------------------------------------------------------------------------

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if len(self._repeats) > MAX_REPEATS and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        if not self._done:
            return
        self._results.mkdir(parents=True, exist_ok=True)
        (self._results / "repeats.txt").write_text(
            "".join(f"{nodeid}\n{said}\n\n" for nodeid, said in self._repeats), encoding="utf-8"
        )
        times = {"wall": time.monotonic() - self._began, "workers": self._workers, "tests": dict(self._seconds)}
        (self._results / "times.json").write_text(json.dumps(times, indent=1), encoding="utf-8")

    def pytest_terminal_summary(self) -> None:
        if not self._done:
            return
        write = self._terminal.write_line
        write("")
        for nodeid, why in self._failures:
            write(f"FAILED {nodeid}: {why}", red=True)
        total: Counter[str] = sum(self._outcomes.values(), Counter())
        reasons = "; ".join(f"{count} {reason}" for reason, count in self._skipped.most_common())
        slowest = seconds_by_file(self._seconds).most_common(SLOWEST)
        repeated = Counter(nodeid for nodeid, _ in self._repeats)
        write(f"tests    {total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped")
        write(f"skipped  {reasons or 'none'}")
        write(
            f"time     {minutes(time.monotonic() - self._began)} on {self._workers} "
            f"{'worker' if self._workers == 1 else 'workers'}; "
            f"longest: {', '.join(f'{Path(file).name} {seconds:.0f} s' for file, seconds in slowest)}"
        )
        write(f"repeats  {', '.join(f'{nodeid} ({count})' for nodeid, count in repeated.items()) or 'none'}")
        write(f"files    {self._results}: times.json, repeats.txt")
        if len(self._repeats) > MAX_REPEATS:
            write(f"FAILED   {len(self._repeats)} repeats, and {MAX_REPEATS} are the most that may be chance", red=True)

    @property
    def _terminal(self) -> Any:
        return self._config.pluginmanager.getplugin("terminalreporter")

    @property
    def _workers(self) -> int:
        return int(getattr(self._config.option, "numprocesses", None) or 1)

    def _print(self, line: str, **markup: bool) -> None:
        if self._config.get_verbosity() == 0:
            self._terminal.ensure_newline()
            self._terminal.write_line(line, **markup)
            self._terminal.flush()


def file_of(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def seconds_by_file(tests: dict[str, float]) -> Counter[str]:
    files: Counter[str] = Counter()
    for nodeid, seconds in tests.items():
        files[file_of(nodeid)] += seconds  # type: ignore[assignment]
    return files


def minutes(seconds: float) -> str:
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"


def reason(report: pytest.TestReport) -> str:
    """Why a test failed, in one line."""
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = [line for line in (crash.message if crash else report.longreprtext).splitlines() if line.strip()]
    if not lines:
        return report.when or ""
    return str(lines[0] if crash else lines[-1]).strip()[:200]  # a traceback without a summary ends with the error
