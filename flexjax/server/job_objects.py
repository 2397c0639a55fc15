"""Fine-tuning jobs, their events and checkpoints as objects of OpenAI's API."""

from typing import Any

OPENAI_HYPERPARAMETERS = ("n_epochs", "batch_size", "learning_rate_multiplier")


def job_object(row: dict[str, Any]) -> dict[str, Any]:
    request, error = row["request"], row["error"]
    given = request["hyperparameters"]
    hyperparameters = {**dict.fromkeys(OPENAI_HYPERPARAMETERS, "auto"), **given}
    return {
        "id": row["id"],
        "object": "fine_tuning.job",
        "created_at": row["created"],
        "finished_at": row["finished"],
        "error": None if error is None else {"code": "job_failed", "message": error, "param": None},
        "fine_tuned_model": row["name"] if row["status"] == "succeeded" else None,
        "hyperparameters": hyperparameters,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        "model": request["model"],
        "organization_id": "flexjax",
        "result_files": [] if row["result_file"] is None else [row["result_file"]],
        "seed": request["seed"],
        "status": row["status"],
        "trained_tokens": row["trained_tokens"],
        "training_file": request["training_file"],
        "validation_file": request["validation_file"],
        "user_provided_suffix": request["suffix"] or None,
        "estimated_finish": None,
        "integrations": [],
        "metadata": request["metadata"],
    }


def event_object(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": row["id"],
        "object": "fine_tuning.job.event",
        "created_at": row["created"],
        "level": row["level"],
        "message": row["message"],
        "type": row["type"],
        "data": row["data"],
    }


def checkpoint_object(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": row["id"],
        "object": "fine_tuning.job.checkpoint",
        "created_at": row["created"],
        "fine_tuned_model_checkpoint": row["name"],
        "fine_tuning_job_id": row["job"],
        "metrics": row["metrics"],
        "step_number": row["step"],
    }
