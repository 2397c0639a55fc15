"""Write the tables of docs/performance.md from what the benchmarks measured; the prose around them stays.

    flexjax bench kernels                      writes benchmarks/results/kernels.json
    flexjax bench step                         writes benchmarks/results/step.json
    python scripts/make_performance_docs.py    replaces what stands between the markers

A table stands between <!-- begin NAME --> and <!-- end NAME -->: "device", "metrics", "kernel cases", "step cases".
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flexjax.bench.page import fill, number, origin, table

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "performance.md"


@dataclass(frozen=True)
class Target:
    """What a metric should reach on one H100, Llama-3.1-8B shapes, bfloat16.

    Attributes:
        least, stretch: limits; of ``share_of`` where that names another metric.
        below: less is better.
    """

    metric: str
    known: str
    least: float
    stretch: float | None
    below: bool = False
    share_of: str | None = None

    def reached(self, metrics: Mapping[str, float]) -> str:
        """In words; empty without a value."""
        value, whole = metrics.get(self.metric), metrics.get(self.share_of, 1.0 if self.share_of is None else None)
        if value is None or whole is None:
            return ""
        holds = lambda limit: limit is not None and (value <= limit * whole if self.below else value >= limit * whole)
        return "stretch" if holds(self.stretch) else "yes" if holds(self.least) else "no"

    def limit(self, value: float | None) -> str:
        if value is None:
            return ""
        text = f"{'≤' if self.below else '≥'} {number(value)}"
        return f"{text} × `{self.share_of}`" if self.share_of else text


def rows_of(known: str, name: str, limits: Mapping[int, tuple]) -> list[Target]:
    """One target for each number of rows: {rows: (known, least, stretch)}."""
    return [
        Target(f"{name}_{rows}", f"{known} {was}", least, stretch, True)
        for rows, (was, least, stretch) in limits.items()
    ]


STEPS = {1: (6.48, 5.9), 8: (6.92, 6.2), 32: (8.18, 7.3), 64: (9.84, 9.0), 128: (13.30, 12.3), 256: (20.53, 19.6)}
MEMORY = "finetune_all_activation_mb_per_token"
PEFT_MEMORY = "PEFT 11.4; with checkpointing 2.1"

TARGETS = (
    Target("decode_attention_fraction_of_copy", "sketch 0.86", 0.88, 0.93),
    Target("decode_attention_few_rows_fraction_of_copy", "sketch 0.57", 0.75, 0.85),
    Target("chunk_attention_fraction_of_cudnn", "sketch 0.36", 0.75, 1.0),
    Target("window_grad_fraction_of_cudnn_backward", "sketch 0.54", 0.75, 1.0),
    Target("page_write_2048_rows_us", "XLA 48", 20, 8, below=True),
    Target("lora_grads_fraction_of_copy", "0.2–0.67", 0.65, 0.85),
    *rows_of("vLLM", "decode_step_ms", {rows: (vllm, vllm, stretch) for rows, (vllm, stretch) in STEPS.items()}),
    Target("decode_step_lora8_ms_8", "vLLM 10.99", 1.2, 1.1, True, "decode_step_ms_8"),
    Target("decode_step_lora8_ms_64", "vLLM 14.18", 1.1, 1.05, True, "decode_step_ms_64"),
    Target("decode_step_lora8_ms_256", "vLLM 26.31", 1.1, 1.05, True, "decode_step_ms_256"),
    Target("prefill_tokens_per_s", "vLLM 41k", 41_000, 45_000),
    Target("offline_output_tokens_per_s", "vLLM 4,419", 4_419, 5_000),
    Target("finetune_all_tokens_per_s", "PEFT 5.4–7.4k; NeMo 12.5k published", 13_000, 15_000),
    Target("finetune_all_lean90_tokens_per_s", "", 0.9, None, share_of="finetune_all_tokens_per_s"),
    Target("finetune_all_lean80_tokens_per_s", "", 0.8, 0.85, share_of="finetune_all_tokens_per_s"),
    Target("finetune_down_tokens_per_s", "PEFT 8.0k", 13_500, 16_000),
    Target(MEMORY, PEFT_MEMORY, 2.9, 1.1, below=True),
    Target(f"{MEMORY}_lean90", PEFT_MEMORY, 1.9, 1.1, below=True),
    Target(f"{MEMORY}_lean80", PEFT_MEMORY, 1.1, None, below=True),
    Target("host_gap_fraction", "", 0.02, 0.005, below=True),
    Target("startup_cold_s", "vLLM 77", 77, 45, below=True),
    Target("startup_warm_s", "", 25, 10, below=True),
)


def metric_table(metrics: Mapping[str, float]) -> str:
    rows = [
        [
            f"`{t.metric}`",
            number(metrics.get(t.metric)),
            t.limit(t.least),
            t.limit(t.stretch),
            t.reached(metrics),
            t.known,
        ]
        for t in TARGETS
    ]
    return table("metric | measured | at least | stretch | reached | known before", rows)


def kernel_table(cases: list[Mapping]) -> str:
    return table(
        "case | shape | ran | µs | of ceiling | best alternative, µs | its time ÷ ours", list(map(kernel_row, cases))
    )


def kernel_row(case: Mapping) -> list[str]:
    alternatives = case.get("alternatives") or {}
    best = min(alternatives, key=alternatives.get, default=None)
    other = (
        [f"{best} {number(alternatives[best] * 1e3)}", number(alternatives[best] / case["ms"])] if best else ["", ""]
    )
    ceiling = f"{number(case['fraction'])} ({case['bound']})" if "bound" in case else ""
    return [case["name"], case["shape"], case.get("implementation", ""), number(case["ms"] * 1e3), ceiling, *other]


def step_table(cases: list[Mapping]) -> str:
    keys = ("ms", "fraction", "alternative_ms")
    rows = [[case["name"], case["shape"], *(number(case.get(key)) for key in keys), commit_of(case)] for case in cases]
    return table("case | shape | ms | of floor | alternative, ms | commit", rows)


def commit_of(case: Mapping) -> str:
    return f"`{case['commit'][:7]}`" if case.get("commit") else ""


def device_lines(results: Mapping[str, Mapping]) -> str:
    lines = []
    for name, found in results.items():
        ran = ", ".join(f"{operation}: {choice}" for operation, choice in found["implementations"].items())
        lines.append(f"* {name}: {origin(found)} Ran {ran}.")
    return "\n".join(lines)


def tables(results: Mapping[str, Mapping]) -> dict[str, str]:
    """Of {"kernels": ..., "step": ...}, either of which may be missing."""
    metrics = {name: value for found in results.values() for name, value in found["metrics"].items()}
    made = {"device": device_lines(results), "metrics": metric_table(metrics)}
    for name, make in (("kernels", kernel_table), ("step", step_table)):
        if name in results:
            made[f"{name.removesuffix('s')} cases"] = make(results[name]["cases"])
    return made


def read_results(folder: Path) -> dict[str, dict]:
    paths = {name: folder / f"{name}.json" for name in ("kernels", "step")}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def main() -> None:
    fill(PAGE, tables(read_results(RESULTS)))


if __name__ == "__main__":
    main()
