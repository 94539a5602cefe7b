"""`bench`: that its rows are there, that what is counted is what was asked for, and that its figures are its times'."""

import json
import re
import shutil
import sys
from functools import partial
from itertools import count

import pytest

from phi3v import __version__, open_llm, quantize, terminal
from phi3v.__main__ import main
from phi3v.llm import DEMO

ROWS = {  # name: unit, tokens, those kept
    "loading": ("ms", None, None),
    "weights": ("MB", None, None),
    "memory, loaded": ("MB", None, None),
    "memory, peak while loading": ("MB", None, None),
    "vision tower, 5 crops": ("ms", 757, None),
    "prefill, 64 tokens": ("tok/s", 64, None),
    "prefill, 1,199 tokens": ("tok/s", 1199, None),
    "first question, 0 of 778 tokens kept": ("ms", 778, 0),
    "second question, 764 of 776 tokens kept": ("ms", 776, 764),
    "next turn's question, 776 of 798 tokens kept": ("ms", 798, 776),
    "decode, 1 at once": ("tok/s", 32, None),
    "decode, 1 at once: from token to token": ("ms", None, None),
    "decode, 3 at once": ("tok/s", 96, None),
    "decode, 3 at once: from token to token": ("ms", None, None),
    "memory, peak of all this": ("MB", None, None),
}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """One round of everything, and little room: prompts and batches have to be cut to it."""
    monkeypatch.setattr(terminal, "SECONDS", 0)
    monkeypatch.setattr(terminal, "PREFILL", (64, 2048, 4096))
    monkeypatch.setattr(terminal, "open_llm", partial(open_llm, max_context=1200, max_batch=3))


@pytest.fixture
def times(monkeypatch):
    """A clock that half a second passes on between two looks, and tokens every two seconds, each answer's one later."""
    looks = count(0, 0.5)
    monkeypatch.setattr(terminal, "perf_counter", lambda: next(looks))
    made = lambda llm, rng, count, length, new: [[k + 2.0 * i for i in range(new)] for k in range(count)]  # noqa: E731
    monkeypatch.setattr(terminal, "_run", made)


def test_each_row_has_the_tokens_that_were_asked_for_and_those_that_were_kept(capsys):
    assert main(["bench", "--model", "demo", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (out.count("\n"), err) == (1, "")
    rows = found.pop("rows")
    assert {row["name"]: (row["unit"], row.get("tokens"), row.get("cached_tokens")) for row in rows} == ROWS
    assert len(rows) == len(ROWS) and all(row["value"] > 0 and row["rounds"] == 1 for row in rows)
    size = {row["name"]: row["value"] for row in rows if row["unit"] == "MB"}
    weights = sum(path.stat().st_size for path in DEMO.glob("*.safetensors")) / 1e6
    assert weights < size["weights"] < 2.2 * weights  # on a CPU float32 of the file's bfloat16
    assert size["weights"] <= size["memory, loaded"] <= size["memory, peak while loading"]
    assert size["memory, peak of all this"] > size["memory, loaded"]
    assert found["phi3v"] == __version__ and found["model"] == f"demo-{__version__}"
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["weights"] in ("float32", "bfloat16") and found["memory_gb"] > 0 and found["cores"] > 0
    assert all(found[name] for name in ("device", "system", "mlx", "blas"))


def test_figures_are_those_of_the_times(times):
    rows = {row["name"]: row["value"] for row in terminal.measure("demo")["rows"]}
    assert rows["loading"] == rows["vision tower, 5 crops"] == 500
    assert rows["first question, 0 of 778 tokens kept"] == rows["next turn's question, 776 of 798 tokens kept"] == 500
    assert (rows["prefill, 64 tokens"], rows["prefill, 1,199 tokens"]) == (128, 2398)
    assert (rows["decode, 1 at once"], rows["decode, 3 at once"]) == (0.5, 1.5)
    assert rows["decode, 3 at once: from token to token"] == 2000


@pytest.mark.parametrize("seconds, rounds", [(0.5, 0), (0.6, 3), (3, 6), (100, 9)])
def test_a_case_has_as_many_rounds_as_fit_the_time_behind_one_that_warms_up(times, monkeypatch, seconds, rounds):
    monkeypatch.setattr(terminal, "SECONDS", seconds)
    found = terminal._repeat("a case", partial(next, made := count()))
    assert found == ([(0.5, k + 1) for k in range(rounds)] or [(0.5, 0)])
    assert next(made) == rounds + 1


def test_the_table_is_markdown_of_a_hundred_columns_that_begins_with_what_ran(times, capsys):
    assert main(["bench", "--model", "demo"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert re.fullmatch(rf"phi3v {__version__} · demo-{__version__} · (float32|bfloat16)", lines[0])
    assert re.fullmatch(r".+ (CPU|GPU), \d+ cores, [\d.]+ GB · .+", lines[1])
    assert re.fullmatch(r"Python [\d.]+ · MLX \S+ · BLAS .+", lines[2])
    table = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")][1:]
    assert [name for name, *_ in table] == [*ROWS]
    assert ["prefill, 1,199 tokens", "2,398 tok/s", "1"] in table and ["decode, 3 at once", "1.5 tok/s", "1"] in table


def test_a_terminal_is_told_what_is_under_way_and_its_line_is_cleared(times, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    terminal.measure("demo")
    shown = capsys.readouterr().err
    for case in ("vision tower", "prefill, 64 tokens", "questions about a picture", "decode, 3 at once"):
        assert f"\r{case} …" in shown
    assert shown.endswith("\r\x1b[K")


def test_quantised_weights_are_named_by_their_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(terminal, "_rows", lambda *_: [])
    quantize.quantize(DEMO, tmp_path / "demo-4bit", 4, 32, False)
    found = terminal.measure(str(tmp_path / "demo-4bit"))
    assert found["model"] == "demo-4bit" and re.fullmatch("4 bits, (float32|bfloat16)", found["weights"])


@pytest.mark.parametrize("broken", ["absent", "cut", "adapter"])
def test_what_cannot_be_measured_is_one_line(tmp_path, capsys, broken):
    folder, options = tmp_path / "model", []
    if broken == "cut":
        shutil.copytree(DEMO, folder)
        weights = next(folder.glob("*.safetensors"))
        weights.write_bytes(weights.read_bytes()[:-1])
    if broken == "adapter":
        folder, options = "demo", ["--adapter", str(tmp_path)]
    assert main(["bench", "--model", str(folder), *options]) == 1
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"phi3v: [^\n]+\n", err)
    assert {"absent": "there is no folder", "cut": "is not a whole safetensors", "adapter": "no adapter"}[broken] in err
