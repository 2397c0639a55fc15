"""The table of policies by the name a configuration gives them."""

import inspect

from flexjax.scheduler.comparison import (
    DynamicTemporalSharing,
    FinetuneOnly,
    FixedBudget,
    InferenceOnly,
    TemporalSharing,
)
from flexjax.scheduler.objectives import CoServe, FlatOut, Price
from flexjax.scheduler.policy import Policy

POLICIES: dict[str, type[Policy]] = {
    "co_serve": CoServe,
    "price": Price,
    "flat_out": FlatOut,
    "inference_only": InferenceOnly,
    "finetune_only": FinetuneOnly,
    "temporal_sharing": TemporalSharing,
    "dynamic_temporal_sharing": DynamicTemporalSharing,
    "fixed_budget": FixedBudget,
}


def policy_from_name(name: str, **options) -> Policy:
    """Builds a policy.

    Raises:
        ValueError: no policy has this name, or it has no such option, or lacks one, or a value is out of range.
    """
    if name not in POLICIES:
        raise ValueError(f"policy is {name!r}; it must be one of {', '.join(POLICIES)}")
    signature = inspect.signature(POLICIES[name])
    try:
        signature.bind(**options)
    except TypeError as error:
        raise ValueError(f"policy {name!r} takes the options ({', '.join(signature.parameters)}): {error}") from error
    return POLICIES[name](**options)
