"""What is wrong about an input of another kind than is needed."""

from __future__ import annotations


class WrongKind(TypeError):
    """A layer, weight, file or optimizer of a kind that cannot be worked with, a quantised one say.

    An input is at fault, as with a ValueError; other TypeErrors are faults of the program.
    """
