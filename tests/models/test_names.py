"""Modules chosen by the ends of their names, and PEFT's patterns, against their definitions."""

from __future__ import annotations

import re
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from peft_svdinit.models import PatternValues, exact_pattern, is_chosen, is_within

parts = st.sampled_from(["a", "b", "ab", "0", "1", "10", "", "x_y", "a-b"])
names = st.lists(parts, min_size=1, max_size=4).map(".".join)
# Keys as PEFT's users write them: names and their ends, and expressions.
keys = st.one_of(
    names,
    names.map(lambda name: f"^{re.escape(name)}"),
    st.sampled_from([r".*", r"a.", r"a|b", r"\d+\.a", r"[ab]\.0", "^a", "a$", "(a|0).b"]),
    st.lists(names, min_size=1, max_size=3).map(lambda found: next(iter(exact_pattern_of(found)))),
)


def exact_pattern_of(found: list[str]) -> dict[str, int]:
    return exact_pattern(dict.fromkeys(found, 1))


def by_definition(patterns: dict[str, Any], names: list[str], default: Any) -> Any:
    """PEFT's own way: every key on every name."""
    for name in names:
        for key, value in patterns.items():
            if re.match(rf"(.*\.)?({key})$", name):
                return value
    return default


@given(found=st.lists(keys, max_size=6, unique=True), name=names, spelled=st.none() | names)
def test_the_value_of_a_pattern_is_that_of_the_first_key_that_matches(found, name, spelled):
    patterns = {key: index for index, key in enumerate(found)}
    tried = [name] if spelled is None else [spelled, name]
    value = PatternValues(patterns)(name, "usual", spelled=spelled)
    assert value == by_definition(patterns, tried, "usual")


def test_keys_that_are_names_are_not_compared_one_by_one(monkeypatch):
    layers = [f"model.layers.{index}.q_proj" for index in range(300)]
    monkeypatch.setattr(re, "compile", None)
    monkeypatch.setattr(re, "match", None)
    values = PatternValues({name: index for index, name in enumerate(layers)})
    assert [values(name, None) for name in layers] == list(range(300))
    values = PatternValues({"q_proj": 0} | exact_pattern_of(layers))
    assert [values(name, None) for name in (layers[0], "k_proj")] == [0, None]


@given(name=names, choice=st.lists(names, max_size=4), kind=st.sampled_from([list, frozenset]))
def test_a_module_is_chosen_by_its_ends_and_within_by_its_beginnings(name, choice, kind):
    ends = any(name == one or name.endswith(f".{one}") for one in choice)
    assert is_chosen(name, kind(choice)) == ends
    begins = any(name == one or name.startswith(f"{one}.") for one in choice)
    assert is_within(name, kind(choice)) == begins
