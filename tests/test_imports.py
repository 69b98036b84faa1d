"""The picture of the packages: who may import whom, read from the source."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("peft_svdinit", "trainer_callbacks", "recipes")

# The core from the bottom up; a part imports from lower rows only. Whatever is not listed stands
# above all of it.
LAYERS = [
    {
        "linalg",
        "atomic",
        "sources",
        "linear_modules",
        "module_names",
        "recognition",
        "tensor_writer",
    },
    {"factors", "checkpoints", "layers"},
    {"factors_file", "deltas", "initializers", "factor_sources"},
    {"extraction", "masks"},
    {"config"},
    {"tuner"},
    {"registration"},
]
# Parts whose place is narrower than their row.
ONLY = {
    "linalg": set(),
    "atomic": set(),
    "sources": set(),
    "linear_modules": set(),
    "module_names": set(),
    "recognition": set(),
    "tensor_writer": set(),
    "layers": set(),
    "factors": {"linalg"},
    "initializers": {"factors"},
}


@cache
def files() -> dict[str, Path]:
    """Module name to file, of everything that belongs to us."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
    }


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(files()[module].read_text(encoding="utf-8"))


def targets(module: str, node: ast.AST) -> Iterator[str]:
    """Absolute names of the modules that an import statement reads, most specific known one."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        parts = module.split(".")
        if files()[module].name == "__init__.py":
            parts.append("__init__")
        start = parts[: -node.level] if node.level else []
        source = ".".join([*start, *([node.module] if node.module else [])])
        for alias in node.names:
            inner = f"{source}.{alias.name}"
            yield inner if inner in files() else source


def imports(module: str) -> set[str]:
    return {name for node in ast.walk(tree(module)) for name in targets(module, node)}


def is_ours(name: str) -> bool:
    return name.partition(".")[0] in PACKAGES


def part_of(module: str) -> str:
    """`linalg` of `peft_svdinit.linalg.spectrum`; the package itself is "__init__"."""
    return [*module.split("."), "__init__"][1]


@cache
def parts_imported() -> dict[str, set[str]]:
    """Part of peft_svdinit to the other parts that it imports."""
    found: dict[str, set[str]] = {}
    for module in files():
        if module.startswith("peft_svdinit"):
            used = {part_of(name) for name in imports(module) if name.startswith("peft_svdinit")}
            found.setdefault(part_of(module), set()).update(used - {part_of(module)})
    return found


def test_the_picture_lists_parts_that_exist():
    assert set().union(*LAYERS) <= set(parts_imported())


def test_the_core_imports_downwards_only():
    allowed: set[str] = set()
    for layer in LAYERS:
        for part in sorted(layer):
            above = parts_imported()[part] - allowed
            assert not above, f"{part} imports {sorted(above)}, which stand above or beside it"
        allowed |= layer


@pytest.mark.parametrize("part", ONLY)
def test_the_lowest_parts_import_no_more_than_the_picture_says(part):
    assert parts_imported()[part] <= ONLY[part]


def test_linalg_imports_torch_and_nothing_else_from_outside():
    outside = {
        name.partition(".")[0]
        for module in files()
        if module.startswith("peft_svdinit.linalg")
        for name in imports(module)
        if not is_ours(name)
    }
    assert outside - sys.stdlib_module_names <= {"torch", "jaxtyping"}


@pytest.mark.parametrize(
    "part", ["factors", "initializers", "factors_file", "factor_sources", "masks", "extraction"]
)
def test_the_numerical_core_does_not_know_peft(part):
    for module in files():
        if module.startswith("peft_svdinit") and part_of(module) == part:
            assert not any(name.partition(".")[0] == "peft" for name in imports(module))


def test_no_modules_import_each_other_in_a_circle():
    # The package's own __init__ collects names and is imported by no part of it.
    graph = {
        module: {name for name in imports(module) if name in files()} - {module}
        for module in files()
        if module != "peft_svdinit"
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"circle: {' -> '.join(error.args[1])}")


def test_no_part_imports_the_package_that_collects_it():
    for module in files():
        if module.startswith("peft_svdinit."):
            assert "peft_svdinit" not in imports(module), module


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [("peft_svdinit", ("trainer_callbacks", "recipes")), ("trainer_callbacks", ("recipes",))],
)
def test_packages_do_not_import_what_is_built_on_them(package, forbidden):
    for module in files():
        if module.partition(".")[0] == package:
            bad = {name for name in imports(module) if name.partition(".")[0] in forbidden}
            assert not bad, f"{module} imports {sorted(bad)}"


@pytest.mark.parametrize("package", PACKAGES)
def test_our_own_packages_are_imported_at_the_top_of_a_file(package):
    for module in files():
        if module.partition(".")[0] != package:
            continue
        for node in ast.walk(tree(module)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                inner = {
                    name
                    for statement in ast.walk(node)
                    for name in targets(module, statement)
                    if is_ours(name)
                }
                assert not inner, f"{module}.{node.name} imports {sorted(inner)}"


def test_every_module_postpones_its_annotations():
    # Shapes such as Float[Tensor, "out in"] must not be evaluated for users.
    for module, path in files().items():
        names = {
            alias.name
            for node in tree(module).body
            if isinstance(node, ast.ImportFrom) and node.module == "__future__"
            for alias in node.names
        }
        has_code = any(
            isinstance(node, (ast.FunctionDef, ast.ClassDef)) for node in tree(module).body
        )
        assert "annotations" in names or not has_code, path
