"""The sampling step: from the logits of a forward step to every sampled row's next token, its next input.

    (rows, logits, packed batch) -> (rows, output)
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from flexjax.request import MAX_LOGPROBS, SamplingLevel
from flexjax.state import RowState
from flexjax.step_batch import sampling_fields, unpack
from flexjax.steps.sampling import SamplingBatch, sample, top_logprobs


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingOutput:
    """What the host reads; never donated.

    Attributes:
        tokens: [rows] int32, the sampled token of each sampled row.
        logprobs: (token's own [rows], ids [rows, 20], values [rows, 20]), raw, if asked for.
    """

    tokens: jax.Array
    logprobs: tuple | None = None


def sample_rows(
    count: int, level: SamplingLevel, logprobs: bool, rows: RowState, logits: jax.Array, packed: jax.Array
) -> tuple[RowState, SamplingOutput]:
    """Sample the first ``count`` rows that ask for it. logits [count, vocabulary], packed as `sampling_fields` says."""
    batch = unpack(packed, sampling_fields(count))
    sampled = batch.sampled > 0
    options = SamplingBatch(**{name: getattr(batch, name) for name in OPTIONS}, active=sampled)
    tokens = sample(logits, options, rows.history[:count], level)
    # .at[:count].set, where that is all of them, crashes XLA inside shard_map (jaxlib 0.11.2)
    newest = jnp.where(sampled, tokens, rows.last_token[:count])
    last = jax.lax.dynamic_update_slice_in_dim(rows.last_token, newest, 0, axis=0)
    seat = jnp.where(sampled, jnp.arange(count, dtype=jnp.int32), rows.history.shape[0])
    history = rows.history.at[seat, batch.position].set(tokens, mode="drop")
    output = SamplingOutput(tokens, top_logprobs(logits, tokens, MAX_LOGPROBS) if logprobs else None)
    return RowState(last_token=last, history=history), output


OPTIONS = (
    *("temperature", "top_p", "min_p", "top_k", "repetition", "presence"),
    *("frequency", "seed", "position", "prompt_length", "banned"),
)
