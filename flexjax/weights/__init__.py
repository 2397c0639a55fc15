"""Weights and adapters on disk: reading, writing and checking every format. Nothing here computes with a model."""
