"""The folders tell the way of the data: who may import whom, and what the device side is free of."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "edge_dtm"
# Imports go down this list. A folder may import itself and what stands beside its name.
ALLOWED = {
    "core": set(),
    "formats": {"core"},
    "llamacpp": {"formats", "core"},
    "report": {"llamacpp", "formats", "core"},
    "search": {"formats", "core"},
    "device": {"report", "search", "llamacpp", "formats", "core"},
    "host": {"report", "search", "llamacpp", "formats", "core"},
    "commands": {"host", "device", "search", "report", "llamacpp", "formats", "core"},
}
HOST_ONLY = {"torch", "transformers", "safetensors", "tokenizers", "matplotlib", "scipy"}


def _modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def _imports(path: Path, modules: dict[str, Path], at_import_only: bool = False) -> set[str]:
    """Modules of the package that a file imports, inside functions too unless told otherwise."""
    tree = ast.parse(path.read_text())
    found = set()
    nodes = list(ast.walk(tree))
    if at_import_only:
        inside = {
            id(child)
            for node in nodes
            if isinstance(node, ast.FunctionDef | ast.Lambda)
            for child in ast.walk(node)
        }
        nodes = [node for node in nodes if id(node) not in inside]
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in modules else node.module)
    return found & set(modules)


def test_imports_go_down_only() -> None:
    modules, wrong = _modules(), []
    for name, path in modules.items():
        folder = name.split(".")[1] if name.count(".") > 1 else ""
        if not folder:
            continue
        for other in _imports(path, modules):
            target = other.split(".")[1] if other.count(".") else ""
            if target and target != folder and target not in {*ALLOWED[folder], "data"}:
                wrong.append(f"{name} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_every_folder_is_listed() -> None:
    folders = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").is_file()}
    assert folders == {*ALLOWED, "data"}


def test_there_is_no_import_circle() -> None:
    modules = _modules()
    graph = {name: _imports(path, modules) - {name} for name, path in modules.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("folder", sorted(set(ALLOWED) - {"host", "commands"}))
def test_what_the_device_uses_imports_no_torch(folder: str) -> None:
    """In a process of its own, since the tests themselves have imported torch."""
    modules = [name for name in _modules() if name.startswith(f"edge_dtm.{folder}")]
    code = "\n".join(f"import {name}" for name in modules)
    code += "\nimport sys; print(*{name.split('.')[0] for name in sys.modules})"
    code += "\nprint(*{'.'.join(n.split('.')[:2]) for n in sys.modules if n[:9] == 'edge_dtm.'})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    external, own = (set(line.split()) for line in done.stdout.splitlines())
    # gguf itself imports sentencepiece where that is installed.
    assert not HOST_ONLY & external
    assert {name.split(".")[1] for name in own} <= {folder, *ALLOWED[folder], "data"}


def test_the_readme_lists_what_is_there() -> None:
    """Every folder of the package is in the README's tree, and nothing else."""
    text = (ROOT / "README.md").read_text().split("## Layout")[1].split("```")[1]
    entries, parents = set(), {0: ROOT}
    for line in filter(str.strip, text.splitlines()):
        depth = (len(line) - len(line.lstrip())) // 2
        names = [w.rstrip(",") for w in line.split()[:2] if w.rstrip(",").endswith(("/", ".py"))]
        if depth > 3 or not names:
            continue  # the second line of a description
        for name in names:
            path = parents[depth] / name
            assert path.exists(), f"{path.relative_to(ROOT)} is in the README only"
            entries.add(path)
            parents[depth + 1] = path
    folders = {p.parent for p in PACKAGE.rglob("__init__.py")} - {PACKAGE}
    assert folders <= entries, sorted(str(p.relative_to(ROOT)) for p in folders - entries)
    assert set((PACKAGE / "host").glob("*.py")) - entries <= {PACKAGE / "host" / "__init__.py"}
