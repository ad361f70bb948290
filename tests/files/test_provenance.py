"""Provenance stores what is known under its keys, comes back from them, and says it on one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

from spp._version import __version__
from spp.files.provenance import Provenance, installed


def test_what_is_stored_comes_back_but_for_hashes_which_have_keys_of_their_own() -> None:
    made = Provenance.here("cpu", torch.bfloat16, kernels="torch", compiled_products=False, seconds=1.5)
    stored = json.loads(json.dumps(Provenance(**{**vars(made), "hashes": {"text_sha256": "ab"}}).to_dict()))
    assert stored["text_sha256"] == "ab" and "hashes" not in stored
    assert Provenance.from_dict({"other": 1, **stored}) == made
    assert made.versions is not None and made.versions["spp"] == __version__
    assert made.versions["torch"] == torch.__version__
    assert (made.dtype, made.threads) == ("bfloat16", torch.get_num_threads())


def test_what_a_result_does_not_depend_on_is_not_stored() -> None:
    assert Provenance().to_dict() == {}
    assert {"device", "dtype", "seconds", "kernels"}.isdisjoint(Provenance.here().to_dict())


def test_it_is_told_on_one_line() -> None:
    made = Provenance("a machine", "float32", 1, 2, "torch", False, "3.11", {"spp": "0.1"})
    assert made.line == "a machine, 1 thread on 2 cores, float32, kernels torch; Python 3.11, spp 0.1"
    assert "products that skip zeros" in Provenance(compiled_products=True).line


def test_a_package_that_is_not_there_has_no_version() -> None:
    assert installed("torch") == torch.__version__.split("+")[0] or installed("torch") == torch.__version__
    assert installed("no-such-package-here") is None


def collects(source: str) -> bool:
    """Whether a file tells the versions or the machine of a result by itself."""
    return re.search(r"python_version\(|sched_getaffinity|\"torch\": torch\.__version__", source) is not None


def test_no_result_collects_its_provenance_by_itself() -> None:
    root = Path(__file__).resolve().parents[2]
    files = [path for folder in ("spp", "benchmarks", "examples") for path in (root / folder).rglob("*.py")]
    found = [path.relative_to(root).as_posix() for path in files if collects(path.read_text(encoding="utf-8"))]
    assert found == ["spp/files/provenance.py"]
