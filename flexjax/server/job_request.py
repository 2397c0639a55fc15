"""JobRequest: the body that creates a fine-tuning job, translated once into what the engine takes.

Besides OpenAI's hyperparameters it takes the fields of `FinetuneJob`; what is not implemented is refused by name.
"""

import dataclasses
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flexjax.config import nearest
from flexjax.fields import ConfigError
from flexjax.finetuning.job import FinetuneJob
from flexjax.server.prompts import BodyError, kind_of, shortened
from flexjax.server.protocol import typed

FIELDS = {
    "model": str,
    "training_file": str,
    "validation_file": str,
    "suffix": str,
    "seed": int,
    "hyperparameters": Mapping,
    "method": Mapping,
    "metadata": Mapping,
    "integrations": list,
}
OWN = ("name", "data", "validation", "init_adapter", "seed")
"""Fields of `FinetuneJob` that other parts of a body decide."""

HINTS = {name: hint for name, hint in typing.get_type_hints(FinetuneJob).items() if name not in OWN}
OPENAI_HINTS = {"n_epochs": int, "batch_size": int, "learning_rate_multiplier": float}
HYPERPARAMETERS = {**HINTS, **OPENAI_HINTS}
SUFFIX = re.compile(r"[A-Za-z0-9_.-]{1,64}")
MOST_STEPS_LOST = 200
"""Steps between two checkpoints at most, where a job does not say: what a killed server has to do again."""


@dataclass(frozen=True)
class JobRequest:
    """What one body asks for, as the database keeps it.

    Attributes:
        model: the base model, or an adapter to go on from.
        hyperparameters: those that were given, under the names they were given.
    """

    model: str
    training_file: str
    validation_file: str | None
    suffix: str
    seed: int
    hyperparameters: dict[str, Any]
    metadata: dict[str, Any] | None

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def job(self, name: str, data: str, validation: str | None, init_adapter: str | None, rows: int) -> FinetuneJob:
        """The engine's job.

        Args:
            data, validation, init_adapter: paths; rows: in the training file.

        Raises:
            BodyError: a hyperparameter is outside its range.
        """
        require_above_zero(self.hyperparameters)
        given = dict(self.hyperparameters)
        multiplier = given.pop("learning_rate_multiplier", None)
        if "n_epochs" in given:
            given["epochs"] = given.pop("n_epochs")
        files = {"data": data, "validation": validation, "init_adapter": init_adapter}
        try:
            job = FinetuneJob(name=name, seed=self.seed, **files, **given)
            if multiplier is not None:
                job = dataclasses.replace(job, learning_rate=job.learning_rate * multiplier)
        except ConfigError as error:
            raise BodyError(f"hyperparameters: {error}", "hyperparameters") from error
        if job.checkpoint_every is None:
            steps = min(MOST_STEPS_LOST, -(-rows // job.batch_size))
            job = dataclasses.replace(job, checkpoint_every=steps)
        return job


def translate_job(body: Mapping[str, Any], seed: int) -> JobRequest:
    """What a body asks for.

    Args:
        seed: for a body without one.

    Raises:
        BodyError: a field is unknown, not supported, absent, or of the wrong type.
    """
    values = {}
    for name, value in body.items():
        if name not in FIELDS:
            raise BodyError(f"unknown field {name!r}{nearest(name, FIELDS)}", name)
        if value is not None:
            values[name] = typed(name, value, FIELDS[name])
    for name in ("model", "training_file"):
        if not values.get(name):
            raise BodyError(f"{name} is absent or empty; it must be text", name)
    if values.get("integrations"):
        raise BodyError("integrations is not supported; it must be empty", "integrations")
    return JobRequest(
        model=values["model"],
        training_file=values["training_file"],
        validation_file=values.get("validation_file"),
        suffix=checked_suffix(values.get("suffix", "")),
        seed=values.get("seed", seed),
        hyperparameters=hyperparameters_of(values),
        metadata=checked_metadata(values.get("metadata")),
    )


def require_above_zero(given: Mapping[str, Any]) -> None:
    """OpenAI's hyperparameters that become others of `FinetuneJob`, whose errors name those. Raises BodyError."""
    for name in ("n_epochs", "learning_rate_multiplier"):
        if name in given and not given[name] > 0:
            message = f"hyperparameters: {name} is {given[name]}; it must be above 0"
            raise BodyError(message, "hyperparameters")


def checked_suffix(suffix: str) -> str:
    if suffix and not SUFFIX.fullmatch(suffix):
        message = f"suffix is {shortened(suffix)}; it must be 1 to 64 letters, digits, dots, dashes or underscores"
        raise BodyError(message, "suffix")
    return suffix


def checked_metadata(metadata: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if metadata is not None and not all(isinstance(value, str) for value in metadata.values()):
        raise BodyError("metadata must map names to texts", "metadata")
    return None if metadata is None else dict(metadata)


def hyperparameters_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the body and those of its method together, "auto" left out. Raises BodyError."""
    method = values.get("method", {})
    kind = method.get("type", "supervised")
    if kind != "supervised" or set(method) - {"type", "supervised"}:
        names = ", ".join(sorted({str(kind), *map(str, method)} - {"type", "supervised"}))
        raise BodyError(f"method has {names}; only the type 'supervised' is supported", "method")
    supervised = method.get("supervised") or {}
    if not isinstance(supervised, Mapping) or set(supervised) - {"hyperparameters"}:
        raise BodyError("method.supervised must be an object that holds hyperparameters and nothing else", "method")
    parts = (values.get("hyperparameters", {}), supervised.get("hyperparameters") or {})
    merged: dict[str, Any] = {}
    for part in parts:
        if not isinstance(part, Mapping):
            raise BodyError(f"hyperparameters is {kind_of(part)}; it must be an object", "hyperparameters")
        for name, value in part.items():
            if name not in HYPERPARAMETERS:
                hint = nearest(name, HYPERPARAMETERS)
                raise BodyError(f"unknown hyperparameter {name!r}{hint}", "hyperparameters")
            if value is None or value == "auto":
                continue
            value = typed(name, value, HYPERPARAMETERS[name])
            if merged.setdefault(name, value) != value:
                raise BodyError(f"{name} is given twice, as {merged[name]} and {value}", "hyperparameters")
    if "n_epochs" in merged and "epochs" in merged:
        raise BodyError("n_epochs and epochs are both given; give one of them", "hyperparameters")
    return merged
