"""How an artefact is loaded, without this package and with it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from typing import Any

from ..analysis import fenced
from ..factors import FactorsFile
from ..low_rank import PLAN_NAME, is_small_form
from ..masks import load_mask
from .artefact import Artefact
from .base_model import BaseModel

_RANK = 16
_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


def usage(artefact: Artefact, base: BaseModel, repo_id: str, revision: str | None) -> str:
    """Markdown with code that can be pasted.

    Args:
        artefact, base: what is shared, and on what.
        repo_id, revision: where it is; None is the default branch.
    """
    named = f"{repo_id}@{revision}" if revision else repo_id
    kind = artefact.kind.name
    if kind == "LoRA adapter":
        return _adapter(artefact, base, repo_id, revision)
    if kind == "model":
        return _model(artefact, repo_id, revision)
    if kind == "set of SVD factors":
        file = FactorsFile(artefact.folder, argument="folder")
        rank = min(_RANK, *map(file.rank_of, file))
        return _joined(
            "They start an adapter of any rank up to their own, with peft-svdinit:",
            _code(
                "from peft import get_peft_model",
                "from peft_svdinit import SvdLoraConfig",
                *_base(_class_of(artefact), base),
                "config = SvdLoraConfig(",
                f"    r={rank}, svd_factors={_quoted(named)},",
                f"    target_modules={_targets(file)},",
                ")",
                "model = get_peft_model(base, config)",
            ),
            "Without it, `factors.safetensors` holds `<layer>.U`, `<layer>.S` and `<layer>.Vh` of "
            "each delta: B = U diag(S) and A = Vh are a LoRA of scaling 1.",
        )
    if kind == "compact LoRI adapter":
        return _joined(
            "peft-svdinit turns it into the stock LoRA that it stands for, which PEFT loads:",
            fenced(
                f"svdinit export --adapter {shlex.quote(named)} --output_dir my-adapter", "bash"
            ),
        )
    mask = load_mask(artefact.folder, argument="folder")
    rank = max(layer.rank for layer in mask.layers.values())
    return _joined(
        "It says which entries of B a LoRI adapter trains, with peft-svdinit:",
        _code(
            "from peft import get_peft_model",
            "from peft_svdinit import LoriConfig",
            *_base(_class_of(artefact), base),
            "config = LoriConfig(",
            f"    r={rank}, lori_density={mask.density}, lori_seed={mask.seed},",
            f"    lori_mask={_quoted(named)}, target_modules={_targets(mask.layers)},",
            ")",
            "model = get_peft_model(base, config)",
        ),
    )


def _adapter(artefact: Artefact, base: BaseModel, repo_id: str, revision: str | None) -> str:
    name, at = _quoted(repo_id), _argument("revision", revision)
    of_base = _argument("base_revision", base.revision)
    stock = _code(
        "from peft import PeftModel",
        *_base(_class_of(artefact), base),
        f"model = PeftModel.from_pretrained(base, {name}{at})",
    )
    parts = ["With stock PEFT:", stock]
    sidecar = artefact.options.get("config_class")
    if _is_name(sidecar):
        parts += [
            "To train on as it was trained, with peft-svdinit:",
            _code(
                f"from peft_svdinit import {sidecar}",
                f"config = {sidecar}.from_pretrained({name}{at})",
                "model = PeftModel.from_pretrained(",
                f"    base, {name}, config=config, is_trainable=True{at}",
                ")",
            ),
        ]
    parts += [
        "To start a smaller or larger adapter from it, with peft-svdinit:",
        _code(
            "from peft_svdinit import warm_start",
            f"start = warm_start({name}, base={_quoted(base.name)}, rank=8{at}{of_base})",
            'factors = start.save("start")  # svd_factors of a SvdLoraConfig',
        ),
    ]
    return _joined(*parts)


def _model(artefact: Artefact, repo_id: str, revision: str | None) -> str:
    known, name = _class_of(artefact), _quoted(repo_id)
    at = _argument("revision", revision)
    load = f"model = {known}.from_pretrained({name}{at})"
    if is_small_form(artefact.folder):
        register = "from peft_svdinit.low_rank import register_small_form"
        return _joined(
            "With peft-svdinit; stock Transformers cannot load this form:",
            _code(f"from transformers import {known}", register, "register_small_form()", load),
        )
    parts = ["With stock Transformers:", _code(f"from transformers import {known}", load)]
    if artefact.has(PLAN_NAME):
        parts += [
            "With its layers of low rank, which multiply less, by peft-svdinit:",
            _code(
                "from peft_svdinit.low_rank import load_low_rank",
                f"model = load_low_rank({name}{at})",
            ),
        ]
    return _joined(*parts)


def _targets(layers: Iterable[str]) -> str:
    """The last parts of the layers' names, as `target_modules` takes them."""
    return _quoted(sorted({name.rpartition(".")[2] for name in layers}))


def _class_of(artefact: Artefact) -> str:
    """The class by which transformers loads the base, or the model itself."""
    task = artefact.config.get("task_type")
    if task in _CLASSES:
        return _CLASSES[task]
    if task:
        return "AutoModel"
    # PEFT notes it where an adapter has no task; a model's configuration lists its own.
    mapping = artefact.config.get("auto_mapping") or {}
    is_stock = str(mapping.get("parent_library")).startswith("transformers")
    noted = mapping.get("base_model_class") if is_stock else None
    own = (artefact.config.get("architectures") or [None])[0]
    return next((str(name) for name in (noted, own) if _is_name(name)), _CLASSES["CAUSAL_LM"])


def _base(name: str, base: BaseModel) -> list[str]:
    revision = _argument("revision", base.revision)
    return [
        f"from transformers import {name}",
        "",
        f"base = {name}.from_pretrained({_quoted(base.name)}{revision})",
    ]


def _is_name(value: Any) -> bool:
    """Whether a value from a file may stand in code as a class's name."""
    return isinstance(value, str) and value.isidentifier()


def _argument(name: str, value: str | None) -> str:
    """A further argument of a call, nothing of None."""
    return f", {name}={_quoted(value)}" if value else ""


def _quoted(value: Any) -> str:
    """Text, or a list of texts, as Python writes it."""
    return json.dumps(value)


def _code(*lines: str) -> str:
    imports = [line for line in lines if line.startswith("from ")]
    rest = [line for line in lines if not line.startswith("from ")]
    return fenced("\n".join([*sorted(imports), "", *filter(None, rest)]), "python")


def _joined(*parts: str) -> str:
    return "\n\n".join(parts)
