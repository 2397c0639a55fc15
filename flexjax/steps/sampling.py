"""Sampling: from logits to the next token of every row, as vLLM defines it. It knows rows, not requests or pages.

Order: held-back ids, repetition, frequency and presence penalty, temperature, min-p, top-k, top-p, draw. Every row is
computed from its own values alone, so what a row draws depends neither on its neighbours nor on its place in the batch.
What no row asks for is left out of the program (`SamplingLevel`): a batch of greedy rows costs one argmax. A condition
on the device would make the host wait for it.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from flexjax.request import SamplingLevel

GREEDY_BELOW = 1e-5
"""Temperatures below this one take the likeliest token."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingBatch:
    """How each of R rows samples.

    Attributes:
        temperature: [R] float32, 0 is greedy.
        top_p: [R] float32 in (0, 1], 1 is off.
        min_p: [R] float32 in [0, 1], 0 is off.
        top_k: [R] int32, 0 or -1 is off.
        repetition: [R] float32 factor over prompt and output tokens, 1 is off.
        presence: [R] float32 term over output tokens, 0 is off.
        frequency: [R] float32 term per occurrence among the output tokens, 0 is off.
        seed: [R] uint32.
        position: [R] int32, index in the row's sequence of the token being sampled.
        prompt_length: [R] int32, tokens of the original prompt; those after it are output tokens.
        banned: [R, B] int32 ids that must not be sampled, -1 for none.
        active: [R] bool; what other rows hold is ignored and their token has no meaning.
    """

    temperature: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    top_k: jax.Array
    repetition: jax.Array
    presence: jax.Array
    frequency: jax.Array
    seed: jax.Array
    position: jax.Array
    prompt_length: jax.Array
    banned: jax.Array
    active: jax.Array

    @property
    def random(self) -> jax.Array:
        return self.active & (self.temperature >= GREEDY_BELOW)

    @property
    def limited_by_rank(self) -> jax.Array:
        return self.random & (self.top_k > 0)

    @property
    def limited_by_mass(self) -> jax.Array:
        return self.random & (self.top_p < 1)


def sample(logits: jax.Array, batch: SamplingBatch, history: jax.Array, level: SamplingLevel) -> jax.Array:
    """The next token of every row.

    Args:
        logits: [R, V], the model's, of any float dtype.
        history: [R, N] int32, each row's tokens by position: prompt, then output; read before ``batch.position``.
        level: static; at least what any active row needs. Which one it is beyond that makes no difference.

    Returns:
        [R] int32.
    """
    logits = logits.astype(jnp.float32)
    if level >= SamplingLevel.PENALISED:
        logits = penalised_logits(logits, batch, history)
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if level < SamplingLevel.RANDOM:
        return likeliest
    return jnp.where(batch.random, draw(logits, batch, filtered=level >= SamplingLevel.FILTERED), likeliest)


def penalised_logits(logits: jax.Array, batch: SamplingBatch, history: jax.Array) -> jax.Array:
    """Held-back ids and penalties, touching only the logits of ids that occur; no count per vocabulary entry.

    An id that occurs twice is written twice with one and the same value, computed from what stood there before.
    """
    vocabulary = logits.shape[-1]
    row = jnp.arange(logits.shape[0])[:, None]
    place = jnp.arange(history.shape[1])
    seen = jnp.where(place < batch.position[:, None], history, vocabulary)  # ids beyond the vocabulary are dropped
    output = jnp.where(place >= batch.prompt_length[:, None], seen, vocabulary)
    banned = jnp.where(batch.banned >= 0, batch.banned, vocabulary)

    logits = logits.at[row, banned].set(-jnp.inf, mode="drop")
    repetition = batch.repetition[:, None]
    held = logits.at[row, seen].get(mode="fill", fill_value=0)
    logits = logits.at[row, seen].set(jnp.where(held > 0, held / repetition, held * repetition), mode="drop")
    logits = logits.at[row, output].add(-batch.frequency[:, None], mode="drop")
    held = logits.at[row, output].get(mode="fill", fill_value=0)
    return logits.at[row, output].set(held - batch.presence[:, None], mode="drop")


def draw(logits: jax.Array, batch: SamplingBatch, *, filtered: bool) -> jax.Array:
    """A random token of every row: the largest of filtered logits plus Gumbel noise. [R, V] float32 -> [R] int32."""
    logits = logits / jnp.where(batch.random, batch.temperature, 1)[:, None]
    least = logits.max(axis=-1) + jnp.log(batch.min_p)  # probability >= min_p * largest, as logarithms
    logits = jnp.where(logits < least[:, None], -jnp.inf, logits)
    if filtered:
        logits = limit_mass(limit_rank(logits, batch), batch)
    noise = jax.vmap(lambda seed, position: gumbel_noise(seed, position, logits.shape[-1]))(batch.seed, batch.position)
    return jnp.argmax(logits + noise, axis=-1).astype(jnp.int32)


def gumbel_noise(seed: jax.Array, position: jax.Array, size: int) -> jax.Array:
    """[size] float32, a function of (seed, position) alone; the generator is named so that no setting changes it."""
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position)
    return jax.random.gumbel(key, (size,), jnp.float32)


def limit_rank(logits: jax.Array, batch: SamplingBatch) -> jax.Array:
    """Top-k: everything below the k-th largest logit to -inf; what equals it stays."""
    keys = ordered_bits(logits)
    least = greatest_bits(len(keys), lambda bits: (keys >= bits[:, None]).sum(axis=-1) >= batch.top_k)
    dropped = (keys < least[:, None]) & batch.limited_by_rank[:, None]
    return jnp.where(dropped, -jnp.inf, logits)


def limit_mass(logits: jax.Array, batch: SamplingBatch) -> jax.Array:
    """Top-p: keeps a token if the likelier ones together have less than top_p; of equals, smaller ids come first.

    An example with top_p = 0.6: of the probabilities 0.5, 0.2, 0.2, 0.1 the boundary is 0.2, which the first token of
    0.2 reaches (0.5 < 0.6), but not the second (0.7).
    """
    keys, mass = ordered_bits(logits), jax.nn.softmax(logits, axis=-1)
    mass_of = lambda kept: jnp.where(kept, mass, 0).sum(axis=-1)
    boundary = greatest_bits(len(keys), lambda bits: mass_of(keys >= bits[:, None]) >= batch.top_p)[:, None]
    above, equal = keys > boundary, keys == boundary
    likelier_equals = (jnp.cumsum(equal, axis=-1) - 1) * mass
    reached = equal & (mass_of(above)[:, None] + likelier_equals < batch.top_p[:, None])
    return jnp.where(above | reached | ~batch.limited_by_mass[:, None], logits, -jnp.inf)


def ordered_bits(values: jax.Array) -> jax.Array:
    """float32 -> uint32 in the same order: negative numbers turned over, positive ones moved above them."""
    bits = jax.lax.bitcast_convert_type(jnp.where(values == 0, 0, values), jnp.uint32)  # one zero, not two
    return jnp.where(bits >> 31, ~bits, bits | jnp.uint32(1 << 31))


def greatest_bits(rows: int, holds) -> jax.Array:
    """[R] uint32, per row the greatest number for which ``holds`` ([R] uint32 -> [R] bool, true up to some number).

    Found bit by bit, in 32 passes over the logits: exact, and several times faster than sorting a vocabulary. Zero
    where it holds nowhere.
    """

    def next_bit(index, found):
        trial = found | (jnp.uint32(1 << 31) >> index.astype(jnp.uint32))
        return jnp.where(holds(trial), trial, found)

    return jax.lax.fori_loop(0, 32, next_bit, jnp.zeros(rows, jnp.uint32))


def top_logprobs(logits: jax.Array, tokens: jax.Array, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities by the model itself, before penalties and temperature.

    Args:
        logits: [R, V], the model's.
        tokens: [R] int32, the tokens asked about.
        count: static, how many of the likeliest ids to report.

    Returns:
        Of the tokens [R] float32; the likeliest ids [R, count] int32, likeliest first; and theirs [R, count] float32.
    """
    logits = logits.astype(jnp.float32)
    normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    own = jnp.take_along_axis(logits, tokens[:, None], axis=-1) - normaliser
    values, ids = jax.lax.top_k(logits, count)
    return own[:, 0], ids.astype(jnp.int32), values - normaliser


def prompt_logprobs(logits: jax.Array, targets: jax.Array, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same of prompt tokens: logits [C, V] of C slots, targets [C] int32 the token after each slot's."""
    return top_logprobs(logits, targets, count)
