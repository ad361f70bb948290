"""Bad input to the program: exit code 1, one message without a traceback, and nothing written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from spp.errors import OutputExistsError
from tests.cli.conftest import Outcome
from tests.helpers.models import tiny_tokenizer

Call = Callable[..., Outcome]


def refused(outcome: Outcome, *words: str) -> None:
    """The call failed with one message that has these words."""
    assert outcome.code == 1, outcome
    assert "Traceback" not in outcome.err
    message = outcome.err[outcome.err.index("error: ") :]
    for word in words:
        assert word in message, message


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "arguments",
    [
        ("prune", "/no/such/model", "{out}", "--method", "magnitude"),
        ("tune", "/no/such/model", "{out}", "--data", "{text}"),
        ("merge", "/no/such/model", "{adapter}", "{out}"),
        ("verify", "/no/such/model"),
        ("inspect", "/no/such/model"),
        ("eval", "/no/such/model", "--text", "{text}"),
    ],
)
def test_a_model_that_is_not_there(
    spp: Call, arguments: tuple[str, ...], text: Path, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    refused(spp(*(a.format(out=out, text=text, adapter=adapter) for a in arguments)), "/no/such/model")
    assert not out.exists()


def test_a_checkpoint_that_lacks_a_weight_is_not_made_up(spp: Call, pruned: Path, text: Path, tmp_path: Path) -> None:
    model, name = tmp_path / "model", "model.layers.1.mlp.up_proj.weight"
    shutil.copytree(pruned, model)
    tensors = load_file(model / "model.safetensors")
    del tensors[name]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    told = (f"{model} lacks 1 weights of its model: {name}; save or fetch it again",)
    refused(spp("eval", model, "--text", text, "--window", 64), *told)
    refused(spp("tune", model, tmp_path / "run", "--data", text), *told)
    refused(spp("prune", model, tmp_path / "out", "--method", "magnitude"), *told)
    assert not (tmp_path / "out").exists() and not (tmp_path / "run").exists()


def test_a_checkpoint_without_a_tokenizer(spp: Call, pruned: Path, text: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(pruned, model, ignore=shutil.ignore_patterns("tokenizer*"))
    refused(spp("tune", model, tmp_path / "run", "--data", text), f"{model} has no tokenizer (tokenizer.json, ")


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_a_file_in_the_place_of_an_output(spp: Call, pruned: Path, tmp_path: Path, overwrite: tuple[str, ...]) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for arguments in (
        ("prune", pruned, file, "--method", "magnitude"),
        ("export", pruned, file, "--packed"),
        ("merge", pruned, "adapter", file),
    ):
        refused(found := spp(*arguments, *overwrite), f"{file} is a file; choose the name of a directory")
        assert "pruning" not in found.err
    assert file.read_text() == "mine" and list(tmp_path.iterdir()) == [file]


def test_a_run_or_an_adapter_in_the_place_of_another(spp: Call, pruned: Path, text: Path, adapter: Path) -> None:
    run = adapter.parent / "run"
    shutil.copytree(adapter, run / "adapter")
    (run / "config.json").write_text('{"format": "spp-tune-1"}')
    told = (f"{run} holds no adapter itself, but a run's: pass {run / 'adapter'}",)
    refused(spp("merge", pruned, run, run.parent / "out"), *told)
    refused(spp("eval", pruned, "--adapter", run, "--text", text), *told)
    refused(spp("eval", adapter, "--text", text), f"{adapter} holds an adapter, no model: pass its base, ")
    refused(spp("verify", adapter), f"{adapter} holds an adapter, no model: pass the model that it was trained on")
    refused(spp("certify", run), f"what spp merge BASE ADAPTER OUTPUT writes for {run / 'adapter'}")


def test_options_of_eval_are_checked_before_the_model_is_loaded(spp: Call, text: Path) -> None:
    found = spp("eval", "/no/such/model", "--text", text, "--window", 1)
    refused(found, "--window is 1; it must be an int of at least 2")
    assert "loading" not in found.err


def test_a_name_that_is_neither_a_directory_nor_on_the_hub(spp: Call, text: Path) -> None:
    refused(spp("eval", "nobody/nothing", "--text", text), "nobody/nothing")


@pytest.mark.parametrize("command", ["prune", "merge"])
def test_an_output_that_exists(
    spp: Call, command: str, dense: Path, pruned: Path, adapter: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    output.mkdir()
    (output / "precious.txt").write_text("mine")
    arguments = (
        ("prune", dense, output, "--method", "magnitude") if command == "prune" else ("merge", pruned, adapter, output)
    )
    refused(spp(*arguments), str(output), "--overwrite")
    refused(spp(*arguments, "--overwrite"), f"{output} holds precious.txt and is no checkpoint")
    assert (output / "precious.txt").read_text() == "mine" and len(list(output.iterdir())) == 1
    (output / "precious.txt").unlink()
    assert spp(*arguments, "--overwrite").code == 0
    assert spp(*arguments, "--overwrite").code == 0
    assert (output / "sparsity.json").exists()


def test_tune_into_a_directory_with_other_things(spp: Call, pruned: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    refused(spp("tune", pruned, tmp_path, "--data", text, "--overwrite"), str(tmp_path))
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_malformed_data_names_the_line(spp: Call, pruned: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a", "output"\n')
    run = tmp_path / "run"
    refused(spp("tune", pruned, run, "--data", data), str(data), "line 2")
    assert not run.exists()


def test_empty_data(spp: Call, pruned: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    refused(spp("tune", pruned, tmp_path / "run", "--data", tmp_path / "empty.txt"), "empty.txt")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--lr", "-1"), ("lr", "-1")),
        (("--r", "0"), ("r ", "0")),
        (("--dropout", "1"), ("dropout", "1")),
        (("--recipe", "grandmother"), ("grandmother", "paper")),
        (("--overwrite", "--resume"), ("overwrite", "resume")),
        (("--dtype", "float8"), ("dtype", "float8")),
    ],
)
def test_options_that_make_no_sense(
    spp: Call, options: tuple[str, ...], words: tuple[str, ...], pruned: Path, text: Path, tmp_path: Path
) -> None:
    refused(spp("tune", pruned, tmp_path / "run", "--data", text, *options), *words)
    assert not (tmp_path / "run").exists()


def test_patterns_and_methods_that_make_no_sense(spp: Call, dense: Path, tmp_path: Path) -> None:
    refused(spp("prune", dense, tmp_path / "a", "--method", "magnitude", "--pattern", "5:4"), "5:4")
    refused(spp("prune", dense, tmp_path / "b", "--method", "guess"), "guess", "wanda")
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_eval_of_a_text_that_is_missing_or_short_or_no_text(spp: Call, pruned: Path, tmp_path: Path) -> None:
    refused(spp("eval", pruned, "--text", tmp_path / "none.txt"), "none.txt")
    (tmp_path / "short.txt").write_text("short")
    refused(spp("eval", pruned, "--text", tmp_path / "short.txt", "--window", 64), "64")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x80")
    refused(spp("eval", pruned, "--text", tmp_path / "binary.txt"), "binary.txt", "UTF-8")
    grown = tmp_path / "grown"  # tokens were added, and no rows for them
    shutil.copytree(pruned, grown)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"zq{i:03}" for i in range(200)])
    tokenizer.save_pretrained(grown)
    (tmp_path / "new.txt").write_text("zq199 " * 99)
    refused(spp("eval", grown, "--text", tmp_path / "new.txt", "--window", 64), "new.txt: token id", "('zq199')")


def test_devices_and_dtypes(spp: Call, pruned: Path, adapter: Path, text: Path, tmp_path: Path) -> None:
    refused(spp("eval", pruned, "--text", text, "--device", "abacus"), "abacus", "cpu")
    refused(spp("eval", pruned, "--text", text, "--dtype", "float8"), "float8", "bfloat16")
    refused(spp("merge", pruned, adapter, tmp_path / "out", "--dtype", "auto"), "auto", "bfloat16")


def test_other_zeros_are_found(spp: Call, dense: Path, pruned: Path, adapter: Path, tmp_path: Path) -> None:
    refused(spp("verify", pruned, dense), "q_proj")
    refused(spp("merge", dense, adapter, tmp_path / "merged"), "zero")
    assert not (tmp_path / "merged").exists()


def test_a_checkpoint_without_certificate(spp: Call, pruned: Path) -> None:
    refused(spp("verify", pruned), "sparsity.json")


def test_a_truncated_file(spp: Call, pruned: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(pruned, broken)
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[: len(data) // 2])
    refused(spp("inspect", broken), "model.safetensors")
    refused(spp("verify", pruned, broken), "model.safetensors")


def test_a_directory_without_a_model(spp: Call, tmp_path: Path, text: Path) -> None:
    refused(spp("inspect", tmp_path), str(tmp_path))
    refused(spp("eval", tmp_path, "--text", text), str(tmp_path))


def test_an_adapter_that_is_not_there(spp: Call, pruned: Path, tmp_path: Path) -> None:
    refused(spp("merge", pruned, tmp_path / "none", tmp_path / "out"), "none")


def test_unknown_commands_and_missing_arguments_are_usage_errors(spp: Call) -> None:
    assert spp("prone").code == 2
    assert spp("merge", "only-one").code == 2


def test_debug_shows_the_traceback(spp: Call, dense: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputExistsError):
        spp("--debug", "prune", dense, tmp_path, "--method", "magnitude")
    refused(spp("prune", dense, tmp_path, "--method", "magnitude"), str(tmp_path))


def test_a_model_of_another_task_is_told_what_is_needed(spp: Call, text: Path, tmp_path: Path) -> None:
    from tests.pst.test_model import classifier

    classifier("bert").save_pretrained(tmp_path / "classifier")
    told = "it was saved as BertForSequenceClassification, and a BertLMHeadModel is needed"
    refused(spp("eval", tmp_path / "classifier", "--text", text, "--window", 64), told)
