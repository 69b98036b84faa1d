"""What an extraction did, as JSON for programs and text for people."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...analysis import code, escaped, markdown_table
from ...factors import Uncovered
from ..checking.layers import Verification
from ..checking.text import TextCheck
from ..export.record import ExportedAdapter

_WORST = 10
# Share of the norm from which rounding is spoken of: a hundredth of the energy.
_NOTABLE = 0.1


@dataclass(frozen=True)
class ExtractedAdapter:
    """A published adapter and everything that is known about it.

    Attributes:
        settings: what was asked for, as JSON values.
        exported: ranks, truncation and rounding errors of every layer.
        short: layers whose bound of energy or error needed more than the largest rank.
        whole: modules that the adapter stores as the tuned model has them.
        uncovered: changed tensors that the adapter does not have.
        verification, text: what was measured on the written adapter, unless that was not asked for.
        rounded, rounded_tensors: layers, and tensors outside of these, that differ by the rounding
            of a cast alone and count as unchanged.
        rounding_share: estimated share of the norm of all deltas that is the rounding of base or
            tuned alone to a coarser dtype.
    """

    folder: Path
    settings: dict[str, Any]
    exported: ExportedAdapter
    short: list[str]
    whole: list[str]
    uncovered: list[Uncovered]
    verification: Verification | None
    text: TextCheck | None
    rounded: list[str]
    rounded_tensors: list[str]
    rounding_share: float

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        measured = self.verification.errors if self.verification else {}
        exported = self.exported
        return {
            "format_version": 1,
            "settings": self.settings,
            "totals": {
                "layers": len(exported.layers),
                "rank": exported.rank,
                "energy_kept": exported.energy,
                "rounding_share": self.rounding_share,
                "relative_error": exported.relative_error,
                "relative_rounding_error": exported.relative_rounding_error,
                "verified_relative_error": (
                    self.verification.relative_error if self.verification else None
                ),
            },
            "text_check": asdict(self.text) if self.text else None,
            "zero_layers": exported.zero_layers,
            "unchanged_but_for_rounding": [*self.rounded, *self.rounded_tensors],
            "short_of_the_bound": self.short,
            "stored_whole": self.whole,
            "uncovered": {tensor.key: tensor.relative_change for tensor in self.uncovered},
            "layers": {
                layer.name: {
                    "rank": layer.rank,
                    "norm": layer.norm,
                    "relative_error": layer.relative_error,
                    "relative_truncation_error": layer.relative(layer.truncation_error),
                    "relative_rounding_error": layer.relative(layer.rounding_error),
                    "verified_relative_error": (
                        layer.relative(measured[layer.name]) if layer.name in measured else None
                    ),
                }
                for layer in exported.layers
            },
        }

    def as_text(self) -> str:
        """Markdown."""
        rows = [
            (
                code(layer.name),
                str(layer.rank),
                f"{layer.norm:.4g}",
                f"{layer.relative_error:.2%}",
                f"{layer.relative(layer.rounding_error):.2g}",
            )
            for layer in self.exported.worst(_WORST)
        ]
        paragraphs = [
            "# Extraction of an adapter",
            escaped(self.exported.in_words()),
            *self._paragraphs(),
            "## Layers that lose the most",
            markdown_table(("layer", "rank", "‖Δ‖", "relative error", "rounding"), rows),
        ]
        return "\n\n".join(paragraphs) + "\n"

    def _paragraphs(self) -> list[str]:
        said, zero = [], self.exported.zero_layers
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
        if self.text and self.text.never_called:
            named = self.text.never_called
            said.append(
                f"**{len(named)} adapted layers were never called on the text**, {code(named[0])} "
                "the first: where the model reads their weights directly, the adapter works only "
                "once it is merged."
            )
        if zero:
            said.append(f"{len(zero)} layers did not change and are left alone.")
        if self.rounded or self.rounded_tensors:
            said.append(
                f"{len(self.rounded)} layers and {len(self.rounded_tensors)} other tensors differ "
                "from the base's by rounding from one dtype to another alone; they count as "
                "unchanged."
            )
        if self.rounding_share >= _NOTABLE:
            said.append(
                f"About {self.rounding_share:.0%} of the norm of the deltas is rounding: base and "
                "tuned went through different dtypes. It has full rank, and energy and error "
                "count it: a rank or a larger error is the better rule here."
            )
        if self.short:
            said.append(
                f"{len(self.short)} layers do **not** reach the bound within the largest rank, "
                f"{code(self.short[0])} the first."
            )
        if self.whole:
            named = ", ".join(map(code, self.whole))
            said.append(f"Stored whole, as the tuned model has them: {named}.")
        if self.settings["changed_settings"]:
            named = ", ".join(map(code, self.settings["changed_settings"]))
            said.append(f"The configurations differ in what no adapter can carry: {named}.")
        if self.uncovered:
            named = ", ".join(code(tensor.key) for tensor in self.uncovered[:5])
            more = ", …" if len(self.uncovered) > 5 else ""
            said.append(
                f"**Not covered**: {len(self.uncovered)} tensors outside the linear layers changed "
                f"and are not in the adapter ({named}{more}); `modules_to_save` stores embeddings "
                "and norms whole."
            )
        return said
