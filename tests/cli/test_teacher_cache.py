"""spp teacher-cache, and what spp tune says of teachers in the command line's own words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.cli.conftest import Outcome
from tests.helpers.checkpoints import contents

Call = Callable[..., Outcome]
SMALL = ("--steps", 2, "--block-length", 16, "--batch-size", 1, "--window", 16, "--eval-windows", 1, "--device", "cpu")
KL = ("--kl-weight", 0.7, "--ce-weight", 0.3)


def test_a_cache_is_written_and_read(spp: Call, dense: Path, pruned: Path, text: Path, tmp_path: Path) -> None:
    cache, run = tmp_path / "cache", tmp_path / "run"
    make = ("teacher-cache", dense, cache, "--data", text, "--block-length", 16, "--top-k", 4)
    made = spp(*make)
    assert made.code == 0 and f"wrote {cache}" in made.out and "outside of them" in made.out
    tune = ("tune", pruned, run, "--data", text, *SMALL, "--teacher-cache", cache)
    found = spp(*tune)
    assert found.code == 1 and "there is a teacher, but --kl-weight and --hidden-weight are 0" in found.err
    assert "pass --kl-weight 0.7 and --ce-weight 0.3" in found.err
    found = spp(*tune, *KL, "--temperature", 2)
    assert found.code == 1 and "--temperature is 2.0, but --teacher-cache is exact at 1 only" in found.err
    assert not run.exists() and spp(*tune, *KL).code == 0
    assert "exists" in spp(*make).err and spp(*make, "--overwrite").code == 0
    (cache / "notes.txt").write_text("mine")
    assert "notes.txt" in spp(*make, "--overwrite").err and (cache / "notes.txt").exists()
    found = spp(*make[:-1], 256, "--overwrite")
    assert found.code == 1
    held = contents(dense)
    found = spp("teacher-cache", dense, dense, *make[3:], "--overwrite")
    assert found.code == 1 and "is the teacher" in found.err and contents(dense) == held


def test_a_teacher_that_is_not_known(spp: Call, pruned: Path, text: Path, tmp_path: Path) -> None:
    found = spp("tune", pruned, tmp_path / "run", "--data", text, *SMALL, *KL, "--teacher", "dense")
    assert found.code == 1 and f"--teacher dense: {pruned} has no certificate that names the dense model" in found.err
    assert "--teacher DIR" in found.err and not (tmp_path / "run").exists()
    found = spp("tune", pruned, tmp_path / "run", "--data", text, *SMALL, *KL)
    assert found.code == 1 and "--ce-weight is 0.3, but there is no teacher: pass --teacher dense" in found.err
    found = spp("teacher-cache", pruned, tmp_path / "cache", "--data", text, "--top-k", 0)
    assert found.code == 1 and "--top-k is 0" in found.err
