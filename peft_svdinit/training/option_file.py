"""A file of options, read strictly: what two readers may take differently is refused."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml


def read_option_file(path: Path) -> Mapping[Any, Any]:
    """What a .json, .yaml or .yml file maps names of options to; nothing of an empty YAML file.

    Of YAML, tags of Python's are refused, and aliases: a few lines of them can stand for more than
    memory holds.

    Raises:
        ValueError: if the file cannot be read, or holds no such mapping, or a name twice; the
            message begins with "--config".
    """
    if path.suffix not in _READERS:
        raise ValueError(f"--config must end in {', '.join(_READERS)}")
    try:
        content = _READERS[path.suffix](path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"--config cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--config is no text in UTF-8: {error}") from error
    except RecursionError as error:
        raise ValueError("--config is nested too deeply") from error
    except (ValueError, yaml.YAMLError) as error:
        kind = path.suffix[1:].upper()
        raise ValueError(f"--config is not valid {kind}: {_in_words(error)}") from error
    if content is None and path.suffix != ".json":
        return {}
    if not isinstance(content, Mapping):
        raise ValueError("--config must map names of options to values")
    return content


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_OTHERWISE = re.compile(r"[-+]?(0[0-9]|.*:)")


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            problem = f"*{event.anchor} stands for what is written elsewhere, write it out"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_scalar(self, node: Any) -> Any:
        # 8 and 90 to YAML 1.1, 10 and text to YAML 1.2 and to people.
        if node.tag in _NUMBERS and _OTHERWISE.match(node.value):
            raise ValueError(f"the number {node.value} is read in two ways; write it in full")
        return super().construct_scalar(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        _refuse_twice(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        return super().construct_mapping(node, deep)


def _yaml(text: str) -> Any:
    return yaml.load(text, _Loader)  # A SafeLoader.


def strict_json(text: str) -> Any:
    """The value of a JSON document, without NaN and infinities, and without a key twice in one.

    Raises:
        ValueError: for what is none.
    """
    return json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)


_READERS: dict[str, Callable[[str], Any]] = {".json": strict_json, ".yaml": _yaml, ".yml": _yaml}


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _refuse_twice(key for key, _ in pairs)
    return dict(pairs)


def _refuse_twice(keys: Iterable[str]) -> None:
    (found, count), *_ = Counter(keys).most_common(1) or [("", 0)]
    if count > 1:
        raise ValueError(f"it has {found!r} {count} times; leave one")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number that JSON has")


def _in_words(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return str(error)
    problem = getattr(error, "problem", None) or "it cannot be read"
    return f"{problem}, in line {mark.line + 1}"
