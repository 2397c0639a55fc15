"""Draw the figures of the documentation from a report that a run wrote.

    flexjax demo configs/demo.toml                                 writes runs/demo/report.json
    python scripts/make_figures.py docs/figures/demo_report.json   draws beside the report
"""

import argparse
import json
from pathlib import Path

from flexjax.bench.plots import plot_iterations, plot_losses
from flexjax.bench.report import read_records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="JSON report of a run")
    path = parser.parse_args().report
    report = json.loads(path.read_text())
    validation = [(point["step"], point["loss"]) for point in report["validation"]]
    plot_losses(path.with_name("demo_loss.png"), report["losses"], validation)
    plot_iterations(path.with_name("demo_iterations.png"), read_records(report), report["objective_seconds"])


if __name__ == "__main__":
    main()
