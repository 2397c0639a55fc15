"""Write the table of docs/reliability.md from what the fault tests tried; the prose around it stays.

    make test-faults                           writes benchmarks/results/reliability.json
    python scripts/make_reliability_docs.py    replaces what stands between the markers
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from flexjax.bench.page import fill, table

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "reliability.json", ROOT / "docs" / "reliability.md"
HEADER = "fault | tries | what came of it"

Tries = Sequence[Mapping[str, float | str]]


def total(tries: Tries, name: str) -> str:
    return f"{sum(each[name] for each in tries):,}"


def killed(tries: Tries) -> str:
    names = ("files", "events", "checkpoints", "adapter_changes")
    checked = ", ".join(f"{total(tries, name)} {name.replace('_', ' ')}" for name in names)
    return (
        f"{checked} were acknowledged before a kill and there afterwards, once; {total(tries, 'answered')} requests "
        f"were answered, each as the model asked for answers, and {total(tries, 'cut')} cut off by the kill; every "
        "adapter was to the byte that of the job nobody killed"
    )


def torn_log(tries: Tries) -> str:
    opened = [each for each in tries if each["transactions"] >= 0]
    least, most = (pick(each["transactions"] for each in opened) for pick in (min, max))
    return (
        f"{len(opened)} were opened, with the first {least} to {most} of 40 transactions, none behind a lost one; "
        f"{len(tries) - len(opened)} were refused"
    )


SUMMARIES: dict[str, tuple[str, Callable[[Tries], int], Callable[[Tries], str]]] = {
    "kill": ("SIGKILL in the middle of a job and of traffic", lambda t: sum(each["moments"] for each in t), killed),
    "torn log": ("a database's log cut or with a bit flipped", len, torn_log),
    "torn database": ("a database file without its end", len, lambda t: "all were refused, with what to do"),
    "corrupt upload": (
        "an upload with bytes changed, lost, doubled or put in",
        lambda t: sum(each["uploads"] for each in t),
        lambda t: f"{total(t, 'kept')} were kept whole, {total(t, 'refused')} refused; none was kept in part",
    ),
    "full disk": (
        "a database that may not grow, during a job",
        len,
        lambda t: (
            f"{total(t, 'refused')} uploads were refused with 507, {total(t, 'kept')} kept; requests were answered; "
            f"{total(t, 'steps_before_room')} of {total(t, 'steps')} steps were written before there was room again, "
            "all of them afterwards, once; the adapter was that of an undisturbed job"
        ),
    ),
    "small disk": (
        "a disk that is really full, during a job",
        lambda t: sum(each["times"] for each in t),
        lambda t: (
            f"{total(t, 'refused')} uploads were refused with 507, {total(t, 'kept')} files are there; requests were "
            f"answered; at the kill {total(t, 'steps_before_room')} of {total(t, 'steps')} steps were written; the "
            "process was killed and started again on the full disk; the adapter was that of an undisturbed job"
        ),
    ),
    "http queue": (
        "requests at once, each on a connection of its own",
        lambda t: sum(each["requests"] for each in t),
        lambda t: f"{total(t, 'answered')} were answered; {total(t, 'refused')} beyond the queue refused with 429",
    ),
    "queue": (
        "sequences in the queue while the engine stands still",
        lambda t: sum(each["sequences"] for each in t),
        lambda t: f"{total(t, 'answered')} were answered; {total(t, 'refused')} beyond the queue refused with 429",
    ),
    "adapter churn": (
        "adapters loaded, replaced and unloaded over HTTP",
        lambda t: sum(each["changes"] for each in t),
        lambda t: (
            f"{total(t, 'answered')} requests were answered, all by what their name meant; {total(t, 'unknown')} named "
            f"one that was unloaded (404); {total(t, 'went_away')} clients went away; {total(t, 'evictions')} adapters "
            "left the device for others"
        ),
    ),
}


def rows(results: Mapping[str, Tries]) -> list[list[str]]:
    return [
        [title, f"{count(results[fault]):,}", summary(results[fault])]
        for fault, (title, count, summary) in SUMMARIES.items()
        if fault in results
    ]


def tables(results: Mapping[str, Tries]) -> dict[str, str]:
    return {"tried": table(HEADER, rows(results))}


def read_results() -> dict:
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def main() -> None:
    fill(PAGE, tables(read_results()))


if __name__ == "__main__":
    main()
