"""Low-rank activations times B added to gate and up, and the activation of both, in one pass over the product."""
