"""guidellm: a short load of synthetic prompts, and what its own report says of it. Knows no flexjax.

    python with_guidellm.py < TASK.json          (a Python with guidellm)
"""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path


def command(task: dict, report: Path) -> list[str]:
    """A run with so many streams at once; its answers are greedy, so that they can be told."""
    backend = {"kind": "openai_http", "target": task["url"].removesuffix("/v1"), "api_key": task["key"]}
    backend |= {"model": task["model"], "request_format": "/v1/completions", "extras": {"body": {"temperature": 0}}}
    options = {
        "backend": backend,
        "profile": {"kind": "concurrent", "streams": task["streams"]},
        "constraint": {"kind": "max_requests", "count": task["requests"]},
        "tokenizer": {"kind": "huggingface_auto", "model": task["directory"]},
        "data": {"kind": "synthetic_text", "prompt_tokens": task["prompt"], "output_tokens": task["tokens"]},
        "output": {"kind": "json", "path": str(report)},
    }
    words = [word for name, value in options.items() for word in (f"--{name}", json.dumps(value))]
    return [sys.executable, "-m", "guidellm", "run", *words, "--disable-console"]


def answer(request: dict) -> dict:
    """Of the report's entry of a request."""
    return {
        "prompt": json.loads(request["request_args"])["body"]["prompt"],
        "text": request["output"],
        "tokens": [request["prompt_tokens"], request["output_tokens"]],
        "times": [request["time_to_first_token_ms"], request["request_latency"] * 1000],
    }


def main() -> None:
    task = json.load(sys.stdin)
    report = Path(task["folder"], "report.json")
    subprocess.run(command(task, report), check=True, stdout=sys.stderr)
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    metrics = benchmark["metrics"]
    found = {
        "version": version("guidellm"),
        "totals": metrics["request_totals"],
        "answers": [answer(request) for request in benchmark["requests"]["successful"]],
        "sums": [metrics[f"{side}_token_count"]["successful"]["total_sum"] for side in ("prompt", "output")],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
