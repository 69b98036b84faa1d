"""The task type that PEFT wants for a class of transformers."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

_ENDINGS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
# PEFT adds these to modules_to_save, by the ends of names, and loads no adapter without them.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def task_type_of(architecture: str, is_encoder_decoder: bool) -> str | None:
    """The task type by the name of a class; None for those that PEFT has no class of its own for.

    Args:
        architecture: a class of transformers, `LlamaForCausalLM` say.
        is_encoder_decoder: as in the model's configuration; models that read images are
            "ForConditionalGeneration" without it, and of no task type.
    """
    if architecture.endswith("ForConditionalGeneration") and is_encoder_decoder:
        return "SEQ_2_SEQ_LM"
    return next((task for end, task in _ENDINGS.items() if architecture.endswith(end)), None)


def heads_of(model: nn.Module, task_type: str | None) -> list[str]:
    """The modules that PEFT stores as a whole in every adapter of this task type."""
    ends = _HEADS.get(task_type or "", ())
    return [name for name, _ in model.named_modules() if ends and name.endswith(ends)]


def heads_of_task(model: nn.Module) -> list[str]:
    """The modules that PEFT stores as a whole in every adapter of the model's own task type."""
    return heads_of(model, _task_type_of_model(model))


def _task_type_of_model(model: nn.Module) -> str | None:
    """None of models of sound or pictures: the classes that PEFT has pass on `input_ids` alone."""
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        return None
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return task_type_of(type(model).__name__, encodes)


def loadable_task_type(
    model: nn.Module, task_type: str | None, replaced: Collection[str]
) -> str | None:
    """The task type for an adapter that replaces the modules `replaced`; "auto" is the model's.

    Where the adapter does not hold the heads that a task type demands, "auto" gives None: with
    that, PEFT loads the adapter around a model of any class and leaves the head as it is, or adapts
    it like other layers.

    Raises:
        ValueError: if another task type than "auto" demands a head that is not in `replaced`.
    """
    automatic = task_type == "auto"
    if automatic:
        task_type = _task_type_of_model(model)
    absent = [name for name in heads_of(model, task_type) if name not in replaced]
    if not absent:
        return task_type
    if automatic:
        return None
    raise ValueError(
        f"task_type={task_type!r}: PEFT loads such an adapter only if it replaces {absent[0]} as a "
        f"whole; give its tensors in modules_to_save and leave it out of the factors "
        f'(exclude_modules), or use task_type="auto"'
    )
