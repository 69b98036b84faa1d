"""Deltas read ahead of their factorisation, into a store."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor
from tqdm.auto import tqdm

from ..low_rank import LowRankFactors
from .layer_store import LayerStore


def fill_store(
    store: LayerStore,
    deltas: Mapping[str, Tensor],
    factorise: Callable[[str, Tensor], LowRankFactors],
    *,
    read_ahead: int = 1,
) -> None:
    """Factorise every delta that the store lacks; those it has are from the run before.

    Args:
        deltas: by module name, each made when it is read.
        read_ahead: threads that read, each holding one delta beside the one in work.

    Raises:
        ValueError: if `read_ahead` is below 1, or as reading and `factorise` do; layers done are
            kept.
    """
    if read_ahead < 1:
        raise ValueError(f"read_ahead must be at least 1, got {read_ahead}")
    missing = [name for name in deltas if name not in store]
    # disable=None: no bar where standard error is not a terminal.
    progress = tqdm(
        total=len(deltas),
        initial=len(deltas) - len(missing),
        desc="SVD of the deltas",
        unit="layer",
        disable=None,
    )
    waiting, readers_at_once = iter(missing), max(1, min(read_ahead, len(missing)))
    pending: deque[tuple[str, Future[Tensor]]] = deque()
    with progress, ThreadPoolExecutor(readers_at_once, thread_name_prefix="deltas") as readers:

        def read_next() -> None:
            name = next(waiting, None)
            if name is not None:
                pending.append((name, readers.submit(deltas.__getitem__, name)))

        for _ in range(readers_at_once):
            read_next()
        try:
            while pending:
                name, future = pending.popleft()
                delta = future.result()
                read_next()
                store.save(name, factorise(name, delta))
                progress.update()
        finally:
            for _, future in pending:
                future.cancel()
