"""Each command does its work, says where it wrote, and leaves an existing output alone."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from spp._version import __version__
from spp.errors import SPPWarning
from spp.files import CheckpointReader, save_tensors
from tests.cli.conftest import Outcome

Call = Callable[..., Outcome]
COMMANDS = ["prune", "tune", "merge", "verify", "certify", "inspect", "eval", "compare", "export", "push"]


def ok(outcome: Outcome) -> Outcome:
    assert outcome.code == 0, outcome.err
    return outcome


@pytest.mark.slow
def test_the_installed_program_runs() -> None:
    code = "import sys; from spp.cli.main import main; sys.argv = ['spp', '--version']; main()"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout) == (0, f"spp {__version__}\n")


@pytest.mark.slow
def test_warnings_are_one_line_and_no_deprecations_of_libraries() -> None:
    code = (
        "import warnings; from spp.cli import console; from spp.errors import SPPWarning\n"
        "console.show_warnings_on_one_line(); warnings.simplefilter('always')\n"
        "warnings.warn('of spp', SPPWarning); warnings.warn('of another', UserWarning)\n"
        "warnings.warn('will be removed', FutureWarning); warnings.warn('is deprecated', DeprecationWarning)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.stderr.startswith("warning: of spp\n") and "UserWarning: of another" in run.stderr
    assert "removed" not in run.stderr and "deprecated" not in run.stderr


def test_other_libraries_do_not_log_their_imports(spp: Call) -> None:
    logger = logging.getLogger("torchao")
    before = logger.level
    try:
        ok(spp("inspect", "--help"))
        assert not logger.isEnabledFor(logging.WARNING) and logger.isEnabledFor(logging.ERROR)
    finally:
        logger.setLevel(before)


@pytest.mark.slow
def test_help_is_quick_and_loads_no_torch() -> None:
    code = (
        "import sys; from spp.cli.main import main; sys.argv = ['spp', '--help']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([n for n in ('transformers.trainer', 'transformers.modeling_utils', 'peft') if n in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "[]"
    assert all(command in run.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(spp: Call, command: str) -> None:
    assert f"Example: spp {command} " in ok(spp(command, "--help")).out


def test_merge_verify_eval(spp: Call, pruned: Path, adapter: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    found = ok(spp("merge", pruned, adapter, output))
    assert f"wrote {output}" in found.out and "survived" in found.out
    assert f"verified: {output} has exactly the zeros of {pruned}" in ok(spp("verify", pruned, output)).out
    assert "is what its certificate says" in ok(spp("verify", output)).out
    AutoModelForCausalLM.from_pretrained(output)

    measure = ("--text", text, "--window", 128, "--json")
    unmerged = json.loads(ok(spp("eval", pruned, "--adapter", adapter, *measure)).out)
    merged = json.loads(ok(spp("eval", output, *measure)).out)
    base = json.loads(ok(spp("eval", pruned, *measure)).out)
    assert merged["perplexity"] == pytest.approx(unmerged["perplexity"], rel=1e-5)
    assert abs(merged["perplexity"] / base["perplexity"] - 1) > 1e-3
    assert merged["window"] == 128
    assert merged["text_sha256"] == base["text_sha256"] == sha256(text.read_bytes()).hexdigest()
    assert len({found["model_fingerprint"] for found in (unmerged, merged, base)}) == 3
    assert {"versions", "device", "dtype", "threads", "seconds"} <= merged.keys()


def test_merge_several_adapters_by_weight(spp: Call, pruned: Path, adapter: Path, tmp_path: Path) -> None:
    second = Path(shutil.copytree(adapter, tmp_path / "second:2"))  # a directory of that name is itself
    ok(spp("merge", pruned, f"{adapter}:0.25", second, tmp_path / "two"))
    ok(spp("merge", pruned, f"{adapter}:1.25", tmp_path / "one"))
    with CheckpointReader(tmp_path / "one") as one, CheckpointReader(tmp_path / "two") as two:
        for key in one:  # 0.25 u + u, rounded on the way, is nearly 1.25 u
            torch.testing.assert_close(two.tensor(key), one.tensor(key), rtol=1e-5, atol=1e-6)
    for wrong in (f"{adapter}:x", f"{adapter}:nan", f"{adapter}:", ":2"):
        refused = spp("merge", pruned, wrong, tmp_path / "three")
        assert refused.code == 1 and "ADAPTER:WEIGHT" in refused.err, wrong
    assert not (tmp_path / "three").exists()


def test_an_adapter_that_changes_nothing_is_said_to(spp: Call, pruned: Path, text: Path, tmp_path: Path) -> None:
    said = "warning: the adapter changes no weight: β is zero everywhere; was it trained?"
    with warnings.catch_warnings():
        warnings.simplefilter("default", SPPWarning)
        for name in ("one", "two"):  # a second command in the process says it again
            run = ("tune", pruned, tmp_path / name, "--data", text, "--steps", 1, "--block-length", 32, "--window", 32)
            assert ok(spp(*run, "--batch-size", 1, "--eval-windows", 2)).err.count(said) == 1
        found = ok(spp("merge", pruned, tmp_path / "one/adapter", tmp_path / "merged"))
    assert found.err.count(said) == 1 and found.out.count("no update") > 1 and "1.0000" not in found.out


def test_merge_dry_run(spp: Call, pruned: Path, adapter: Path, tmp_path: Path) -> None:
    found = ok(spp("merge", pruned, adapter, tmp_path / "out", "--dry-run"))
    assert "survived" in found.out and "nothing was written" in found.out and str(tmp_path / "out") in found.out
    assert os.listdir(tmp_path) == []
    (tmp_path / "out").mkdir()
    assert spp("merge", pruned, adapter, tmp_path / "out", "--dry-run").code == 1


def test_verify_gives_a_verdict_on_each_tensor(spp: Call, pruned: Path, adapter: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    ok(spp("merge", pruned, adapter, merged))
    found = ok(spp("verify", merged, "--against", pruned))
    assert found.out.count("verified: ") == 2
    grouped = ok(spp("verify", merged)).out
    assert "self_attn.q_proj        2    0.5000      2:4  ok" in grouped and "other" in grouped
    listed = ok(spp("verify", merged, "--all")).out
    assert "model.layers.1.mlp.up_proj.weight" in listed and "model.norm.weight" in listed

    with CheckpointReader(merged) as reader:
        tensors = {key: reader.load(key) for key in reader}
    key = "model.layers.1.mlp.up_proj.weight"
    tensors[key][0, :4] = 1.0
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    tensors["model.norm.weight"][0] = 7.0
    save_tensors(merged / "model.safetensors", tensors)
    failed = spp("verify", merged, "--all")
    assert failed.code == 1
    rows = {line.split()[0]: line for line in failed.out.splitlines() if line.startswith("model.")}
    assert "its zeros have changed" in rows[key] and "unstructured" in rows[key]
    assert rows["model.layers.0.mlp.up_proj.weight"].endswith("NaN or infinity")
    assert rows["model.norm.weight"].endswith("its contents have changed")
    assert rows["model.layers.1.mlp.down_proj.weight"].endswith("ok")
    assert "fails its certificate" in failed.err and key in failed.err
    failed = spp("verify", merged, "--against", pruned)
    assert failed.code == 1 and "2 of 2 not as they should be" in failed.out
    assert "became non-zero" in failed.err

    for key in tensors:
        if "proj" in key:
            tensors[key].fill_(1.0)
    save_tensors(merged / "model.safetensors", tensors)
    failed, every = spp("verify", pruned, merged), spp("verify", pruned, merged, "--all")
    (more,) = [line for line in failed.err.splitlines() if "more" in line]
    count = every.err.count("became non-zero")
    assert failed.err.count("became non-zero") == 10 < count and f"… and {count - 10} more; --all lists all" in more

    refused = spp("verify", pruned, merged, "--against", pruned)
    assert refused.code == 1 and "--against" in refused.err


def test_eval_prints_a_table(spp: Call, pruned: Path, text: Path) -> None:
    out = ok(spp("eval", pruned, "--text", text, "--window", 64, "--max-windows", 2)).out
    assert out.startswith(f"perplexity on {text}\nmodel")
    assert out.splitlines()[3].split()[2:] == ["64", "2", "126"]


def test_tune(spp: Call, pruned: Path, text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ("--data", text, "--eval-text", text, "--steps", 3, "--lr", 0.02, "--r", 4, "--batch-size", 2)
    sizes = ("--block-length", 64, "--window", 64, "--eval-windows", 4, "--device", "cpu", "--no-progress")
    found = ok(spp("tune", pruned, run, *options, *sizes))
    assert f"wrote {run}" in found.out and f"wrote {run / 'adapter'}" in found.out
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["r"] == 4
    assert len((run / "log.jsonl").read_text().splitlines()) >= 3
    assert f"{text}: " in found.err and "rows of text" in found.err and found.err.count(f" on {text}") == 2
    ok(spp("merge", pruned, run / "adapter", tmp_path / "merged"))

    refused = spp("tune", pruned, run, *options, *sizes)
    assert refused.code == 1 and "--resume" in refused.err and "--overwrite" in refused.err


@pytest.mark.slow
def test_the_whole_road_by_pst(spp: Call, dense: Path, adapter: Path, text: Path, tmp_path: Path) -> None:
    run, sparse = tmp_path / "run", tmp_path / "sparse"
    options = ("--data", text, "--method", "pst", "--recipe", "short", "--steps", 4, "--batch-size", 2)
    sizes = ("--block-length", 64, "--window", 64, "--eval-windows", 4, "--device", "cpu", "--no-progress")
    refused = spp("tune", dense, run, *options, *sizes)
    assert refused.code == 1 and "--pattern" in refused.err
    refused = spp("tune", dense, run, *options, *sizes, "--pattern", 0.5, "--r", 8)
    assert refused.code == 1 and "--r is 8, which means nothing to --method pst" in refused.err
    found = ok(spp("tune", dense, run, *options, *sizes, "--pattern", "1:4", "--weight-rank", 3))
    assert f"wrote {run / 'adapter'}" in found.out and "0.7500" in found.out
    assert json.loads((run / "config.json").read_text())["tune"]["lr"] == 1e-3

    inspected = ok(spp("inspect", run / "adapter")).out
    assert all(word in inspected for word in ("method", "PST", "weight_rank", "0.75", "self_attn.q_proj.score_R"))
    assert json.loads(ok(spp("inspect", run / "adapter", "--json")).out)["method"] == "PST"
    refused = spp("merge", dense, run / "adapter", sparse, "--rounding", "stochastic")
    assert refused.code == 1 and "--rounding" in refused.err
    for adapters in ((f"{run / 'adapter'}:0.5",), (run / "adapter", adapter)):
        refused = spp("merge", dense, *adapters, sparse)
        assert refused.code == 1 and "is merged alone, and without a weight" in refused.err
    tried = ok(spp("merge", dense, run / "adapter", sparse, "--dry-run")).out
    assert "0.7500" in tried and "nothing was written" in tried and not sparse.exists()
    found = json.loads(ok(spp("merge", dense, run / "adapter", sparse, "--json")).out)
    assert found["sparsity_report"]["sparsity"] == 0.75 and found["wrote"] == [str(sparse)]
    assert "1:4" in ok(spp("verify", sparse)).out
    measure = ("--text", text, "--window", 128, "--json")
    unmerged = json.loads(ok(spp("eval", dense, "--adapter", run / "adapter", *measure)).out)
    merged = json.loads(ok(spp("eval", sparse, *measure)).out)
    assert merged["perplexity"] == pytest.approx(unmerged["perplexity"], rel=1e-5)
    assert spp("eval", dense, "--adapter", run / "adapter", *measure, "--no-strict").code == 1


@pytest.mark.slow
def test_the_whole_road_with_mask_updates(spp: Call, dense: Path, pruned: Path, text: Path, tmp_path: Path) -> None:
    run, merged = tmp_path / "run", tmp_path / "merged"
    options = ("--data", text, "--steps", 4, "--lr", 0.02, "--batch-size", 2, "--block-length", 64, "--window", 64)
    others = ("--eval-windows", 4, "--device", "cpu", "--no-progress", "--mask-update-every", 1)
    refused = spp("tune", pruned, run, *options, *others)
    assert refused.code == 1 and "--dense-model" in refused.err
    found = ok(spp("tune", pruned, run, *options, *others, "--dense-model", dense, "--mask-update-fraction", 0.3))
    assert f"wrote {run / 'base'}" in found.out
    assert spp("merge", pruned, run / "adapter", merged).code == 1
    ok(spp("merge", run / "base", run / "adapter", merged))
    assert "has exactly the zeros of" in ok(spp("verify", run / "base", merged)).out
    assert spp("verify", pruned, merged).code == 1


def test_inspect_a_model(spp: Call, pruned: Path) -> None:
    grouped = ok(spp("inspect", pruned)).out
    assert "self_attn.q_proj" in grouped and "layers.1" not in grouped
    listed = ok(spp("inspect", pruned, "--all")).out
    assert "model.layers.1.self_attn.q_proj.weight" in listed and "2:4" in listed


@pytest.mark.slow
def test_inspect_draws(spp: Call, pruned: Path, adapter: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "zeros.png"
    found = ok(spp("inspect", pruned, "--plot", path))
    assert "self_attn.q_proj" in found.out and f"wrote {path}" in found.out
    assert path.read_bytes().startswith(b"\x89PNG")
    for arguments, message in (
        ((pruned, "--plot", path), "--overwrite"),
        ((pruned, "--plot", tmp_path / "zeros.gif"), "must end in .png"),
        ((adapter, "--plot", tmp_path / "other.png"), "is an adapter"),
    ):
        refused = spp("inspect", *arguments)
        assert refused.code == 1 and message in refused.err, refused.err
    assert "wrote" in ok(spp("inspect", pruned, "--plot", path, "--overwrite")).out


def test_inspect_an_adapter(spp: Call, adapter: Path) -> None:
    out = ok(spp("inspect", adapter)).out
    assert "scaling" in out and "self_attn.q_proj.spp_alpha" in out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line}
    shapes = [(64, 64), (32, 64), (32, 64), (64, 64), (160, 64), (160, 64), (64, 160)]
    assert rows["parameters"] == [str(2 * sum(4 * n + m for m, n in shapes))]
    assert rows["self_attn.k_proj.spp_beta"] == ["2", "32×1", "64"]


def test_the_road_with_norms(spp: Call, pruned: Path, text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ("--data", text, "--eval-fraction", 0, "--steps", 2, "--block-length", 32, "--no-progress")
    refused = spp("tune", pruned, run, *options, "--also-train", "norms", "--also-train", "biases")
    assert refused.code == 1 and not run.exists()
    assert "--also-train names biases, of which LlamaForCausalLM has none. It has norms: 5" in refused.err
    ok(spp("tune", pruned, run, *options, "--also-train", "norms", "--also-lr", 0.01))
    inspected = ok(spp("inspect", run / "adapter")).out
    assert "also trained" in inspected and "5 parameters of the base" in inspected
    found = json.loads(ok(spp("inspect", run / "adapter", "--json")).out)
    assert len(found["also_trained"]) == 5 and found["tensors"]["model.norm.weight"]["shape"] == [64]
    said = ok(spp("merge", pruned, run / "adapter", tmp_path / "merged"))
    assert "also trained: 5 parameters; the largest change is" in said.out + said.err
    ok(spp("verify", pruned, tmp_path / "merged"))
    ok(spp("verify", tmp_path / "merged"))


def test_a_rank_of_its_own(spp: Callable[..., Outcome], pruned: Path, text: Path, tmp_path: Path) -> None:
    options = (
        "--data",
        text,
        "--block-length",
        32,
        "--window",
        32,
        "--steps",
        2,
        "--warmup-ratio",
        0,
        "--lr",
        0.1,
        "--r",
        40,
    )
    refused = spp("tune", pruned, tmp_path / "run", *options)
    assert refused.code == 1
    assert "k_proj: r = 40 does not fit a weight of shape (32, 64): r must be between 1 and its 32 rows" in refused.err
    remedy = "lower --r, or give layers of this name their own: --rank-pattern k_proj=32"
    assert remedy in refused.err and not (tmp_path / "run").exists()
    taken = spp("tune", pruned, tmp_path / "run", *options, "--rank-pattern", "k_proj=32", "--rank-pattern", "v_proj=4")
    assert taken.code == 0, taken.err
    ranks = {name: shape for name, shape in shapes(tmp_path / "run" / "adapter").items() if ".0.self_attn" in name}
    assert {name.split(".")[-2]: r for name, (r, _) in ranks.items() if name.endswith("alpha")} == {
        "q_proj": 40,
        "k_proj": 32,
        "v_proj": 4,
        "o_proj": 40,
    }


def shapes(adapter: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of an adapter."""
    return {name: tuple(tensor.shape) for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
