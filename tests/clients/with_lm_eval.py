"""lm-eval: a task of the disk, scored over /v1/completions with echo and log-probabilities. Knows no flexjax.

    python with_lm_eval.py < TASK.json          (a Python with lm-eval)
"""

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

import lm_eval
import yaml
from lm_eval.tasks import TaskManager

NAME = "tiny_choices"


def write_task(folder: Path, questions: list[dict]) -> None:
    """Questions with choices of which one is right."""
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(each) + "\n" for each in questions))
    task = {
        "task": NAME,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{right}}",
        "target_delimiter": " ",
        "metric_list": [{"metric": name} for name in ("acc", "acc_norm")],
    }
    (folder / f"{NAME}.yaml").write_text(yaml.safe_dump(task))


def main() -> None:
    task = json.load(sys.stdin)
    folder = Path(task["folder"])
    os.environ["OPENAI_API_KEY"] = task["key"]
    os.environ["HF_DATASETS_CACHE"] = str(folder / "datasets")
    write_task(folder, task["questions"])
    server = {
        "model": task["model"],
        "base_url": f"{task['url']}/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": task["directory"],
        "num_concurrent": 3,
        "max_length": task["length"],
        "max_retries": 1,
    }
    manager = TaskManager(include_path=str(folder))
    run = {"tasks": [NAME], "task_manager": manager, "log_samples": True, "bootstrap_iters": 0}
    found = lm_eval.simple_evaluate(model="local-completions", model_args=server, **run)
    samples = sorted(found["samples"][NAME], key=lambda sample: sample["doc_id"])
    scores = {name: found["results"][NAME][f"{name},none"] for name in ("acc", "acc_norm")}
    answers = [[list(map(float, answer)) for answer in sample["filtered_resps"]] for sample in samples]
    print(json.dumps({"version": version("lm_eval"), "scores": scores, "answers": answers}))


if __name__ == "__main__":
    main()
