from __future__ import annotations

import json
import math
import re
import struct
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support.comparison_runs import CONTEXT, COUNTED, curve, make_run, whole_experiment

from peft_svdinit.analysis import write_comparison
from peft_svdinit.analysis.markdown import escaped
from peft_svdinit.analysis.runs.compare import compare_runs
from peft_svdinit.analysis.runs.limits import limits
from peft_svdinit.analysis.runs.output import ComparisonPaths
from peft_svdinit.analysis.runs.panels import compact, method_styles, short_label
from peft_svdinit.training import TRAINING_LOG, TrainingLog, read_run, write_run_info

SECTIONS = [
    "Results",
    "Equal student steps",
    "Equal total budget",
    "A teacher that exists already",
    "Figures",
    "Limits",
    "Learning-rate sweep",
    "Cost",
    "Every seed",
    "Settings",
]
HOSTILE = '<script>alert("1")</script> & $x_1$ | `a` *b* [c](d) --> \x1b\u202e'


class Elements(HTMLParser):
    """All start tags with their attributes, and whether every element was closed."""

    VOID = ("meta", "br", "link", "img", "input", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> ComparisonPaths:
    return write_comparison(whole_experiment(), CONTEXT, tmp_path_factory.mktemp("comparison"))


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_all_files_are_written_and_nothing_else(written):
    names = {path.name for path in written.report.parent.iterdir()}
    assert names == {
        "comparison_report.md",
        "comparison.json",
        "comparison.html",
        "loss_curves.png",
        "loss_curves_late.png",
        "final_loss.png",
        "differences.png",
        "learning_rates.png",
    }
    assert {path.name for path in written.figures} == {n for n in names if n.endswith(".png")}


def test_figures_are_pictures_of_a_readable_size(written):
    for path in written.figures:
        content = path.read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", content[16:24])
        assert width >= 1000 and height >= 250


def test_report_and_page_have_the_same_sections_and_the_report_refers_to_every_figure(written):
    text = text_of(written.report)
    assert re.findall(r"^## (.*)$", text, flags=re.MULTILINE) == SECTIONS
    for path in written.figures:
        assert f"]({path.name})" in text
    page = text_of(written.page)
    assert re.findall(r"<(?:h2|summary)>(.*?)</", page) == SECTIONS


def test_tables_of_the_report_are_rectangular(written):
    blocks = re.findall(r"(?:^\|.*\|\n?)+", text_of(written.report), flags=re.MULTILINE)
    assert len(blocks) >= 7
    for block in blocks:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.strip().split("\n")}
        assert len(widths) == 1


def test_the_page_needs_nothing_but_itself(written):
    text = text_of(written.page)
    assert text.startswith("<!DOCTYPE html>")
    assert "http:" not in text and "https:" not in text and "//" not in text
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    elements = Elements(text)
    assert not elements.open
    for tag, attributes in elements.tags:
        assert tag not in ("script", "link", "img", "iframe", "object", "base")
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
    assert sum(tag == "figure" for tag, _ in elements.tags) == 7


def test_figures_of_the_page_take_the_colour_of_its_text_and_share_no_ids(written):
    text = text_of(written.page)
    assert "currentColor" in text and "#010203" not in text
    svgs = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    ids = [set(re.findall(r'\bid="(?!\w+_\d+")([^"]*)"', svg)) for svg in svgs]
    clips = [{name for name in found if name.startswith("p")} for found in ids]
    together = [name for found in clips for name in found if len(name) > 8]
    assert len(together) == len(set(together))


def test_report_and_page_state_the_same_numbers(written):
    report, page = text_of(written.report), text_of(written.page)
    numbers = json.loads(text_of(written.numbers))
    assert numbers["headline"] in page
    for method in numbers["methods"]:
        mean = f"{method['final']['mean']:#.4g}"
        assert mean in report and mean in page


def test_json_holds_all_numbers_and_the_context(written):
    numbers = json.loads(text_of(written.numbers))
    assert numbers["context"] == CONTEXT
    assert [table["name"] for table in numbers["tables"]] == [
        "equal_steps",
        "equal_budget",
        "sunk_teacher",
    ]
    row = numbers["tables"][0]["rows"][0]
    assert row["result"]["outcome"] == "lower" and row["verdict"] == "lower (better)"
    assert len(numbers["trials"]) == len(whole_experiment())
    assert numbers["trials"][0]["evaluations"][0]["step"] == 0


def test_equal_input_gives_equal_files(written, tmp_path):
    again = write_comparison(whole_experiment(), CONTEXT, tmp_path / "new" / "folder")
    for path in (written.report, written.numbers, written.page, *written.figures):
        assert path.read_bytes() == (again.report.parent / path.name).read_bytes(), path.name


def test_labels_are_escaped_everywhere(tmp_path):
    runs = [
        make_run("random", label=HOSTILE, losses=(2.0, 1.0)),
        make_run("_svd", label="_" + HOSTILE, losses=(2.0, math.nan)),
        make_run("third", label="<b>", losses=(2.0, 0.9)),
    ]
    paths = write_comparison(runs, {"model": "<i>m</i>", "dataset": HOSTILE}, tmp_path)
    page, report = text_of(paths.page), text_of(paths.report)
    elements = Elements(page)
    assert not elements.open
    assert not {"script", "i", "b"} & {tag for tag, _ in elements.tags}
    assert "&lt;script&gt;" in page and r"\x1b\u202e" in page and "\x1b" not in page
    assert not re.findall(r"(?<!\\)[<>`]", report)


def test_warnings_stand_in_all_three_outputs(tmp_path):
    runs = [
        make_run("random", 0, (2.0, 1.0)),
        make_run("random", 1, (2.0, 1.0)),
        make_run("eva", 0, (2.0, math.nan), world_size=2),
    ]
    paths = write_comparison(runs, {}, tmp_path)
    warnings = json.loads(text_of(paths.numbers))["warnings"]
    assert len(warnings) == 3
    for warning in warnings:
        assert escaped(warning) in text_of(paths.report)
        assert warning in text_of(paths.page)
    assert 'class="warnings"' in text_of(paths.page)


def test_a_fair_comparison_has_no_warning_block(written):
    assert 'class="warnings"' not in text_of(written.page)
    assert "reservations" not in text_of(written.report)


def test_an_invalid_comparison_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="reference"):
        write_comparison([make_run("eva")], CONTEXT, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_seed_without_teachers_context_or_tokens_is_still_a_report(tmp_path):
    runs = [make_run(name, extra={}, name=name, tokens=None) for name in ("random", "mine")]
    for run in runs:
        for row in run.log:
            row["tokens"] = None
    paths = write_comparison(runs, {}, tmp_path)
    text = text_of(paths.report)
    assert "\u00b1" not in text.split("Final eval loss: mean")[0]
    assert "fewer than 3 seeds: no test" in text
    assert "One seed per method" in text
    assert "by total steps" in text_of(paths.page)


def test_the_only_method_may_be_the_reference(tmp_path):
    paths = write_comparison([make_run("random")], {}, tmp_path)
    assert "nothing to compare" in text_of(paths.report)
    assert not (tmp_path / "differences.png").exists()


def test_a_synthesised_teacher_is_said_not_to_be_a_fine_tune(written):
    for path in (written.report, written.page):
        text = text_of(path)
        assert "synthesised from a trained LoRA and is no full fine-tune" in text
        assert "97.3" in text


def test_a_full_teacher_states_the_energy_lost_by_truncation():
    full = {**COUNTED, "kind": "full"}
    comparison = compare_runs([make_run("random"), make_run("svd_delta", teacher=full)])
    text = limits(comparison, {"energy_kept_mean": 0.76})
    assert "full fine-tune" in text and "loses 24.0" in text
    assert "not stated" in limits(comparison, {})
    without = limits(compare_runs([make_run("random")]), {"energy_kept_mean": 0.5})
    assert "teacher" not in without and "energy" not in without


def test_limits_name_scale_seeds_teachers_and_rates():
    comparison = compare_runs([make_run("random", total_parameters=5_000_000), make_run("eva")])
    text = limits(comparison, CONTEXT)
    for part in (
        "60 steps and 60,000 tokens",
        "5 M parameters",
        "One seed per method",
        "not swept",
    ):
        assert part in text
    assert "Holm" not in text
    swept = limits(compare_runs(whole_experiment()), CONTEXT)
    for part in ("3 seeds", "Learning rates were chosen", "Not swept: \u201crandom, total budget"):
        assert part in swept
    assert "empty optimizer" in swept and "cost is unknown" not in swept


def test_limits_say_that_nothing_passed_the_correction_and_which_teacher_cost_is_unknown():
    unknown = {"kind": "given", "steps": None, "tokens": None, "seconds": None, "sunk": True}
    runs = [make_run("random", seed) for seed in range(3)]
    runs += [
        make_run("svd", seed, (2.0, 1.5, 1.2, end), teacher=unknown)
        for seed, end in enumerate((0.9, 1.1, 1.05))
    ]
    text = limits(compare_runs(runs), {})
    assert "No difference passed" in text and "cost is unknown for svd" in text


def test_the_start_shows_the_share_of_the_progress_and_the_sweep_its_doubts(written):
    text = text_of(written.report)
    assert "| 1.060 (90 %) |" in text
    assert "| used |" in text and "| lowest |" in text and "used, lowest" in text


def test_a_method_keeps_one_style_and_no_two_share_one():
    runs = [make_run("random"), *(make_run(f"method {n}") for n in range(12))]
    styles = method_styles(compare_runs(runs))
    assert len(set(styles.values())) == 13
    assert styles["random"].color is None
    fewer = method_styles(compare_runs(runs[:4]))
    assert all(styles[name] == style for name, style in fewer.items())


def test_labels_of_figures_are_plain_and_short():
    assert short_label("_a $b$") == r" _a \$b\$"
    wrapped = short_label("word " * 40, 20, lines=2)
    assert wrapped.count("\n") == 1 and wrapped.endswith("\u2026")
    assert short_label("") == ""


def test_counts_on_axes_are_compact():
    assert [compact(n) for n in (0, 500, 1500, 2_000_000)] == ["0", "500", "1.5k", "2M"]


def test_runs_read_from_disk_compare_like_those_in_memory(tmp_path):
    runs = whole_experiment((0, 1, 2))
    for run in runs:
        folder = tmp_path / run.directory
        folder.mkdir(parents=True)
        TrainingLog(folder / TRAINING_LOG, run.log)
        write_run_info(folder, run.info)
    read = [read_run(tmp_path / run.directory) for run in runs]
    assert compare_runs(read) == compare_runs(runs)


def test_a_second_half_of_one_evaluation_has_no_figure_of_its_own(tmp_path):
    paths = write_comparison([make_run("random", losses=(2.0, 1.0))], {}, tmp_path)
    assert [path.name for path in paths.figures] == ["loss_curves.png", "final_loss.png"]


def test_many_methods_and_evaluations_are_drawn(tmp_path):
    runs = [make_run("random", losses=curve(2.0, 1.0, 60), every=1)]
    runs += [
        make_run(f"m{n}", losses=curve(2.0, 1.0 + n / 50, 60), every=1, label=f"method {n} " * 5)
        for n in range(8)
    ]
    assert len(write_comparison(runs, CONTEXT, tmp_path).figures) == 4
