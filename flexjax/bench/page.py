"""Pages of the documentation that are made from results: numbers, tables, and the places where these stand."""

import re
from collections.abc import Mapping
from pathlib import Path


def number(value: float | None) -> str:
    """Three digits, thousands with commas: 0.883, 12.4, 41,230."""
    if value is None:
        return ""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def table(header: str, rows: list[list[str]]) -> str:
    """Markdown; the names of the columns are separated by ``|``."""
    columns = header.split("|")
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.strip() for cell in line)} |" for line in lines)


def origin(found: Mapping) -> str:
    """Of a file of results: the device, versions and commit, as `flexjax.bench.measurement.device_facts` has them."""
    versions = ", ".join(f"{part} {version}" for part, version in found["versions"].items())
    return f"{found['device']}; {versions}; commit {found['commit'] or 'unknown'}."


def fill(path: Path, made: Mapping[str, str]) -> None:
    """Write each text into its place on a page; the rest of the page stays. Raises as `filled`."""
    path.write_text(filled(path.read_text(encoding="utf-8"), made), encoding="utf-8")


def outdated(path: Path, made: Mapping[str, str]) -> list[str]:
    """Names of the places of a page where something else stands than was made. Raises as `filled`."""
    page = path.read_text(encoding="utf-8")
    return [name for name, text in made.items() if filled(page, {name: text}) != page]


def filled(page: str, made: Mapping[str, str]) -> str:
    """The page with each text in its place, between <!-- begin NAME --> and <!-- end NAME -->.

    Raises:
        ValueError: the page has no place for one of them.
    """
    for name, text in made.items():
        place = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        found = place.search(page)
        if not found:
            raise ValueError(f"the page has no <!-- begin {name} --> ... <!-- end {name} -->")
        page = f"{page[: found.end(1)]}{text}\n{page[found.start(2) :]}"
    return page
