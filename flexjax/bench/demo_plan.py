"""DemoPlan: the [demo] table of a configuration, and everything else a demo reads before it starts."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from flexjax.config import PATH, EngineConfig, from_table, load_tables
from flexjax.fields import ConfigError, check_range, check_types
from flexjax.finetuning.job import FinetuneJob


@dataclass(frozen=True)
class DemoConfig:
    """What the demo does around the engine and its job.

    Attributes:
        questions: text file, one question a line, that the stream of requests asks.
        held_out: JSONL of conversations that the job does not see; their last message is the wanted answer.
        signature: text that the trained adapter's answers hold and the base model's do not.
        output: folder of the adapter, the report and the plots.
        request_rate: requests per second, on average.
        answer_tokens: most tokens of an answer.
        seed: of the stream.
        time_limit_seconds: the job is given up if it takes longer.
        tighter_objective_ms: time per output token that the second run aims at.
        tighter_seconds: length of the second run.
        short_steps, short_tighter_seconds: optimizer steps of the job, and length of the second run, with --short.

    Raises:
        ConfigError: a value has the wrong type or is outside its range.
    """

    questions: str = field(metadata=PATH)
    held_out: str = field(metadata=PATH)
    signature: str
    output: str = field(metadata=PATH)
    tighter_objective_ms: float
    request_rate: float = 0.3
    answer_tokens: int = 40
    seed: int = 0
    time_limit_seconds: float = 480.0
    tighter_seconds: float = 45.0
    short_steps: int = 12
    short_tighter_seconds: float = 20.0

    def __post_init__(self):
        check_types(self)
        if not self.signature.strip():
            raise ConfigError(f"signature is {self.signature!r}; it must be text that can be searched for")
        for name in ("answer_tokens", "short_steps"):
            check_range(self, name, 1)
        for name in ("tighter_objective_ms", "request_rate", "tighter_seconds", "short_tighter_seconds"):
            check_range(self, name, 0.0, open_low=True)
        check_range(self, "time_limit_seconds", 0.0, open_low=True)
        check_range(self, "seed", 0)


@dataclass(frozen=True)
class DemoPlan:
    """A demo, ready to run.

    Attributes:
        questions: the stream's; held_out: conversations without their last message.
        tighter_seconds: length of the second run.
    """

    engine: EngineConfig
    job: FinetuneJob
    demo: DemoConfig
    output: Path
    tighter_seconds: float
    questions: tuple[str, ...]
    held_out: tuple[tuple[dict, ...], ...]


def read_plan(path: Path, short: bool, output: Path | None) -> DemoPlan:
    """Everything that ``path`` says and names, checked.

    Raises:
        ConfigError: a table or a value is missing or wrong, or a file it names cannot be used.
    """
    tables = load_tables(path)
    for name in ("engine", "finetune", "demo"):
        if not tables.get(name):
            raise ConfigError(f"{path} has no table [{name}]; a demo needs [engine], [[finetune]] and [demo]")
    jobs = tables["finetune"]
    if len(jobs) != 1:
        raise ConfigError(f"{path} has {len(jobs)} tables [[finetune]]; a demo runs one job")
    engine = from_table(EngineConfig, tables["engine"], f"{path} [engine]", path.parent)
    job = from_table(FinetuneJob, jobs[0], f"{path} [[finetune]]", path.parent)
    demo = from_table(DemoConfig, tables["demo"], f"{path} [demo]", path.parent)
    if engine.tpot_objective_ms is None or demo.tighter_objective_ms >= engine.tpot_objective_ms:
        raise ConfigError(
            f"{path}: tighter_objective_ms is {demo.tighter_objective_ms}; it must be less than tpot_objective_ms of "
            f"[engine], which is {engine.tpot_objective_ms}"
        )
    return DemoPlan(
        engine=engine,
        job=replace(job, max_steps=demo.short_steps, evaluate_every=None) if short else job,
        demo=demo,
        output=Path(demo.output if output is None else output),
        tighter_seconds=demo.short_tighter_seconds if short else demo.tighter_seconds,
        questions=read_questions(Path(demo.questions)),
        held_out=read_held_out(Path(demo.held_out)),
    )


def read_questions(path: Path) -> tuple[str, ...]:
    questions = tuple(line.strip() for line in read_lines(path) if line.strip())
    if not questions:
        raise ConfigError(f"{path} holds no question; it needs one a line")
    return questions


def read_held_out(path: Path) -> tuple[tuple[dict, ...], ...]:
    """Conversations up to the last message, which must be the assistant's."""
    conversations = []
    for number, text in enumerate(read_lines(path), 1):
        try:
            *before, last = json.loads(text)["messages"]
            usable = last["role"] == "assistant" and before
        except (ValueError, KeyError, TypeError):
            usable = False
        if not usable:
            raise ConfigError(f'{path}, line {number}: it must be {{"messages": [...]}} that end with the assistant\'s')
        conversations.append(tuple(before))
    if not conversations:
        raise ConfigError(f"{path} holds no conversation")
    return tuple(conversations)


def read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
