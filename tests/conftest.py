"""What every test shares: repeatable property tests, where recorded results lie, and why tests were skipped."""

import os
from collections import Counter
from pathlib import Path

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")

jax.config.update("jax_num_cpu_devices", 4)  # virtual devices for tests of tensor parallelism; must precede any array


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of models and recorded results that stands outside the repository; skips the test where there is none."""
    folder = os.environ.get("FLEXJAX_SHARED")
    if not folder:
        pytest.skip("FLEXJAX_SHARED is not set: no folder of models and recorded results to compare with")
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"FLEXJAX_SHARED is {folder!r}, which is no folder; unset it or name one")
    return Path(folder)


@pytest.fixture(scope="session")
def compilation_cache(tmp_path_factory) -> str:
    """Folder in which the engines of this run share their compiled programs."""
    return str(tmp_path_factory.mktemp("compiled"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and jax.default_backend() != "gpu":
        skip = pytest.mark.skip(reason=f"needs a GPU that jax can see; jax runs on {jax.default_backend()!r}")
        for item in on_gpu:
            item.add_marker(skip)


def pytest_terminal_summary(terminalreporter) -> None:
    """Count skipped tests by reason at the end of the run, so that none goes unnoticed."""
    reports = terminalreporter.stats.get("skipped", [])
    if not reports:
        return
    reasons = Counter(reason_of(report) for report in reports)
    terminalreporter.section(f"{len(reports)} skipped, by reason")
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count:4d} × {reason}")


def reason_of(report: pytest.TestReport) -> str:
    """Why a test was skipped: pytest stores (file, line, "Skipped: reason")."""
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    return str(report.longrepr)
