"""Jobs as the dashboard shows them: progress and curves of the newest ones that an owner may see."""

from collections.abc import Callable
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import flexjax
from flexjax.finetuning.job_run import JobRun
from flexjax.server.curves import Curve, Curves
from flexjax.server.job_events import rows_of
from flexjax.server.keys import OPERATOR
from flexjax.server.store import Store

MOST_JOBS = 12


class ConfiguredJobs:
    """Jobs that no client created, but the configuration: the engine alone knows them."""

    def __init__(self, engine: "flexjax.Engine"):
        self._engine, self._lock = engine, Lock()
        self._curves: WeakKeyDictionary[JobRun, tuple[int, Curve]] = WeakKeyDictionary()

    def newest(self, is_clients: Callable[[str], bool]) -> list[tuple[JobRun, Curve]]:
        """The newest first.

        Args:
            is_clients: whether a client created the job of that name.
        """
        runs = [run for run in reversed(list(self._engine.trainer.queue.runs)) if not is_clients(run.job.name)]
        with self._lock:
            return [(run, self._curve(run)) for run in runs[:MOST_JOBS]]

    def _curve(self, run: JobRun) -> Curve:
        seen, curve = self._curves.get(run, (0, Curve()))
        new = run.events[seen:]
        for row in rows_of(new, 0, run.total_steps):
            curve.take(row["data"])
        self._curves[run] = seen + len(new), curve
        return curve


def jobs_of(store: Store, curves: Curves, configured: ConfiguredJobs, owner: str) -> list[dict[str, Any]]:
    """The newest MOST_JOBS, those of the configuration before others; they are the operator's. On any thread."""
    is_clients = lambda name: store.find("jobs", name=name) is not None
    known = configured.newest(is_clients) if owner == OPERATOR else []
    own = [job_view(None, run.job.name, str(run.status), curve) for run, curve in known]
    rows = store.rows("jobs", {"owner": owner}, limit=MOST_JOBS, newest_first=True)
    found = [job_view(row["id"], row["name"], row["status"], curves.of(row["id"])) for row in rows]
    return (own + found)[:MOST_JOBS]


def job_view(identifier: str | None, name: str, status: str, curve: Curve) -> dict[str, Any]:
    """``step`` of ``total_steps``, null before the first; curves are lists of [step, loss]."""
    points = {"train": curve.train.points, "validation": curve.validation.points}
    steps = {"step": curve.step, "total_steps": curve.total_steps}
    return {"id": identifier, "name": name, "status": status, **steps, "losses": points}
