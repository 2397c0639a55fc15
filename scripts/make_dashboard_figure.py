"""Makes docs/figures/dashboard.png: the dashboard of a server that runs, as headless Chromium shows it.

    flexjax serve CONFIG                                  (with a job, and clients that ask for answers)
    python scripts/make_dashboard_figure.py [URL]         (http://127.0.0.1:8000/ if none is named)
"""

import subprocess
import sys
from pathlib import Path

FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "dashboard.png"
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1150,960", "--timeout=4000")


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/"
    subprocess.run(["chromium-headless-shell", *FLAGS, f"--screenshot={FIGURE}", url], check=True, timeout=60)


if __name__ == "__main__":
    main()
