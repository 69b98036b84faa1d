"""What an extraction did, as JSON for programs and text for people."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...factors import Uncovered
from ..checking.layers import Verification
from ..checking.text import TextCheck
from ..export.record import ExportedAdapter, ExportedLayer

_WORST = 10


@dataclass(frozen=True)
class ExtractedAdapter:
    """A published adapter and everything that is known about it.

    Attributes:
        settings: what was asked for, as JSON values.
        exported: ranks, truncation and rounding errors of every layer.
        short: layers whose bound of energy or error needed more than the largest rank.
        uncovered: changed tensors that the adapter does not have.
        verification, text: what was measured on the written adapter, unless that was not asked for.
    """

    folder: Path
    settings: dict[str, Any]
    exported: ExportedAdapter
    short: list[str]
    uncovered: list[Uncovered]
    verification: Verification | None
    text: TextCheck | None

    @property
    def relative_error(self) -> float:
        """‖delta − adapter‖_F / ‖delta‖_F over all layers, rounding included."""
        layers = self.exported.layers.values()
        lost = math.fsum(layer.error**2 for layer in layers)
        return math.sqrt(lost / math.fsum(layer.norm**2 for layer in layers))

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        measured = self.verification.errors if self.verification else {}
        return {
            "format_version": 1,
            "settings": self.settings,
            "totals": {
                "layers": len(self.exported.layers),
                "rank": self.exported.rank,
                "energy_kept": self.exported.energy,
                "relative_error": self.relative_error,
                "relative_rounding_error": self.exported.relative_rounding_error,
                "verified_relative_error": (
                    self.verification.relative_error if self.verification else None
                ),
            },
            "text_check": asdict(self.text) if self.text else None,
            "zero_layers": [name for name, layer in self.exported.layers.items() if not layer.norm],
            "short_of_the_bound": self.short,
            "uncovered": {tensor.key: tensor.relative_change for tensor in self.uncovered},
            "layers": {
                name: {
                    "rank": layer.rank,
                    "norm": layer.norm,
                    "relative_error": _share(layer.error, layer),
                    "relative_truncation_error": _share(layer.truncation_error, layer),
                    "relative_rounding_error": _share(layer.rounding_error, layer),
                    "verified_relative_error": (
                        _share(measured[name], layer) if name in measured else None
                    ),
                }
                for name, layer in self.exported.layers.items()
            },
        }

    def as_text(self) -> str:
        """Markdown."""
        layers = self.exported.layers
        ranks = sorted({layer.rank for layer in layers.values() if layer.rank})
        span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        lines = [
            "# Extraction of an adapter",
            "",
            f"{len(layers)} linear layers, rank {span}. The adapter keeps "
            f"**{self.exported.energy:.2%}** of the energy Σ‖Δ‖² of the fine-tune: a relative "
            f"Frobenius error of {self.relative_error:.2%}, of which rounding to the stored "
            f"precision is {self.exported.relative_rounding_error:.2g}.",
            *self._paragraphs(),
            "",
            "## Layers that lose the most",
            "",
            "| layer | rank | ‖Δ‖ | relative error | rounding |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        worst = sorted(layers.items(), key=lambda item: -_share(item[1].error, item[1]))[:_WORST]
        lines += [
            f"| `{name}` | {layer.rank} | {layer.norm:.4g} | {_share(layer.error, layer):.2%} | "
            f"{_share(layer.rounding_error, layer):.2g} |"
            for name, layer in worst
        ]
        return "\n".join(lines) + "\n"

    def _paragraphs(self) -> list[str]:
        zero = sum(not layer.norm for layer in self.exported.layers.values())
        said = []
        if self.verification:
            said.append(
                "Verified: loaded through stock PEFT, every layer's update was compared with its "
                f"delta; the error measured over all is {self.verification.relative_error:.2%}."
            )
        else:
            said.append("Not verified.")
        if self.text:
            text = self.text
            said.append(
                f"On {text.tokens} tokens of {text.sample}: KL(tuned ‖ base) is {text.kl_base:.4g} "
                f"nats per token, KL(tuned ‖ base + adapter) {text.kl_adapted:.4g}; the loss is "
                f"{text.loss_base:.4f} of the base, {text.loss_tuned:.4f} of the tuned model, "
                f"{text.loss_adapted:.4f} of base + adapter."
            )
        if zero:
            said.append(f"{zero} layers did not change and are left alone.")
        if self.short:
            said.append(
                f"{len(self.short)} layers do **not** reach the bound within the largest rank, "
                f"`{self.short[0]}` the first."
            )
        if self.settings["changed_settings"]:
            named = ", ".join(f"`{name}`" for name in self.settings["changed_settings"])
            said.append(f"The configurations differ in what no adapter can carry: {named}.")
        if self.uncovered:
            named = ", ".join(f"`{tensor.key}`" for tensor in self.uncovered[:5])
            more = ", …" if len(self.uncovered) > 5 else ""
            said.append(
                f"**Not covered**: {len(self.uncovered)} tensors outside the linear layers changed "
                f"and are not in the adapter ({named}{more}); `modules_to_save` stores embeddings "
                "and norms whole."
            )
        return [line for sentence in said for line in ("", sentence)]


def _share(error: float, layer: ExportedLayer) -> float:
    return error / layer.norm if layer.norm else 0.0
