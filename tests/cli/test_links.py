"""A model and an adapter of links to files elsewhere, as people keep them on a larger disk, in every command.

vladmandic/sdnext#1045, huggingface/sentence-transformers#3231: one loader follows links, the next one does not.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from spp.files import CheckpointReader
from tests.cli.conftest import Outcome
from tests.files.test_links import farm
from tests.helpers.models import tiny_tokenizer

Call = Callable[..., Outcome]
TUNE = ("--steps", 2, "--lr", 0.1, "--block-length", 32, "--window", 32, "--r", 2)


def test_every_command_reads_a_folder_of_links(
    spp: Call, dense: Path, pruned: Path, adapter: Path, text: Path, tmp_path: Path
) -> None:
    made = {name: tmp_path / name for name in ("dense", "pruned", "adapter")}
    for name, source in (("dense", dense), ("pruned", pruned), ("adapter", adapter)):
        (tmp_path / f"of-{name}").mkdir()
        made[name] = farm(source, tmp_path / f"of-{name}" / name)
        (made[name] / "pytorch_model.bin").symlink_to("nowhere")  # which nobody reads
    out = {name: tmp_path / name for name in ("pruned-out", "run", "merged", "packed")}
    for arguments in (
        ("prune", made["dense"], out["pruned-out"], "--method", "magnitude"),
        ("tune", made["pruned"], out["run"], "--data", text, *TUNE),
        ("merge", made["pruned"], made["adapter"], out["merged"]),
        ("verify", made["pruned"], out["merged"]),
        ("certify", made["pruned"]),
        ("inspect", made["pruned"]),
        ("inspect", made["adapter"]),
        ("eval", made["pruned"], "--adapter", made["adapter"], "--text", text, "--window", 32, "--max-windows", 1),
        ("export", made["pruned"], out["packed"], "--packed"),
        ("push", made["adapter"], "owner/name", "--dry-run"),
    ):
        if arguments[0] == "push":
            (made["adapter"] / "pytorch_model.bin").unlink()
        outcome = spp(*arguments)
        assert outcome.code == 0, (arguments, outcome.err)
    for name in ("pruned-out", "merged", "packed"):
        assert not [path for path in out[name].iterdir() if path.is_symlink()]
        assert AutoTokenizer.from_pretrained(out[name])("a b").input_ids == tiny_tokenizer()("a b").input_ids
    tokenizer = made["pruned"] / "tokenizer.json"
    tokenizer.unlink()
    tokenizer.symlink_to("nowhere")  # which those that look at weights do not read
    for arguments in (
        ("inspect", made["pruned"]),
        ("verify", made["pruned"], made["pruned"]),
        ("certify", made["pruned"], "--overwrite"),
    ):
        assert spp(*arguments).code == 0, arguments
    for arguments in (("merge", made["pruned"], made["adapter"], tmp_path / "x"), ("eval", made["pruned"])):
        outcome = spp(*arguments, *(("--text", text) if arguments[0] == "eval" else ()))
        assert outcome.code == 1 and "tokenizer.json is a symbolic link to nowhere, which does not" in outcome.err
    with CheckpointReader(out["merged"]) as reader:
        assert reader.config()["model_type"] == "llama"


@pytest.mark.sampled(3)
@pytest.mark.parametrize("command", ["eval", "tune", "prune", "merge", "verify", "certify", "inspect", "export"])
def test_a_clone_with_links_out_of_it_is_refused_alike(
    spp: Call, command: str, pruned: Path, adapter: Path, text: Path, tmp_path: Path
) -> None:
    links, out = farm(pruned, tmp_path / "links"), tmp_path / "out"
    (links / ".git").mkdir()
    arguments = {
        "eval": ("--text", text, "--window", 32, "--max-windows", 1),
        "tune": (out, "--data", text, *TUNE),
        "prune": (out, "--method", "magnitude"),
        "merge": (adapter, out),
        "export": (out, "--packed"),
    }.get(command, ())
    refused = spp(command, links, *arguments)
    assert refused.code == 1 and not out.exists()
    assert "is a symbolic link to" in refused.err and "follow it (--follow-links)" in refused.err
    followed = spp(command, links, *arguments, "--follow-links")
    assert followed.code == (1 if command == "verify" else 0), followed.err  # it has no certificate
    assert "symbolic link" not in followed.err
