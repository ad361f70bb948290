"""Messages that name arguments and calls: what Python shows of them, and what the errors carry."""

from __future__ import annotations

import ast
import inspect
import pickle
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from spp import errors
from spp.cli.main import COMMANDS
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


OPTIONS = {name for command in COMMANDS.values() for name in command.spellings}
ANSWERS = r"\w*(Error|Warning)|warnings\.warn|logger\.\w+"  # what takes a message


def spelled_as_python(source: str) -> list[str]:
    """The messages of a file that spell an option of a command as Python does, outside of `arg` and `call`.

    `block_length=8` and, in a sentence, `block_length` are what nobody can type; arg("block_length", 8) is.
    """

    def texts(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("arg", "call"):
            return
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        for child in ast.iter_child_nodes(node):
            yield from texts(child)

    found = set()
    for node in ast.walk(ast.parse(source)):
        answers = isinstance(node, ast.Call) and re.fullmatch(ANSWERS, ast.unparse(node.func))
        for text in texts(node) if answers or isinstance(node, ast.Raise) else ():
            words = re.findall(r"(?<![\w./\['])([a-z]\w*)\b(=(?!=))?(?!\()", text) if " " in text else []
            found |= {text for word, equals in words if word in OPTIONS and (equals or "_" in word)}
    return sorted(found)


def test_no_message_spells_an_option_as_python_does() -> None:
    assert spelled_as_python("raise E(f'lower {n} (block_length) or so')") == [" (block_length) or so"]
    assert spelled_as_python("warnings.warn('pass overwrite=True to it', W)") == ["pass overwrite=True to it"]
    right = "raise E(f\"lower {arg('block_length')}, {config['block_length']} of a == b\")"
    assert spelled_as_python(right) == []
    for path in ROOT.rglob("*.py"):
        if (where := path.relative_to(ROOT).as_posix()).startswith("integrations/"):
            continue  # no command calls these
        assert spelled_as_python(path.read_text(encoding="utf-8")) == [], where


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
