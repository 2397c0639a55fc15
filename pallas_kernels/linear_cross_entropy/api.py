"""``linear_cross_entropy`` as callers use it: arguments checked, implementation named."""

from types import MappingProxyType

from pallas_kernels.implementations import choose
from pallas_kernels.linear_cross_entropy import reference

IMPLEMENTATIONS = MappingProxyType({"reference": reference.linear_cross_entropy})


def linear_cross_entropy(
    hidden, head, targets, *, chunk: int, transposed: bool = False, implementation: str = "reference"
):
    """Cross-entropy of every token under a frozen head, and its gradient with respect to the hidden state.

    Args:
        hidden: [tokens, d].
        head: [d, vocabulary]; with ``transposed`` [vocabulary, d], as tied embeddings are stored.
        targets: [tokens] int32, below the vocabulary; negative for a token that has no target.
        chunk: columns of the vocabulary taken at a time. The largest temporary is [tokens, chunk] float32; the
            vocabulary need not be a multiple of it, and the head is not copied as a whole.

    Returns:
        loss: [tokens] float32, -log softmax(hidden head)[target] in natural logarithm.
        d_hidden: [tokens, d] float32, d loss[t] / d hidden[t]; to be multiplied by each token's cotangent.
        Both are exactly 0 for tokens without a target.

    Raises:
        ValueError: shapes that do not fit together, a chunk below 1, or an unknown implementation.
    """
    d = head.shape[1 if transposed else 0]
    if hidden.shape[1] != d:
        raise ValueError(f"linear_cross_entropy: hidden has {hidden.shape[1]} values a token, the head takes {d}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"linear_cross_entropy: targets of shape {targets.shape} for {hidden.shape[0]} tokens")
    if chunk < 1:
        raise ValueError(f"linear_cross_entropy: chunk is {chunk}; at least 1 column is needed")
    run = choose("linear_cross_entropy", IMPLEMENTATIONS, implementation)
    return run(hidden, head, targets, chunk=chunk, transposed=transposed)
