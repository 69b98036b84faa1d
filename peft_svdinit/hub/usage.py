"""How an artefact is loaded, without this package and with it."""

from __future__ import annotations

import json
from collections.abc import Iterable

from ..factors import SIDECAR_NAME, FactorsFile
from ..low_rank import PLAN_NAME
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


def usage(artefact: Artefact, base: BaseModel, repo_id: str) -> str:
    """Markdown with code that can be pasted."""
    kind = artefact.kind.name
    if kind == "LoRA adapter":
        return _adapter(artefact, base, repo_id)
    if kind == "model":
        return _model(artefact, repo_id)
    if kind == "set of SVD factors":
        file = FactorsFile(artefact.folder, argument="folder")
        rank = min(_RANK, *map(file.rank_of, file))
        return _joined(
            "They start an adapter of any rank up to their own, with peft-svdinit:",
            _code(
                "from peft import get_peft_model",
                "from peft_svdinit import SvdLoraConfig",
                *_base("CAUSAL_LM", base),
                "config = SvdLoraConfig(",
                f'    r={rank}, svd_factors="{repo_id}",',
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
            f"```bash\nsvdinit export --adapter {repo_id} --output_dir my-adapter\n```",
        )
    mask = load_mask(artefact.folder, argument="folder")
    rank = max(layer.rank for layer in mask.layers.values())
    return _joined(
        "It says which entries of B a LoRI adapter trains, with peft-svdinit:",
        _code(
            "from peft import get_peft_model",
            "from peft_svdinit import LoriConfig",
            *_base("CAUSAL_LM", base),
            "config = LoriConfig(",
            f"    r={rank}, lori_density={mask.density}, lori_seed={mask.seed},",
            f'    lori_mask="{repo_id}", target_modules={_targets(mask.layers)},',
            ")",
            "model = get_peft_model(base, config)",
        ),
    )


def _adapter(artefact: Artefact, base: BaseModel, repo_id: str) -> str:
    task = artefact.config.get("task_type") or ""
    stock = _code(
        "from peft import PeftModel",
        *_base(task, base),
        f'model = PeftModel.from_pretrained(base, "{repo_id}")',
    )
    parts = ["With stock PEFT:", stock]
    sidecar = artefact.options.get("config_class")
    if artefact.has(SIDECAR_NAME) and sidecar:
        parts += [
            "To train on as it was trained, with peft-svdinit:",
            _code(
                f"from peft_svdinit import {sidecar}",
                f'config = {sidecar}.from_pretrained("{repo_id}")',
                f'model = PeftModel.from_pretrained(base, "{repo_id}", config=config, '
                "is_trainable=True)",
            ),
        ]
    parts += [
        "To start a smaller or larger adapter from it, with peft-svdinit:",
        _code(
            "from peft_svdinit import warm_start",
            f'start = warm_start("{repo_id}", base="{base.name}", rank=8)',
            'factors = start.save("start")  # svd_factors of a SvdLoraConfig',
        ),
    ]
    return _joined(*parts)


def _model(artefact: Artefact, repo_id: str) -> str:
    architecture = (artefact.config.get("architectures") or [""])[0]
    known = "AutoModelForCausalLM" if architecture.endswith("ForCausalLM") else "AutoModel"
    parts = [
        "With stock Transformers:",
        _code(f"from transformers import {known}", f'model = {known}.from_pretrained("{repo_id}")'),
    ]
    if artefact.has(PLAN_NAME):
        parts += [
            "With its layers of low rank, which multiply less, by peft-svdinit:",
            _code(
                "from peft_svdinit.low_rank import load_low_rank",
                f'model = load_low_rank("{repo_id}")',
            ),
        ]
    return _joined(*parts)


def _targets(layers: Iterable[str]) -> str:
    """The last parts of the layers' names, as `target_modules` takes them."""
    return json.dumps(sorted({name.rpartition(".")[2] for name in layers}))


def _base(task: str, base: BaseModel) -> list[str]:
    name = _CLASSES.get(task, "AutoModel")
    revision = f', revision="{base.revision}"' if base.revision else ""
    return [
        f"from transformers import {name}",
        "",
        f'base = {name}.from_pretrained("{base.name}"{revision})',
    ]


def _code(*lines: str) -> str:
    imports = [line for line in lines if line.startswith("from ")]
    rest = [line for line in lines if not line.startswith("from ")]
    return "\n".join(["```python", *sorted(imports), "", *filter(None, rest), "```"])


def _joined(*parts: str) -> str:
    return "\n\n".join(parts)
