"""`builtin:stdlib-names`: from what a docstring says to the name and signature it belongs to."""

from __future__ import annotations

from .stdlib import Definition, rows_of, signature

_COMPLETION_LENGTHS = range(12, 201)  # characters; longer signatures are mostly tables of defaults


def stdlib_names() -> list[dict[str, str]]:
    """Pairs of a docstring's first sentence and the signature it describes, about 4,000 of them.

    The reverse of `stdlib_docstrings`, from the same definitions.

    Returns:
        One dict per public function, method or class, in the order of the modules' paths and of
        the source, without a repeated prompt. `prompt` is a comment line with the module's dotted
        name, a method's class and the sentence (`# module json: Deserialize ...`); `completion`
        is the signature line that follows it (`def load(fp, *, cls=None, ...):`), of 12 to 200
        characters; `module` is the top-level module's name.

    Errors and cost as of `stdlib_docstrings`.
    """
    return [dict(row) for row in rows_of(_pair)]


def _pair(definition: Definition) -> tuple[str, str] | None:
    place = f"module {definition.module}"
    if definition.classes:
        place += f", class {'.'.join(node.name for node in definition.classes)}"
    completion = signature(definition.node)
    if len(completion) not in _COMPLETION_LENGTHS:
        return None
    return f"# {place}: {definition.sentence}\n", completion
