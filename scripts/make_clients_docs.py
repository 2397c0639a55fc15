"""Write the table of docs/clients.md from what the clients saw; the prose around it stays.

    make test-clients                      writes benchmarks/results/clients.json
    python scripts/make_clients_docs.py    replaces what stands between the markers
"""

import json
from collections.abc import Mapping
from pathlib import Path

from flexjax.bench.page import fill, table

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "clients.json", ROOT / "docs" / "clients.md"
HEADER = "client | version | what came of it"
OPENAI = (
    "chats, completions, files, a job steered and one finished ({steps} steps told, {checkpoints} checkpoints), its "
    "model asked and deleted: every answer that of a float64 model"
)
SUMMARIES = {
    "openai2": ("openai", OPENAI),
    "openai3": ("openai", OPENAI),
    "litellm": ("litellm", "answers, whole and streamed; {refusals} kinds of refusal, each as its own exception"),
    "lm-eval": (
        "lm-eval",
        "{questions} questions of four choices: accuracy {acc:.4f}, and every log-likelihood, as transformers has them",
    ),
    "peft": ("peft", "loads an export; the log-probabilities of {positions} positions are the service's"),
    "guidellm": (
        "guidellm",
        "{requests:.0f} requests, all succeeded; {tokens:,.0f} tokens by its count, by the service's, and as asked for",
    ),
}


def rows(results: Mapping[str, Mapping]) -> list[list[str]]:
    return [
        [title, results[client]["version"], summary.format(**results[client])]
        for client, (title, summary) in SUMMARIES.items()
        if client in results
    ]


def tables(results: Mapping[str, Mapping]) -> dict[str, str]:
    return {"clients": table(HEADER, rows(results))}


def read_results() -> dict:
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def main() -> None:
    fill(PAGE, tables(read_results()))


if __name__ == "__main__":
    main()
