"""Small checkpoints, texts and a way to call the program inside the test's process."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from spp.cli.main import main
from tests.helpers.models import prune_nm_, tiny_llama, tiny_tokenizer

LINES = [f"line {i}: the number {i} times {i + 1} is {i * (i + 1)}, and that is that." for i in range(120)]

# What only Python says: overwrite=True, dtype=torch.float32, target_modules=['x'], pattern= is missing, spp.f(dir).
PYTHON = re.compile(r"\b[a-z_]{2,}=(True|False|None|torch\.|['\"\[{(]|[ ,;.)]|$)|\bspp\.[a-z_]+\(", re.M)


@dataclass(frozen=True)
class Outcome:
    """What a call of the program came to."""

    code: int
    out: str
    err: str


@pytest.fixture
def spp(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Call `spp ARGUMENTS` as the console script does."""

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["spp", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        captured = capsys.readouterr()
        if code == 1:
            said = captured.err.partition("Traceback (most recent")[0]
            assert not PYTHON.search(said), f"Python's spelling on the command line: {said}"
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense checkpoint with its tokenizer."""
    directory = tmp_path_factory.mktemp("models") / "dense"
    tiny_llama().save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, 2:4."""
    directory = tmp_path_factory.mktemp("models") / "pruned"
    prune_nm_(tiny_llama()).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text file of some thousand characters."""
    path = tmp_path / "text.txt"
    path.write_text("\n".join(LINES), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the pruned checkpoint whose β is not zero."""
    import torch

    from spp.wrapping.adapters import save_adapter
    from spp.wrapping.wrap import adapter_parameters, wrap

    model = wrap(prune_nm_(tiny_llama()), r=4, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return save_adapter(model, tmp_path_factory.mktemp("adapters") / "adapter")
