"""The loss curve of a training run as a picture: python demo/curve.py OUT/log.jsonl demo/training.svg."""

import json
import math
import sys
from pathlib import Path

WIDTH, HEIGHT, LEFT, BOTTOM = 720, 360, 60, 40
LOWEST, HIGHEST = -3, 1  # powers of ten
LINES = {"one": "#1f6fb4", "two": "#2ca02c", "text": "#d62728"}


def main(log: str, picture: str) -> None:
    rows = [json.loads(line) for line in Path(log).read_text().splitlines()]
    end = max(row["s"] for row in rows)

    def at(seconds: float, loss: float) -> str:
        high = (math.log10(max(loss, 10**LOWEST)) - LOWEST) / (HIGHEST - LOWEST)
        return f"{LEFT + (WIDTH - LEFT - 10) * seconds / end:.1f},{HEIGHT - BOTTOM - (HEIGHT - BOTTOM - 10) * high:.1f}"

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">']
    out.append(f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>')
    for power in range(LOWEST, HIGHEST + 1):
        x, y = at(0, 10**power).split(",")
        out.append(
            f'<path d="M{x} {y}H{WIDTH - 10}" stroke="#ccc"/><text x="8" y="{y}" font-size="12">{10**power:g}</text>'
        )
    for k, (name, color) in enumerate(LINES.items()):
        points = " ".join(at(row["s"], row[name][0]) for row in rows if name in row)
        out.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        label = {"one": "one picture", "two": "two pictures", "text": "text alone"}[name]
        out.append(f'<text x="{WIDTH - 150}" y="{30 + 18 * k}" font-size="13" fill="{color}">{label}</text>')
    for minute in range(0, int(end) // 60 + 1, 2):
        x, y = at(60 * minute, 10**LOWEST).split(",")
        out.append(f'<text x="{x}" y="{HEIGHT - 20}" font-size="12" text-anchor="middle">{minute}</text>')
    out.append(
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 4}" font-size="12">minutes · cross-entropy per answer token</text></svg>'
    )
    Path(picture).write_text("\n".join(out) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
