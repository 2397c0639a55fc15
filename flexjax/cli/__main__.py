"""``python -m flexjax.cli`` is ``flexjax``."""

import sys

from flexjax.cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
