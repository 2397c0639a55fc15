"""Makes docs/figures/dashboard.png: the dashboard of a server that runs, as headless Chromium shows it.

    flexjax serve CONFIG                                  (with a job, and clients that ask for answers)
    python scripts/make_dashboard_figure.py [URL]         (http://127.0.0.1:8000/ if none is named)
"""

import subprocess
import sys
from pathlib import Path

FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "dashboard.png"
SIZE, LIVE_MS = "1150,1080", 2500
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={SIZE}")


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/"
    command = ["chromium-headless-shell", *FLAGS, f"--virtual-time-budget={LIVE_MS}", f"--screenshot={FIGURE}", url]
    subprocess.run(command, check=True, timeout=60)


if __name__ == "__main__":
    main()
