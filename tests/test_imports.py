"""The picture of the packages: who may import whom, read from the source."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("peft_svdinit", "trainer_callbacks", "recipes")

# The rooms from the bottom up, with the rooms below that each may know.
ROOMS: dict[str, set[str]] = {
    "linalg": set(),
    "files": set(),
    "models": {"files"},
    "training": {"files"},
    "factors": {"linalg", "files", "models"},
    "masks": {"factors", "files", "models"},
    "optim": {"factors", "files", "models"},
    "analysis": {"linalg", "files", "models", "training", "factors", "masks"},
    "low_rank": {"linalg", "files", "models", "factors", "optim"},
    "tuner": {"files", "models", "factors", "masks", "optim"},
    "adapters": {"linalg", "files", "models", "factors", "masks", "analysis"},
    "hub": {"files", "models", "training", "factors", "masks", "analysis", "low_rank", "adapters"},
    "cli": {
        "linalg", "files", "models", "training", "factors", "masks", "analysis", "adapters", "hub",
    },
}  # fmt: skip
# Rooms that work without PEFT.
WITHOUT_PEFT = (
    "linalg",
    "files",
    "models",
    "training",
    "factors",
    "masks",
    "optim",
    "analysis",
    "low_rank",
)
# Files of this many lines hold more than one idea.
LONGEST, MEDIAN, EQUAL_LINES = 350, 150, 6


@cache
def files() -> dict[str, Path]:
    """Module name to file, of all that belongs to us; of a lazy face its stub."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            stub = path.with_suffix(".pyi")
            found[name.removesuffix(".__init__")] = stub if stub.is_file() else path
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def targets(module: str, node: ast.AST) -> Iterator[tuple[str, str]]:
    """(module, name) of what an import statement reads; the name of a whole module is ""."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, "") for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        parts = module.split(".")
        if files()[module].stem == "__init__":
            parts.append("__init__")
        start = parts[: -node.level] if node.level else []
        source = ".".join([*start, *([node.module] if node.module else [])])
        for alias in node.names:
            inner = f"{source}.{alias.name}"
            yield (inner, "") if inner in files() else (source, alias.name)


@cache
def imports(module: str) -> set[tuple[str, str]]:
    nodes = ast.walk(tree(files()[module]))
    return {target for node in nodes for target in targets(module, node)}


def imported_modules(module: str) -> set[str]:
    return {name for name, _ in imports(module)}


def is_ours(name: str) -> bool:
    return name.partition(".")[0] in PACKAGES


def room_of(module: str) -> str:
    """`linalg` of `peft_svdinit.linalg.spectrum`, "" of the package's own face and of others."""
    parts = module.split(".")
    return parts[1] if parts[0] == "peft_svdinit" and len(parts) > 1 else ""


def neighbours(module: str) -> set[tuple[str, str]]:
    """What a module takes from rooms of peft_svdinit other than its own."""
    return {
        (name, part)
        for name, part in imports(module)
        if room_of(name) and room_of(name) != room_of(module)
    }


def test_the_picture_shows_the_rooms_that_exist():
    assert {room_of(module) for module in files()} - {""} == set(ROOMS)


def test_rooms_are_listed_from_the_bottom_up():
    below: set[str] = set()
    for room, known in ROOMS.items():
        assert known <= below, f"{room} knows {sorted(known - below)}, which stand above it"
        below.add(room)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_the_picture_says(room):
    for module in files():
        if room_of(module) == room:
            above = {room_of(name) for name, _ in neighbours(module)} - ROOMS[room]
            assert not above, f"{module} imports from {sorted(above)}"


def test_rooms_are_entered_by_their_door():
    for module in files():
        behind = {name for name, _ in neighbours(module) if name.count(".") > 1}
        assert not behind, f"{module} imports {sorted(behind)}, which are behind a room's face"


def test_a_face_lists_what_others_use():
    used = {target for module in files() for target in neighbours(module) | through_rooms(module)}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    # linalg is a library of its own.
    for face in {f"peft_svdinit.{room}" for room in ROOMS} - {"peft_svdinit.linalg"}:
        for name in () if is_code(face) else listed(face):
            documented = re.search(rf"from {face} import .*\b{name}\b", readme)
            assert (face, name) in used or documented, f"{face}.{name}"


def through_rooms(module: str) -> set[tuple[str, str]]:
    """(room, name) of `room.name` in a module that imports rooms whole."""
    rooms = {name.rpartition(".")[2]: name for name, part in neighbours(module) if not part}
    return {
        (rooms[node.value.id], node.attr)
        for node in ast.walk(tree(files()[module]))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in rooms
    }


def listed(face: str) -> set[str]:
    nodes = tree(files()[face]).body
    found = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 1]
    return {alias.name for node in found for alias in node.names}


def test_linalg_imports_torch_and_nothing_else_from_outside():
    outside = {
        name.partition(".")[0]
        for module in files()
        if room_of(module) == "linalg"
        for name in imported_modules(module)
        if not is_ours(name)
    }
    assert outside - sys.stdlib_module_names <= {"torch", "jaxtyping", "lazy_loader"}


def run_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The statements that importing a module runs: those outside of functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield child
            yield from run_at_import(child)


@pytest.mark.parametrize("room", WITHOUT_PEFT)
def test_rooms_below_the_tuner_do_not_know_peft(room):
    for module, path in files().items():
        if room_of(module) == room:
            top = {name for node in run_at_import(tree(path)) for name, _ in targets(module, node)}
            assert not any(name.partition(".")[0] == "peft" for name in top), module


def test_a_lazy_face_imports_nothing_itself():
    allowed = {"peft_svdinit.tuner": {"lazy_loader", "peft", "registration"}}
    allowed["peft_svdinit"] = {"lazy_loader", "wrapt", "importlib", "sys", "types"}
    for module in files():
        if is_code(module):
            continue
        read = {
            node.names[0].name if isinstance(node, ast.Import) else str(node.module)
            for node in ast.walk(tree(files()[module].with_suffix(".py")))
            if isinstance(node, (ast.Import, ast.ImportFrom))
        }
        assert read <= allowed.get(module, {"lazy_loader"}), module


def test_no_module_enters_its_own_room_by_the_door():
    for module in files():
        room = f"peft_svdinit.{room_of(module)}"
        assert module == room or room not in imported_modules(module), module


def test_no_modules_import_each_other_in_a_circle():
    # Lazy faces read a module when a name of it is asked for: the edge goes to that module.
    graph = {
        module: {
            defining(name, part)
            for name, part in imports(module)
            if name in files() and is_code(module)
        }
        - {module}
        for module in files()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"circle: {' -> '.join(error.args[1])}")


def is_code(module: str) -> bool:
    return files()[module].suffix == ".py"


def defining(name: str, part: str) -> str:
    """The module that a face takes a name from, or the module itself."""
    if is_code(name):
        return name
    for source, member in imports(name):
        if member == part:
            return defining(source, part)
    return name


def test_no_part_imports_the_package_that_collects_it():
    for module in files():
        if module.startswith("peft_svdinit."):
            assert "peft_svdinit" not in imported_modules(module), module


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [("peft_svdinit", ("trainer_callbacks", "recipes")), ("trainer_callbacks", ("recipes",))],
)
def test_packages_do_not_import_what_is_built_on_them(package, forbidden):
    for module in files():
        if module.partition(".")[0] == package:
            bad = {n for n in imported_modules(module) if n.partition(".")[0] in forbidden}
            assert not bad, f"{module} imports {sorted(bad)}"


@pytest.mark.parametrize("package", PACKAGES)
def test_our_own_packages_are_imported_at_the_top_of_a_file(package):
    for module in files():
        if module.partition(".")[0] != package:
            continue
        for node in ast.walk(tree(files()[module])):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                inner = {
                    name
                    for statement in ast.walk(node)
                    for name, _ in targets(module, statement)
                    if is_ours(name)
                }
                assert not inner, f"{module}.{node.name} imports {sorted(inner)}"


def test_every_module_postpones_its_annotations():
    # Shapes such as Float[Tensor, "out in"] must not be evaluated for users.
    for path in files().values():
        names = {
            alias.name
            for node in tree(path).body
            if isinstance(node, ast.ImportFrom) and node.module == "__future__"
            for alias in node.names
        }
        has_code = any(
            isinstance(node, (ast.FunctionDef, ast.ClassDef)) for node in tree(path).body
        )
        assert "annotations" in names or not has_code, path


def test_no_test_imports_another():
    tests = {path.stem: path for path in (ROOT / "tests").rglob("test_*.py")}
    for path in tests.values():
        for node in ast.walk(tree(path)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not {name.rpartition(".")[2] for name in names} & set(tests), path


def test_a_file_holds_one_idea():
    lengths = {
        module: len(path.read_text(encoding="utf-8").splitlines())
        for module, path in files().items()
        if is_code(module)
    }
    assert not {module: length for module, length in lengths.items() if length > LONGEST}
    assert median(length for length in lengths.values() if length > 1) <= MEDIAN


def code_lines(path: Path) -> list[str]:
    """The lines of a file that say something: no imports, comments, brackets alone, decorators."""
    imported = {
        line
        for node in ast.walk(tree(path))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    lines = path.read_text(encoding="utf-8").splitlines()
    stripped = (line.strip() for number, line in enumerate(lines, 1) if number not in imported)
    return [line for line in stripped if len(line) > 1 and not re.match(r"#|@\w+$", line)]


def test_nothing_is_said_twice():
    seen: dict[tuple[str, ...], str] = {}
    for module, path in files().items():
        lines = code_lines(path) if is_code(module) else []
        for start in range(len(lines) - EQUAL_LINES + 1):
            run = tuple(lines[start : start + EQUAL_LINES])
            place = f"{module}, code line {start}"
            other = seen.setdefault(run, place)
            assert other == place, f"{other} and {place}: {run}"
