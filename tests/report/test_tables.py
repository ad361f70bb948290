"""Tables say what the reports hold, grouped or one by one."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from spp.certifying.scan import report_from_tensors
from spp.errors import SPPWarning
from spp.evaluation import PerplexityResult
from spp.merging.model import merge
from spp.merging.report import LayerMerge, MergeReport
from spp.pruning import LayerReport, PruneReport
from spp.report import Table, byte_text, kind_of, merge_table, prune_lines, prune_table, sparsity_table, time_text
from spp.wrapping.wrap import wrap
from tests.helpers.models import prune_nm_, tiny_llama


def test_columns_are_aligned_and_numbers_flush_right() -> None:
    table = Table("sizes", ("name", "size", "share"), (("a", "1", "0.5 … 0.7"), ("long name", "200", "–")))
    assert table.text() == (
        "sizes\n"
        "name       size      share\n"
        "---------  ----  ---------\n"
        "a             1  0.5 … 0.7\n"
        "long name   200          –"
    )
    assert table.markdown() == (
        "| name | size | share |\n| --- | --: | --: |\n| a | 1 | 0.5 … 0.7 |\n| long name | 200 | – |"
    )


def test_no_line_ends_in_blanks() -> None:
    text = Table("", ("a", "b"), (("x", ""), ("", "y"))).text()
    assert all(line == line.rstrip() for line in text.splitlines())
    assert text.startswith("a")


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="2 cells, not 1"):
        Table("t", ("a",), (("x", "y"),))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "self_attn.q_proj"),
        ("model.layers.12.mlp.experts.7.w1.weight", "w1"),
        ("lm_head.weight", "lm_head"),
        ("0.weight", "0"),
        ("model.layers.3.self_attn.q_proj.spp_alpha", "self_attn.q_proj.spp_alpha"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert kind_of(name) == kind


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.421, "0.42 s"), (12.34, "12.3 s"), (245.2, "4 min 05 s"), (3600, "60 min 00 s")]
)
def test_times(seconds: float, text: str) -> None:
    assert time_text(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(1 << 20, "1.0 MiB"), (3 << 29, "1.50 GiB"), (0, "0.0 MiB")])
def test_bytes(count: int, text: str) -> None:
    assert byte_text(count) == text


def test_sparsity_by_kind_and_one_by_one() -> None:
    weights = {
        "layers.0.q.weight": torch.tensor([[1.0, 0, 0, 2]]),
        "layers.1.q.weight": torch.tensor([[1.0, 3, 0, 2]]),
    }
    report = report_from_tensors((name, t, 1) for name, t in weights.items())
    grouped = sparsity_table(report)
    assert grouped.rows[0][:5] == ("q", "2", "1×4", "float32", "0.2500 … 0.5000")
    assert grouped.rows[-1][4] == "0.3750"
    listed = sparsity_table(report, every=True)
    assert [row[:5] for row in listed.rows] == [
        ("layers.0.q.weight", "1×4", "float32", "2", "0.5000"),
        ("layers.1.q.weight", "1×4", "float32", "1", "0.2500"),
    ]


def test_a_merge_adds_up() -> None:
    model = wrap(prune_nm_(tiny_llama()), r=4, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("spp_beta"):
                parameter.fill_(0.1)
    report = merge(model)
    grouped, listed = merge_table(report), merge_table(report, every=True)
    assert len(grouped.rows) == 8 and len(listed.rows) == 15
    assert grouped.rows[-1][2] == str(sum(int(row[2]) for row in listed.rows[:-1]))
    assert grouped.rows[-1] == listed.rows[-1]
    assert grouped.rows[0][0] == "self_attn.q_proj" and listed.rows[0][0] == "model.layers.0.self_attn.q_proj"


def test_a_merge_without_an_update_and_one_that_was_quantized_again() -> None:
    done = {"kept": 4, "rescued": 1, "max_relative_change": 0.25}
    trained = LayerMerge(**done, survived=0.75, update_norm=2.0, updated=4, moved=3)
    idle = LayerMerge(**done, survived=None, update_norm=0.0, updated=0, moved=0)
    zeros = report_from_tensors([("0.weight", torch.tensor([[1.0, 0, 0, 2]]), 1)])
    with pytest.warns(SPPWarning, match=r"left 75\.0% of the update"):
        report = MergeReport.from_layers({"0.a": idle, "0.b": trained}, zeros)
    assert report.survived == 0.75, "what has no update does not count"
    assert [row[4] for row in merge_table(report).rows] == ["no update", "0.7500", "0.7500"]
    with pytest.warns(SPPWarning, match="changes no weight: β is zero everywhere"):
        report = MergeReport.from_layers({"0.a": idle}, zeros, idle="β is zero everywhere")
    assert [row[4] for row in merge_table(report).rows] == ["no update", "no update"]
    again = replace(trained, survived=0.98, lost=2, requantize_error=0.5)
    with pytest.warns(SPPWarning, match=r"left 98\.0% of the update.*by 0\.50 times.*[Mm]erge without requantize"):
        report = MergeReport.from_layers({"0.a": idle, "0.b": again}, zeros, requantized=True)
    table = merge_table(report)
    assert table.columns[-2:] == ("lost", "error")
    assert [row[-2:] for row in table.rows] == [("0", "–"), ("2", "0.5000"), ("2", "0.5000")]
    assert "requantize error 0.5000" in repr(report)
    close = replace(again, requantize_error=0.3)
    assert MergeReport.from_layers({"0.b": close}, zeros, requantized=True).requantize_error == pytest.approx(0.3)


def _layer(**values: object) -> LayerReport:
    defaults = {"shape": (4, 8), "pattern": "2:4", "sparsity": 0.5, "sparsity_before": 0.0}
    return LayerReport(**{**defaults, "relative_error": 0.25, "tokens": 64, "seconds": 1.5, **values})


def _pruned(layers: dict[str, LayerReport], **values: object) -> PruneReport:
    defaults = {"method": "wanda", "pattern": "2:4", "sparsity": 0.5, "windows": 4, "seqlen": 16, "seed": 7}
    more = {"calibration": "a.txt", "owl": None, "sparsity_before": 0.125, "keeps_zeros": True, "seconds": 61.0}
    return PruneReport(layers=layers, **{**defaults, **more, **values})


def test_pruning_by_kind_and_one_by_one() -> None:
    layers = {
        "layers.0.up": _layer(),
        "layers.1.up": _layer(relative_error=0.5, seconds=0.5),
        "layers.0.down": _layer(relative_error=None, pattern="0.75", sparsity=0.75),
    }
    report = _pruned(layers, pattern={"down": "0.75", ".*": "2:4"})
    assert prune_table(report).text() == (
        "pruned by wanda to down=0.75, .*=2:4\n"
        "layer  layers  sparsity    pattern            error  seconds\n"
        "-----  ------  --------  ---------  ---------------  -------\n"
        "up          2    0.5000        2:4  0.2500 … 0.5000      2.0\n"
        "down        1    0.7500       0.75                       1.5\n"
        "all         3    0.5000  2:4, 0.75  0.2500 … 0.5000      3.5"
    )
    assert [row[0] for row in prune_table(report, every=True).rows] == [*layers, "all"]


def test_notes_have_a_column_where_there_are_some() -> None:
    layers = {f"layers.{i}.up": _layer(note="damping raised to 0.1" if i else "") for i in range(3)}
    layers["layers.0.down"] = _layer(note="no token")
    table = prune_table(_pruned(layers))
    assert table.columns[-1] == "notes"
    assert [row[-1] for row in table.rows] == [
        "damping raised to 0.1 (2)",
        "no token",
        "damping raised to 0.1 (2); no token (1)",
    ]


def test_many_fractions_are_their_range() -> None:
    layers = {f"layers.{i}.up": _layer(pattern=str(0.5 + i / 100)) for i in range(5)}
    assert prune_table(_pruned(layers)).rows[0][3] == "0.5000 … 0.5400"


@pytest.mark.parametrize(
    ("values", "lines"),
    [
        (
            {},
            [
                "calibration: 4 windows of 16 tokens from a.txt, seed 7",
                "zeros before: 0.1250 of the weights (4), all kept",
                "time: 1 min 01 s, with the forward passes",
            ],
        ),
        (
            {"windows": 0, "keeps_zeros": False, "already_sparser": 1, "owl": {"threshold": 5.0, "spread": 0.08}},
            [
                "OWL: blocks with more outliers keep more weights (threshold 5, spread 0.08)",
                "calibration: none",
                "zeros before: 0.1250 of the weights (4), weights like any other to this method; 1 of 1 layer had more "
                "than asked for",
                "time: 1 min 01 s",
            ],
        ),
        (
            {"windows": 1, "sparsity_before": 0.0},
            [
                "calibration: 1 window of 16 tokens from a.txt, seed 7",
                "zeros before: none",
                "time: 1 min 01 s, with the forward passes",
            ],
        ),
    ],
)
def test_what_the_table_leaves_out(values: dict[str, object], lines: list[str]) -> None:
    assert prune_lines(_pruned({"up": _layer(sparsity_before=0.125)}, **values)) == lines


ROOT = Path(__file__).resolve().parents[2]


def drawn_by_hand(source: str) -> bool:
    """Whether a file aligns columns, or draws the bars of a markdown table."""
    return re.search(r"[lr]just\b|['\"]\| ['\"]|--: \|", source) is not None


def test_every_table_is_a_table() -> None:
    assert drawn_by_hand("print(name.ljust(9))") and drawn_by_hand('"| " + " | ".join(row)')
    files = [path for folder in ("spp", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")]
    found = [path.relative_to(ROOT).as_posix() for path in files if drawn_by_hand(path.read_text(encoding="utf-8"))]
    assert found == ["spp/files/tables.py"]


NASTY = '<script>alert("1")</script>'


class _Parsed(HTMLParser):
    """The tags and the texts of a page; one that is not closed is in `open` at the end."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts += [data] if data.strip() else []


def test_a_notebook_shows_the_table_and_takes_nothing_in_it_for_html() -> None:
    table = Table(f"t {NASTY}", ("name & co", NASTY), ((NASTY, "1"), ("a\x00b\ud800", "–")))
    found = _Parsed(table._repr_html_())
    assert "script" not in found.tags and found.open == []
    assert found.texts == [f"t {NASTY}", "name & co", NASTY, NASTY, "1", "a\ufffdb\ufffd", "–"]
    assert found.tags.count("th") == 4 and found.tags.count("td") == 2, "the first cell of a row is its head"
    assert table.html().count('scope="col" style="text-align:right"') == 1, "numbers are flush right"


def test_reports_show_their_tables_in_a_notebook() -> None:
    zeros = report_from_tensors([(f"0.{NASTY}.weight", torch.tensor([[1.0, 0, 0, 2]]), 1)])
    pruned = _pruned({f"layers.0.{NASTY}": _layer()})
    done = LayerMerge(4, 0, 0.95, 0.25, 2.0, 4, 4)
    merged = MergeReport.from_layers({f"0.{NASTY}": done}, zeros)
    shown = [(zeros, sparsity_table(zeros)), (pruned, prune_table(pruned)), (merged, merge_table(merged))]
    for report, table in shown:
        assert report._repr_html_() == table.html()
        assert NASTY in " ".join(_Parsed(table.html()).texts) and "script" not in _Parsed(table.html()).tags
    texts = _Parsed(PerplexityResult(20.5, 3.02, 62, 2, None)._repr_html_()).texts
    assert texts == [
        "perplexity",
        "value",
        "perplexity",
        "20.5",
        "loss",
        "3.02",
        "tokens",
        "62",
        "windows",
        "2",
        "bos",
        "False",
    ]
