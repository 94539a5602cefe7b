"""What README and the files around the package say is what the code has."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from phi3v import __main__ as cli
from phi3v import tls

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_readme_is_short_and_its_file_tree_is_complete():
    assert len(README.splitlines()) <= 150
    listed = re.findall(r"^phi3v/(\w+)\.py +\S", README, re.M)
    assert sorted(listed) == sorted(path.stem for path in (ROOT / "phi3v").glob("*.py"))


def test_readme_and_command_line_name_the_same_commands_and_options():
    parser = cli._parser()
    commands = next(action for action in parser._actions if action.choices).choices
    shown = set(re.findall(r"(?:^\$ |`|python -m )(?:\S+=\S+ )?phi3v (\w+)", README, re.M)) - {"COMMAND"}
    by_key = set(re.findall(r"`(\w+) --key ", README))
    assert by_key == {"update", "rotate", "delete"} and shown == set(commands) - by_key
    flags = {flag for sub in commands.values() for action in sub._actions for flag in action.option_strings}
    elsewhere = {"--cacert"}  # curl's
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) - elsewhere <= flags


def test_every_promise_of_security_stands_in_its_place_and_names_tests_that_exist():
    text = (ROOT / "SECURITY.md").read_text()
    assert len(text.splitlines()) <= 120
    rows = re.findall(r"^\| [A-F](\d+) \|[^|]+\|[^|]+\| ([^|]+) \|$", text, re.M)
    assert [int(number) for number, _ in rows] == list(range(1, 33))
    named = [test for _, tests in rows for test in re.findall(r"(test_\w+): ([^;|]*[^;| ])", tests)]
    for file, sentence in named:
        assert f"def test_{sentence.replace(' ', '_')}(" in (ROOT / "tests" / f"{file}.py").read_text()
    assert len(named) >= 20
    parts = re.findall(r'^    "([\w-]+)": \(', (ROOT / "bench" / "guarantees" / "run.py").read_text(), re.M)
    shown = re.findall(r"guarantees: ([\w, -]+?) \|$", text, re.M)
    assert set(", ".join(shown).split(", ")) == set(parts)


def test_the_lines_that_make_a_certificate_trusted_are_those_that_serve_prints():
    rows = dict(re.findall(r"^\| ([^|]+) \| `(.+)` \|$", (ROOT / "docs" / "certificate.md").read_text(), re.M))
    assert {where: rows[where] for where in tls.TRUST} == {w: t.format("server.crt") for w, t in tls.TRUST.items()}


def test_run_time_dependencies_are_those_of_the_card_and_what_these_bring_and_we_import():
    names = sorted(re.match(r"[\w-]+", need)[0] for need in PROJECT["dependencies"])
    assert names == ["huggingface_hub", "mlx", "mlx-lm", "numpy", "pillow", "safetensors", "tokenizers", "transformers"]
    assert PROJECT["requires-python"] == ">=3.12.3"
    assert PROJECT["optional-dependencies"] == {e: [f"mlx[{e}]"] for e in ("cpu", "cuda12", "cuda13")}


@pytest.mark.parametrize("versions, found", [({"python3.13": "3.13.0"}, "python3.13"), ({"python3": "3.12.1"}, None)])
def test_make_finds_a_python_or_says_how_to_get_one(tmp_path, versions, found):
    """With stand-ins for every interpreter on PATH: each knows its version, and reports being asked for a venv."""
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    (tmp_path / "pyproject.toml").touch()
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("python3.13", "python3.12", "python3.14", "python3", "python"):
        recent = versions.get(name, "0") >= "3.12.3"
        script = f'[ "$1" = -c ] && exit {int(not recent)}; echo "{name} was asked for $2 $3"; exit 1\n'
        (programs / name).write_text("#!/bin/sh\n" + script)
        (programs / name).chmod(0o755)
    done = subprocess.run(
        ["make", "serve"], cwd=tmp_path, env={"PATH": f"{programs}:/usr/bin:/bin"}, capture_output=True, text=True
    )
    assert done.returncode != 0
    if found:
        assert f"{found} was asked for venv .venv" in done.stdout and "apt install python3-venv" in done.stdout
    else:
        assert "needs Python 3.12.3 or newer" in done.stdout
