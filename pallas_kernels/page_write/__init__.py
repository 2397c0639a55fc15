"""Rows of values written into the pages of a donated pool, in place."""
