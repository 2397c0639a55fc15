"""Write the tables of docs/coserving.md, and draw its figures, from what the benchmarks measured; the prose stays.

    flexjax bench coserve CONFIG ...          writes benchmarks/results/coserve_*.json
    flexjax bench memory                      writes benchmarks/results/memory.json
    python scripts/make_coserving_docs.py     replaces what stands between the markers, and docs/figures/coserve_*.png

A table stands between <!-- begin NAME --> and <!-- end NAME -->; the names are those of `tables`.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from flexjax.bench.coserve_results import STOPPED
from flexjax.bench.page import fill, number, origin, table
from flexjax.bench.plots import plot_rates

ROOT = Path(__file__).parents[1]
RESULTS, PAGE, FIGURES = ROOT / "benchmarks" / "results", ROOT / "docs" / "coserving.md", ROOT / "docs" / "figures"
NOTHING = "Nothing has been measured yet."
DRAWN = ("case_study",)
"""Set-ups whose runs are drawn."""

COLUMNS = {
    "attainment": "attainment",
    "TTFT p99, ms": "ttft_ms_p99",
    "TPOT p50, ms": "tpot_ms_p50",
    "TPOT p99, ms": "tpot_ms_p99",
    "ITL p99, ms": "itl_ms_p99",
    "largest gap p99, ms": "max_gap_ms_p99",
    "output tokens/s": "output_tokens_per_s",
    "finetuning tokens/s": "finetune_tokens_per_s",
    "kept": "finetune_kept",
    "efficiency": "efficiency",
    "bound, finetuning tokens/s": "bound_finetune_tokens_per_s",
    "SM clock, MHz": "sm_clock_mhz",
}
"""Heading -> metric of a run."""


@dataclass(frozen=True)
class Target:
    """What a run under co_serve should reach on one H100.

    Attributes:
        least, stretch: limits; below: less is better.
        known: what is published, or a peer's figure.
    """

    setup: str
    workload: str
    metric: str
    least: float
    stretch: float | None = None
    below: bool = False
    known: str = ""

    def reached(self, value: float | None) -> str:
        """In words; empty without a value."""
        if value is None:
            return ""
        holds = lambda limit: limit is not None and (value < limit if self.below else value >= limit)
        return "stretch" if holds(self.stretch) else "yes" if holds(self.least) else "no"

    def limit(self, value: float | None) -> str:
        return "" if value is None else f"{'<' if self.below else '≥'} {number(value)}"


def finetune_targets(kind: str, limits: Mapping[int, tuple[float, float]], known: Mapping[int, str]) -> list[Target]:
    """Attainment and finetuning tokens per second of set-up A: {requests per second: (least, stretch)}."""
    made = []
    for rate, (least, stretch) in limits.items():
        workload = f"{kind}_r{rate}_240s"
        made.append(Target("a", workload, "attainment", 0.99, 0.999, known=known.get(rate, "")))
        made.append(Target("a", workload, "finetune_tokens_per_s", least, stretch))
    return made


TARGETS = (
    *finetune_targets(
        "sharegpt",
        {5: (11_500, 13_500), 10: (10_000, 12_500), 20: (8_000, 10_500)},
        {5: "FlexLLM on an A100: attainment 97.7 %, 1,799 tokens/s"},
    ),
    *finetune_targets("burst_sharegpt", {5: (11_000, 13_000), 10: (9_500, 12_000), 20: (7_500, 10_000)}, {}),
    Target("a", "sharegpt_r20_240s", "finetune_kept", 0.55, 0.64),
    Target("a", "sharegpt_r10_240s_without_every_5th", "finetune_kept", 0.76, known="FlexLLM 76 % at 5 per GPU"),
    Target("a", "sharegpt_r10_240s", "efficiency", 0.95, 1.05, known="time sharing below 1"),
    Target("a", "sharegpt_r20_240s", "efficiency", 1.00, 1.10),
    Target("a", "burst_sharegpt_r20_240s", "efficiency", 1.15, 1.25),
    Target("tight", "sharegpt_r10_240s", "itl_ms_p99", 25, below=True),
    Target("tight", "sharegpt_r10_240s", "finetune_kept", 0.5, 0.6),
    Target("b", "azure_r10_240s", "itl_ms_p99", 50, below=True, known="vLLM, 8 LoRA, alone: TPOT p50/p99 19.3/30.0 ms"),
    Target("b", "azure_r10_240s", "ttft_ms_p99", 1000, below=True, known="vLLM, 8 LoRA, alone: 380"),
    Target("b", "azure_r10_240s", "max_gap_ms_p99", 100, below=True, known="vLLM, 8 LoRA, alone: 199"),
    Target("b", "azure_r10_240s", "finetune_tokens_per_s", 7_000, 9_000),
)


PEER_METRICS = ("ttft_ms_p50", "ttft_ms_p99", "tpot_ms_p50", "tpot_ms_p99", "max_gap_ms_p99")
VLLM = {
    "azure_r10": (46, 211, 9.7, 15.1, 126),
    "azure_r20": (84, 330, 20.6, 30.0, 208),
    "sharegpt_r20": (26, 82, 8.6, 10.3, 64),
    "sharegpt_r40": (47, 134, 15.4, 21.2, 94),
}
"""Its figures on an H100, over traces of 25 s, by workload in the order of `PEER_METRICS`."""

DENOMINATORS = ("capacity_requests_per_s", "alone_finetune_tokens_per_s")
ALTERNATIVES = "set-up | workload | policy | attainment | finetuning tokens/s | co_serve's | co_serve's ÷ this"


def runs_of(results: Mapping[str, Mapping]) -> list[Mapping]:
    """Those that replayed a trace, or were composed for one."""
    return [found for found in results.values() if "workload" in found]


def target_table(runs: Iterable[Mapping]) -> str:
    held = [run for run in runs if run["policy"] == "co_serve"]
    rows = []
    for target in TARGETS:
        workload, metrics = longest_run(held, target)
        value = metrics.get(target.metric)
        limits = (target.limit(target.least), target.limit(target.stretch), target.reached(value))
        rows.append([target.setup, workload, f"`{target.metric}`", share(value), *limits, target.known])
    return table("set-up | workload | metric | measured | at least | stretch | reached | known before", rows)


def longest_run(runs: Iterable[Mapping], target: Target) -> tuple[str, Mapping]:
    """Workload and metrics of the run of a target's trace; without one, of its longest beginning (`Trace.first`)."""
    found = {run["workload"]: run["metrics"] for run in runs if run["setup"] == target.setup}
    beginning = re.compile(re.escape(target.workload) + r"_first([\d.]+)s")
    seconds = {name: float(match[1]) for name in found if (match := beginning.fullmatch(name))}
    name = target.workload if target.workload in found else max(seconds, key=seconds.get, default=target.workload)
    return name, found.get(name, {})


def share(value: float | None) -> str:
    """Four digits where three would hide what is missing to 1."""
    return f"{value:.4f}" if value is not None and 0.9 <= value < 1 else number(value)


def run_table(runs: Iterable[Mapping]) -> str:
    rows = [
        [run["setup"], run["workload"], policy_of(run), *(share(run["metrics"].get(name)) for name in COLUMNS.values())]
        for run in sorted(runs, key=lambda run: (run["setup"], run["workload"], run["policy"]))
    ]
    return table(" | ".join(["set-up", "workload", "policy", *COLUMNS]), rows) if rows else NOTHING


def policy_of(run: Mapping) -> str:
    """With a word where the run was stopped before all were answered."""
    stopped = any(note.startswith(STOPPED) for note in run.get("notes", ()))
    return f"{run['policy']} (stopped)" if stopped else run["policy"]


def alternative_table(runs: Iterable[Mapping]) -> str:
    """Every run that finetunes, beside co_serve's over the same requests."""
    finetuning = {(run["setup"], run["workload"], run["policy"]): run["metrics"] for run in runs}
    rows = []
    for (setup, workload, policy), metrics in sorted(finetuning.items()):
        ours = finetuning.get((setup, workload, "co_serve"), {}).get("finetune_tokens_per_s")
        theirs = metrics.get("finetune_tokens_per_s")
        if policy != "co_serve" and ours is not None and theirs:
            figures = [share(metrics.get("attainment")), number(theirs), number(ours), number(ours / theirs)]
            rows.append([setup, workload, policy, *figures])
    return table(ALTERNATIVES, rows) if rows else NOTHING


def peer_table(runs: Iterable[Mapping]) -> str:
    """Inference alone beside what vLLM showed on the same requests."""
    alone = {run["workload"]: run["metrics"] for run in runs if run["policy"] == "inference_only"}
    rows = [
        [workload, f"`{metric}`", number(alone.get(workload, {}).get(metric)), number(peer)]
        for workload, peers in VLLM.items()
        for metric, peer in zip(PEER_METRICS, peers, strict=True)
    ]
    return table("workload | metric | measured | vLLM 0.23", rows)


def denominator_table(results: Mapping[str, Mapping]) -> str:
    """Every file of a denominator, and who divided by it."""
    rows = []
    for name, found in results.items():
        metric = next((each for each in DENOMINATORS if each in found["metrics"]), None)
        if metric is not None and "workload" not in found:
            users = [run["workload"] for run in runs_of(results) if used_file(run, metric) == f"{name}.json"]
            values = [f"`{metric}`", number(found["metrics"][metric]), found.get("policy", "finetune_only")]
            rows.append([f"`{name}.json`", *values, short(found["commit"]), ", ".join(dict.fromkeys(users))])
    return table("file | metric | value | policy | commit | used by", rows) if rows else NOTHING


def short(commit: str | None) -> str:
    """Ten digits, and whether files differed from it."""
    return "unknown" if commit is None else commit[:10] + "-dirty" * commit.endswith("-dirty")


def used_file(run: Mapping, metric: str) -> str | None:
    used = run["denominators"].get(metric)
    return used["file"] if isinstance(used, Mapping) else None


def memory_table(results: Mapping[str, Mapping]) -> str:
    """With a line below it if nothing was measured."""
    if "memory" not in results:
        return NOTHING
    found = results["memory"]
    figures = lambda case: [number(case["gb"]), f"{number(100 * case['saved'])} %"]
    rows = [[case["name"], case["shape"], *figures(case)] for case in found["cases"]]
    facts = f"{found['device']}; commit {short(found['commit'])}"
    below = "" if measured(found) else f"\n\nCounted without a GPU ({facts}), not measured."
    return table("case | what is kept | GB | less than nothing pruned", rows) + below


def measured(memory: Mapping) -> bool:
    """Whether memory was measured on a device too, not only counted, which gives the same anywhere."""
    return any("memory_mb" in case for case in memory["cases"])


def device_lines(results: Mapping[str, Mapping]) -> str:
    found = [origin(each) for name, each in results.items() if name != "memory" or measured(each)]
    return "\n".join(f"* {each}" for each in dict.fromkeys(found)) or NOTHING


def tables(results: Mapping[str, Mapping]) -> dict[str, str]:
    """Of the files of results by their names without ``.json``."""
    runs = runs_of(results)
    return {
        "device": device_lines(results),
        "targets": target_table(runs),
        "runs": run_table(runs),
        "alternatives": alternative_table(runs),
        "peers": peer_table(runs),
        "denominators": denominator_table(results),
        "memory": memory_table(results),
        "figures": "\n\n".join(picture_lines(runs)) or NOTHING,
    }


def picture_lines(runs: Iterable[Mapping]) -> list[str]:
    return [
        f"![Requests, tokens and memory over time: {run['workload']} under {run['policy']}](figures/{picture(run)})"
        for run in drawn(runs)
    ]


def drawn(runs: Iterable[Mapping]) -> list[Mapping]:
    return [run for run in runs if run["setup"] in DRAWN and "timeline" in run]


def picture(run: Mapping) -> str:
    return f"coserve_{run['setup']}_{run['policy']}.png"


def read_results(folder: Path) -> dict[str, dict]:
    paths = [*sorted(folder.glob("coserve_*.json")), folder / "memory.json"]
    return {path.stem: json.loads(path.read_text()) for path in paths if path.exists()}


def main() -> None:
    results = read_results(RESULTS)
    fill(PAGE, tables(results))
    for run in drawn(runs_of(results)):
        plot_rates(FIGURES / picture(run), run["timeline"])


if __name__ == "__main__":
    main()
