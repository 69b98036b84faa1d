"""Parts of the forward pass that LoRA does not have."""

from .reference import ReferenceVariant, attach_reference, detach_reference, reference_of

__all__ = ["ReferenceVariant", "attach_reference", "detach_reference", "reference_of"]
