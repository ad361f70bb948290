"""The house keeps its shape: imports go down the levels, heavy packages stay in place, import stays light."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "spp").rglob("*.py"))
LONGEST_FILE = 500

# A room is a file or a folder right under spp/; `calibrate_statistics.py` belongs to the room `calibrate`.
# A file imports from rooms of lower levels and from its own room only.
LEVELS = {
    "errors": 0,
    "_version": 0,
    "configs": 1,
    "supported": 1,
    "patterns": 2,
    "files": 2,
    "offload": 2,
    "rules": 3,
    "packed": 3,
    "targets": 3,
    "certificate": 3,
    "pruning": 3,
    "kernels": 4,
    "adapter_files": 4,
    "base_values": 4,
    "functional": 5,
    "layer": 6,
    "experts": 6,
    "inject": 7,
    "adapters": 8,
    "merge": 8,
    "semi_structured": 8,
    "calibrate": 8,
    "pst": 8,
    "checkpoint": 9,
    "evaluation": 10,
    "report": 10,
    "training": 11,
    "integrations": 12,
    "bench": 12,
    "cli": 13,
    "__main__": 14,
}
# Within a level: the hash of a mask is a file's matter, its bits a pattern's; a projection may be
# quantized, and how to read it is the packed room's matter. Experts are checked as layers are.
BESIDE = {("files", "patterns"), ("targets", "packed"), ("experts", "layer")}
PUBLIC_LEVEL = 9  # what spp/__init__.py may import: the names of `import spp`, which must stay light
TRANSFORMERS_LEVEL = 10  # from here up, Trainer and modelling files may be imported at module level

ONLY_IN = {  # third-party packages that belong to some rooms, wherever in a file they are imported
    "typer": ("cli/",),
    "click": ("cli/",),
    "rich": ("cli/",),
    "peft": ("integrations/peft/", "bench/"),
    "trl": ("integrations/",),
}
# An integration subclasses what another library has, so there it is imported at module level: whoever imports the
# integration wants that library loaded, and nothing else in spp imports it.
AT_MODULE_LEVEL_IN = {"peft": "integrations/peft/", "trl": "integrations/trl.py"}
# A kernel is defined when its file is imported: Triton may be imported at module level in one folder, and that folder
# nowhere outside of itself but inside functions.
TRITON_FOLDER, TRITON_MODULES = "kernels/triton/", "spp.kernels.triton"
NEVER_AT_MODULE_LEVEL = {"datasets", "trl", "matplotlib", "gguf", "triton", "lm_eval", "peft"}
NOT_LOADED_BY_IMPORT = [
    "transformers.trainer",
    "transformers.modeling_utils",
    "datasets",
    "peft",
    "trl",
    "triton",
    "matplotlib",
    "typer",
    "rich",
    "gguf",
]


def room_of(name: str) -> str | None:
    """The room that `name`, the first part of a path below spp/, belongs to."""
    if name in LEVELS:
        return name
    return next((room for room in LEVELS if name.startswith(room + "_")), None)


def imports_of(tree: ast.Module) -> Iterator[tuple[int, str, bool]]:
    """Yield (line, dotted name, whether it runs when the module is imported) of every import in a file."""

    def walk(node: ast.AST, at_import: bool) -> Iterator[tuple[int, str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield child.lineno, alias.name, at_import
            elif isinstance(child, ast.ImportFrom):
                module = "." * child.level + (child.module or "")
                for alias in child.names:
                    yield child.lineno, f"{module}:{alias.name}", at_import
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for part in child.body:
                    yield from walk(ast.Module([part], []), False)
                for part in child.orelse:
                    yield from walk(ast.Module([part], []), at_import)
            else:
                deferred = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                yield from walk(child, at_import and not deferred)

    yield from walk(tree, True)


def violations(path: str, source: str) -> list[str]:
    """What the imports of a file break; `path` is relative to spp/, with forward slashes."""
    parts = path.removesuffix(".py").split("/")
    is_root = parts == ["__init__"]
    room = room_of(parts[0])
    if room is None and not is_root:
        return [f"{path}: no level for {parts[0]!r} in LEVELS"]
    level = PUBLIC_LEVEL + 1 if is_root else LEVELS[str(room)]
    found = []
    in_triton_folder = path.startswith(TRITON_FOLDER)
    for line, name, at_import in imports_of(ast.parse(source)):
        where = f"{path}:{line}"
        module, _, attribute = name.partition(":")
        package = module.split(".")[0]
        if module.startswith("."):
            found.append(f"{where}: relative import; write the full name")
        elif module == "spp" and not (is_root and LEVELS.get(attribute, level) < level):
            found.append(f"{where}: imports the package root")
        elif package == "spp" and module != "spp":
            target = room_of(module.split(".")[1])
            if target is None:
                found.append(f"{where}: no level for {module}")
            elif target != room and LEVELS[target] >= level and (room, target) not in BESIDE:
                found.append(f"{where}: level {level} imports {module} of level {LEVELS[target]}")
            elif at_import and f"{module}.{attribute}.".startswith(f"{TRITON_MODULES}.") and not in_triton_folder:
                found.append(f"{where}: {TRITON_MODULES} at module level; import it where it is used")
            elif at_import and module.startswith("spp.integrations.") and room != "integrations":
                found.append(f"{where}: {module} at module level; import it where it is used")
        elif package in ONLY_IN and not path.startswith(ONLY_IN[package]):
            found.append(f"{where}: {package} belongs to {' and '.join(ONLY_IN[package])}")
        elif package == "triton" and in_triton_folder:
            continue
        elif (
            package in NEVER_AT_MODULE_LEVEL and at_import and not path.startswith(AT_MODULE_LEVEL_IN.get(package, "-"))
        ):
            found.append(f"{where}: {package} at module level; import it where it is used")
        elif package == "transformers" and at_import and level < TRANSFORMERS_LEVEL and name != "transformers":
            found.append(f"{where}: {name} at module level below level {TRANSFORMERS_LEVEL}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_the_levels(path: Path) -> None:
    assert violations(path.relative_to(ROOT / "spp").as_posix(), path.read_text()) == []


CONFIGS = sorted((ROOT / "spp" / "configs").glob("*.py"))


def heavy(source: str) -> list[str]:
    """The packages beside the standard library and the lowest rooms that a file of the configs imports."""
    light = {*sys.stdlib_module_names, "spp.configs", "spp.errors", "spp._version"}
    modules = [name.partition(":")[0] for _, name, _ in imports_of(ast.parse(source))]
    return [m for m in modules if m.split(".")[0] not in light and ".".join(m.split(".")[:2]) not in light]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_configs_load_nothing_heavy(path: Path) -> None:
    assert heavy(path.read_text()) == []


def test_what_is_heavy() -> None:
    assert heavy("import math\nfrom spp.errors import arg\nfrom spp.configs.options import Option") == []
    for bad in ("torch", "spp.files", "spp.files.rows", "typer", "numpy"):
        assert heavy(f"def f():\n    import {bad}") == [bad]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST_FILE, f"{path.name} is asking to be two files"


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("layer.py", "import spp", "imports the package root"),
        ("layer.py", "from spp import targets", "imports the package root"),
        ("layer.py", "from . import targets", "relative import"),
        ("layer.py", "from spp.inject import wrap", "level 6 imports spp.inject of level 7"),
        ("layer.py", "from spp.experts import Experts", "level 6 imports spp.experts of level 6"),
        ("merge.py", "def f():\n    import spp.cli.main", "level 8 imports spp.cli.main of level 13"),
        ("__init__.py", "from spp import training", "imports the package root"),
        ("__init__.py", "import spp.training", "level 10 imports spp.training of level 11"),
        ("training/tune.py", "import rich.table", "rich belongs to cli/"),
        ("training/tune.py", "def f():\n    import peft", "peft belongs to"),
        ("bench/step.py", "import peft", "peft at module level"),
        ("integrations/trl.py", "import peft", "peft belongs to"),
        ("integrations/peft/model.py", "import trl", "trl at module level"),
        ("cli/tune.py", "import spp.integrations.peft", "spp.integrations.peft at module level"),
        ("kernels/backend.py", "import triton", "triton at module level"),
        ("kernels/backend.py", "from spp.kernels.triton import build", "spp.kernels.triton at module level"),
        ("kernels/backend.py", "from spp.kernels import triton", "spp.kernels.triton at module level"),
        ("functional.py", "import spp.kernels.triton.build", "spp.kernels.triton at module level"),
        ("training/data.py", "import datasets", "datasets at module level"),
        ("merge.py", "from transformers import Trainer", "transformers:Trainer at module level"),
        ("merge.py", "if True:\n    import transformers.trainer", "transformers.trainer at module level"),
        ("merge.py", "class A:\n    from transformers import Bert", "transformers:Bert at module level"),
        ("unheard_of.py", "", "no level for 'unheard_of'"),
        ("merge.py", "import spp.unheard_of", "no level for spp.unheard_of"),
    ],
)
def test_the_walk_finds_what_is_wrong(path: str, source: str, complaint: str) -> None:
    (found,) = violations(path, source)
    assert complaint in found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("layer.py", "from spp.functional import spp_linear"),
        ("__init__.py", "from spp import functional"),
        ("files/hashes.py", "from spp.patterns import nonzero_mask"),
        ("training/tune.py", "from spp.training.data import load_data"),
        ("calibrate.py", "from spp.calibrate_statistics import Statistics"),
        ("training/data.py", "def f():\n    import datasets"),
        ("kernels/triton/build_kernel.py", "import triton\nfrom spp.kernels.triton.launch import launch"),
        ("kernels/backend.py", "def f():\n    from spp.kernels.triton import build"),
        ("merge.py", "if TYPE_CHECKING:\n    from transformers import Trainer"),
        ("merge.py", "def f():\n    from transformers import PreTrainedModel"),
        ("training/trainer.py", "from transformers import Trainer"),
        ("bench/step.py", "def f():\n    import peft"),
        ("integrations/peft/model.py", "from peft.tuners.tuners_utils import BaseTuner"),
        ("integrations/trl.py", "from trl import SFTTrainer"),
        ("cli/tune.py", "def f():\n    import spp.integrations.peft"),
    ],
)
def test_the_walk_allows_what_is_right(path: str, source: str) -> None:
    assert violations(path, source) == []


def test_import_spp_stays_light() -> None:
    code = (
        "import json, sys\n"
        "import spp, spp.integrations, torch\n"
        "for name in spp.__all__: getattr(spp, name)\n"
        f"loaded = [name for name in {NOT_LOADED_BY_IMPORT!r} if name in sys.modules]\n"
        "print(json.dumps([loaded, torch.cuda.is_initialized()]))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    loaded, cuda = json.loads(run.stdout)
    assert loaded == []
    assert cuda is False


def test_nothing_is_unpickled_but_tensors() -> None:
    """A pickle can run code: torch.load reads tensors alone, and nothing else reads pickles."""
    for path in SOURCES:
        text = path.read_text()
        if "pickle" not in text and "torch.load" not in text:
            continue
        calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
        for call in calls:
            name, given = ast.unparse(call.func), {word.arg: ast.unparse(word.value) for word in call.keywords}
            assert not name.startswith("pickle."), f"{path}:{call.lineno}"
            assert name != "torch.load" or given.get("weights_only") == "True", f"{path}:{call.lineno}"
