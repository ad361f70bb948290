"""The heat map: which weight is in which cell, whatever a model calls its layers, and a file that holds it."""

from __future__ import annotations

from pathlib import Path

import pytest

from spp.certifying.certificate import SparsityReport, TensorSparsity, make_report
from spp.certifying.verify import sparsity
from spp.errors import ConfigError, OutputExistsError
from spp.files.recognised import PICTURE
from spp.report.plot import check_plot, heat_panels, plot_sparsity
from tests.helpers.models import moe_model, prune_nm_, tiny_llama


def report_of(tensors: dict[str, tuple[int, tuple[int, ...]]], wrong: str = "") -> SparsityReport:
    """Zeros and shape by name."""
    found = {}
    for name, (zeros, shape) in tensors.items():
        numel = 1
        for length in shape:
            numel *= length
        found[name] = TensorSparsity(shape, "float32", zeros, zeros / numel, "unstructured", name != wrong)
    return make_report(found)


def test_layers_and_projections() -> None:
    names = [f"model.layers.{i}.{k}.weight" for i in (0, 2, 10) for k in ("mlp.up_proj", "self_attn.q_proj")]
    zeros = dict(zip(names, ((i, (10, 1)) for i in range(6)), strict=True))
    (panel,) = heat_panels(report_of(zeros, wrong=names[3]))
    assert (panel.title, panel.across) == ("model.layers", "")
    assert panel.rows == ("0", "2", "10")  # numbers, not text
    assert panel.columns == ("self_attn.q_proj", "mlp.up_proj")  # as a layer computes them
    assert panel.values == ((0.1, 0.0), (0.3, 0.2), (0.5, 0.4))
    assert panel.wrong == ((1, 0),)


def test_experts_count_together_and_apart() -> None:
    prefix = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
    zeros = {prefix.format(i, e, w): (i + e, (4, 2)) for i in (0, 1) for e in (0, 1, 10) for w in ("w1", "w2")}
    zeros["model.layers.0.block_sparse_moe.experts.1.w2.weight"] = (8, (4, 4))
    together, apart = heat_panels(report_of(zeros))
    assert together.columns == ("block_sparse_moe.experts.w1", "block_sparse_moe.experts.w2")
    assert together.values[0] == (11 / 24, (0 + 8 + 10) / 32)  # weights, not experts, are counted
    assert together.values[1] == (14 / 24, 14 / 24)
    assert (apart.title, apart.across, apart.columns) == ("model.layers, by expert", "expert", ("0", "1", "10"))
    assert apart.values == ((0.0, 9 / 24, 20 / 16), (2 / 16, 4 / 16, 22 / 16))


def test_stacks_gaps_and_names_without_a_number() -> None:
    one = (1, (2, 2))
    first, second, rest = heat_panels(
        report_of(
            {
                "model.encoder.layers.0.fc1.weight": one,
                "model.decoder.layers.0.fc1.weight": one,
                "model.decoder.layers.1.encoder_attn.q_proj.weight": one,
                "lm_head.weight": (3, (2, 2)),
                "head.strange": one,
            }
        )
    )
    assert (first.title, second.title, rest.title) == ("model.encoder.layers", "model.decoder.layers", "other weights")
    assert second.values == ((None, 0.25), (0.25, None)) and second.columns == ("encoder_attn.q_proj", "fc1")
    assert rest.rows == ("",) and dict(zip(rest.columns, rest.values[0], strict=True)) == {
        "lm_head": 0.75,
        "head.strange": 0.25,
    }


@pytest.mark.parametrize("name", ["mixtral", "jetmoe"])
def test_every_weight_of_a_model_is_in_a_cell(name: str) -> None:
    report = sparsity(moe_model(name))
    panels = [panel for panel in heat_panels(report) if not panel.across]
    assert sum(value is not None for panel in panels for row in panel.values for value in row) == len(report.tensors)
    assert all(panel.rows == ("0", "1") for panel in panels)


def test_a_file_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = sparsity(prune_nm_(tiny_llama()))
    for ending, start in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")):
        path = tmp_path / f"zeros.{ending}"
        plot_sparsity(report, "a model", path, overwrite=False)
        assert path.read_bytes().startswith(start) and PICTURE.recognises(path)
    with pytest.raises(OutputExistsError, match="overwrite=True"):
        plot_sparsity(report, "a model", path, overwrite=False)
    plot_sparsity(report, "a model", path, overwrite=True)
    text = (tmp_path / "zeros.svg").read_text()
    for word in ("a model", "sparsity 0.5000, 2:4", "model.layers", "self_attn.q_proj", "layer"):
        assert f"<!-- {word} -->" in text, word
    assert text.count("<!-- 0.50 -->") == 14
    with pytest.raises(ConfigError, match=r"must end in \.png, \.svg, \.pdf"):
        check_plot(tmp_path / "zeros.gif")


@pytest.mark.slow
def test_large_models_and_single_weights(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    prefix = "model.layers.{}.mlp.experts.{}.up_proj.weight"
    many = report_of(
        {prefix.format(i, e): (i + e, (20, 10)) for i in range(70) for e in range(25)}, prefix.format(3, 4)
    )
    one = report_of({"weight": (1, (2, 2))})
    for name, report in (("many", many), ("one", one)):
        plot_sparsity(report, name, tmp_path / f"{name}.svg", overwrite=False)
    text = (tmp_path / "many.svg").read_text()
    assert "model.layers, by expert" in text and "<!-- 0.50 -->" not in text  # cells too small for numbers
    assert "#c0392b" in text  # what is not finite is marked all the same
    assert (tmp_path / "one.svg").read_text().count("<!-- 0.25 -->") == 2  # the cell, the scale
