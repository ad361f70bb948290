"""The import benchmark runs and reports a ratio of one for the reference."""

from __future__ import annotations

import pytest

from benchmarks import imports


def test_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imports, "IMPORTS", {"spp": "import json", "what it stands on": "import json, decimal"})
    imports.main(["--rounds", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("what it stands on") and "1.000 (1.000 … 1.000)" in line for line in lines)
    assert any(line.startswith("spp ") for line in lines)
