"""`builtin:arithmetic`: word problems in two steps, in the shape of GSM8K (arXiv:2110.14168)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

T = TypeVar("T")

_COUNT, _SEED = 4000, 0
_NAMES = "Ada Ben Chen Dana Emil Fatima Grace Hugo Ines Jamal Kofi Lena".split()
_THINGS = "apples books cards coins eggs marbles pencils shells stamps stickers".split()


class _Template(NamedTuple):
    """One kind of problem. In its texts ab is the product of a and b, n the answer."""

    answer: Callable[[int, int, int], int]
    question: str
    equation: str
    solution: str


_TEMPLATES = (
    _Template(
        lambda a, b, c: a * b - c,
        "{who} buys {a} bags of {b} {things} and gives {c} {things} away. "
        "How many {things} does {who} have left?",
        "{a} * {b} - {c} = {n}",
        "{a} bags of {b} {things} are {a} * {b} = {ab} {things}. {ab} - {c} = {n} are left.",
    ),
    _Template(
        lambda a, b, c: a * b + c,
        "{who} has {c} {things} and gets {a} more each day for {b} days. "
        "How many {things} does {who} have then?",
        "{a} * {b} + {c} = {n}",
        "In {b} days {who} gets {a} * {b} = {ab} {things}. {c} + {ab} = {n} is the total.",
    ),
    _Template(
        lambda a, b, c: b + c,
        "{a} friends share {ab} {things} equally, and each of them finds {c} more. "
        "How many {things} does each friend have?",
        "{ab} / {a} + {c} = {n}",
        "Each friend is given {ab} / {a} = {b} {things}. {b} + {c} = {n} with those found.",
    ),
    _Template(
        lambda a, b, c: c,
        "{who} pays for {a} {things} at {b} dollars each with {paid} dollars. "
        "How many dollars does {who} get back?",
        "{paid} - {a} * {b} = {n}",
        "{a} {things} cost {a} * {b} = {ab} dollars. {who} gets back {paid} - {ab} = {n} dollars.",
    ),
    _Template(
        lambda a, b, c: a + b + c,
        "{who} counts {a} {things} on Monday, {b} on Tuesday and {c} on Wednesday. "
        "How many {things} is that in all?",
        "{a} + {b} + {c} = {n}",
        "By Tuesday it is {a} + {b} = {sum} {things}. {sum} + {c} = {n} by Wednesday.",
    ),
)


def arithmetic() -> list[dict[str, str]]:
    """4,000 problems with whole numbers from 3 to 20, made from a seed.

    Numbers come from SHA-256 of their place, so that the problems are the same on every Python.

    Returns:
        One dict per problem, without a repeated one. `prompt` is "Question: ...\\nAnswer:";
        `completion` a space, one sentence for each step, and "The answer is 12"; `equation` what
        is calculated ("3 * 5 - 3 = 12"), by which problems are held out: none that is calculated
        alike is trained on, under other names or about other things.
    """
    rows: dict[str, dict[str, str]] = {}
    place = 0
    while len(rows) < _COUNT:
        row = _problem(place)
        rows.setdefault(row["prompt"], row)
        place += 1
    return list(rows.values())


def _problem(place: int) -> dict[str, str]:
    numbers = range(3, 21)
    a, b, c = (_pick(numbers, place, slot) for slot in "abc")
    template = _pick(_TEMPLATES, place, "template")
    if template.answer(a, b, c) <= 0:
        c = a
    words = {
        "who": _pick(_NAMES, place, "who"),
        "things": _pick(_THINGS, place, "things"),
        **{"a": a, "b": b, "c": c, "ab": a * b, "sum": a + b, "paid": a * b + c},
        "n": template.answer(a, b, c),
    }
    question, equation, solution = (text.format(**words) for text in template[1:])
    return {
        "prompt": f"Question: {question}\nAnswer:",
        "completion": f" {solution} The answer is {words['n']}",
        "equation": equation,
    }


def _pick(choices: Sequence[T], place: int, slot: str) -> T:
    digest = hashlib.sha256(f"{_SEED} {place} {slot}".encode()).digest()
    return choices[int.from_bytes(digest[:8], "big") % len(choices)]
