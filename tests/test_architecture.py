"""The house keeps its shape: imports go down the levels, heavy packages stay in place, import stays light."""

from __future__ import annotations

import ast
import contextlib
import functools
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import spp
from spp.kernels.choice import use_kernels
from spp.kernels.native import elementwise
from spp.merging import rewrite
from tests.helpers.checkpoints import make_sources
from tests.helpers.models import prune_nm_, tiny_llama

ROOT = Path(__file__).resolve().parents[1]

# A room is a folder or a file right under spp/. A file imports from rooms of lower levels and from its own room only,
# wherever in the file an import is: at the top, in a function, or for type checkers.
LEVELS = {
    "errors": 0,
    "_version": 0,
    "configs": 1,  # the options of every verb; loads no torch
    "supported": 1,
    "masks": 1,
    "distributed": 1,  # asked by every verb; loads no torch for one process
    "files": 2,
    "rules": 2,
    "weights": 3,
    "data": 4,
    "models": 4,
    "kernels": 4,
    "layers": 5,
    "functional": 5,
    "evaluation": 5,
    "planning": 5,
    "wrapping": 6,
    "certifying": 7,
    "merging": 8,
    "packing": 8,
    "converting": 9,
    "pruning": 9,
    "pst": 9,
    "training": 10,
    "report": 11,  # a page of runs reads them
    "integrations": 12,
    "comparing": 12,
    "recipes": 12,
    "cli": 13,
    "__main__": 14,
}
# Within a level: a pattern is the type of an option, and what a mask follows.
BESIDE = {("masks", "configs")}
LONGEST_FILE = 500
LONGEST_FUNCTION, DEEPEST = 80, 4  # lines without the docstring; blocks within blocks
ROOT_FILES = {"__init__", "__main__", "_version", "errors", "functional", "supported"}
MORE_ROOT_FILES = 3
PUBLIC_LEVEL = 9  # what spp/__init__.py may import: the names of `import spp`, which must stay light
TRANSFORMERS_LEVEL = 10  # from here up, Trainer and modelling files may be imported at module level

ONLY_IN = {  # third-party packages that belong to some rooms, wherever in a file they are imported
    "typer": ("cli/",),
    "click": ("cli/",),
    "rich": ("cli/",),
    "peft": ("integrations/peft/", "comparing/"),
    "trl": ("integrations/",),
}
# An integration subclasses what another library has, so there it is imported at module level: whoever imports the
# integration wants that library loaded, and nothing else in spp imports it.
AT_MODULE_LEVEL_IN = {"peft": "integrations/peft/", "trl": "integrations/trl.py"}
# A kernel is defined when its file is imported: Triton may be imported at module level in one folder, and that folder
# nowhere outside of itself but inside functions.
TRITON_FOLDER, TRITON_MODULES = "kernels/triton/", "spp.kernels.triton"
NEVER_AT_MODULE_LEVEL = {"datasets", "trl", "matplotlib", "gguf", "triton", "lm_eval", "peft"}


def read_tree(folder: Path) -> dict[str, str]:
    """Return {path below spp/, with forward slashes: text} of every Python file in a folder like spp/."""
    return {p.relative_to(folder).as_posix(): p.read_text(encoding="utf-8") for p in sorted(folder.rglob("*.py"))}


def module_of(path: str) -> str:
    """The import path of a file, given relative to spp/."""
    return f"spp/{path}".removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@functools.cache
def imports_of(source: str) -> list[tuple[int, str, bool]]:
    """Return (line, dotted name, whether it runs when the module is imported) of every import in a file."""

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

    return list(walk(ast.parse(source), True))


def violations(path: str, source: str) -> list[str]:
    """What the imports of a file break; `path` is relative to spp/, with forward slashes."""
    room = path.removesuffix(".py").split("/")[0]
    is_root = path == "__init__.py"
    if room not in LEVELS and not is_root:
        return [f"{path}: no level for {room!r} in LEVELS"]
    level = PUBLIC_LEVEL + 1 if is_root else LEVELS[room]
    found = []
    in_triton_folder = path.startswith(TRITON_FOLDER)
    for line, name, at_import in imports_of(source):
        where = f"{path}:{line}"
        module, _, attribute = name.partition(":")
        package = module.split(".")[0]
        if module.startswith("."):
            found.append(f"{where}: relative import; write the full name")
        elif package in ("benchmarks", "tests"):
            found.append(f"{where}: {package} is outside of the package")
        elif module == "spp" and not (is_root and LEVELS.get(attribute, level) < level):
            found.append(f"{where}: imports the package root")
        elif package == "spp" and module != "spp":
            target = module.split(".")[1]
            if target not in LEVELS:
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


def circles(files: dict[str, str]) -> list[str]:
    """Every module that imports itself by way of others, whenever those imports run: "spp.a -> spp.b -> spp.a"."""
    modules = {module_of(path): text for path, text in files.items()}
    imports: dict[str, list[str]] = {}
    for module, text in modules.items():
        names = (name.partition(":") for _, name, _ in imports_of(text))
        targets = (f"{into}.{name}" if f"{into}.{name}" in modules else into for into, _, name in names)
        imports[module] = sorted({target for target in targets if target in modules})
    found, done = [], set[str]()

    def visit(module: str, road: list[str]) -> None:
        if module in road:
            found.append(" -> ".join([*road[road.index(module) :], module]))
        elif module not in done:
            for target in imports[module]:
                visit(target, [*road, module])
            done.add(module)

    for module in imports:
        visit(module, [])
    return found


def hidden(files: dict[str, str]) -> list[str]:
    """Every module that has the import path of a name which its package exports, so that one of the two is hidden."""
    modules = {module_of(path) for path in files}
    found = []
    for path, text in files.items():
        if not path.endswith("__init__.py"):
            continue
        package, exported, itself = module_of(path), set[str](), set[str]()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                names = {alias.asname or alias.name for alias in node.names}
                (itself if node.module == package else exported).update(names)
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                exported.add(node.name)
            elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                exported.update(ast.literal_eval(node.value))
        clashes = sorted(name for name in exported - itself if f"{package}.{name}" in modules)
        found += [f"{package}.{name} is a module and something that {package} exports" for name in clashes]
    return found


def sprawling(path: str, source: str) -> list[str]:
    """Every function that is too long or whose blocks go too deep; an elif is no deeper than its if."""
    blocks = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match)
    scopes = (ast.FunctionDef, ast.ClassDef, ast.Lambda)

    def depth(node: ast.AST) -> int:
        inner = [child for child in ast.iter_child_nodes(node) if not isinstance(child, scopes)]
        chained = getattr(node, "orelse", None) if isinstance(node, ast.If) else None
        return max((depth(c) + (isinstance(c, blocks) and [c] != chained) for c in inner), default=0)

    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
            if lines > LONGEST_FUNCTION or depth(node) > DEEPEST:
                found.append(f"{path}:{node.lineno}: {node.name} has {lines} lines, {depth(node)} blocks deep")
    return found


def findings(files: dict[str, str]) -> list[str]:
    """All that is wrong with a tree of files."""
    long = [(path, count) for path, text in files.items() if (count := len(text.splitlines())) > LONGEST_FILE]
    more = sorted({p.removesuffix(".py") for p in files if "/" not in p} - ROOT_FILES)
    crowd = f"right under spp/ are {', '.join(more)}: {MORE_ROOT_FILES} at most"
    return [
        *(found for path, text in files.items() for found in violations(path, text)),
        *(found for path, text in files.items() for found in sprawling(path, text)),
        *circles(files),
        *hidden(files),
        *(f"{path}: {count} lines; it is asking to be two files" for path, count in long),
        *([crowd] if len(more) > MORE_ROOT_FILES else []),
    ]


FILES = read_tree(ROOT / "spp")


def test_imports_go_down_the_levels_without_circles_hidden_names_and_long_files() -> None:
    assert findings(FILES) == []


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("layers/linear.py", "import spp", "imports the package root"),
        ("layers/linear.py", "from spp import models", "imports the package root"),
        ("layers/linear.py", "from . import checks", "relative import"),
        ("layers/linear.py", "from spp.wrapping.wrap import wrap", "level 5 imports spp.wrapping.wrap of level 6"),
        ("kernels/cpu.py", "from spp.models.targets import x", "level 4 imports spp.models.targets of level 4"),
        ("merging/disk.py", "def f():\n    import spp.cli.main", "level 8 imports spp.cli.main of level 13"),
        ("configs/pattern.py", "import spp.masks.patterns", "level 1 imports spp.masks.patterns of level 1"),
        ("rules/base.py", "if TYPE_CHECKING:\n    import spp.weights.base", "level 2 imports spp.weights.base"),
        ("training/loading.py", "import spp.report.plot", "level 10 imports spp.report.plot of level 11"),
        ("__init__.py", "from spp import training", "imports the package root"),
        ("__init__.py", "import spp.training", "level 10 imports spp.training of level 10"),
        ("comparing/trial.py", "import benchmarks.step", "benchmarks is outside of the package"),
        ("training/tuning.py", "import rich.table", "rich belongs to cli/"),
        ("training/tuning.py", "def f():\n    import peft", "peft belongs to"),
        ("comparing/methods.py", "import peft", "peft at module level"),
        ("integrations/trl.py", "import peft", "peft belongs to"),
        ("integrations/peft/model.py", "import trl", "trl at module level"),
        ("cli/tune.py", "import spp.integrations.peft", "spp.integrations.peft at module level"),
        ("kernels/gpu.py", "import triton", "triton at module level"),
        ("kernels/gpu.py", "from spp.kernels.triton import build", "spp.kernels.triton at module level"),
        ("kernels/gpu.py", "from spp.kernels import triton", "spp.kernels.triton at module level"),
        ("functional.py", "import spp.kernels.triton.build", "spp.kernels.triton at module level"),
        ("training/data.py", "import datasets", "datasets at module level"),
        ("merging/model.py", "from transformers import Trainer", "transformers:Trainer at module level"),
        ("merging/model.py", "if True:\n    import transformers.trainer", "transformers.trainer at module level"),
        ("merging/model.py", "class A:\n    from transformers import Bert", "transformers:Bert at module level"),
        ("unheard_of.py", "", "no level for 'unheard_of'"),
        ("merging/model.py", "import spp.unheard_of", "no level for spp.unheard_of"),
    ],
)
def test_the_walk_finds_what_is_wrong(path: str, source: str, complaint: str) -> None:
    (found,) = violations(path, source)
    assert complaint in found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("layers/linear.py", "from spp.kernels.linear import linear"),
        ("layers/linear.py", "from spp.layers.host import PackedLinear"),
        ("__init__.py", "from spp import functional"),
        ("__main__.py", "from spp.cli.main import main"),
        ("files/hashes.py", "from spp.masks.patterns import nonzero_mask"),
        ("masks/patterns.py", "from spp.configs.pattern import Pattern"),
        ("training/data.py", "def f():\n    import datasets"),
        ("kernels/triton/build_kernel.py", "import triton\nfrom spp.kernels.triton.tile import launch"),
        ("kernels/gpu.py", "def f():\n    from spp.kernels.triton import build"),
        ("merging/model.py", "if TYPE_CHECKING:\n    from transformers import Trainer"),
        ("merging/model.py", "def f():\n    from transformers import PreTrainedModel"),
        ("training/trainer.py", "from transformers import Trainer"),
        ("comparing/methods.py", "def f():\n    import peft"),
        ("integrations/peft/model.py", "from peft.tuners.tuners_utils import BaseTuner"),
        ("integrations/trl.py", "from trl import SFTTrainer"),
        ("cli/tune.py", "def f():\n    import spp.integrations.peft"),
    ],
)
def test_the_walk_allows_what_is_right(path: str, source: str) -> None:
    assert violations(path, source) == []


def test_a_tree_with_every_fault_is_told_each_of_them(tmp_path: Path) -> None:
    tree = {
        "__init__.py": "from spp.merging.model import merge\n__all__ = ['merge']\n",
        "errors.py": "",
        "merge.py": "",  # hides the function
        **{f"{name}.py": "" for name in ("one", "two", "three")},  # with merge.py one file too many
        "merging/__init__.py": "",
        "merging/model.py": "def merge():\n    from spp.merging.disk import rewrite\n",
        "merging/disk.py": "from spp.merging.rewrite import rewrite\n",
        "merging/rewrite.py": "if TYPE_CHECKING:\n    from spp.merging import model\n",
        "masks/patterns.py": "from spp.files import hashes\n" + "\n" * LONGEST_FILE,
        "masks/bits.py": "def long():\n" + "    x = 1\n" * (LONGEST_FUNCTION + 1),
        "masks/select.py": "def deep():\n" + "".join("    " * n + "if n:\n" for n in range(1, 6)) + " " * 24 + "a()",
        "masks/swap.py": "def flat():\n    if n:\n        a()\n" + "    elif n:\n        b()\n" * 9,
    }
    for path, text in tree.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    complaints = [
        "no level for 'merge'",
        "no level for 'one'",
        "no level for 'three'",
        "no level for 'two'",
        "masks/patterns.py:1: level 1 imports spp.files of level 2",
        "spp.merging.model -> spp.merging.disk -> spp.merging.rewrite -> spp.merging.model",
        "spp.merge is a module and something that spp exports",
        f"masks/patterns.py: {LONGEST_FILE + 1} lines",
        f"masks/bits.py:1: long has {LONGEST_FUNCTION + 1} lines, 0 blocks deep",
        "masks/select.py:1: deep has 6 lines, 5 blocks deep",
        "right under spp/ are merge, one, three, two: 3 at most",
    ]
    found = findings(read_tree(tmp_path))
    assert len(found) == len(complaints)
    assert [c for c in complaints if not any(c in f for f in found)] == []


@contextlib.contextmanager
def files_run_through() -> Iterator[set[Path]]:
    """The files of spp, relative to it, whose functions this thread and those that it starts run in the block."""
    seen, files = set[str](), set[Path]()

    def note(frame: FrameType, event: str, argument: object) -> None:
        seen.add(frame.f_code.co_filename)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield files
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
        files |= {file.relative_to(ROOT / "spp") for file in map(Path, seen) if file.is_relative_to(ROOT / "spp")}


def test_a_wrap_runs_through_few_files() -> None:
    model = prune_nm_(tiny_llama())
    spp.wrap  # noqa: B018  the root imports it when it is asked for
    with files_run_through() as touched:
        spp.wrap(model, r=2)
    assert 10 < len(touched) <= 20, sorted(map(str, touched))
    assert len({file.parent for file in touched}) <= 8


@pytest.mark.parametrize(("kernels", "most"), [("auto", (17, 8)), ("torch", (20, 8))])
def test_a_shard_runs_through_few_files_of_a_merge(
    kernels: str, most: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a merge on disk, from the first byte of a shard that is read to the last one that is written.

    Around the shards a merge reads adapters, checks the base, copies what is beside it and writes the certificate.
    """
    if kernels == "auto" and elementwise.why_not() is not None:
        pytest.skip(f"nothing compiled: {elementwise.why_not()}")
    folder = make_sources(tmp_path / "made")
    write_tensors, touched = rewrite._write_tensors, set[Path]()

    def traced(*given: Any) -> None:
        nonlocal touched
        with files_run_through() as touched:
            write_tensors(*given)

    monkeypatch.setattr(rewrite, "_write_tensors", traced)
    with use_kernels(kernels):
        spp.merge_checkpoint(folder / "base", folder / "adapter", tmp_path / "out")
    assert Path("files/writer.py") in touched and Path("files/reader.py") in touched
    assert len(touched) <= most[0], sorted(map(str, touched))
    assert len({file.parent for file in touched}) <= most[1]
    monkeypatch.undo()
    with use_kernels(kernels), files_run_through() as whole:
        spp.merge_checkpoint(folder / "base", folder / "adapter", tmp_path / "again")
    assert len(touched) < len(whole) <= 37, sorted(map(str, whole))
    assert len({file.parent for file in whole}) <= 13


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
    "lm_eval",
]
CONFIGS = sorted((ROOT / "spp" / "configs").glob("*.py"))


def heavy(source: str) -> list[str]:
    """The packages beside the standard library and the lowest rooms that a file of the configs imports."""
    light = {*sys.stdlib_module_names, "spp.configs", "spp.errors", "spp._version"}
    modules = [name.partition(":")[0] for _, name, _ in imports_of(source)]
    return [m for m in modules if m.split(".")[0] not in light and ".".join(m.split(".")[:2]) not in light]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_configs_load_nothing_heavy(path: Path) -> None:
    assert heavy(path.read_text()) == []


def test_what_is_heavy() -> None:
    assert heavy("import math\nfrom spp.errors import arg\nfrom spp.configs.options import Option") == []
    for bad in ("torch", "spp.files", "spp.files.hub", "typer", "numpy"):
        assert heavy(f"def f():\n    import {bad}") == [bad]


@pytest.mark.slow
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
    for path, text in FILES.items():
        if "pickle" not in text and "torch.load" not in text:
            continue
        calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
        for call in calls:
            name, given = ast.unparse(call.func), {word.arg: ast.unparse(word.value) for word in call.keywords}
            assert not name.startswith("pickle."), f"{path}:{call.lineno}"
            assert name != "torch.load" or given.get("weights_only") == "True", f"{path}:{call.lineno}"
