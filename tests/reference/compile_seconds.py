"""A plugin for pytest: where a run's time goes, by file and by tier, and a budget for what is compiled.

Most of what these tests take is XLA compiling. ``-p compile_seconds`` sums, for every file, the seconds of its tests
and those that JAX spent tracing, lowering and compiling in them, over all workers, and prints the tiers (the folders of
tests/) and the ten files that compile longest. With ``--compile-budget PROGRAMS`` the run fails if more programs than
that were compiled, or fetched from the cache of compiled ones: a number that, unlike the seconds, does not depend on
the machine and on what else it does.
"""

import collections

import jax
import pytest

EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "compile",
}
KINDS = ("tests", *EVENTS.values(), "programs")
"""Seconds, but for the last."""


def pytest_addoption(parser):
    parser.addoption("--compile-budget", type=int, metavar="PROGRAMS", help="fail if more are compiled, in all")


def pytest_configure(config):
    config.pluginmanager.register(_Counter(config), "compile-seconds")


class _Counter:
    """One in every process: workers hand their sums to the process that started them."""

    def __init__(self, config):
        self.config = config
        self.sums = collections.defaultdict(lambda: dict.fromkeys(KINDS, 0))  # by file
        self.file = "(collection)"
        self.over = False
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event, duration, **_):
        if kind := EVENTS.get(event):
            self.sums[self.file][kind] += duration
            self.sums[self.file]["programs"] += kind == "compile"

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.file = item.location[0]
        return (yield)

    def pytest_runtest_logreport(self, report):
        if not hasattr(self.config, "workerinput"):
            self.sums[report.location[0]]["tests"] += report.duration

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node):
        for file, kinds in getattr(node, "workeroutput", {}).get("compile-seconds", {}).items():
            for kind, value in kinds.items():
                self.sums[file][kind] += value

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session):
        if hasattr(self.config, "workeroutput"):
            self.config.workeroutput["compile-seconds"] = {file: dict(kinds) for file, kinds in self.sums.items()}
            return
        budget = self.config.getoption("--compile-budget")
        self.over = budget is not None and self._sum("programs") > budget
        if self.over and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def _sum(self, kind, files=None):
        return sum(self.sums[file][kind] for file in (self.sums if files is None else files))

    def pytest_terminal_summary(self, terminalreporter):
        tiers = collections.defaultdict(list)
        for file in self.sums:
            parts = file.split("/")
            tiers[parts[1] if len(parts) > 2 else parts[0]].append(file)
        rows = {tier: [self._sum(kind, files) for kind in KINDS] for tier, files in sorted(tiers.items())}
        rows["all"] = [self._sum(kind) for kind in KINDS]
        longest = sorted(self.sums, key=lambda file: -self.sums[file]["compile"])[:10]
        rows |= {file: [self.sums[file][kind] for kind in KINDS] for file in longest}

        terminalreporter.section("seconds and programs, by tier and of the files that compile longest")
        terminalreporter.write_line(f"{'':<48}" + "".join(f"{kind:>10}" for kind in KINDS))
        for name, (*seconds, programs) in rows.items():
            terminalreporter.write_line(f"{name:<48}" + "".join(f"{x:10.1f}" for x in seconds) + f"{programs:10}")
        if self.over:
            budget = self.config.getoption("--compile-budget")
            terminalreporter.write_line(
                f"FAILED: {rows['all'][-1]} programs were compiled; --compile-budget is {budget}"
            )
