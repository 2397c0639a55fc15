"""Low-rank updates of many adapters in one batch, and the gradients of one adapter."""
