"""The house stands as its plan says: no circles, arrows in one direction, one idea in a module."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fairseq_deq"
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")
}
# What a room may import of the others; every room may use what stands at the top of the package.
ROOMS = {
    "solvers": set(),
    "layers": {"solvers"},
    "models": {"solvers", "layers", "generation"},
    "tasks": {"solvers", "layers", "models", "generation", "patches"},
    "criterions": {"solvers", "layers", "models"},
    "optim": set(),
    "generation": {"patches"},
    "export": set(),
}
# What someone with a model of another kind uses alone.
BARE = ("solvers", "implicit", "adjoint", "equilibrium", "jacobian", "held", "invariant_matmul")


def _imports(name: str, everywhere: bool = False) -> Iterator[str]:
    """Modules of the package that a module imports when it is imported itself, or `everywhere` in it."""
    package = name.removesuffix(".__init__") if name.endswith("__init__") else name.rpartition(".")[0]
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if everywhere else _at_import(tree)
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                for found in (f"{source}.{alias.name}", f"{source}.{alias.name}.__init__", source):
                    if found in MODULES:
                        yield found
                        break
                else:
                    if f"{source}.__init__" in MODULES:
                        yield f"{source}.__init__"
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)


def _at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """Statements that run when the module is imported, and those that a type checker reads."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield node
            yield from _at_import(node)


def test_no_module_imports_itself_over_others():
    graph = {name: set(_imports(name)) - {name} for name in MODULES}
    circle = []
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            circle.append(" -> ".join([*path[path.index(name) :], name]))
        elif name not in done:
            for other in sorted(graph[name]):
                visit(other, [*path, name])
            done.add(name)

    for name in sorted(graph):
        visit(name, [])
    assert not circle


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_those_below_it(room):
    found = set()
    for name in MODULES:
        if name.startswith(f"fairseq_deq.{room}."):
            for other in _imports(name, everywhere=True):
                parts = other.split(".")
                if len(parts) > 2 and parts[1] not in (room, *ROOMS[room]):
                    found.add(f"{name} -> {other}")
    assert not found


def test_solvers_and_gradients_know_torch_alone():
    for name in MODULES:
        if name.split(".")[1] in BARE:
            text = MODULES[name].read_text(encoding="utf-8")
            assert "import fairseq\n" not in text, name
            assert "from fairseq" not in text, name
            for other in _imports(name, everywhere=True):
                assert other.split(".")[1] in BARE, f"{name} -> {other}"


def test_no_module_is_longer_than_320_lines():
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert not {name: n for name, n in lines.items() if n > 320}


def test_nobody_outside_of_a_family_asks_which_it_is():
    for name, path in MODULES.items():
        if not name.startswith("fairseq_deq.layers."):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
                    "isinstance",
                    "issubclass",
                ):
                    kinds = ast.unparse(node.args[1])
                    assert "Transformer" not in kinds, name
                    assert "Trellis" not in kinds, name


def test_every_file_that_the_page_of_the_house_names_is_there():
    page = (PACKAGE / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r"`((?:\w+/)*\w+\.py)`", page):
        assert list(PACKAGE.rglob(name)) or (PACKAGE.parent / name).is_file(), name
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert rooms <= set(re.findall(r"`(\w+)/`", page))
