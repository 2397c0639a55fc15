"""The version of flexjax: the one place where it is written. It imports nothing, so that a build can read it."""

__version__ = "0.1.0"
