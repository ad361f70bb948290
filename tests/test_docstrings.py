"""Docstrings say what a reader needs: the public API its arguments, result, errors and an example; all of them in
plain English."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import spp

ROOT = Path(__file__).resolve().parents[1]
MODULES = ("spp", "spp.pruning", "spp.pst", "spp.functional", "spp.training", "spp.evaluation", "spp.report")
OPTIONAL = {
    "peft": "spp.integrations.peft",
    "trl": "spp.integrations.trl",
    "transformers": "spp.integrations.transformers",
}
MADE = "spp makes it; the function that returns it has the example"
NEEDS_NO_EXAMPLE = {  # name: the reason
    "SPPError": "an exception",
    "SPPWarning": "a warning",
    "TrainingInterrupted": "an exception",
    **dict.fromkeys(("MergeReport", "SparsityReport", "SemiStructuredReport", "PruneReport", "LayerReport"), MADE),
    "ReconstructionReport": MADE,
    **dict.fromkeys(("InputStats", "TuneResult", "TrainingData", "PerplexityResult", "PushReport"), MADE),
    **dict.fromkeys(("LoadedTasks", "TaskFacts", "TaskResults"), MADE),
    "RunReport": MADE,
    **dict.fromkeys(("SPPPeftModel", "SPPPeftLinear", "SPPPeftExperts"), "PEFT makes it"),
    **dict.fromkeys(("SPPPackedConfig", "SPPPackedQuantizer"), "transformers makes it"),
}
SECTIONS = r"Args|Attributes|Returns|Yields|Raises|Example|Examples|Reference"
DIALECT = re.compile(  # words of this project alone, and what to say instead
    r"\b(lets? go of|letting go of"  # free, give back
    r"|stands? for|stood for"  # mean, be the placeholder of
    r"|lies? (?:in|on|there|beside|below|between)|lying (?:in|on)"  # is stored, is
    r"|(?:have|has|having) (?:it|them|that|these) (?:be|let|do|take|hold|say)"  # set, make
    r"|as long as it lasts"  # context manager
    r"|puts? \S+ off)\b"  # defer
)


def public(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Yield (name, object) of every function and class that a module offers."""
    named = getattr(module, "__all__", None)
    names = named if named is not None else [n for n in vars(module) if not n.startswith("_")]
    for name in names:
        found = getattr(module, name)
        own = named is not None or getattr(found, "__module__", "") == module.__name__
        if own and (inspect.isclass(found) or inspect.isfunction(found)):
            yield name, found


def sections(doc: str) -> dict[str, str]:
    """Return the sections of a docstring by name, and its beginning under ""."""
    parts = re.split(rf"^({SECTIONS}):[ ]*$", inspect.cleandoc(doc), flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def tree_of(found: Any) -> Any:
    return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(found)))).body[0]


def raises(node: ast.AST) -> bool:
    """Whether `raise` with an exception is in a function itself, not in one that it defines."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.Lambda, ast.ClassDef)):
            continue
        if (isinstance(child, ast.Raise) and child.exc is not None) or raises(child):
            return True
    return False


def parameters(node: ast.FunctionDef) -> list[str]:
    given = node.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    return [p.arg for p in every if p.arg not in ("self", "cls")]


def wanting(name: str, doc: str | None, node: Any) -> list[str]:
    """Return what the docstring of a function or class lacks."""
    if not doc:
        return ["a docstring"]
    found, lacks = sections(doc), []
    told = found.get("Args", "") + found.get("Attributes", "")
    if isinstance(node, ast.ClassDef):
        inner = {n.name: n for n in node.body if isinstance(n, ast.FunctionDef)}
        fields = [n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
        is_dataclass = any("dataclass" in ast.unparse(d) for d in node.decorator_list)
        made = inner.get("__init__")
        names = parameters(made) if made else fields if is_dataclass else []
        throws = any(raises(inner[method]) for method in ("__init__", "__post_init__") if method in inner)
    else:
        names, throws = parameters(node), raises(node)
        result = "None" if node.returns is None else ast.unparse(node.returns)
        says = re.match(r"(Return|Yield|Iterate|Whether)", found[""]) or {"Returns", "Yields"} & found.keys()
        if result not in ("None", "NoReturn") and not says:
            lacks.append("Returns")
    lacks += [f"Args: {n}" for n in names if not re.search(rf"\b{re.escape(n)}\b", told)]
    if throws and "Raises" not in found:
        lacks.append("Raises")
    if name not in NEEDS_NO_EXAMPLE and ">>>" not in doc and "Example" not in found:
        lacks.append("Example")
    return lacks


@pytest.mark.parametrize("module", [*MODULES, "spp.integrations.hub"])
def test_public_names_say_arguments_result_errors_and_an_example(module: str) -> None:
    check(importlib.import_module(module))


@pytest.mark.parametrize("package", OPTIONAL)
def test_public_names_of_integrations_do_too(package: str) -> None:
    pytest.importorskip(package)
    check(importlib.import_module(OPTIONAL[package]))


def check(module: ModuleType) -> None:
    found = {name: lacks for name, it in public(module) if (lacks := wanting(name, it.__doc__, tree_of(it)))}
    assert found == {}


@pytest.mark.parametrize("module", [*MODULES, "spp.integrations.hub"])
def test_examples_that_need_no_model_run(module: str) -> None:
    runner, finder = doctest.DocTestRunner(verbose=False), doctest.DocTestFinder(recurse=False)
    for name, found in public(importlib.import_module(module)):
        names = {**vars(importlib.import_module(found.__module__)), "torch": torch, "nn": torch.nn, "spp": spp}
        for test in finder.find(found, name, globs=names):
            runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


def test_every_exemption_is_of_something_that_is_there() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "spp").rglob("*.py"))
    assert [name for name in NEEDS_NO_EXAMPLE if not re.search(rf"^class {name}\b", text, re.MULTILINE)] == []


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (doc := ast.get_docstring(node)):
            yield getattr(node, "lineno", 1), doc


def faults(doc: str) -> list[str]:
    """Return what is no plain English in a docstring."""
    begins = ['begins with "What"'] if re.match(r"What\b(?!.*\?)", doc.split("\n")[0]) else []
    return begins + [f"says {match[0]!r}" for match in DIALECT.finditer(doc)]


def test_docstrings_are_plain_english() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line} {fault}"
        for path in sorted((ROOT / "spp").rglob("*.py"))
        for line, doc in docstrings(path)
        for fault in faults(doc)
    ]
    assert found == []


def good(x: int, *, y: int = 0) -> int:
    """Return x.

    Args:
        x: a number.
        y: another.

    Raises:
        ValueError: x is 0.

    Example:
        >>> good(1)
        1
    """
    if not x:
        raise ValueError
    return x


def bad(x: int, y: int = 0) -> int:
    """Compute.

    Args:
        x: a number.
    """
    if not x:
        raise ValueError
    return y


def test_the_checks_find_what_is_wanting() -> None:
    def lacks(function: Callable[..., object]) -> list[str]:
        return wanting(function.__name__, function.__doc__, tree_of(function))

    assert lacks(good) == []
    assert lacks(bad) == ["Returns", "Args: y", "Raises", "Example"]
    assert wanting("f", None, None) == ["a docstring"]
    assert faults("What it holds.") == ['begins with "What"'] and faults("What is it? A word.") == []
    assert faults("Lets it be.") == [] and faults("The source lets go of it.") == ["says 'lets go of'"]
