"""The command line. The public names of this package, one by one."""

from flexjax.cli.entry import main

__all__ = ["main"]
