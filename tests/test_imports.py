"""Imports run one way: no circle among the modules, and no room reaches up."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import xclip_fast.kernels

import xclip_fast

HOMES = {"xclip_fast": Path(xclip_fast.__file__).parent, "xclip_fast.kernels": Path(xclip_fast.kernels.__file__).parent}
# What no module of a room may import, however deep in it.
FORBIDDEN = {
    "xclip_fast.kernels": ("xclip_fast",),
    "xclip_fast.nn": ("xclip_fast.model", "xclip_fast.inference", "xclip_fast.data", "xclip_fast.cli"),
    "xclip_fast.data": ("xclip_fast.model", "xclip_fast.nn", "xclip_fast.kernels", "xclip_fast.inference"),
    "xclip_fast.model": ("xclip_fast.data", "xclip_fast.train", "xclip_fast.evaluate", "xclip_fast.cli"),
    "xclip_fast.weights": ("xclip_fast.model", "xclip_fast.cli"),
    "xclip_fast.train": ("xclip_fast.cli", "xclip_fast.search"),
    "xclip_fast.evaluate": ("xclip_fast.cli", "xclip_fast.search", "xclip_fast.train"),
    "xclip_fast.export": ("xclip_fast.cli", "xclip_fast.train", "xclip_fast.evaluate", "xclip_fast.data"),
    "xclip_fast.search": ("xclip_fast.cli", "xclip_fast.train", "xclip_fast.evaluate"),
}


def modules() -> dict[str, Path]:
    found = {}
    for package, home in HOMES.items():
        for path in home.rglob("*.py"):
            parts = path.relative_to(home).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that one imports, at its top or inside functions, but not for type checkers alone."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                found.add(whole if whole in known else base)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return {each for each in found if each in known and each != name}


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(name, path, known) for name, path in known.items()}


def test_the_graph_is_seen(graph: dict[str, set[str]]) -> None:
    assert "xclip_fast.nn.vit" in graph["xclip_fast.model"]
    assert "xclip_fast.model" in graph["xclip_fast.inference.placement"]  # inside a function


def test_no_circle(graph: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("room", FORBIDDEN)
def test_no_room_reaches_up(graph: dict[str, set[str]], room: str) -> None:
    own = [name for name in graph if f"{name}.".startswith(f"{room}.")]
    assert own
    wrong = [
        f"{name} imports {other}"
        for name in own
        for other in graph[name]
        if not f"{other}.".startswith(f"{room}.") and any(f"{other}.".startswith(f"{top}.") for top in FORBIDDEN[room])
    ]
    assert not wrong


def test_the_folder_kernels_is_nobody_elses_package() -> None:
    """Started in the repository's root, transformers imports `kernels` to look for the package of that name."""
    pytest.importorskip("transformers")
    code = (
        "import sys, xclip_fast.kernels; from transformers import XCLIPModel; "
        "print(*(name for name in sys.modules if name.startswith('kernels.')))"
    )
    root = HOMES["xclip_fast.kernels"].parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert not done.stdout.split()
