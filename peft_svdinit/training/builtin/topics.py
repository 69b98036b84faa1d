"""`builtin:python-topics`: the next sentence of Python's language reference.

The text is that of `help("topics")`, which comes with Python as the module `pydoc_data.topics`.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterator
from itertools import pairwise

_LONGEST_PROMPT = 400  # characters, about 100 tokens
_COMPLETION_LENGTHS = range(12, 241)  # characters
_RULE = re.compile(r"[*=\-~^\"'#+]{3,}")
_ITEM = re.compile(r" *(?:\*|\d+\.) +(?=\S)")
_TERM = re.compile(r"^( *)((?![*|+]|\d+\.)\S.*)\n(?=\1 {3}\S)", re.MULTILINE)
_LABEL = re.compile(r"(?:Note|Warning|See also|Attention|Hint|Tip|Important|Caution):")
_VERSION = re.compile(r"(?:New|Added|Changed|Deprecated|Removed)[\w, -]* (?:in|since) version")
_EMPHASIS = re.compile(r"(?<![\w*])(\*{1,2})([^\s*\"](?:[^*\"]*[^\s*\"])?)\1(?![\w*])")
_FOOTNOTE = re.compile(r"\s*\[\d+\]")
_WRAPPED_HYPHEN = re.compile(r"(?<=\w)-\n\s*(?=\w)")
_SENTENCE_END = re.compile(
    r"(?:(?<=[.!?])|(?<=[.!?][)\"”]))(?<![Ee]\.g\.)(?<![Ii]\.e\.)(?<!etc\.)\s+(?=[A-Z\"“\u2018(])"
)
_SENTENCE = re.compile(r"[A-Z\"“\u2018(].*[.!?][)\"”]?")


def python_topics() -> list[dict[str, str]]:
    """Pairs of a sentence of the language reference and the one that follows it.

    Large topics repeat smaller ones word for word. Each sentence belongs to the smallest topic
    that has it, so no sentence of one topic is in a row of another.

    Returns:
        One dict per sentence, the smallest topic first, without a repeated prompt. `prompt` is the
        topic's title, an empty line and what comes before the sentence, which is the sentence, the
        signature or the heading above it; `completion` is the sentence on one line, of 12 to 240
        characters; `topic` is the name that `help()` knows. Grammar, tables, code and notes on
        versions are left out, and so is the markup of emphasis and footnotes.

    Raises:
        RuntimeError: if this Python comes without `pydoc_data.topics`.
    """
    return [dict(row) for row in _rows()]


@functools.cache
def _rows() -> tuple[dict[str, str], ...]:
    topics = _topics()
    owners: dict[str, str] = {}
    rows: dict[str, dict[str, str]] = {}
    for topic in sorted(topics, key=lambda name: (len(topics[name]), name)):
        title, _, text = topics[topic].strip().partition("\n")
        pieces = list(_pieces(text))
        for piece in pieces:
            owners.setdefault(piece, topic)
        for before, piece in pairwise(["", *pieces]):
            prompt = f"{title}\n\n{before}\n" if before else f"{title}\n\n"
            if (
                owners[piece] == owners.get(before, topic) == topic
                and len(piece) in _COMPLETION_LENGTHS
                and len(prompt) <= _LONGEST_PROMPT
                and _SENTENCE.fullmatch(piece)
            ):
                row = {"prompt": prompt, "completion": piece, "topic": topic}
                rows.setdefault(prompt, row)
    return tuple(rows.values())


def _topics() -> dict[str, str]:
    try:
        return importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise RuntimeError(
            "builtin:python-topics needs the module pydoc_data.topics, the text of Python's "
            "help(), which this Python comes without; use another Python build or give "
            "dataset_name a file"
        ) from None


def _pieces(text: str) -> Iterator[str]:
    """Sentences, signatures and headings in their order, each on one line and without markup."""
    margin: int | None = None  # of the paragraph that announced the code which now follows
    apart = _TERM.sub(r"\1\2\n\n", text.strip("\n"))  # the term of a definition, with no empty line
    for block in re.split(r"\n\s*\n", apart):
        lines = block.splitlines()
        if len(lines) > 1 and _RULE.fullmatch(lines[1].strip()):
            lines = lines[:1]
        item = _ITEM.match(lines[0])
        indent = item.end() if item else len(lines[0]) - len(lines[0].lstrip())
        if margin is not None and indent > margin:
            continue
        margin = None
        paragraph = "\n".join(lines)[indent:]
        if _LABEL.fullmatch(paragraph) or _VERSION.match(paragraph) or _is_no_prose(paragraph):
            continue
        if paragraph.endswith(":"):
            margin = indent
        yield from _SENTENCE_END.split(_plain(paragraph))


def _is_no_prose(paragraph: str) -> bool:
    return (
        "::=" in paragraph
        or paragraph.startswith((">>>", "|", "+-"))
        or bool(_RULE.match(paragraph))
    )


def _plain(paragraph: str) -> str:
    joined = " ".join(_WRAPPED_HYPHEN.sub("-", paragraph).split())
    return _EMPHASIS.sub(r"\2", _FOOTNOTE.sub("", joined))
