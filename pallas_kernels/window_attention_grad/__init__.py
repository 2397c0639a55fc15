"""Gradient of causal attention for a window of packed sequences whose K/V rows are in pages."""
