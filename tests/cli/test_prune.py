"""spp prune: from the disk block by block or in memory, with every option, and what it says meanwhile."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import spp.cli.prune as command
import spp.pruning.loop as loop
from tests.cli.conftest import Outcome
from tests.cli.test_bad_input import refused
from tests.cli.test_commands import ok

Call = Callable[..., Outcome]
WANDA = ("--nsamples", 4, "--seqlen", 64)
KEY = "model.layers.{}.{}.weight"


def _zeros(path: Path, key: str) -> float:
    return float((load_file(path / "model.safetensors")[key] == 0).float().mean())


def test_by_magnitude(spp: Call, dense: Path, tmp_path: Path) -> None:
    output = tmp_path / "pruned"
    found = ok(spp("prune", dense, output, "--method", "magnitude", "--pattern", "1:4"))
    assert f"wrote {output}" in found.out
    assert "pruned by magnitude to 1:4" in found.out and "0.7500" in found.out
    assert "calibration: none" in found.out
    weight = load_file(output / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal((weight != 0).view(weight.shape[0], -1, 4).sum(-1), torch.ones(64, 16, dtype=torch.long))
    ok(spp("verify", output))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pruned"]


def test_on_text_of_the_models_own(
    spp: Call, dense: Path, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spp.pruning.own_text.cache_directory", lambda: tmp_path / "cache")
    few = ("--nsamples", 2, "--seqlen", 16, "--calibration", "self", "--device", "cpu")
    streamed = ok(spp("prune", dense, tmp_path / "one", *few))
    assert "loaded whole to write its own text" in streamed.err and "tokens from self, sha256 " in streamed.out
    memory = ok(spp("prune", dense, tmp_path / "two", *few, "--in-memory"))
    assert "was written by the model before" in memory.err
    same = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    assert same[0].keys() == same[1].keys() and all(torch.equal(t, same[1][key]) for key, t in same[0].items())
    tune = ("--steps", 2, "--warmup-ratio", 0, "--block-length", 16, "--window", 16, "--eval-windows", 1)
    ok(spp("tune", tmp_path / "one", tmp_path / "run", "--data", "self:200", *tune))
    found = spp("tune", pruned, tmp_path / "no", "--data", "self", *tune)  # whose certificate names nothing
    refused(found, "--data is self", "pass --dense-model")
    refused(spp("tune", pruned, tmp_path / "no", "--data", "self:x", *tune), "--data is 'self:x'")


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "options", [(), ("--method", "sparsegpt"), ("--pattern", 0.6, "--owl"), ("--dtype", "bfloat16")]
)
def test_streaming_and_in_memory_give_the_same(
    spp: Call, dense: Path, text: Path, tmp_path: Path, options: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--calibration", text, *WANDA, *options)
    ok(spp("prune", dense, tmp_path / "memory", *arguments, "--in-memory"))
    monkeypatch.setattr(command, "load_and_prune", None)
    found = ok(spp("prune", dense, tmp_path / "stream", *arguments))
    assert f"calibration: 4 windows of 64 tokens from {text}, seed 0" in found.out
    assert f"4 calibration windows of 64 tokens from {text} (seed 0)" in found.err
    assert "loading" not in found.err and "%|" not in found.err
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("memory", "stream"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in one)
    read = [(tmp_path / name / "sparsity.json").read_text() for name in ("memory", "stream")]
    assert read[0] == read[1]
    assert "0.5000" in ok(spp("inspect", tmp_path / "stream")).out or "--owl" in options


def test_a_checkpoint_that_cannot_be_streamed_is_loaded(spp: Call, dense: Path, tmp_path: Path) -> None:
    pickled, output = tmp_path / "pickled", tmp_path / "pruned"
    shutil.copytree(dense, pickled)
    torch.save(load_file(dense / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    found = ok(spp("prune", pickled, output, "--method", "magnitude"))
    assert "no model.safetensors, only pytorch_model.bin" in found.err and ": loading the whole model" in found.err
    ok(spp("prune", dense, tmp_path / "other", "--method", "magnitude"))
    one, other = (load_file(path / "model.safetensors") for path in (output, tmp_path / "other"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_keys_without_the_models_prefix_are_pruned_too(spp: Call, dense: Path, tmp_path: Path) -> None:
    bare, output = tmp_path / "bare", tmp_path / "pruned"
    shutil.copytree(dense, bare)
    tensors = {key.removeprefix("model."): t for key, t in load_file(dense / "model.safetensors").items()}
    save_file(tensors, bare / "model.safetensors", metadata={"format": "pt"})
    ok(spp("prune", bare, output, "--method", "magnitude"))
    ok(spp("verify", output))
    state = AutoModelForCausalLM.from_pretrained(output).state_dict()
    assert float((state[KEY.format(1, "mlp.up_proj")] == 0).float().mean()) == 0.5


def test_without_a_tokenizer(spp: Call, dense: Path, adapter: Path, text: Path, tmp_path: Path) -> None:
    bare, output = tmp_path / "bare", tmp_path / "pruned"
    shutil.copytree(dense, bare, ignore=shutil.ignore_patterns("tokenizer*", "special_tokens*", "chat_template*"))
    assert "no tokenizer is saved" in ok(spp("prune", bare, output, "--method", "magnitude", "--in-memory")).err
    assert not list(output.glob("tokenizer*"))
    ok(spp("merge", output, adapter, tmp_path / "merged"))
    for memory in ([], ["--in-memory"]):
        found = spp("prune", bare, tmp_path / "other", "--calibration", text, *WANDA, *memory)
        refused(found, f"{bare} has no tokenizer")
    torch.save(torch.randint(3, 90, (4, 32)), tmp_path / "ids.pt")
    found = ok(spp("prune", bare, tmp_path / "other", "--calibration", tmp_path / "ids.pt"))
    assert f"4 windows of 32 tokens from {tmp_path / 'ids.pt'}" in found.out


def test_patterns_by_name(spp: Call, dense: Path, tmp_path: Path) -> None:
    patterns = ("--pattern", "mlp.down_proj=0.7", "--pattern", r".*layers\.1\..*=1:4", "--pattern", "2:4")
    found = ok(spp("prune", dense, tmp_path / "out", "--method", "magnitude", *patterns))
    assert r"to mlp.down_proj=0.7, .*layers\.1\..*=1:4, .*=2:4" in found.out
    expected = {(0, "mlp.down_proj"): 0.7, (1, "mlp.down_proj"): 0.7, (1, "mlp.up_proj"): 0.75, (0, "mlp.up_proj"): 0.5}
    for (layer, name), share in expected.items():
        assert _zeros(tmp_path / "out", KEY.format(layer, name)) == pytest.approx(share, abs=1e-3)


def test_which_layers(spp: Call, dense: Path, tmp_path: Path) -> None:
    options = ("--target-modules", "up_proj", "--target-modules", "q_proj", "--exclude-modules", "layers.0.mlp.up_proj")
    ok(spp("prune", dense, tmp_path / "out", "--method", "magnitude", *options))
    pruned = {key for key in load_file(tmp_path / "out" / "model.safetensors") if _zeros(tmp_path / "out", key) > 0.4}
    named = ((1, "mlp.up_proj"), (0, "self_attn.q_proj"), (1, "self_attn.q_proj"))
    assert pruned == {KEY.format(layer, name) for layer, name in named}


def test_the_report(spp: Call, pruned: Path, text: Path, tmp_path: Path) -> None:
    arguments = ("--calibration", text, *WANDA, "--seed", 3, "--report", tmp_path / "made" / "report.json", "--all")
    found = ok(spp("prune", pruned, tmp_path / "out", *arguments, "--pattern", "1:4"))
    assert f"wrote {tmp_path / 'made' / 'report.json'}" in found.out
    assert "zeros before: 0.5000 of the weights (43008), all kept" in found.out
    assert "these stay zeros" in found.err
    values = json.loads((tmp_path / "made" / "report.json").read_text())
    assert (values["method"], values["pattern"], values["seed"]) == ("wanda", "1:4", 3)
    assert (values["windows"], values["seqlen"], values["calibration"]) == (4, 64, str(text))
    assert (values["sparsity_before"], values["keeps_zeros"]) == (0.5, True)
    assert len(values["layers"]) == 14
    layer = values["layers"]["model.layers.1.mlp.up_proj"]
    assert layer["shape"] == [160, 64] and layer["sparsity"] == 0.75 and 0 < layer["relative_error"] < 1
    rows = {line.split()[0]: line.split() for line in found.out.splitlines() if line}
    assert rows["model.layers.1.mlp.up_proj"][2:5] == ["0.7500", "1:4", f"{layer['relative_error']:.4f}"]
    assert rows["all"][1:4] == ["14", "0.7500", "1:4"]


def test_zeros_are_kept_unless_sparsegpt_may_fill_them(spp: Call, pruned: Path, text: Path, tmp_path: Path) -> None:
    arguments = ("--method", "sparsegpt", "--pattern", "1:4", "--calibration", text, *WANDA)
    kept, filled = tmp_path / "kept", tmp_path / "filled"
    assert "of the weights (43008), all kept\n" in ok(spp("prune", pruned, kept, *arguments)).out
    found = ok(spp("verify", pruned, kept, "--more-zeros-allowed"))
    assert f"verified: {kept} has every zero of {pruned}, and 21504 more" in found.out
    assert f"verified: {kept} is what its certificate says" in found.out
    refused(spp("verify", pruned, kept), "spp verify BEFORE AFTER --more-zeros-allowed")
    refused(spp("verify", kept, pruned, "--more-zeros-allowed"), "became non-zero")
    found = ok(spp("prune", pruned, filled, *arguments, "--in-memory", "--no-keep-zeros"))
    assert "of the weights (43008), weights like any other to this method" in found.out
    refused(spp("verify", pruned, filled, "--more-zeros-allowed"), "became non-zero")
    refused(spp("verify", pruned, "--more-zeros-allowed"), "--more-zeros-allowed", "needs both")


def test_layers_that_were_sparser_already_are_counted(spp: Call, pruned: Path, tmp_path: Path) -> None:
    found = ok(spp("prune", pruned, tmp_path / "out", "--method", "magnitude", "--pattern", "0.3"))
    assert "(43008), all kept; 14 of 14 layers had more than asked for" in found.out
    assert "14 of 14 layers were sparser already than asked for" in found.err
    ok(spp("verify", pruned, tmp_path / "out"))


def test_the_report_is_never_overwritten_unasked(spp: Call, dense: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    report.write_text("mine")
    arguments = ("prune", dense, tmp_path / "out", "--method", "magnitude", "--report")
    refused(spp(*arguments, report), str(report), "--overwrite")
    refused(spp(*arguments, tmp_path), "is a directory")
    assert report.read_text() == "mine" and not (tmp_path / "out").exists()
    report.unlink()
    ok(spp(*arguments, report, "--overwrite"))
    ok(spp(*arguments, report, "--overwrite"))
    assert json.loads(report.read_text())["method"] == "magnitude"


def test_an_interrupted_run_goes_on(spp: Call, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = loop.prune_layer, []

    def interrupted(layer: Any, *arguments: Any) -> Any:
        seen.append(layer)
        if len(seen) == 10:
            raise KeyboardInterrupt
        return real(layer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "prune_layer", interrupted)
        found = spp("prune", dense, tmp_path / "out", "--method", "magnitude")
    assert found.code == 130
    assert f"is kept in {tmp_path / '.out.pruning'}: the same command goes on behind it" in found.err
    assert "continuing after 1 finished block" in ok(spp("prune", dense, tmp_path / "out", "--method", "magnitude")).err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


@pytest.mark.sampled(12)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--pattern", "5:4"), ["pattern 5:4"]),
        (("--pattern", "1.0"), ["pattern 1.0", "at least 0 and below 1"]),
        (("--pattern", "50"), ["did you mean 0.5"]),
        (("--pattern", "2:4", "--pattern", "1:4"), ["--pattern is given 2 times", "NAME=PATTERN"]),
        (("--pattern", "a=2:4", "--pattern", "a=1:4"), ["--pattern a=1:4 is the second for a"]),
        (("--pattern", "=2:4"), ["no name before ="]),
        (("--pattern", "(=2:4"), ["not a regular expression"]),
        (("--pattern", "q_proj=4:2"), ["pattern 4:2"]),
        (("--method", "guess"), ["--method is 'guess'", "known: magnitude"]),
        (("--method", "wanda"), ["needs calibration data: pass --calibration", "--method magnitude"]),
        (("--nsamples", 0), ["--nsamples is 0"]),
        (("--seqlen", -1), ["--seqlen is -1"]),
        (("--target-modules", "(("), ["--target-modules: '((' is not a regular expression"]),
        (("--exclude-modules", "*"), ["--exclude-modules: '*' is not a regular expression"]),
        (("--owl",), ["--owl gives blocks different fractions"]),
        (("--owl", "--pattern", 0.5), ["--owl needs calibration data"]),
        (("--owl-spread", 0.1), ["--owl-spread is an option of OWL: add --owl"]),
        (("--owl", "--owl-threshold", 0), ["threshold"]),
        (("--calibration", "rows.csv"), ["--calibration is 'rows.csv', which is no file", ".jsonl", "CONFIG"]),
        (("--dtype", "float8"), ["float8", "bfloat16"]),
        (("--device", "abacus"), ["abacus"]),
    ],
)
@pytest.mark.parametrize("memory", [[], ["--in-memory"]])
def test_options_are_checked_before_the_model_is_looked_for(
    spp: Call, tmp_path: Path, options: tuple[Any, ...], words: list[str], memory: list[str]
) -> None:
    method = () if "--method" in options else ("--method", "magnitude")
    refused(spp("prune", "/no/such/model", tmp_path / "out", *method, *options, *memory), *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--pattern", "2:6"), ["layers.0.self_attn.q_proj", "nearest"]),
        (("--pattern", "up_proj=2:4"), ["no name in --pattern up_proj=2:4 matches model.layers.0"]),
        (("--pattern", "nonsense=0.5", "--pattern", "2:4"), ["names in --pattern that decide", "nonsense"]),
        (
            ("--target-modules", "nothing"),
            ["--target-modules nothing matches no linear", "such as --target-modules down_proj"],
        ),
        (("--exclude-modules", "nothing"), ["--exclude-modules: no linear"]),
        (("--owl", "--owl-spread", 0.4, "--pattern", 0.9), ["take a spread below"]),
        (("--seqlen", 512, "--target-modules", "lm_head"), ["--method magnitude"]),
    ],
)
def test_what_does_not_fit_the_model(
    spp: Call, dense: Path, text: Path, tmp_path: Path, options: tuple[Any, ...], words: list[str]
) -> None:
    calibration = () if "--method" in options else ("--calibration", text, "--nsamples", 2)
    seqlen = () if "--seqlen" in options else ("--seqlen", 32)
    refused(spp("prune", dense, tmp_path / "out", *calibration, *seqlen, *options), *words)
    assert not (tmp_path / "out").exists()


def test_calibration_text_that_is_short_or_empty(spp: Call, dense: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "table.xls").write_text("a,b\n")
    arguments = ("prune", dense, tmp_path / "out", "--calibration")
    refused(spp(*arguments, tmp_path / "short.txt", "--seqlen", 64), "too short", "--seqlen 64; pass more text")
    refused(spp(*arguments, tmp_path / "empty.txt"), "empty.txt is empty")
    refused(spp(*arguments, tmp_path / "table.xls"), "table.xls ends in .xls", "known: .txt")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        found = ok(spp(*arguments, text, "--seqlen", 128))
    assert f"warning: {text} gives" in found.err and "not the 128 asked for" in found.err


@pytest.mark.parametrize("memory", [[], ["--in-memory"]])
def test_activations_that_are_not_finite(spp: Call, dense: Path, text: Path, tmp_path: Path, memory: list[str]) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(dense, bad)
    tensors = load_file(bad / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][0] = torch.nan
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    found = spp("prune", bad, tmp_path / "out", "--calibration", text, *WANDA, *memory)
    refused(found, "model.layers.1.self_attn.q_proj: its inputs", "--dtype float32")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("memory", [[], ["--in-memory"]])
def test_a_quantized_checkpoint(spp: Call, dense: Path, tmp_path: Path, memory: list[str]) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(dense, bad)
    config = json.loads((bad / "config.json").read_text())
    quantized = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    (bad / "config.json").write_text(json.dumps({**config, "quantization_config": quantized}))
    refused(spp("prune", bad, tmp_path / "out", "--method", "magnitude", *memory), "quantized")


@pytest.mark.sampled(1)
def test_dead_input_features_are_pruned_first(spp: Call, dense: Path, text: Path, tmp_path: Path) -> None:
    dead = tmp_path / "dead"
    shutil.copytree(dense, dead)
    tensors = load_file(dead / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"][::4] = 0
    save_file(tensors, dead / "model.safetensors", metadata={"format": "pt"})
    for method in ("wanda", "sparsegpt", "dsnot"):
        ok(spp("prune", dead, tmp_path / method, "--method", method, "--calibration", text, *WANDA))
        weight = load_file(tmp_path / method / "model.safetensors")[KEY.format(0, "self_attn.q_proj")]
        assert (weight[:, ::4] == 0).all()
        assert torch.equal((weight != 0).view(64, -1, 4).sum(-1), torch.full((64, 16), 2))


@pytest.mark.parametrize(("pattern", "told"), [("3:4", "25"), ("2:4", "50"), ("1:3", "66.7")])
@pytest.mark.parametrize("where", [(), ("--in-memory",)])
def test_what_a_pattern_keeps_is_told_before_any_work(
    spp: Callable[..., Outcome], tmp_path: Path, pattern: str, told: str, where: tuple[str, ...]
) -> None:
    # Many read 3:4 as 75 % pruned: N:M is said as zeros in some papers, as kept weights in others.
    n, m = pattern.split(":")
    line = f"{pattern}: {n} of every {m} weights are kept, {told} % are pruned"
    found = spp("prune", "/no/such/model", tmp_path / "out", "--method", "magnitude", "--pattern", pattern, *where)
    assert found.code == 1 and found.err.count(line) == 1
    assert ("warning: " + line in found.err) == (pattern == "3:4")
    assert ("to prune 3 of every 4, the pattern is 1:4" in found.err) == (pattern == "3:4")
