"""JSON of others: read strictly, and what is wrong with it said in one sentence."""

from __future__ import annotations

import json
from typing import Annotated, Any

import msgspec
import pytest

from peft_svdinit.files import Positive, parsed_json, read_json, validated
from peft_svdinit.files.json_text import DEEPEST

BIG = "1" + "0" * 400


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"r": 8, "s": {"b": 1, "b": 2}}', "the key 'b' twice"),
        ('{"r": NaN}', "NaN is no number"),
        ('{"r": [-Infinity]}', "-Infinity is no number"),
        (f'{{"r": {BIG}}}', r"the number 10{19}… is too large"),
        (f'{{"r": -{BIG}}}', "too large"),
        ('{"r": 1e400}', "the number 1e400"),
        ("[" * 100_000 + "]" * 100_000, "nested deeper than"),
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "nested deeper than"),
        (b'{"name": "caf\xe9"}', "no text in UTF-8"),
        (b'\xef\xbb\xbf{"r": 1}', "BOM"),
        (r'{"name": "\uD83D"}', "half a character"),
        ('{"r": 1', "delimiter"),
        ("", "Expecting value"),
    ],
)
def test_what_readers_take_differently_is_no_json(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        parsed_json(text)
    path = tmp_path / "x.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=rf"^adapter: .*x\.json is not readable JSON .*{message}"):
        read_json(path, "adapter")


def test_all_that_json_has_is_read_as_python_reads_it():
    deep: Any = "[" * DEEPEST + "1e300" + "]" * DEEPEST
    for text in (deep, r'{"a": "\ud83d\ude00é", "b": [null, -0.0, 10000000000000000000000]}'):
        assert repr(parsed_json(text)) == repr(json.loads(text))
    # As transformers writes it into a model's configuration.
    assert parsed_json('{"limit": [0.0, Infinity]}', constants=True) == {"limit": [0, float("inf")]}


class Layer(msgspec.Struct):
    rank: Positive
    share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    targets: str | list[str] | None = None


class Document(msgspec.Struct):
    name: Annotated[str, msgspec.Meta(min_length=1)]
    layers: dict[str, Layer] = {}


@pytest.mark.parametrize(
    ("document", "sentence"),
    [
        ({}, "name is missing"),
        ([], "it must be an object, got []"),
        ({"name": ""}, 'name must be text of length at least 1, got ""'),
        ({"name": "x" * 200}, None),
        ({"name": ["y" * 200]}, f'name must be text, got ["{"y" * 78}…'),
        ({"name": "x", "layers": {"a": {"rank": 1}, "b.c": {}}}, 'layers["b.c"].rank is missing'),
        (
            {"name": "x", "layers": {"a": {"rank": 1}, "b": {"rank": 0}}},
            'layers["b"].rank must be an integer of at least 1, got 0',
        ),
        (
            {"name": "x", "layers": {"a": {"rank": 10**30}}},
            f'layers["a"].rank must be an integer of at most {2**31 - 1}, got {10**30}',
        ),
        (
            {"name": "x", "layers": {"a": {"rank": True}}},
            'layers["a"].rank must be an integer, got true',
        ),
        (
            {"name": "x", "layers": {"a": {"rank": 1, "share": 2}}},
            'layers["a"].share must be a number of at most 1.0, got 2',
        ),
        (
            {"name": "x", "layers": {"a": {"rank": 1, "targets": 3}}},
            'layers["a"].targets must be text, a list or null, got 3',
        ),
        (
            {"name": "x", "layers": {"a": {"rank": 1, "targets": ["q", None]}}},
            'layers["a"].targets[1] must be text, got null',
        ),
        ({"name": "x", "of another version": {"rank": 0}, "layers": {"a": {"rank": 1}}}, None),
    ],
)
def test_an_error_names_the_key_the_rule_and_the_value(document, sentence):
    before = json.dumps(document)
    if sentence is None:
        validated(document, Document)
    else:
        with pytest.raises(ValueError) as error:
            validated(document, Document, "mask: m.json: ")
        assert str(error.value) == f"mask: m.json: {sentence}"
    assert json.dumps(document) == before
