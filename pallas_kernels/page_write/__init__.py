"""Rows and whole pages of values written into the pages of a donated pool, in place and together."""
