"""The base model of a run and its tokenizer: options, loading, and what is refused."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..files import opened
from .builtin.model import resolve_model
from .refusal import refused_as


@dataclass(frozen=True)
class ModelOptions:
    """The base model, and how it is loaded."""

    _argument_group_name = "model"

    model_name_or_path: str = field(
        default="builtin:smollm2-135m",
        metadata={"help": "Hub id or folder of a causal language model, or builtin:smollm2-135m"},
    )
    model_revision: str = field(
        default="main", metadata={"help": "branch, tag or commit of a model from the Hub"}
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="float32",
        metadata={"help": "type of the loaded weights; auto: as in the checkpoint"},
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "hold the linear layers in 4 bits (NF4, bitsandbytes)"}
    )
    load_in_8bit: bool = field(
        default=False, metadata={"help": "hold the linear layers in 8 bits (bitsandbytes)"}
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "sdpa, eager, flash_attention_2, ...; by default the model's own choice"},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "run Python code that comes with the checkpoint"}
    )

    def __post_init__(self) -> None:
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit exclude each other; set one of them")


def load_model(options: ModelOptions) -> PreTrainedModel:
    """The base model, from safetensors only.

    A quantised model is on the current device and not yet prepared for training
    (`peft.prepare_model_for_kbit_training`); any other is on the CPU.

    Raises:
        ValueError: if the model cannot be found, is an adapter, or has only pickled weights.
        ModuleNotFoundError: if quantisation is asked for without bitsandbytes.
    """
    source = checked_source(options)
    quantization = _quantization(options)
    try:
        with refused_as(f"model_name_or_path: cannot load {options.model_name_or_path!r}"):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                revision=options.model_revision,
                dtype=options.dtype if options.dtype == "auto" else getattr(torch, options.dtype),
                quantization_config=quantization,
                attn_implementation=options.attn_implementation,
                trust_remote_code=options.trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
            )
            model, found = loaded
    except ValueError as error:
        # A folder has been checked already.
        hint = "" if Path(source).is_dir() else f"\nIf {_pickle_remedy('it', source)}"
        raise ValueError(f"{error}{hint}") from error
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"model_name_or_path: the weights of {options.model_name_or_path!r} lack "
            f"{', '.join(missing[:3])} ({len(missing)} in all), which would be drawn at random: "
            "give a whole checkpoint of a causal language model"
        )
    return model


def load_tokenizer(options: ModelOptions) -> PreTrainedTokenizerBase:
    """The model's tokenizer; without a padding token of its own it pads with the end token.

    Raises:
        ValueError: if it cannot be found, or has no end-of-sequence token.
    """
    source = checked_source(options)
    where = f"model_name_or_path: cannot load the tokenizer of {options.model_name_or_path!r}"
    with refused_as(where):
        tokenizer = AutoTokenizer.from_pretrained(
            source,
            revision=options.model_revision,
            trust_remote_code=options.trust_remote_code,
        )
        tokenizer("a")  # What its configuration has wrong, text for a length say, shows in use.
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer of {options.model_name_or_path!r} has no end-of-sequence token, with "
            f"which completions must end; set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def checked_source(options: ModelOptions) -> str:
    """The folder or Hub id of the model.

    Raises:
        ValueError: if it is a folder that is not there, holds an adapter, or pickled weights only.
    """
    source = resolve_model(options.model_name_or_path)
    folder = Path(source)
    with refused_as("model_name_or_path"):
        is_folder, exists = folder.is_dir(), folder.exists()
    if not is_folder:
        if folder.is_absolute() or source.startswith((".", "~")) or exists:
            raise ValueError(f"model_name_or_path must be a folder or a Hub id, got {source!r}")
        return source
    if options.model_revision != "main":
        raise ValueError(
            f"model_revision={options.model_revision} is of a repository of the Hub, and "
            f"model_name_or_path={options.model_name_or_path} is a folder; leave it out"
        )
    files = {file.name for file in folder.iterdir()}
    if "adapter_config.json" in files and "config.json" not in files:
        raise ValueError(
            f"model_name_or_path: {source} holds an adapter; give its base model instead"
        )
    if "config.json" not in files:
        raise ValueError(
            f"model_name_or_path: {source} holds no model, it has no config.json; give the folder "
            "that save_pretrained wrote"
        )
    pickled = any(file.startswith("pytorch_model") and file.endswith(".bin") for file in files)
    if pickled and not any(file.endswith(".safetensors") for file in files):
        raise ValueError(f"model_name_or_path: {_pickle_remedy(source, source)}")
    for file in sorted(folder.glob("model*.safetensors")):
        with opened(file, "model_name_or_path"):
            pass  # The header tells whether it is whole.
    return source


def _pickle_remedy(subject: str, source: str) -> str:
    target = Path(source).name + "-safetensors"
    return (
        f"{subject} has only pickled weights, which can run code when they are read; if you trust "
        'them, convert them once: python -c "'
        "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
        f"M.from_pretrained('{source}', use_safetensors=False, dtype='auto')"
        f".save_pretrained('{target}'); "
        f"T.from_pretrained('{source}').save_pretrained('{target}')\""
    )


def _quantization(options: ModelOptions) -> BitsAndBytesConfig | None:
    if not (options.load_in_4bit or options.load_in_8bit):
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModuleNotFoundError(
            "load_in_4bit and load_in_8bit need bitsandbytes; "
            'run: pip install "peft-svdinit[quantization]"'
        )
    if options.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if options.dtype == "auto" else getattr(torch, options.dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
    )
