"""Running a model that ZeRO-3 has split without an engine around it, one layer whole at a time.

The hooks that fetch parameters are the engine's; a model that was just loaded has none, and an
adapter's factors are taken before there is an engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from .sharding import gathered, is_of_zero, reshard


@contextmanager
def layers_gathered(model: nn.Module) -> Iterator[None]:
    """Within, the model can be called, and gradients passed back through it, by all processes.

    Gradients reach what layers are given, not the parameters of ZeRO-3, which must be frozen.

    Each module's own parameters are gathered for its forward pass, and each once more when an
    operation's backward pass asks for it. Parameters that were whole stay so, as those that an
    engine fetches do. FSDP2 fetches for itself; its outermost parameters are put back.

    Memory: one layer; with gradient checkpointing, in the backward pass, one checkpointed block.

    Raises:
        RuntimeError: if a parameter of ZeRO-3 is trainable, or if a pass through a model split by
            it fails in torch, as it does where a module reads the weight of another.
    """
    reshard(model)
    owners: dict[nn.Module, dict[str, Tensor]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not is_of_zero(parameter):
                continue
            if parameter.requires_grad:
                raise RuntimeError(
                    f"parameter {name} of {path or type(model).__name__} is split by ZeRO-3 and "
                    "requires a gradient, which would not reach it here; freeze it by "
                    "requires_grad_(False)"
                )
            owners.setdefault(module, {})[name] = parameter
    lent = _Lent()
    handles = []
    for module, own in owners.items():
        before, after = lent.hooks(module, own)
        handles.append(module.register_forward_pre_hook(before))
        handles.append(module.register_forward_hook(after, always_call=True))
    try:
        if owners:
            with saved_tensors_hooks(lent.pack, lent.unpack):
                yield
        else:
            yield
    except (RuntimeError, IndexError) as error:
        # Errors of torch itself; its subclasses, out of memory say, speak for themselves.
        if not owners or type(error) not in (RuntimeError, IndexError):
            raise
        raise RuntimeError(
            f"{type(model).__name__} failed in a pass through its layers, split by ZeRO-3, which "
            "most likely means that it reads weights outside of the layers that own them, where "
            "they are empty; make the factors on a whole model and save them to a file, or start "
            'from its weights by svd_source="weight"'
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        reshard(model)


class _Piece(NamedTuple):
    """What autograd keeps of a parameter in the place of its numbers."""

    parameter: Tensor
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class _Lent:
    """The parameters that are whole at present because a module of theirs is running."""

    def __init__(self) -> None:
        self._by_storage: dict[int, Tensor] = {}

    def hooks(self, owner: nn.Module, own: dict[str, Tensor]) -> tuple[Any, Any]:
        """To be called before and after the forward pass of the module whose own these are."""
        running: list[ExitStack] = []

        def before(module: nn.Module, args: tuple) -> None:
            running.append(ExitStack())
            for name, parameter in own.items():
                # One by one, so that each has a storage of its own.
                running[-1].enter_context(self._one(owner, name, parameter))

        def after(module: nn.Module, args: tuple, output: Any) -> None:
            if running:  # A hook before ours may have failed.
                running.pop().close()

        return before, after

    @contextmanager
    def _one(self, owner: nn.Module, name: str, parameter: Tensor) -> Iterator[None]:
        if parameter.numel():
            yield
            return
        with gathered([parameter]):
            storage = parameter.untyped_storage().data_ptr()
            self._by_storage[storage] = parameter
            # Checkpointing keeps the tensors that a layer computes with themselves, and the
            # parameter is to be empty again.
            lent: Any = parameter.detach()
            owner._parameters[name] = lent
            del lent
            try:
                yield
            finally:
                owner._parameters[name] = parameter  # pyright: ignore[reportArgumentType]
                del self._by_storage[storage]

    def pack(self, tensor: Tensor) -> Tensor | _Piece:
        """Keep no numbers of a parameter that is to be released."""
        parameter = self._by_storage.get(tensor.untyped_storage().data_ptr())
        if parameter is None:
            return tensor
        offset = int(tensor.storage_offset() - parameter.storage_offset())
        return _Piece(parameter, tuple(tensor.shape), tensor.stride(), offset)

    def unpack(self, packed: Tensor | _Piece) -> Tensor:
        """The numbers again; they last as long as the operation that asks for them."""
        if isinstance(packed, Tensor):
            return packed
        parameter, size, stride, offset = packed
        with gathered([parameter]):
            data = parameter.detach()
            return data.as_strided(size, stride, data.storage_offset() + offset)
