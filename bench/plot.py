"""The picture of a result of bench/compare.py: python bench/plot.py RESULT.json writes RESULT.svg beside it.

Decode speed over the number of sequences and time to first token, one colour for each engine.
"""

import json
import statistics
import sys
from pathlib import Path

COLOURS = {"phi3v": "#e0542f", "mlx-lm": "#3b82c4", "mlx-vlm": "#8a63c9", "plain loop": "#8c8c8c"}
INK = "#7f7f7f"  # legible on white and on a dark page, as the background is transparent


def plot(path: Path) -> None:
    """Nothing to see, or no matplotlib: no picture, and a word about it."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed", file=sys.stderr)
        return
    matplotlib.use("svg")
    from matplotlib import pyplot

    result = json.loads(path.read_text())
    colours = {"text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK}
    with pyplot.rc_context({**colours, "font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "phi3v"}):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
        decode(left, result["rows"])
        first_tokens(right, result["rows"])
        figure.suptitle(f"{result['size']}, {result['device']}, {result['date'][:10]}", fontsize=9)
        figure.savefig(path.with_suffix(".svg"), transparent=True, metadata={"Date": None})


def decode(axes, rows: list[dict]) -> None:
    """Decode tokens/s over sequences running together, text only, both axes logarithmic."""
    from matplotlib.ticker import LogLocator

    points: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.get("n") and "decode, tok/s" in row["values"]:
            speed = statistics.median(row["values"]["decode, tok/s"])
            points.setdefault(engine(row["side"]), {}).setdefault(row["n"], speed)
    for side, speeds in points.items():
        style = "--" if side == "plain loop" else "-"
        axes.plot(*zip(*sorted(speeds.items()), strict=True), style, marker="o", color=COLOURS[side], label=side)
    counts = sorted({n for speeds in points.values() for n in speeds})
    axes.set(xlabel="sequences", ylabel="decode, tokens/s", title="text, all sequences together", yscale="log")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.yaxis.set_minor_formatter("{x:,.0f}")
    if counts:
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, counts)
        axes.legend(frameon=False)
    axes.grid(alpha=0.25)


def first_tokens(axes, rows: list[dict]) -> None:
    """Time to the first token of one request, text and picture, a bar for each engine."""
    chosen = [r for r in rows if r["section"] == "text, one sequence" and r["side"] != "plain loop"]
    chosen += [r for r in rows if (r["section"], r["case"]) == ("picture questions", "1 at once")]
    labels = []
    for place, row in enumerate(chosen):
        values = row["values"]["first token, s"]
        ms = statistics.median(values) * 1e3
        axes.barh(place, ms, color=COLOURS[engine(row["side"])])
        axes.text(ms, place, f" {ms:,.0f}" if ms >= 100 else f" {ms:.3g}", va="center")
        labels.append(f"{'picture' if 'picture' in row['section'] else row['case']}, {engine(row['side'])}")
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set(xlabel="ms", title="time to first token")
    axes.grid(alpha=0.25, axis="x")


def engine(side: str) -> str:
    return next(name for name in COLOURS if side.startswith(name))


def load_plot(path: Path) -> None:
    """The picture of bench/load.py's result: latencies over requests offered a second, a colour for each number."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    result = json.loads(path.read_text())
    colours = {"text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK}
    with pyplot.rc_context({**colours, "font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "phi3v"}):
        figure, axes = pyplot.subplots(figsize=(7, 3.8), layout="constrained")
        for side, colour in zip(result["sides"], ("#e0542f", "#3b82c4"), strict=True):
            name = f"{side['replicas']} replica{'s' * (side['replicas'] > 1)}"
            rates = [point["rate"] for point in side["points"]]
            for p, style in {"p50": "-", "p95": "--", "p99": ":"}.items():
                seconds = [point[p] for point in side["points"]]
                axes.plot(rates, seconds, style, marker=".", color=colour, label=f"{name}, {p}")
        axes.set(xlabel="requests offered a second", ylabel="seconds to the whole answer", yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.grid(alpha=0.25, which="both")
        axes.legend(frameon=False)
        axes.set_title(
            f"{result['answer']} tokens each, {result['cores']} cores for all, {result['date'][:10]}", fontsize=9
        )
        figure.savefig(path.with_suffix(".svg"), transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        plot(Path(argument))
