"""The shape of the code, as ARCHITECTURE.md draws it: who imports whom, who may fork, how big a module may be."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "agentos"

MAY_IMPORT = {
    "errors": set(),
    "printing": set(),
    "model": {"network", "printing", "errors"},
    "linux": set(),
    "network": {"linux", "errors"},
    "guest": set(),
    "nested": set(),
    "machine": {"linux", "nested", "network", "model", "errors"},
    "host": {"machine", "network", "model", "errors"},
    "background": set(),
    "sync": {"background", "client", "host", "machine", "model", "nested", "network"},
    "wire": {"model", "errors"},
    "arguments": {"wire", "model", "errors"},
    "conversions": {"model", "errors"},
    "actions": {"arguments", "conversions", "host", "machine", "model", "errors"},
    "store": {"wire", "model", "errors"},
    "streams": {"machine", "model", "errors"},
    "actor": {"streams", "store", "actions", "conversions", "wire", "host", "machine", "model", "errors"},
    "actors": {"actor", "store", "wire", "host", "model", "errors"},
    "registry": {"actor", "actors", "server", "store", "host", "model", "network", "errors"},
    "server": {
        "streams",
        "",
        "network",
        "actor",
        "actors",
        "actions",
        "store",
        "conversions",
        "wire",
        "registry",
        "host",
        "machine",
        "model",
        "printing",
        "errors",
    },
    "client": {"wire", "actions", "background", "conversions", "model", "nested", "errors"},
    "": {"client", "errors", "host", "machine", "model", "network", "registry"},
    "commands": {
        "",
        "actions",
        "actors",
        "client",
        "conversions",
        "errors",
        "host",
        "machine",
        "model",
        "printing",
        "registry",
        "server",
        "store",
        "wire",
    },
    "cli": {"", "commands", "errors"},
    "__main__": {"cli"},
}
"""Layer -> the layers that it may import, besides itself. "" is the package's own __init__: the public names."""

UPWARD = {("machine/vm.py", "agentos.host")}
"""VM() without a host takes the process's default one, found when it starts."""

INSIDE_A_VM = {
    "zygote", "forks", "start", "seed", "init", "boot", "spawner", "connector", "confinement", "template", "identity",
    "channel", "fileserver", "filetree", "filetarget", "image", "jobwire", "lookup", "outlets", "reserve", "shared",
    "zygote_vm",
}  # fmt: skip
"""Modules of `machine` that the zygote and every VM's init carry: each import costs time and memory in every VM."""
STANDARD_INSIDE = {
    "__future__", "array", "collections", "collections.abc", "contextlib", "ctypes", "errno", "fcntl", "gc",
    "importlib", "json", "marshal", "os", "resource", "select", "shutil", "signal", "socket", "stat", "struct", "sys",
    "termios", "time", "types", "typing",
}  # fmt: skip
MAY_FORK = {
    "machine/seed.py", "machine/boot.py", "machine/zygote.py", "machine/identity.py", "machine/confinement.py",
    "machine/reserve.py",
    "machine/probes.py",
}  # fmt: skip
MOST_LINES = 400
LONGER = {
    "sync.py": "generated",
    "client/sync.py": "generated",
    "machine/link.py": "all that init is asked for, and tells",
    "model.py": "values only",
    "actor.py": "one actor's whole life: its steps share its state",
}


def modules() -> dict[str, ast.Module]:
    """Path below the package -> its tree."""
    return {
        str(path.relative_to(SOURCE)): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(SOURCE.rglob("*.py"))
    }


MODULES = modules()


def dotted(path: str) -> str:
    """machine/vm.py -> agentos.machine.vm; a package's __init__ -> the package."""
    name = "agentos." + path.removesuffix(".py").replace("/", ".")
    return name.removesuffix(".__init__")


NAMES = {dotted(path): path for path in MODULES}


def layer(name: str) -> str:
    """agentos.machine.vm -> machine; agentos -> ''."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else ""


def imports(tree: ast.AST, *, at_start: bool = False) -> set[str]:
    """The modules that are imported, those for type checkers left out; `at_start`: not those inside functions."""
    found: set[str] = set()
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if at_start and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            assert node.module
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in NAMES else node.module)
        pending += ast.iter_child_nodes(node)
    return found


@pytest.mark.parametrize("path", MODULES)
def test_imports_point_one_way(path: str) -> None:
    """A module imports only what the layers below it offer."""
    own = layer(dotted(path))
    assert own in MAY_IMPORT, f"{path}: say in MAY_IMPORT where the layer {own!r} stands"
    for name in imports(MODULES[path]):
        if name.split(".")[0] == "agentos" and (path, name) not in UPWARD:
            assert layer(name) in {own, *MAY_IMPORT[own]}, f"{path} imports {name}"


def test_no_module_imports_itself_in_a_circle() -> None:
    """What is imported at the start of modules has an order."""
    graph = {name: imports(MODULES[path], at_start=True) & set(NAMES) for name, path in NAMES.items()}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way[way.index(name) :], name))
        if name not in done:
            for imported in graph[name]:
                visit(imported, (*way, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", [path for path in MODULES if path.startswith("linux/")])
def test_what_the_kernel_can_do_knows_nothing_of_us(path: str) -> None:
    """linux/ imports the listed part of the standard library and itself."""
    for name in imports(MODULES[path]):
        assert name in STANDARD_INSIDE or name.startswith("agentos.linux"), name


@pytest.mark.parametrize("module", sorted(INSIDE_A_VM))
def test_what_runs_inside_every_vm_stays_small(module: str) -> None:
    """The zygote, init and its children import the listed part of the standard library, linux/ and one another."""
    for name in imports(MODULES[f"machine/{module}.py"]):
        if name.startswith("agentos.machine."):
            assert name.removeprefix("agentos.machine.") in INSIDE_A_VM, name
        elif name != "agentos.machine":
            assert name in STANDARD_INSIDE or name.startswith("agentos.linux"), name


@pytest.mark.parametrize("path", MODULES)
def test_only_what_is_small_and_has_one_thread_forks(path: str) -> None:
    """A fork of the host process would be slow, and with threads unsafe."""
    calls = {ast.unparse(node.func) for node in ast.walk(MODULES[path]) if isinstance(node, ast.Call)}
    if path not in MAY_FORK:
        assert not calls & {"os.fork", "fork", "os.forkpty", "forkpty", "pty.fork"}


@pytest.mark.parametrize("path", MODULES)
def test_modules_are_of_a_size_to_read(path: str) -> None:
    """At most MOST_LINES, or an exception with its reason."""
    lines = len((SOURCE / path).read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES or path in LONGER, f"{lines} lines"


@pytest.mark.parametrize("path", MODULES)
def test_every_module_and_public_name_says_what_it_is_for(path: str) -> None:
    """Modules, and public classes and functions at their top, have docstrings."""
    tree = MODULES[path]
    assert ast.get_docstring(tree), path
    for node in tree.body:
        if isinstance(
            node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        ) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path}: {node.name}"


def test_the_exceptions_are_needed() -> None:
    """A list of exceptions that holds more than there are hides the next one."""
    assert set(LONGER) <= set(MODULES)
    assert set(MAY_FORK) <= set(MODULES)
    for path, name in UPWARD:
        assert name in imports(MODULES[path])
    for path in MAY_FORK:
        assert "fork()" in (SOURCE / path).read_text(encoding="utf-8"), path
    assert {f"machine/{module}.py" for module in INSIDE_A_VM} <= set(MODULES)
    assert set(sys.stdlib_module_names) >= {name.split(".")[0] for name in STANDARD_INSIDE}
