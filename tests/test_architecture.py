"""The import rules of the architecture: data flows one way, and the core knows no engine."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("brstnet", "sweeps", "dashboards", "clusters")
ENGINES = ("ray", "mlflow", "optuna")
LEVEL = {
    "brstnet.config": 0,
    "brstnet.metrics": 0,
    "brstnet.launch": 0,
    "brstnet.page": 0,
    "brstnet.data": 1,
    "brstnet.training": 2,
    "brstnet.evaluation": 3,
    "brstnet.__main__": 4,
    "sweeps": 5,
    "dashboards": 5,
    "clusters": 6,
}


def modules() -> dict[str, Path]:
    files = [p for top in ROOMS for p in (ROOT / top).rglob("*.py")]
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in files}
    return {name.removesuffix(".__init__"): path for name, path in names.items()}


def imports(path: Path) -> set[str]:
    """Every module a file imports, at any depth; `from a import b` counts as a.b too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {str(node.module)} | {f"{node.module}.{a.name}" for a in node.names}
    return found


def level(name: str) -> int:
    return max((LEVEL[room] for room in LEVEL if f"{name}.".startswith(f"{room}.")), default=0)


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_flow_one_way(name: str) -> None:
    known = set(modules())
    for other in imports(modules()[name]) & known:
        assert level(other) <= level(name), f"{name} imports {other}, which comes after it"
        if "dashboards" in (name.split(".")[0], other.split(".")[0]):
            assert "sweeps" not in (name.split(".")[0], other.split(".")[0])


def test_no_cycle_between_modules() -> None:
    known = modules()
    edges = {name: (imports(path) & set(known)) - {name} for name, path in known.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for other in edges[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in known:
        visit(name, ())


@pytest.mark.parametrize("name", [n for n in sorted(modules()) if n.startswith("brstnet")])
def test_core_names_no_engine(name: str) -> None:
    assert not {i.split(".")[0] for i in imports(modules()[name])} & set(ENGINES)


def test_core_runs_without_engines() -> None:
    """Import all of brstnet in a process where the engines cannot be imported."""
    core = [name for name in modules() if name.startswith("brstnet")]
    code = f"import sys; sys.modules.update(dict.fromkeys({ENGINES}))\n"
    code += "\n".join(f"import {name}" for name in core if not name.endswith("__main__"))
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


def test_package_files_hold_only_a_docstring() -> None:
    for path in ROOT.glob("brstnet/**/__init__.py"):
        body = ast.parse(path.read_text()).body
        allowed = 2 if path.parent.name == "brstnet" else 1  # the version, at the top
        assert len(body) <= allowed, path
