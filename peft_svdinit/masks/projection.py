"""LoRI's frozen random A: the same bits for the same seed on every machine.

LoRI (arXiv 2504.07448, section 3.1) trains B over a random A that never changes. A mask of B means
something only beside the A it was made with, so A is a function of the seed and the layer's name.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

_HASH_LENGTH = 16


def random_projection(
    name: str, rank: int, in_features: int, seed: int
) -> Float[Tensor, "rank in"]:
    """A of a layer, uniform in ±1/√in_features as PEFT draws it, in float32.

    The entries come from the counter-based generator Philox 4x64 and exact arithmetic, so that they
    depend on no device, thread count or version of torch.

    Args:
        name: the layer's module name in the base model.
        rank, in_features: the shape.
        seed: of the whole adapter; layers of other names draw other numbers.
    """
    key = hashlib.sha256(f"lora_A:{seed}:{name}".encode()).digest()[:16]
    words = np.random.Philox(key=np.frombuffer(key, "<u8")).random_raw(rank * in_features)
    # 24 bits are what float32 holds: (k + 1/2) / 2²⁴ in (0, 1), moved to (−1, 1) without rounding.
    unit = ((words >> np.uint64(40)).astype(np.float64) + 0.5) / 2**23 - 1
    entries = torch.from_numpy(unit / math.sqrt(in_features)).float()
    return entries.reshape(rank, in_features)


def tensor_hash(tensor: Tensor) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a tensor's entries as float32."""
    content = tensor.detach().float().cpu().contiguous().numpy().tobytes()
    return hashlib.sha256(content).hexdigest()[:_HASH_LENGTH]


def is_same_projection(saved: Tensor, drawn: Tensor) -> bool:
    """Whether a saved A is the drawn one, in its own dtype or once rounded to a half precision."""
    return saved.shape == drawn.shape and any(
        torch.equal(saved.float().cpu(), drawn.to(dtype).float())
        for dtype in (saved.dtype, torch.bfloat16, torch.float16)
    )
