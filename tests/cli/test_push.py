"""spp push: a dry run prints the card, a push says where it went, and what is refused is one message."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalTokenNotFoundError

from tests.cli.conftest import Outcome
from tests.integrations.fake_hub import FakeHub


def test_push(
    spp: Callable[..., Outcome], pruned: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub()
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    model = Path(shutil.copytree(pruned, tmp_path / "model"))
    found = spp("push", model, "owner/name")
    assert found.code == 1 and "spp certify DIRECTORY writes the certificate" in found.err
    assert spp("certify", model).code == 0
    found = spp("push", model, "owner/name", "--dry-run")
    assert found.code == 0 and "# name" in found.out and "would push 8 files" in found.out
    assert hub.repos == {}
    found = spp("push", model, "owner/name", "--private", "--license", "mit", "--base", "org/base")
    assert found.code == 0 and "wrote https://hub/owner/name/commit/1" in found.out, found.err
    assert ("create", "owner/name", True) in hub.calls and b"license: mit\n" in hub.repos["owner/name"]["README.md"]
    found = spp("push", model, "owner/name")
    assert found.code == 1 and "exists already" in found.err and "with --overwrite" in found.err
    assert spp("push", adapter, "owner/adapter").code == 0
    (model / "README.md").write_text("mine")
    found = spp("push", model, "owner/name", "--dry-run")
    assert found.code == 0 and "the card is the README.md that is there; --new-card" in found.out
    hub.error = LocalTokenNotFoundError("none")
    found = spp("push", model, "owner/new")
    assert found.code == 1 and "hf auth login" in found.err and "Traceback" not in found.err
