"""Messages that name arguments and calls: what Python shows of them, and what the errors carry."""

from __future__ import annotations

import ast
import inspect
import pickle
import re
import warnings
from pathlib import Path

import pytest
import torch

from spp import errors
from spp.errors import ConfigError, Marked, SPPError, SPPWarning, arg, call, render
from spp.training import TrainingInterrupted

ROOT = Path(__file__).resolve().parents[1] / "spp"
ERRORS = [e for _, e in inspect.getmembers(errors, inspect.isclass) if issubclass(e, Marked) and e is not Marked]


@pytest.mark.parametrize(
    ("marked", "said"),
    [
        (f"{arg('lr')} is 0", "lr is 0"),
        (f"pass {arg('overwrite', True)}", "pass overwrite=True"),
        (f"pass {arg('pattern', ...)} too", "pass pattern= too"),
        (f"with {arg('dtype', torch.float32)}", "with dtype=torch.float32"),
        (f"{arg('target_modules', ['a', 'b'])} matches nothing", "target_modules=['a', 'b'] matches nothing"),
        (f"{call('certify')} writes one", "spp.certify writes one"),
        (f"{call('certify', 'dir', deep=True)} writes one", "spp.certify(dir, deep=True) writes one"),
        (f"{call('verify', 'a, b')}, {arg('r', 3)}", "spp.verify(a, b), r=3"),
        ("nothing to say", "nothing to say"),
    ],
)
def test_what_python_shows(marked: str, said: str) -> None:
    assert render(marked) == said
    assert str(SPPError(marked)) == said


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: e.__name__)
def test_every_error_carries_its_option_and_its_remedy(error: type[Marked]) -> None:
    raised = error(f"{arg('lr')} is 0", remedy=f"pass {arg('lr', 0.1)}")
    again = pickle.loads(pickle.dumps(raised))
    for one in (raised, again):
        assert str(one) == "lr is 0; pass lr=0.1"
        assert (one.option, one.remedy) == ("lr", "pass lr=0.1")
    assert repr(raised) == f"{error.__name__}('lr is 0; pass lr=0.1')"


def test_an_error_without_a_mention_has_neither() -> None:
    assert (SPPError("wrong").option, SPPError("wrong").remedy) == (None, None)
    assert SPPError(f"that {arg('lr')} is 0").option is None  # not what the message is about
    assert SPPError(f"{call('certify', 'dir')} first").option is None
    assert ConfigError("there is no rule 'x'", option="rule").option == "rule"


def test_a_warning_shows_python_too() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.warn(SPPWarning(f"lower {arg('lr', ...)}"), stacklevel=1)
    assert str(caught[0].message) == "lower lr="


def test_an_interruption_carries_its_remedy() -> None:
    stop = TrainingInterrupted(2, Path("run/checkpoints/3"), 3)
    assert str(stop).endswith("saved run/checkpoints/3; run the same again with resume=True to continue")


def spelled_for_the_command_line(source: str) -> list[str]:
    """The messages that a file raises or warns of with an option's spelling in them."""
    found = []
    for node in ast.walk(ast.parse(source)):
        warns = isinstance(node, ast.Call) and ast.unparse(node.func) in ("warnings.warn", "SPPWarning")
        if isinstance(node, ast.Raise) or warns:
            texts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
            found += [text for text in texts if isinstance(text, str) and re.search(r"(^|[\s(])--[a-z]", text)]
    return found


def test_no_message_of_the_library_has_an_option_of_the_command_line() -> None:
    assert spelled_for_the_command_line("raise E(f'pass {x} (--overwrite)')") == [" (--overwrite)"]
    assert spelled_for_the_command_line("def f():\n    'spp merge --dry-run'\n    raise E('a--b')") == []
    for path in ROOT.rglob("*.py"):
        where = path.relative_to(ROOT).as_posix()
        if not where.startswith("cli/") and where != "kernels/native/compiler.py":  # a compiler's --version
            assert spelled_for_the_command_line(path.read_text()) == [], where
