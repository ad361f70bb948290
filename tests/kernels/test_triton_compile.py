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


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="Triton's compiler for CUDA")
@pytest.mark.parametrize(("capability", "kernels"), [(80, 13), (90, 28)])
def test_kernels_compile_without_contraction(capability: int, kernels: int, tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.kernels.compile_kernels", str(capability)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout)
    assert len(found) == kernels
    for name, instructions in found.items():
        assert not any(i.startswith(("fma", "mad")) for i in instructions), f"{name}: {instructions}"
        # Explicitly rounded operations, which no later stage of the compiler may join.
        expected = {"build": {"mul.rn.f32", "add.rn.f32"}, "delta": {"mul.rn.f32"}, "decode": set()}
        expected["quantise"] = expected["build"]
        expected["reduce"] = expected["build"]
        assert expected[name.split()[0]] <= set(instructions), f"{name}: {instructions}"
        if name.startswith(("build", "delta")) and not name.endswith("*fp32"):
            assert any(i.startswith("cvt.rn") for i in instructions), f"{name}: {instructions}"
