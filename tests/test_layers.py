"""The house holds: imports go downwards only, MLX stays where it may be, and nothing runs code or programs."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "phi3v"
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))
FLOORS = [
    {"errors"},
    {"keys", "tls", "request"},
    {"connection", "protocol", "images", "tokenizer", "sampling", "language", "vision"},
    {"model", "sequences"},
    {"parallel"},
    {"engine", "hub", "quantize"},
    {"llm"},
    {"server"},
    {"__init__"},
    {"terminal"},
    {"__main__"},
]
FLOOR = {module: number for number, modules in enumerate(FLOORS) for module in modules}
MLX = {"language", "vision", "sampling", "sequences", "model", "parallel", "engine", "quantize", "terminal"}
UPWARDS = {("llm", "__init__")}  # for the version
LIGHT = FLOORS[0] | FLOORS[1] | {"connection", "protocol", "server", "__init__", "terminal", "__main__"}
HEAVY = set(MODULES) - LIGHT | {"server"}  # imported by those inside functions only: `list` needs none of it
OUTSIDE = {"huggingface_hub", "mlx", "numpy", "PIL", "safetensors", "tokenizers"}
RUNS = {
    name
    for name in dir(os)
    if name.startswith(("exec", "spawn", "posix_spawn", "fork", "popen", "system", "startfile"))
}
RUNS |= set(subprocess.__all__) - {"run"}


def tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module}.py").read_text())


def imports(module: str, anywhere: bool) -> set[str]:
    """The first names of what a module imports: ours without the dot, others as they are."""
    found = set()
    nodes = ast.walk(tree(module)) if anywhere else tree(module).body
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {name if name in MODULES else "__init__" for name in names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.partition(".")[0])
    return found


def test_every_module_has_a_floor():
    assert sorted(FLOOR) == MODULES
    assert len(MODULES) <= 22


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_to_lower_floors_only(module):
    for name in imports(module, anywhere=True) & set(MODULES):
        assert FLOOR[name] < FLOOR[module] or (module, name) in UPWARDS, f"{module} imports {name}"


@pytest.mark.parametrize("module", MODULES)
def test_mlx_and_other_packages_are_imported_where_they_may_be(module):
    everything = imports(module, anywhere=True)
    foreign = everything - set(MODULES) - set(sys.stdlib_module_names)
    assert foreign <= OUTSIDE
    assert ("mlx" in everything) == (module in MLX or module == "__init__")
    if module in LIGHT:
        assert not imports(module, anywhere=False) & (OUTSIDE | HEAVY)
    assert module == "llm" or "hub" not in everything
    assert "hub" not in imports("llm", anywhere=False)  # a path has no business with it


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_evaluated_unpickled_or_run_but_openssl_and_sips(module):
    names = {node.id for node in ast.walk(tree(module)) if isinstance(node, ast.Name)}
    assert not names & {"eval", "exec", "compile", "__import__"}
    assert not imports(module, anywhere=True) & {"pickle", "marshal", "shelve", "importlib", "runpy", "code", "dill"}
    assert not imports(module, anywhere=True) & {"torch", "joblib", "transformers", "jinja2", "multiprocessing", "pty"}
    assert "trust_remote_code" not in (PACKAGE / f"{module}.py").read_text()
    assert ("subprocess" in imports(module, anywhere=True)) == (module in ("tls", "images"))
    calls = [n for n in ast.walk(tree(module)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]
    started = {c.func.attr for c in calls if getattr(c.func.value, "id", "") in ("os", "subprocess")}
    assert not started & RUNS
    loads = {ast.unparse(c.func) for c in calls if c.func.attr in ("load", "loads", "fromfile", "memmap", "genfromtxt")}
    assert loads <= {"json.loads"} | ({"mx.load"} if module == "model" else set())  # there, what safe_open has checked
    programs = [ast.unparse(c.args[0]) for c in calls if ast.unparse(c.func) == "subprocess.run"]
    run = {"tls": ["['openssl', *arguments]"], "images": ["['sips', *options]"]}
    assert programs == run.get(module, [])
