"""Signature-to-docstring pairs of the running Python's standard library.

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
from collections.abc import Iterator
from pathlib import Path

# Tests, tools, generated tables, installed packages, jokes, and what only some machines or versions
# have (tkinter, turtle, distutils). Modules that start with an underscore, many of them twins such
# as _pydecimal, are left out by a rule of their own.
_SKIPPED = frozenset(
    "antigravity distutils dist-packages encodings ensurepip idlelib lib-dynload lib2to3 "
    "pydoc_data site-packages test tests this tkinter turtle turtledemo".split()
)
_LONGEST_PROMPT = (
    240  # characters, about 80 tokens; longer signatures are mostly tables of defaults
)
_COMPLETION_LENGTHS = range(12, 201)  # characters; shorter ones say nothing, longer ones are rare
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z`'\"(])")


def stdlib_docstrings() -> list[dict[str, str]]:
    """Pairs of a signature and the first sentence of its docstring, about 4,000 of them.

    Returns:
        One dict per public function, method or class, in the order of the modules' paths and of
        the source, without a repeated prompt. `prompt` is source text up to the docstring's
        opening quotes, with the enclosing class above a method; `completion` is the docstring's
        first sentence on one line; `module` is the top-level module's name.

    Raises:
        RuntimeError: if this Python comes without the sources of its standard library.

    Cost: a few seconds on the first call of a process, for parsing about 8 MB of source.
    """
    return [dict(pair) for pair in _pairs()]


@functools.cache
def _pairs() -> tuple[dict[str, str], ...]:
    root = Path(sysconfig.get_path("stdlib"))
    pairs: dict[str, dict[str, str]] = {}
    for path in _sources(root):
        module = path.relative_to(root).parts[0].removesuffix(".py")
        for prompt, completion in _file_pairs(path.read_bytes()):
            pairs.setdefault(prompt, {"prompt": prompt, "completion": completion, "module": module})
    if not pairs:
        raise RuntimeError(
            f"builtin:stdlib-docstrings needs the sources of Python's standard library, and "
            f"{root} has none; use another Python build or give dataset_name a file"
        )
    return tuple(pairs.values())


def _sources(folder: Path) -> Iterator[Path]:
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        name = entry.name.removesuffix(".py")
        if name in _SKIPPED or (name.startswith("_") and name != "__init__"):
            continue
        if entry.suffix == ".py":
            yield entry
        elif entry.is_dir() and (entry / "__init__.py").is_file():
            yield from _sources(entry)


def _file_pairs(source: bytes) -> Iterator[tuple[str, str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escape sequences in somebody else's source
        try:
            tree = ast.parse(source)
        except SyntaxError:
            return
    yield from _body_pairs(tree.body, header="", indent="")


def _body_pairs(body: list[ast.stmt], header: str, indent: str) -> Iterator[tuple[str, str]]:
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if node.name.startswith("_") and not node.name.endswith("__"):
            continue
        completion = _first_sentence(ast.get_docstring(node, clean=False))
        is_told = len(completion) in _COMPLETION_LENGTHS
        if not (is_told or isinstance(node, ast.ClassDef)):
            continue
        signature = f"{header}{indent}{_signature(node)}\n"
        prompt = f'{signature}{indent}    """'
        if is_told and len(prompt) <= _LONGEST_PROMPT:
            yield prompt, completion
        if isinstance(node, ast.ClassDef):
            yield from _body_pairs(node.body, header=signature, indent=indent + "    ")


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in [*node.bases, *node.keywords])
        return f"class {node.name}({bases}):" if bases else f"class {node.name}:"
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{keyword} {node.name}({ast.unparse(node.args)}){returns}:"


def _first_sentence(docstring: str | None) -> str:
    if not docstring:
        return ""
    paragraph = re.split(r"\n\s*\n", inspect.cleandoc(docstring), maxsplit=1)[0]
    return _SENTENCE_END.split(" ".join(paragraph.split()), maxsplit=1)[0]
