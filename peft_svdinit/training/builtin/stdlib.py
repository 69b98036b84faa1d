"""Public definitions of the running Python's standard library, with what their docstrings say.

Real text that every machine already has: nothing is downloaded, and no module is imported, since
the sources are only parsed.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

# Tests, tools, generated tables, installed packages, jokes, and what only some machines or versions
# have (tkinter, turtle, distutils). Modules that start with an underscore, many of them twins such
# as _pydecimal, are left out by a rule of their own.
_SKIPPED = frozenset(
    "antigravity distutils dist-packages encodings ensurepip idlelib lib-dynload lib2to3 "
    "pydoc_data site-packages test tests this tkinter turtle turtledemo".split()
)
_SENTENCE_LENGTHS = range(12, 201)  # characters; shorter ones say nothing, longer ones are rare
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z`'\"(])")


class Definition(NamedTuple):
    """A public function, method or class whose docstring begins with a sentence."""

    module: str
    """Dotted name, such as `json.encoder`."""
    classes: tuple[ast.ClassDef, ...]
    """Those that enclose it, the outermost first."""
    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    sentence: str
    """The docstring's first sentence on one line, of 12 to 200 characters."""

    @property
    def package(self) -> str:
        """The top-level module's name, such as `json`."""
        return self.module.partition(".")[0]


@functools.cache
def definitions() -> tuple[Definition, ...]:
    """All of them, in the order of the modules' paths and of the source.

    Raises:
        RuntimeError: if this Python comes without the sources of its standard library.

    Cost: a few seconds on the first call of a process, for parsing about 8 MB of source.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found: list[Definition] = []
    for path in _sources(root):
        parts = path.relative_to(root).with_suffix("").parts
        module = ".".join(parts).removesuffix(".__init__")
        found.extend(_in_body(_parse(path.read_bytes()), module, ()))
    if not found:
        raise RuntimeError(
            f"the built-in data sets need the sources of Python's standard library, and {root} "
            f"has none; use another Python build or give dataset_name a file"
        )
    return tuple(found)


@functools.cache
def rows_of(
    pair: Callable[[Definition], tuple[str, str] | None],
) -> tuple[dict[str, str], ...]:
    """Rows of `prompt`, `completion` and `module`, without a repeated prompt.

    Args:
        pair: (prompt, completion) of a definition, or None to leave it out.

    Raises:
        RuntimeError: as `definitions`.
    """
    rows: dict[str, dict[str, str]] = {}
    for definition in definitions():
        found = pair(definition)
        if found is not None:
            prompt, completion = found
            row = {"prompt": prompt, "completion": completion, "module": definition.package}
            rows.setdefault(prompt, row)
    return tuple(rows.values())


def signature(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    """The definition's first line as source text, up to its colon and without decorators."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in [*node.bases, *node.keywords])
        return f"class {node.name}({bases}):" if bases else f"class {node.name}:"
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{keyword} {node.name}({ast.unparse(node.args)}){returns}:"


def _sources(folder: Path) -> Iterator[Path]:
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        name = entry.name.removesuffix(".py")
        if name in _SKIPPED or (name.startswith("_") and name != "__init__"):
            continue
        if entry.suffix == ".py":
            yield entry
        elif entry.is_dir() and (entry / "__init__.py").is_file():
            yield from _sources(entry)


def _parse(source: bytes) -> list[ast.stmt]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escape sequences in somebody else's source
        try:
            return ast.parse(source).body
        except SyntaxError:
            return []


def _in_body(
    body: list[ast.stmt], module: str, classes: tuple[ast.ClassDef, ...]
) -> Iterator[Definition]:
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if node.name.startswith("_") and not node.name.endswith("__"):
            continue
        sentence = _first_sentence(ast.get_docstring(node, clean=False))
        if len(sentence) in _SENTENCE_LENGTHS:
            yield Definition(module, classes, node, sentence)
        if isinstance(node, ast.ClassDef):
            yield from _in_body(node.body, module, (*classes, node))


def _first_sentence(docstring: str | None) -> str:
    if not docstring:
        return ""
    paragraph = re.split(r"\n\s*\n", inspect.cleandoc(docstring), maxsplit=1)[0]
    return _SENTENCE_END.split(" ".join(paragraph.split()), maxsplit=1)[0]
