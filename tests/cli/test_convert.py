"""spp convert on the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.cli.conftest import Outcome

Call = Callable[..., Outcome]
FILES = Path(__file__).parents[1] / "fixtures" / "compressed-tensors-0.9.4"


def test_convert(spp: Call, dense: Path, pruned: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = spp("convert", FILES / "sparse-24-bitmask", out)
    assert found.code == 0 and f"wrote {out}" in found.out and "2:4" in found.out, found
    assert spp("verify", out).code == 0
    again = spp("convert", FILES / "sparse-24-bitmask", out)
    assert again.code == 1 and "--overwrite" in again.err
    masks = {key: t != 0 for key, t in load_file(pruned / "model.safetensors").items() if "_proj" in key}
    save_file(masks, tmp_path / "masks.safetensors")
    found = spp("convert", tmp_path / "masks.safetensors", out, "--overwrite")
    assert found.code == 1 and "that they prune, --dense" in found.err, found.err
    found = spp("convert", tmp_path / "masks.safetensors", out, "--dense", dense, "--overwrite")
    assert found.code == 0 and spp("verify", pruned, out).code == 0, found.err
    found = spp("convert", FILES / "sparse-bitmask", out, "--dense", dense, "--overwrite")
    assert found.code == 1 and "--dense is for masks" in found.err, found.err
    (out / "thesis.txt").write_text("mine")
    found = spp("convert", FILES / "sparse-bitmask", out, "--overwrite")
    assert found.code == 1 and "also holds thesis.txt, which would be lost" in found.err
    assert (out / "thesis.txt").read_text() == "mine"
