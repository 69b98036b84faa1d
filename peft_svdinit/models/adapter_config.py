"""`adapter_config.json` as every reader takes it: checked where it is read, else untouched."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from ..files import ClassName, Positive, read_json, validated
from .foreign_patterns import Pattern, refuse_endless, refuse_unreadable

_Alpha = Annotated[float, msgspec.Meta(gt=0, le=2**31)]
_Names = str | list[str] | None


class _AutoMapping(msgspec.Struct):
    base_model_class: ClassName | None = None
    parent_library: str | None = None


class _Selection(msgspec.Struct, kw_only=True):
    """What adapters of all types share, and which layers they are for."""

    rank_pattern: dict[str, Any] | None = None
    alpha_pattern: dict[str, Any] | None = None
    target_modules: _Names = None
    exclude_modules: _Names = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: _Names = None
    modules_to_save: list[str] | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = None
    auto_mapping: _AutoMapping | None = None


class _Entries(_Selection, kw_only=True):
    r: Positive
    rank_pattern: dict[str, Positive] | None = None
    alpha_pattern: dict[str, _Alpha] | None = None


class _Lora(_Entries, kw_only=True):
    lora_alpha: _Alpha
    use_rslora: bool | None = None
    fan_in_fan_out: bool | None = None
    lora_dropout: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    bias: str | None = None
    lora_bias: bool | None = None
    use_dora: bool | None = None
    init_lora_weights: bool | str | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool | None = None
    target_parameters: list[str] | None = None


class _Lycoris(_Entries, kw_only=True):
    alpha: _Alpha


# Of PEFT 0.21; of the patterns the keys.
_FORMS = {
    "rank_pattern": r"(.*\.)?({})$",
    "alpha_pattern": r"(.*\.)?({})$",
    "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
    "modules_to_save": r"(^|.*\.){}($|\..*)",
}
_SCHEMAS = {"LORA": _Lora, "LOHA": _Lycoris, "LOKR": _Lycoris}


def read_adapter_config(path: Path, argument: str) -> dict[str, Any]:
    """The entries of an `adapter_config.json`.

    Args:
        path: the file.
        argument: by which the user gave it; the messages of errors begin with it.

    Raises:
        ValueError: as `read_json` and `check_adapter_config`.
    """
    config = read_json(path, argument)
    check_adapter_config(config, f"{argument}: {path}: ")
    return config


def check_adapter_config(config: Mapping[str, Any], place: str) -> None:
    """Refuse entries that PEFT or we would misread; of a LoRA, LoHa or LoKr ranks and alphas too.

    Args:
        config: as JSON has it.
        place: what the message of an error begins with.

    Raises:
        ValueError: naming the entry, the rule and the value; for an expression that is none, too.
    """
    validated(config, _SCHEMAS.get(str(config.get("peft_type")), _Selection), place)
    refuse_unreadable(_patterns_of(config), place)


def refuse_endless_patterns(config: Mapping[str, Any], names: Iterable[str], place: str) -> None:
    """Refuse a configuration with an expression that backtracks without end on names of layers.

    To be called before an expression of a stranger is matched, by PEFT or by `pattern_value`.

    Args:
        config: as `check_adapter_config` has checked it.
        names: of the layers, as they are matched.
        place: what the message of an error begins with.

    Raises:
        ValueError: naming the entry and the expression.
    """
    refuse_endless(_patterns_of(config), names, place)


def _patterns_of(config: Mapping[str, Any]) -> list[Pattern]:
    """All that PEFT takes for regular expressions, in the form in which it matches them."""
    found = []
    for option in ("target_modules", "exclude_modules"):
        if isinstance(config.get(option), str):
            found.append(Pattern(option, config[option], config[option], whole=True))
    for option, form in _FORMS.items():
        given = config.get(option) or ()
        for written in (given,) if isinstance(given, str) else given:
            found.append(Pattern(option, written, form.format(written)))
    return found
