"""The hybrid scheduler: requests and finetuning in one iteration, decided in plain Python."""

from flexjax.scheduler.cursor import Microbatch, MicrobatchCursor
from flexjax.scheduler.latency import LatencyModel
from flexjax.scheduler.output import (
    Completion,
    DecodeSlot,
    Iteration,
    MicrobatchPages,
    NewToken,
    PromptSegment,
    Unit,
    UnitKind,
    WindowSegment,
)
from flexjax.scheduler.policies import POLICIES, policy_from_name
from flexjax.scheduler.policy import Policy
from flexjax.scheduler.scheduler import Scheduler, Statistics

__all__ = [
    "POLICIES",
    "Completion",
    "DecodeSlot",
    "Iteration",
    "LatencyModel",
    "Microbatch",
    "MicrobatchCursor",
    "MicrobatchPages",
    "NewToken",
    "Policy",
    "PromptSegment",
    "Scheduler",
    "Statistics",
    "Unit",
    "UnitKind",
    "WindowSegment",
    "policy_from_name",
]
