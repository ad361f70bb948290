"""The package root: its names are imported when they are first used, and nothing heavy before."""

from __future__ import annotations

import ast
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import spp

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "numpy", "transformers", "typer", "rich")
TRAINERS = ("transformers.trainer", "transformers.modeling_utils", "datasets", "peft", "trl", "typer", "rich")


def loaded_by(code: str, names: tuple[str, ...]) -> list[str]:
    """Which of `names` a fresh process has loaded after `code`."""
    code += f"\nimport json, sys\nprint(json.dumps([name for name in {names!r} if name in sys.modules]))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert isinstance(found, list)
    return found


@pytest.mark.slow
def test_import_loads_no_torch() -> None:
    assert loaded_by("import spp", HEAVY) == []
    assert loaded_by("import spp, torch", HEAVY) == ["torch", "numpy"]  # the check can fail


@pytest.mark.slow
def test_a_config_loads_no_torch() -> None:
    assert loaded_by("import spp; spp.SPPConfig(r=8)", HEAVY) == []


@pytest.mark.slow
def test_the_functions_load_no_trainer() -> None:
    assert loaded_by("import spp; spp.wrap, spp.merge, spp.prune, spp.verify, spp.pst", TRAINERS) == []
    assert loaded_by("from spp import *; assert callable(wrap) and callable(merge)", TRAINERS) == []


@pytest.mark.slow
@pytest.mark.parametrize("module", ["spp.training", "spp.evaluation", "spp.integrations", "spp.report"])
def test_a_module_imported_by_name_is_an_attribute(module: str) -> None:
    assert loaded_by(f"import {module}, spp; {module}; assert callable(spp.merge)", ("torch",)) == ["torch"]


@pytest.mark.parametrize("name", spp.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(spp, name) is not None
    assert name in dir(spp)


def test_what_type_checkers_read_is_what_runs() -> None:
    tree = ast.parse((ROOT / "spp" / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    read = {str(node.module): tuple(alias.name for alias in node.names) for node in imports}
    assert read.pop("spp") == spp._MODULES
    assert read == spp._HOMES
    assert sorted([*spp._MODULES, *spp._HOME_OF, "__version__"]) == spp.__all__


def test_no_module_hides_a_name() -> None:
    """Importing a module spp/merge.py would put it in the place of the function spp.merge."""
    for name in set(spp.__all__) - set(spp._MODULES):
        assert not (ROOT / "spp" / f"{name}.py").exists() and not (ROOT / "spp" / name).exists(), name


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'spp' has no attribute 'prunes'"):
        spp.prunes  # noqa: B018
    with pytest.raises(ImportError, match="prunes"):
        from spp import prunes  # noqa: F401


def test_configs_and_errors_are_pickled() -> None:
    config = spp.SPPConfig(r=8, target_modules=["q_proj"])
    assert pickle.loads(pickle.dumps(config)) == config
    assert str(pickle.loads(pickle.dumps(spp.SPPError("that is wrong")))) == "that is wrong"


@pytest.mark.slow
@pytest.mark.parametrize("use", ["spp.wrap", "from spp import merge", "import spp.training"])
def test_another_version_is_refused_at_the_first_use(use: str) -> None:
    code = (
        "import importlib.metadata as m\nreal = m.version\n"
        "m.version = lambda name: '2.7.0' if name == 'torch' else real(name)\n"
        f"import spp\nfrom spp.errors import DependencyError\ntry:\n    {use}\n"
        "except DependencyError as error:\n    assert 'does not work with torch 2.7.0' in str(error)\n"
        "else:\n    raise SystemExit('it was let in')\n"
    )
    assert loaded_by(code, ("torch",)) == []


@pytest.mark.slow
def test_the_module_is_the_program() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "spp", "--version"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (run.returncode, run.stdout) == (0, f"spp {spp.__version__}\n")
