"""Every kernel compiles for real GPUs, which need not be there, and keeps the roundings of the canonical order."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROUNDED = {"mul.rn.f32", "add.rn.f32"}  # said to round by themselves: no later stage of the compiler may join them
FORMS = {"80": ["dense"], "90": ["dense", "2:4", "any pattern"]}  # of W, by the capability of a GPU
ARITHMETIC = {"build": ROUNDED, "delta": {"mul.rn.f32"}, "reduce": ROUNDED, "decode": set()}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="Triton's compiler for CUDA")
def test_kernels_compile_without_contraction(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.kernels.compile_kernels", json.dumps(FORMS)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    compiled = json.loads(run.stdout)
    for capability, forms in FORMS.items():
        assert len(compiled[capability]) == 14 + 5 * (len(forms) - 1)
        for name, instructions in compiled[capability].items():
            check(name, instructions)


def check(name: str, instructions: dict[str, list[str]]) -> None:
    arithmetic = instructions["arithmetic"]
    assert not any(i.startswith(("fma", "mad")) for i in arithmetic), f"{name}: {arithmetic}"
    assert ARITHMETIC[name.split()[0]] <= set(arithmetic), f"{name}: {arithmetic}"
    if name.startswith(("build", "delta")) and not name.endswith("float32"):
        assert any(i.startswith("cvt.rn") for i in arithmetic), f"{name}: {arithmetic}"
    stores = [i for i in instructions["access"] if i.startswith("st")]
    if not name.startswith("reduce"):
        assert any(".v4." in i for i in stores), f"{name}: {instructions['access']}"
    if " dense " in name:
        assert any(i.startswith("ld") and ".v4." in i for i in instructions["access"]), name
