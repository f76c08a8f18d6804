"""The stairs of `docs/architecture.md`: imports run downward only.

F0  errors settings spans version      standard library
F1  wire                               + msgspec numpy ml_dtypes
F2  memory, then bus on it             + zmq (bus)
F3  server  engine  client             none imports another; torch only in engine
    engine: device, models, state, jobs, and the loop on these
F4  probe
F5  cli
The package's own face (`__init__`, `aio`) and `hf`, which has torch, stand at the client's edge.

Lazy imports and those for type checking count as well.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "djinn_zmq"
ROOT = Path(__file__).parents[1] / PACKAGE
GROUND = {"errors", "settings", "spans", "version"}

# What each room may import of the rooms below it.
BELOW: dict[str, set[str]] = {room: set() for room in GROUND}
BELOW["settings"] = {"errors"}
BELOW["wire"] = GROUND
BELOW["memory"] = GROUND | {"wire"}
BELOW["bus"] = GROUND | {"wire", "memory"}
BELOW["server"] = BELOW["engine"] = BELOW["client"] = GROUND | {"wire", "memory", "bus"}
BELOW["face"] = BELOW["client"] | {"client"}
BELOW["hf"] = BELOW["face"]
BELOW["probe"] = BELOW["face"] | {"server", "engine", "face", "hf"}
BELOW["cli"] = BELOW["probe"] | {"probe"}

# What each room may import from outside. Rooms that are not named are free.
OUTSIDE: dict[str, set[str]] = {room: set() for room in GROUND}
OUTSIDE["wire"] = {"msgspec", "numpy", "ml_dtypes"}
OUTSIDE["memory"] = {"numpy", "zlib_ng"}
OUTSIDE["bus"] = {"zmq", "numpy"}

# Rooms within a room, from the ground up; what lies in the room itself stands on all of them.
WITHIN = {"engine": ["device", "models", "state", "jobs"]}

HEAVY = {"torch", "transformers", "accelerate", "cupy"}
# What a client imports when it is entered: a first stop and resume do without.
CLIENTS_LATER = {
    *(f"{PACKAGE}.{name}" for name in ("server", "engine", "bus.keys", "bus.news", "bus.poll")),
    *(f"{PACKAGE}.{name}" for name in ("memory.files", "client.attach", "client.batch")),
    *(f"{PACKAGE}.client.{name}" for name in ("cuda", "events", "forwards", "generation", "local")),
    *(f"{PACKAGE}.client.{name}" for name in ("parts", "sweep", "talk", "trace")),
}
TORCH_ROOMS = {"engine", "hf"}
TORCH_MODULES = {f"{PACKAGE}.{name}" for name in ("probe.device_time", "client.cuda")}


def modules() -> dict[str, Path]:
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def room_of(module: str) -> str:
    parts = module.split(".")
    if len(parts) > 1 and parts[1] in BELOW:
        return parts[1]
    return "face"


def floor_within(module: str) -> int:
    """Of a module of a room that has rooms within."""
    floors = WITHIN[room_of(module)]
    inner = module.split(".")[2:3]
    return floors.index(inner[0]) if inner and inner[0] in floors else len(floors)


def imported(node: ast.AST, module: str) -> Iterator[str]:
    """The modules that an import statement names, as far as they are files of ours."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.name
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*above, base] if base else above)
        for alias in node.names:
            inner = f"{base}.{alias.name}"
            yield inner if inner in MODULES else base


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


@cache
def imports_of(module: str) -> set[str]:
    """All imports, wherever in the file they stand."""
    return {name for node in ast.walk(tree_of(module)) for name in imported(node, module)}


def imports_at_start_of(module: str) -> set[str]:
    """Imports that are carried out when the module is: not in functions, not for type checking."""

    def running(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                continue
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            yield child
            if not isinstance(child, ast.expr):  # there is no import in one
                yield from running(child)

    return {name for node in running(tree_of(module)) for name in imported(node, module)}


def is_ours(name: str) -> bool:
    return name == PACKAGE or name.startswith(f"{PACKAGE}.")


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_its_own_floor_or_below(module: str) -> None:
    room = room_of(module)
    for name in filter(is_ours, imports_of(module)):
        assert name in MODULES, f"{module} imports {name}, which does not exist"
        assert room_of(name) == room or room_of(name) in BELOW[room], f"{module} imports {name}"


@pytest.mark.parametrize("module", sorted(name for name in MODULES if room_of(name) in WITHIN))
def test_a_module_of_a_room_within_a_room_imports_its_own_floor_or_below(module: str) -> None:
    room, own = room_of(module), floor_within(module)
    for name in imports_of(module) & MODULES.keys():
        if room_of(name) == room:
            assert floor_within(name) <= own, f"{module} imports {name}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_the_lower_floors_need_little_from_outside(module: str) -> None:
    outside = {name.split(".")[0] for name in imports_of(module) if not is_ours(name)}
    room = room_of(module)
    if room in OUTSIDE:
        assert outside <= OUTSIDE[room] | sys.stdlib_module_names
    if room not in TORCH_ROOMS and module not in TORCH_MODULES:
        assert not outside & HEAVY


def test_no_two_modules_import_each_other() -> None:
    graph = {module: imports_at_start_of(module) & MODULES.keys() for module in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as exc:
        pytest.fail(" imports ".join(reversed(exc.args[1])))


def test_every_room_is_on_a_floor() -> None:
    rooms = {path.parent.name for path in ROOT.glob("*/*.py")}
    assert rooms <= BELOW.keys()
    for room, floors in WITHIN.items():
        assert {path.parent.name for path in ROOT.glob(f"{room}/*/*.py")} == set(floors)


@pytest.mark.parametrize(
    "module, kept_out",
    [
        (PACKAGE, HEAVY | {"pytest", "matplotlib", "rich", "logging"} | CLIENTS_LATER),
        (f"{PACKAGE}.server", HEAVY | {"pytest", "djinn_zmq.engine"}),
        (f"{PACKAGE}.wire.codec", HEAVY | {"pytest"}),
    ],
)  # fmt: skip
def test_a_fresh_python_does_not_load_what_it_does_not_need(
    module: str, kept_out: set[str]
) -> None:
    program = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT.parent, check=True, capture_output=True, text=True
    )
    assert not set(loaded.stdout.split()) & kept_out


def test_names_that_are_imported_later_are_public_like_the_others() -> None:
    program = (
        "import djinn_zmq; print(*set(djinn_zmq.__all__) - set(dir(djinn_zmq)));"
        "from djinn_zmq import *; print(Session, Generation, Batch, local)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT.parent, check=True, capture_output=True, text=True
    )
    missing, found = shown.stdout.splitlines()
    assert missing == ""
    for name in ("talk.Session", "generation.Generation", "batch.Batch", "function local"):
        assert name in found
