"""Mappings whose values are read or made when they are asked for, one at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TypeVar

Value = TypeVar("Value", covariant=True)


class LazyMapping(Mapping[str, Value]):
    """Whether a name is there is said without its value, which Mapping's own would read.

    Attributes:
        names: the keys in their order.
    """

    names: Collection[str]

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
