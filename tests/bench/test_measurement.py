"""What figures are measured on, and the clock meanwhile."""

import subprocess
import time
from pathlib import Path

import jax
import pytest

from flexjax.bench import measurement
from flexjax.bench.measurement import clock_watch, device_facts, output_of

ROOT = Path(__file__).parents[2]


def test_facts_name_device_versions_and_commit():
    facts = device_facts()
    assert set(facts) == {"device", "versions", "commit"}
    assert facts["device"] and facts["versions"]["jax"] == jax.__version__
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        assert facts["commit"] is None
    else:
        assert facts["commit"].removesuffix("-dirty") == head.stdout.strip()


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="this machine has a GPU")
def test_without_a_gpu_there_is_no_clock():
    with clock_watch() as watch:
        pass
    assert watch.mean_mhz is None


def test_the_clock_is_read_while_the_body_runs(monkeypatch):
    readings = iter(["1000", "2000", None, *["1500"] * 1000])
    monkeypatch.setattr(measurement.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(measurement, "CLOCK_PERIOD", 0.001)
    monkeypatch.setattr(measurement, "query_gpu", lambda field: next(readings))
    with clock_watch() as watch:
        while len(watch.readings) < 4:
            time.sleep(0.001)
    count = len(watch.readings)
    assert watch.readings[:3] == [1000, 2000, 1500]  # the reading that failed is left out
    assert watch.mean_mhz == sum(watch.readings) / count
    time.sleep(0.01)
    assert len(watch.readings) == count


@pytest.mark.parametrize(
    ("command", "output"),
    [(("echo", "1"), "1"), (("true",), None), (("false",), None), (("no-such-command-anywhere",), None)],
)
def test_commands_that_fail_say_nothing(command, output):
    assert output_of(*command) == output
