"""Calibration on the engine: what is timed before work begins is what work will be."""

import numpy as np

from flexjax.engine import trainer
from flexjax.engine.runner import Runner
from tests.engine.conftest import job


def test_units_are_timed_with_their_attention(engine, monkeypatch):
    """The gradient of attention leaves out queries without a cotangent. Nothing of it stays."""
    cotangents, left = [], []

    def watched(self, job, *arguments):
        cotangents.append(np.asarray(job.gradients.hidden, np.float32).any(axis=-1).all())
        return backward(self, job, *arguments)

    def calibrated(runner, latency, name):
        monkeypatch.setattr(Runner, "backward", watched)
        calibrate(runner, latency, name)
        monkeypatch.setattr(Runner, "backward", backward)
        gradients = runner.jobs[name].gradients
        left.extend(np.asarray(each, np.float32).any() for each in (gradients.hidden, *gradients.a.values()))

    backward, calibrate = Runner.backward, trainer.calibrate_job
    monkeypatch.setattr(trainer, "calibrate_job", calibrated)
    assert engine.finetune(job("timed", epochs=1)).wait(timeout=120) == "succeeded"
    assert len(cotangents) > 5 and all(cotangents)
    assert left and not any(left)
