"""Pages of the documentation that are made from results: numbers, tables, and the places where these stand."""

import re
from collections.abc import Mapping


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
