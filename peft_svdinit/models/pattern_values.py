"""What PEFT's `rank_pattern` and `alpha_pattern` say of a module, whatever their number of keys."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from .patterns import names_of_exact

# In which a dot alone has a meaning.
_PLAIN = re.compile(r"[\w.-]+")


class PatternValues:
    """The values of such patterns by module name: that of the first key to match.

    A key matches the end of a name, from a dot on, as a regular expression. Only keys that are more
    than names are compared one by one: with a key for each layer, PEFT's own way takes the square
    of their number, and compiles every key anew.

    Args:
        patterns: by such keys.
    """

    def __init__(self, patterns: Mapping[str, Any] | None) -> None:
        self._values = list((patterns or {}).values())
        self._exact: dict[str, int] = {}
        # By their length and the places of their dots, which stand for any character.
        self._plain: dict[tuple[int, tuple[int, ...]], dict[str, int]] = defaultdict(dict)
        self._others: list[tuple[int, re.Pattern[str]]] = []
        for index, key in enumerate(patterns or ()):
            names = names_of_exact(key)
            if names is not None:
                self._exact = dict.fromkeys(names, index) | self._exact
            elif _PLAIN.fullmatch(key):
                dots = tuple(place for place, sign in enumerate(key) if sign == ".")
                self._plain[len(key), dots].setdefault(key, index)
            else:
                self._others.append((index, re.compile(rf"(.*\.)?({key})$")))

    def __call__(self, name: str, default: Any, *, spelled: str | None = None) -> Any:
        """The value of a module.

        Args:
            name: of the module.
            default: where no key matches.
            spelled: the name with what wrappers add, tried before the one without: patterns were
                matched with a wrapper that was there before PEFT, and not with one that came after.
        """
        for tried in (name,) if spelled is None else (spelled, name):
            index = self._first(tried)
            if index < len(self._values):
                return self._values[index]
        return default

    def _first(self, name: str) -> int:
        """Index of the first key that matches; beyond the last if none does."""
        first = self._exact.get(name, len(self._values))
        for (length, dots), keys in self._plain.items():
            start = len(name) - length
            if start == 0 or (start > 0 and name[start - 1] == "."):
                signs = list(name[start:])
                for dot in dots:
                    signs[dot] = "."
                first = min(first, keys.get("".join(signs), first))
        return next((i for i, key in self._others if i < first and key.match(name)), first)
