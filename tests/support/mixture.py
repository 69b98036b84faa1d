"""A model with one layer of each kind that PEFT can adapt."""

from __future__ import annotations

import torch
from torch import nn


class Mixture(nn.Module):
    """One layer of each kind that PEFT can adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.convolution = nn.Conv1d(8, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.linear = nn.Linear(8, 6)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.convolution(self.embedding(ids).mT).mT
        return self.linear(self.attention(x, x, x)[0])
