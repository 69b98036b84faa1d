"""Covariances of what the layers of a model are given, one for all layers given the same tensor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from tqdm.auto import tqdm

from .batches import Batch, on_device
from .covariance import InputCovariance
from .targets import (
    TargetLayer,
    first_input,
    groups_within,
    input_device,
    reading,
)

Positions = Literal["attended", "labelled"]
POSITIONS: tuple[Positions, ...] = get_args(Positions)
_IGNORED_LABEL = -100


def input_covariances(
    model: nn.Module,
    layers: Mapping[str, TargetLayer],
    batches: Sequence[Batch],
    *,
    centred: bool,
    positions: Positions,
    memory_gb: float,
) -> Iterator[tuple[list[TargetLayer], Float[Tensor, "in in"]]]:
    """Layers that are given the same inputs, with the covariance of these over all batches.

    As many covariances as fit into `memory_gb`, at least one, are summed up in one pass over the
    batches; the others follow in further passes. Each belongs to the caller once it is yielded.

    Raises:
        ValueError: if positions cannot be told apart, or `memory_gb` is not positive.
        RuntimeError: if a layer was given no input.
    """
    sizes = {name: 4 * layer.in_features**2 for name, layer in layers.items()}
    sums = _Sums(model, layers, centred, positions)
    with tqdm(total=len(batches), desc="Activations", unit="batch", disable=None) as progress:
        sums.admit_within(sizes, memory_gb)
        sums.read(batches[:1], progress.update)
        sharing = sums.settle()
        waiting = {name: sizes[name] for name in sharing if name not in sums.covariances}
        groups = groups_within(waiting, memory_gb)
        progress.reset(total=len(batches) * (1 + len(groups)))
        progress.update()
        sums.read(batches[1:], progress.update)
        yield from sums.taken(sharing)
        for group in groups:
            sums.admit(group)
            sums.read(batches, progress.update)
            yield from sums.taken(sharing)


class _Sums:
    """The covariances of one pass, and in the first batch who is given what."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, TargetLayer],
        centred: bool,
        positions: Positions,
    ) -> None:
        self.covariances: dict[str, InputCovariance] = {}
        self._model, self._layers = model, layers
        self._centred = centred
        self._positions: Positions = positions
        self._mask: Bool[Tensor, "batch length"] | None = None
        # Owners of the inputs of each call, while it is not settled who shares.
        self._calls: defaultdict[str, list[str]] | None = None
        self._seen = WeakIdKeyDictionary()
        self._room: tuple[Mapping[str, int], float] = ({}, 0.0)

    def admit(self, names: Sequence[str]) -> None:
        self.covariances = {name: InputCovariance(centred=self._centred) for name in names}

    def admit_within(self, sizes: Mapping[str, int], memory_gb: float) -> None:
        """Admit layers as they come, if their input is new, until the memory is used up."""
        groups_within(sizes, memory_gb)  # Checks the argument.
        self._calls = defaultdict(list)
        self._room = (sizes, memory_gb * 2**30)

    def settle(self) -> dict[str, list[TargetLayer]]:
        """Each layer whose input nobody had before, with those always given the same as it."""
        calls, self._calls = self._calls or {}, None
        sharing: dict[str, list[TargetLayer]] = defaultdict(list)
        for name, layer in self._layers.items():
            owner = next(iter(calls.get(name, ())), name)
            follows = set(calls.get(name, ())) == {owner} and calls.get(owner) == calls.get(name)
            sharing[owner if follows else name].append(layer)
        return dict(sharing)

    def read(self, batches: Sequence[Batch], progress: Callable[[], object]) -> None:
        """Add the inputs of the admitted layers."""
        watched = self._layers if self._calls is not None else self.covariances
        handles = [
            self._layers[name].module.register_forward_pre_hook(self._hook(name), with_kwargs=True)
            for name in watched
        ]
        device = input_device(self._model)
        try:
            with reading(self._model), torch.no_grad():
                for batch in batches:
                    self._mask = _mask(batch, self._positions, device)
                    self._model(**on_device(batch, device))
                    progress()
        finally:
            for handle in handles:
                handle.remove()

    def taken(
        self, sharing: Mapping[str, list[TargetLayer]]
    ) -> Iterator[tuple[list[TargetLayer], Tensor]]:
        """The finished covariances, each given away."""
        for name in list(self.covariances):
            covariance = self.covariances.pop(name)
            if not covariance.count:
                raise RuntimeError(
                    f"layer {name} was given no input by any batch; leave it out of "
                    "target_modules, or use more batches"
                )
            yield sharing[name], covariance.take()

    def _hook(self, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = first_input(args, kwargs).detach()
            if self._calls is not None:
                self._note(name, first_input(args, kwargs))
            if name in self.covariances:
                self.covariances[name].add(_rows(x, self._mask, name))

        return hook

    def _note(self, name: str, x: Tensor) -> None:
        assert self._calls is not None
        # The same tensor changed in place between two layers is another input.
        held = self._seen.get(x)
        owner = held[0] if held is not None and held[1] == x._version else name
        self._seen[x] = (owner, x._version)
        sizes, room = self._room
        used = sum(sizes[admitted] for admitted in self.covariances)
        fits = not self.covariances or used + sizes[name] <= room
        if owner == name and not self._calls[name] and fits:
            self.covariances[name] = InputCovariance(centred=self._centred)
        self._calls[name].append(owner)


def _mask(
    batch: Batch, positions: Positions, device: torch.device
) -> Bool[Tensor, "batch length"] | None:
    """Which positions count; None if all do."""
    attended = batch.get("attention_mask")
    mask = None if attended is None else attended.to(device).bool()
    if positions == "labelled":
        if batch.get("labels") is None:
            raise ValueError('batches must hold labels with positions="labelled"')
        labelled = batch["labels"].to(device) != _IGNORED_LABEL
        mask = labelled if mask is None else mask & labelled
    return None if mask is None or bool(mask.all()) else mask


def _rows(
    x: Float[Tensor, "... in"], mask: Bool[Tensor, "batch length"] | None, name: str
) -> Float[Tensor, "tokens in"]:
    flat = x.reshape(-1, x.shape[-1])
    if mask is None:
        return flat
    if len(flat) != mask.numel():
        raise ValueError(
            f"layer {name} is given {len(flat)} rows for a batch of {mask.numel()} positions, so "
            "that padding cannot be told apart; use batches without padding, or leave it out of "
            "target_modules"
        )
    return flat[mask.reshape(-1)]
