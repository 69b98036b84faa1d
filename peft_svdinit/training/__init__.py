"""What recipes share: options, the base model and its tokenizer, and exactly labelled data."""

from .arguments import RecipeArguments
from .data import (
    DataOptions,
    completion_collator,
    load_examples,
    prepare_examples,
    tokenize_examples,
)
from .models import ModelOptions, load_model, load_tokenizer
from .options import parse_options, refusal

__all__ = [
    "DataOptions",
    "ModelOptions",
    "RecipeArguments",
    "completion_collator",
    "load_examples",
    "load_model",
    "load_tokenizer",
    "parse_options",
    "prepare_examples",
    "refusal",
    "tokenize_examples",
]
