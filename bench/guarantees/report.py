"""What was measured, as lines: a target, a figure and whether it holds; and these lines as Markdown."""

import re
from dataclasses import dataclass

HEAD = ("line", "what", "target", "measured", "holds", "note")


class NotRun(Exception):
    """A measurement could not be made here; says what it needs. Never taken for a line that holds."""


@dataclass
class Line:
    """`line` is its name in SECURITY.md, such as C12; `holds` is None where it was not run, or has no target."""

    line: str
    what: str
    target: str
    measured: str
    holds: bool | None
    note: str = ""

    def row(self) -> str:
        verdict = {True: "yes", False: "**no**", None: "–" if self.measured else "not run"}[self.holds]
        cells = self.line, self.what, self.target, self.measured, verdict, self.note
        return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"

    def brief(self) -> str:
        """For the table of SECURITY.md, which has a cell for all lines of a name."""
        if self.holds is None:
            return f"{self.what}: {self.measured or 'not run'}"
        return f"{self.what}: {self.measured} ({self.target})" + ("" if self.holds else " **does not hold**")


def at_most(line: str, what: str, measured: float, limit: float, unit: str = "", note: str = "") -> Line:
    return Line(
        line, what, f"≤ {number(limit)} {unit}".strip(), f"{number(measured)} {unit}".strip(), measured <= limit, note
    )


def at_least(line: str, what: str, measured: float, limit: float, unit: str = "", note: str = "") -> Line:
    return Line(
        line, what, f"≥ {number(limit)} {unit}".strip(), f"{number(measured)} {unit}".strip(), measured >= limit, note
    )


def is_true(line: str, what: str, holds: bool, measured: str = "", note: str = "") -> Line:
    return Line(line, what, "yes", measured or ("yes" if holds else "no"), bool(holds), note)


def none_of(line: str, what: str, found: list[str], note: str = "") -> Line:
    """A line that holds when nothing was found; what was found stands in the note."""
    some = ", ".join(found[:6]) + (" …" if len(found) > 6 else "")
    return Line(line, what, "0", str(len(found)), not found, "; ".join(filter(None, (some, note))))


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def table(lines: list[Line]) -> str:
    return "\n".join([f"| {' | '.join(HEAD)} |", "|" + " --- |" * len(HEAD), *(line.row() for line in lines)]) + "\n"


def lines_of(results: dict) -> list[Line]:
    return [Line(**line) for part in results["parts"].values() for line in part["lines"]]


def in_security(text: str, results: dict) -> str:
    """SECURITY.md with its table's third column, and the sentence above the table, as `results` say."""
    lines = lines_of(results)

    def row(found: re.Match) -> str:
        cell = "; ".join(line.brief() for line in lines if line.line == found[1])
        return f"| {found[1]} | {found[2]} | {cell or '–'} |"

    text = re.sub(r"^\| ([A-F]\d+) \| ([^|]+) \|[^|]*\|", row, text, flags=re.M)
    return re.sub(r"^Measured .*$", f"Measured {machine(results)}", text, flags=re.M)


def machine(results: dict) -> str:
    """When, how and where."""
    it = results
    where = f"{it['machine']}, {it['cores']} cores that client and server share"
    return f"{it['date'][:10]} with `{it['command']}`: {where}; Python {it['python']}, {it['openssl']}."
