"""Names that are strangers' words: in no report do they mean more than their characters."""

from __future__ import annotations

import ast
import re
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token
from support.comparison_runs import make_run

from peft_svdinit import LowRankFactors
from peft_svdinit.adapters.carried import Carried
from peft_svdinit.adapters.export.record import ExportedAdapter
from peft_svdinit.adapters.extraction.record import ExtractedAdapter
from peft_svdinit.adapters.merging.methods import MergeMethod
from peft_svdinit.adapters.merging.record import Merged, MergedLayer
from peft_svdinit.adapters.merging.report import merge_report
from peft_svdinit.adapters.record import KeptLayer
from peft_svdinit.analysis import (
    Stages,
    compare_masks,
    find_intruders,
    plot_loss_curve,
    write_factors_analysis,
    write_mask_comparison,
    write_mask_report,
)
from peft_svdinit.analysis.deltas.synthesis_plot import plot_synthesis
from peft_svdinit.analysis.evaluation import evaluation_report
from peft_svdinit.analysis.markdown import code, escaped, fenced, markdown_table
from peft_svdinit.analysis.runs.compare import compare_runs
from peft_svdinit.analysis.runs.continual import _by_scheme, _document, write_continual
from peft_svdinit.analysis.runs.document import comparison_document
from peft_svdinit.analysis.runs.figures import figure_files
from peft_svdinit.analysis.runs.markdown_report import markdown_report
from peft_svdinit.factors import Uncovered
from peft_svdinit.files import one_line, printable
from peft_svdinit.hub.artefact import KINDS, Artefact
from peft_svdinit.hub.base_model import BaseModel
from peft_svdinit.hub.card import card_data, card_text
from peft_svdinit.hub.card_merge import END, Card
from peft_svdinit.hub.figures import Figures
from peft_svdinit.masks import LoriMask

PARSER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
PARTS = (
    *("<img src=x onerror=alert(1)>", "<!-- -->", "</table>", "&lt;", "&#60;", "\n\n# heading\n\n"),
    *("[link](javascript:alert(1))", "![](http://tracker/x)", "https://e", "[x]: /y"),
    *("\n---\n", "\n===\n", "- ", "1) ", "> ", "`", "```\n", "~~~\n", "~~", "|", "\\", "**", "_"),
    *("\n| a | b |\n|---|---|\n", "\t", "$x$", "\x1b[2J", "\u202e", "\u200b", "\x00", "\ud800"),
    *(END, "{{ 7 * 7 }}", "'\"", "字", "q_proj", " ", "\r"),
)
# A dot ends a part of a layer's name, and tables name the last part.
letters = st.characters(exclude_characters=".")
names = st.lists(st.sampled_from(PARTS) | letters, min_size=1, max_size=5).map("".join)


def deltas(name: str, folder: Path, plots: bool = False) -> None:
    generator = torch.Generator().manual_seed(0)
    layers = {
        layer: LowRankFactors.from_delta(scale * torch.randn(6, 5, generator=generator), 3)
        for layer, scale in ((f"a.0.x{name}", 1.0), (f"a.1.x{name} zero", 0.0), ("a.2.third", 1.0))
    }
    intruders = [
        find_intruders(layer, *torch.randn(2, 6, 5, generator=generator), threshold=1.0)
        for layer in layers
    ]
    source = {"kind": name, "base_model_name_or_path": name, "uncovered": {name: 0.1}, name: 1}
    write_factors_analysis(
        layers, folder, rank=2, source={"source": source}, intruders=intruders, plots=plots
    )
    if plots:
        plot_synthesis(layers, layers, folder / "synthesis.png")


def of_deltas(name: str, folder: Path) -> str:
    deltas(name, folder)
    return (folder / "svd_analysis_rank2.md").read_text()


def a_mask(name: str) -> LoriMask:
    # The header of a file of tensors is UTF-8.
    layer = name.encode(errors="backslashreplace").decode()
    masks = {f"a.0.x{layer}": torch.eye(4, 3).bool(), "a.1.other": torch.ones(4, 3).bool()}
    about = {"density": 0.5, "source": {"kind": name, name: name}, "scope": name}
    return LoriMask.over(
        masks, dict.fromkeys(masks, 5), seed=0, base_model_name_or_path=name, **about
    )


def of_a_mask(name: str, folder: Path) -> str:
    write_mask_report(a_mask(name), folder, plots=False)
    return (folder / "mask_report.md").read_text()


def of_masks(name: str, folder: Path) -> str:
    masks = {f"{name}a": a_mask(name), "b": a_mask(name)}
    write_mask_comparison(compare_masks(masks), masks, folder, plots=False)
    return (folder / "mask_report.md").read_text()


def runs(name: str) -> list[Any]:
    swept = make_run("m", label=name, learning_rate=2e-3, sweep=True)
    return [make_run("random", label=name), make_run("m", label=name, world_size=2), swept]


def of_runs(name: str, folder: Path) -> str:
    comparison = compare_runs(runs(name))
    context = {"model": name, "dataset": name, "machine": name, "options": {name: name}}
    return markdown_report(comparison_document(comparison, context, figure_files(comparison)))


def stages(name: str) -> list[Stages]:
    losses = {stage: {"first": 1.0, "second": 2.0} for stage in ("base", "one", "two")}
    return [
        Stages(scheme, name, seed, losses, 1, 1, (1, 1), 0.5)
        for scheme in ("lora", name)
        for seed in (0, 1)
    ]


def of_stages(name: str, folder: Path) -> str:
    return markdown_report(_document(_by_scheme(stages(name)), {"model": name, name: name}))


def of_an_evaluation(name: str, folder: Path) -> str:
    rows = [
        {
            "name": name,
            "note": name,
            "parameters": 1,
            "loss": {"loss": 1.0, "loss_interval": None},
            "lm_eval": {f"{name} task": {f"{name},none": 0.5}},
        }
        for _ in range(3)
    ]
    return evaluation_report(
        {
            "model": {"model_name_or_path": name},
            "data": {name: {"dataset_name": name, "examples": name, "split_seed": 0}},
            "environment": {"versions": {name: name}},
            "command": name,
            "results": rows,
        }
    )


def of_a_merge(name: str, folder: Path) -> str:
    layer = MergedLayer(name, (4, 3), 2, 2, 1.0, 0.1, 0.0, ranks={0: 1, 1: 1}, pairs={})
    carried = Carried({name: "unknown"}, {}, (name,), {})
    respelled: Any = {name: SimpleNamespace(own=name, given=name)}
    merged = Merged(
        folder, (layer,), 14, (name, "b"), (1.0, 1.0), 14, {}, {name: [name]}, respelled, carried,
        (1.0, 1.0), (name,), MergeMethod("cat"), (),
    )  # fmt: skip
    return merge_report(merged)


def of_an_extraction(name: str, folder: Path) -> str:
    layer = KeptLayer(name, (4, 3), 3, 2, 1.0, 0.1, 0.0)
    exported = ExportedAdapter(folder, (layer,), 14, 2, ())
    text: Any = SimpleNamespace(
        sample="text", tokens=1, loss_base=1.0, loss_tuned=1.0, loss_adapted=1.0, kl_base=0.1,
        kl_adapted=0.1, never_called=(name,),
    )  # fmt: skip
    return ExtractedAdapter(
        folder, {"changed_settings": [name]}, exported, [name], [name], [Uncovered(name, 0.1)],
        None, text, [name], [name], 0.5,
    ).as_text()  # fmt: skip


def of_a_card(name: str, folder: Path) -> str:
    noted = {"parent_library": "transformers", "base_model_class": name}
    config = {"r": name, "lora_alpha": name, "auto_mapping": noted}
    options = {"config_class": "SvdLoraConfig", "svd_source": name, "svd_start": name}
    artefact = Artefact(folder, KINDS[0], (), {}, config, options)
    base = BaseModel("user/base", name, licence={"license_name": name})
    figures = Figures(
        markdown_table(["", "value"], [(name, name)]),
        command=f"train.py {name.replace(chr(39), '')!r}",
        facts={"dataset": name, name: name},
    )
    text = card_text(artefact, base, figures, "user/shared")
    card = Card().merged(card_data(artefact, base, figures), text, name)
    again = Card.read(card)
    assert again is not None and again.metadata["license_name"] == name
    assert Card.read(again.merged({"tags": []}, text, name)) is not None
    return again.body


WRITERS: dict[str, Callable[[str, Path], str]] = {
    writer.__name__: writer
    for writer in (
        *(of_deltas, of_a_mask, of_masks, of_runs, of_stages, of_an_evaluation, of_a_merge),
        *(of_an_extraction, of_a_card),
    )
}


def shape(tokens: list[Token]) -> list[str]:
    """The kinds of tokens, names as code or text alike."""
    found: list[str] = []
    for token in tokens:
        for kind in shape(token.children) if token.children else [token.type]:
            kind = "text" if kind in ("code_inline", "inline") else kind
            if kind != "text" or found[-1:] != ["text"]:
                found.append(kind)
    return found


def text_of(tokens: list[Token]) -> str:
    return "".join(text_of(t.children) if t.children else t.content for t in tokens)


@pytest.mark.parametrize("writer", WRITERS)
@settings(max_examples=8)
@given(name=names.filter(lambda name: name.strip()))
@example(name="".join(PARTS))
def test_a_name_changes_nothing_of_a_report_but_its_own_letters(writer, name, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    report, of_word = (WRITERS[writer](given, folder) for given in (name, "word"))
    found = PARSER.parse(report)
    assert shape(found) == shape(PARSER.parse(of_word))
    text = text_of(found)
    assert one_line(name) in text and printable(text) == text
    # Cells beyond those of the heading are dropped in silence; readers differ in what splits them.
    for table in (token for token in found if token.type == "table_open"):
        lines = report.splitlines()[slice(*table.map or ())]
        assert len({re.sub(r"\\.", "", line).count("|") for line in lines}) == 1
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


def test_code_in_a_card_holds_names_as_quoted_words_alone(tmp_path):
    def kinds(name: str) -> list[list[type]]:
        tokens = PARSER.parse(of_a_card(name, tmp_path))
        blocks = [ast.parse(token.content) for token in tokens if token.info == "python"]
        return [[type(node) for node in ast.walk(block)] for block in blocks]

    found = kinds('"); import os; os.abort() #\n```\n')
    assert found and found == kinds("name")


def test_figures_draw_a_name_letter_by_letter_and_of_a_long_one_its_end(tmp_path):
    name = f"{'_' * 5000}\n字$\\frac{{$\x1b\x00"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        deltas(name, tmp_path, plots=True)
        write_mask_report(a_mask(name), tmp_path)
        masks = {f"{name}a": a_mask(name), f"{name}b": a_mask(name)}
        write_mask_comparison(compare_masks(masks), masks, tmp_path)
        log = [{"step": step, "loss": 1.0, f"eval_{name}_loss": 1.0} for step in (1, 2)]
        plot_loss_curve(log, tmp_path / "loss.png", title=name)
        write_continual(stages(name), {}, tmp_path)
    for path in tmp_path.glob("*.png"):
        width, height = struct.unpack(">II", path.read_bytes()[16:24])
        assert max(width, height) < 4000, path.name


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("model.layers.0.q_proj", "model.layers.0.q_proj"),
        ("+0.01 of -0.5 to 1.5", "+0.01 of -0.5 to 1.5"),
        ("a | b\n_c_ <d>", r"a | b \_c\_ \<d\>"),
        ("me@x.org at www.x.org", r"me\@x.org at www\.x.org"),
        ("\x1b\u202e\xa0%", r"\\x1b\\u202e %"),
    ],
)
def test_text_is_marked_only_where_it_would_mean_something(text, shown):
    assert escaped(text) == escaped(escaped(text)) == shown


def test_code_and_cells_show_what_they_are_given():
    assert code("layers.0.q_proj") == "`layers.0.q_proj`"
    assert (code("a`b"), code(r"a\|b")) == (r"a\`b", r"a\\|b")
    assert markdown_table(["|"], [[code("a|b")], [r"\|"]]) == (
        "| \\| |\n| --- |\n| `a\\|b` |\n| \\\\\\| |"
    )
    assert fenced("a\n```\nb\x1b", "bash") == "````bash\na\n```\nb\\x1b\n````"
