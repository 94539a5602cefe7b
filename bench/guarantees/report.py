"""What was measured, as lines: a target, a figure and whether it holds; and these lines as Markdown."""

from dataclasses import dataclass

HEAD = ("line", "what", "target", "measured", "holds", "note")


class NotRun(Exception):
    """A measurement could not be made here; says what it needs. Never taken for a line that holds."""


@dataclass
class Line:
    """`line` is its name in SECURITY.md, such as C12; `holds` is None where it was not run."""

    line: str
    what: str
    target: str
    measured: str
    holds: bool | None
    note: str = ""

    def row(self) -> str:
        verdict = {True: "yes", False: "**no**", None: "not run"}[self.holds]
        cells = self.line, self.what, self.target, self.measured, verdict, self.note
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def at_most(line: str, what: str, measured: float, limit: float, unit: str = "", note: str = "") -> Line:
    return Line(
        line, what, f"≤ {number(limit)} {unit}".strip(), f"{number(measured)} {unit}".strip(), measured <= limit, note
    )


def at_least(line: str, what: str, measured: float, limit: float, unit: str = "", note: str = "") -> Line:
    return Line(
        line, what, f"≥ {number(limit)} {unit}".strip(), f"{number(measured)} {unit}".strip(), measured >= limit, note
    )


def is_true(line: str, what: str, holds: bool, measured: str, note: str = "") -> Line:
    return Line(line, what, "always", measured, bool(holds), note)


def none_of(line: str, what: str, found: list[str], note: str = "") -> Line:
    """A line that holds when nothing was found; what was found stands in the note."""
    some = ", ".join(found[:6]) + (" …" if len(found) > 6 else "")
    return Line(line, what, "0", str(len(found)), not found, "; ".join(filter(None, (some, note))))


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def table(lines: list[Line]) -> str:
    return "\n".join([f"| {' | '.join(HEAD)} |", "|" + " --- |" * len(HEAD), *(line.row() for line in lines)]) + "\n"
