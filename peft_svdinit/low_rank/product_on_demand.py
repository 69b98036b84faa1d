"""A product of two matrices that is formed when its entries are asked for, and only then."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

# What models ask of a weight that they do not multiply by: none of it needs an entry.
_DESCRIPTIONS = {
    *(
        getattr(torch.Tensor, name).__get__
        for name in ("dtype", "device", "shape", "requires_grad", "ndim", "layout", "is_meta")
    ),
    *(getattr(torch.Tensor, name) for name in ("size", "dim", "numel", "is_floating_point")),
}
# Of these a model may ask before it changes what it gets.
_DETACHED = {torch.Tensor.data.__get__, torch.Tensor.detach}  # pyright: ignore
# `weight[0] = x`, `weight.data = x` and `weight += x`.
_OPERATORS = "add sub mul div truediv floordiv mod pow and or xor lshift rshift".split()
_ASSIGNMENTS = {"__setitem__", "__set__", *(f"__i{name}__" for name in _OPERATORS)}


class ProductOnDemand(torch.Tensor):
    """Stands in for what `form()` returns; any use but its dtype, device or shape calls that.

    Many models read `layer.weight.dtype` in every forward pass, which is to cost nothing. Whatever
    is computed with it is computed with the real product, whose gradients reach the factors.
    """

    form: Callable[[], Tensor]
    # Or transformers, having read the factors, would draw it at random.
    _is_hf_initialized = True

    @staticmethod
    def of(
        form: Callable[[], Tensor], shape: Iterable[int], like: Tensor, *, trained: bool = True
    ) -> Tensor:
        """A stand-in for a tensor of this shape, of the dtype and device of `like`."""
        if torch.compiler.is_compiling():
            return form()  # A compiler drops what nobody uses.
        stand_in = torch.Tensor._make_wrapper_subclass(
            ProductOnDemand,
            tuple(shape),
            dtype=like.dtype,
            device=like.device,
            requires_grad=trained and like.requires_grad,
        )
        stand_in.form = form
        return stand_in

    @classmethod
    def __torch_function__(
        cls,
        func: Callable,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _DESCRIPTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func in _DETACHED:
            form, shape = args[0].form, args[0].shape
            return cls.of(lambda: form().detach(), shape, args[0], trained=False)
        name = getattr(func, "__name__", "")
        named = kwargs or {}
        changed = _works_in_place(name) and _products(args[:1] or named)
        if changed or _products(named.get("out")):
            raise RuntimeError(
                f"{name} would change a product that nobody keeps; change the U and Vh of the "
                "LowRankLinear"
            )
        return _with_products(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Reached only where __torch_function__ is switched off.
        return _with_products(func, args, kwargs)


def _works_in_place(name: str) -> bool:
    return name in _ASSIGNMENTS or (name.endswith("_") and not name.endswith("__"))


def _products(values: Any) -> list[ProductOnDemand]:
    return [each for each in tree_leaves(values) if isinstance(each, ProductOnDemand)]


def _with_products(func: Callable, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> Any:
    formed: Any = tree_map_only(ProductOnDemand, lambda each: each.form(), (args, kwargs or {}))
    return func(*formed[0], **formed[1])
