"""What happened since the start, counted and timed, as Prometheus text; totals only, nothing about any key.

Knows nothing of requests or sockets. Source of the format: prometheus.io/docs/instrumenting/exposition_formats
"""

import bisect
import threading
from collections import defaultdict

# Upper bounds in seconds, from one step of a small model to the wait in a full queue.
BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
HELP = {
    "requests_total": "Requests answered, by route and HTTP status.",
    "refusals_total": "Requests refused or broken off, by type of error.",
    "turned_away_total": "Connections that were one too many.",
    "prompt_tokens_total": "Tokens of the prompts that were answered.",
    "completion_tokens_total": "Tokens made.",
    "cached_tokens_total": "Tokens of prompts that were not read again.",
    "running_sequences": "Sequences being read or answered now.",
    "waiting_sequences": "Sequences waiting for their turn now.",
    "cache_bytes": "Memory taken by prompts and pictures that were read.",
    "time_to_first_token_seconds": "From a request's head to its first token.",
    "inter_token_latency_seconds": "From one token of an answer to its next.",
}


class Metrics:
    """Counters and histograms by name, safe from any thread."""

    def __init__(self):
        self._lock = threading.Lock()
        self._counts: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self._times = {name: [0] * (len(BOUNDS) + 1) for name in HELP if name.endswith("_seconds")}
        self._sums = dict.fromkeys(self._times, 0.0)

    def add(self, name: str, amount: float = 1, **labels: str | int) -> None:
        # Labels are our own words, never a client's: nothing in them needs escaping.
        key = "{" + ",".join(f'{label}="{value}"' for label, value in labels.items()) + "}" if labels else ""
        with self._lock:
            self._counts[name][key] += amount

    def observe(self, name: str, seconds: float, times: int = 1) -> None:
        """Count a duration that occurred so many `times`."""
        with self._lock:
            self._times[name][bisect.bisect_left(BOUNDS, seconds)] += times
            self._sums[name] += seconds * times

    def render(self, gauges: dict[str, float]) -> bytes:
        """Everything, with `gauges` for what is measured at this moment."""
        lines = []
        with self._lock:
            for name, text in HELP.items():
                full, total = f"phi3v_{name}", 0
                kind = "histogram" if name in self._times else "gauge" if name in gauges else "counter"
                lines += [f"# HELP {full} {text}", f"# TYPE {full} {kind}"]
                for bound, count in zip((*BOUNDS, "+Inf"), self._times.get(name, ()), strict=False):
                    total += count
                    lines.append(f'{full}_bucket{{le="{bound}"}} {total}')
                if name in self._times:
                    lines += [f"{full}_sum {self._sums[name]:.9g}", f"{full}_count {total}"]
                values = {"": gauges[name]} if name in gauges else self._counts[name]
                lines += [f"{full}{labels} {value:.15g}" for labels, value in values.items()]
        return ("\n".join(lines) + "\n").encode()
