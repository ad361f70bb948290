"""The public names: where users import them from, whatever the folders behind them look like."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import runpy
import sys
from types import ModuleType

import pytest

import spp

NAMES = {
    "spp": [
        *("wrap", "unwrap", "disabled", "SPPConfig", "SPPLinear", "adapter_parameters", "adapter_state_dict"),
        *("print_trainable_parameters", "save_adapter", "load_adapter", "merge", "MergeReport", "merge_checkpoint"),
        *("save_model", "certify", "verify", "sparsity", "SparsityReport", "prune", "prune_checkpoint"),
        *("reconstruct", "reconstruct_checkpoint", "Reconstruction", "ReconstructionReport"),
        *("pack", "unpack", "load_packed", "export_packed", "follow_links", "export_dense", "convert_checkpoint"),
        "convert",
        *("to_semi_structured", "SemiStructuredReport", "SPPError", "SPPWarning", "functional", "pruning", "pst"),
        "__version__",
    ],
    "spp.errors": ["SPPError", "SPPWarning", "ConfigError", "MaskError", "CheckpointError", "OutputExistsError"],
    "spp.functional": ["spp_linear", "effective_weight", "spp_linear_reference"],
    "spp.pruning": [
        *("magnitude_mask", "wanda_mask", "sparsegpt", "dsnot", "InputStats", "OWL", "calibration_windows"),
        *("own_windows", "prune", "PruneReport", "LayerReport"),
    ],
    "spp.pst": [
        *("PSTConfig", "PSTLinear", "wrap", "unwrap", "is_wrapped", "convert", "save", "load", "pst_layers"),
        *("set_sparsity", "sparsity_schedule"),
    ],
    "spp.training": [
        *("tune", "TuneConfig", "TuneResult", "RECIPES", "SPPTrainer", "PSTTrainer", "MaskUpdates", "load_data"),
        *("SparsitySchedule", "Collator", "TrainingData", "TrainingInterrupted", "causal_lm_loss"),
        *("chunked_cross_entropy", "set_saved_activations"),
    ],
    "spp.evaluation": ["perplexity", "perplexity_result", "PerplexityResult", "tasks", "TaskResults"],
    "spp.report": [
        *("Table", "byte_text", "time_text", "merge_table", "sparsity_table", "prune_table", "verdict_table"),
        *("html_report", "RunReport"),
    ],
    "spp.integrations.hub": ["push"],
    "spp.integrations.transformers": [],
    "spp.cli.main": ["main"],
}


@pytest.mark.parametrize("module", NAMES)
def test_the_names_are_there(module: str) -> None:
    found = importlib.import_module(module)
    assert [name for name in NAMES[module] if not hasattr(found, name)] == []


def test_the_root_lists_them() -> None:
    assert sorted(set(NAMES["spp"]) - set(spp.__all__)) == []


@pytest.mark.parametrize("module", ["spp", "spp.pruning", "spp.pst", "spp.training", "spp.evaluation", "spp.report"])
def test_what_a_package_exports_is_there_and_no_module_of_that_name_hides_it(module: str) -> None:
    package = importlib.import_module(module)
    exported = list(package.__all__)
    assert len(exported) == len(set(exported))
    modules = {found.name for found in pkgutil.iter_modules(package.__path__)}
    for name in exported:
        value = getattr(package, name)
        if name in modules:  # then the module itself is what is exported
            assert isinstance(value, ModuleType) and value.__name__ == f"{module}.{name}"


def test_functions_are_functions() -> None:
    for function in (spp.merge, spp.prune, spp.wrap, spp.verify, spp.pruning.dsnot, spp.pruning.sparsegpt):
        assert inspect.isfunction(function), function
    assert inspect.isfunction(spp.pst.convert) and inspect.isfunction(importlib.import_module("spp.training").tune)


@pytest.mark.parametrize("name", ["SPPPeftConfig", "SPPPeftLinear", "SPPPeftExperts", "SPPPeftModel"])
def test_the_plug_in_of_peft(name: str) -> None:
    pytest.importorskip("peft")
    assert hasattr(importlib.import_module("spp.integrations.peft"), name)


def test_the_trainer_of_trl() -> None:
    pytest.importorskip("trl")
    assert hasattr(importlib.import_module("spp.integrations.trl"), "SPPSFTTrainer")


def test_python_m_spp_is_the_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["spp", "--version"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("spp", run_name="__main__")
    assert not stop.value.code
    assert capsys.readouterr().out == f"spp {spp.__version__}\n"


def test_the_benchmarks_are_outside_of_the_package() -> None:
    assert "bench" not in {found.name for found in pkgutil.iter_modules(spp.__path__)}
    assert importlib.util.find_spec("benchmarks") is not None
