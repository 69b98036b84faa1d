"""Text of an adapter's file that means another file: whoever wrote the one chose the other."""

from __future__ import annotations


class FromFile(str):
    """A path, Hub id or alias that stood in a file, and is known as such in every copy of it.

    In all else it is the string: for comparisons, in JSON, and to PEFT.
    """

    __slots__ = ()
