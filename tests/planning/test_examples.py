"""examples/distributed: its figures are the planner's, and accelerate reads its configs."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

HERE = Path(__file__).resolve().parents[2] / "examples" / "distributed"


def test_the_tables_are_the_planners() -> None:
    spec = importlib.util.spec_from_file_location("tables", HERE / "tables.py")
    assert spec is not None and spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    text = (HERE / "README.md").read_text(encoding="utf-8")
    assert tables.written(text) == text, "run python examples/distributed/tables.py"
    assert text.count("| llama-") == 20 and text.count("\naccelerate launch") == 3


@pytest.mark.parametrize(
    ("name", "kind"), [("ddp", "MULTI_GPU"), ("fsdp", "FSDP"), ("zero2", "DEEPSPEED"), ("zero3", "DEEPSPEED")]
)
def test_accelerate_reads_the_configs(name: str, kind: str) -> None:
    found = load_config_from_file(str(HERE / f"{name}.yaml"))
    assert found.distributed_type == kind and found.num_processes == 8 and found.mixed_precision == "no"
    if name == "fsdp":
        assert found.fsdp_config["fsdp_version"] == 2
    if name.startswith("zero"):
        assert found.deepspeed_config["zero_stage"] == int(name[-1])
