"""The options that commands have are those of the golden list, their help shows them all and loads no torch."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
import typer

from spp.cli.main import COMMANDS, app
from spp.cli.options import command, typed
from spp.cli.spelling import Spelling, spoken
from spp.configs.checkpoints import MergeConfig
from spp.configs.evaluating import EvalConfig
from spp.configs.options import GROUPS, MODEL, Option
from spp.configs.pruning import OWL, PruneConfig
from spp.configs.tuning import TuneConfig
from spp.errors import ConfigError, SPPWarning, arg, call
from tests.cli.conftest import Outcome

ROOT = Path(__file__).resolve().parents[2]
GOLDEN: dict[str, list[dict[str, Any]]] = json.loads((Path(__file__).parent / "options.json").read_text())
HEAVY = ("torch", "numpy", "transformers", "tqdm")


def _described(parameter: Any) -> dict[str, Any]:
    option = parameter.param_type_name == "option"
    return {
        "names": [*parameter.opts, *parameter.secondary_opts],
        "kind": parameter.param_type_name,
        "many": bool(parameter.multiple if option else parameter.nargs != 1),
        "required": bool(parameter.required),
        "flag": bool(getattr(parameter, "is_flag", False)),
    }


def _found(tree: Any, path: tuple[str, ...] = ()) -> dict[str, list[dict[str, Any]]]:
    described = [_described(parameter) for parameter in tree.params]
    described.sort(key=lambda p: (p["kind"] != "argument", p["names"] if p["kind"] == "option" else []))
    found = {" ".join(path) or "spp": described}
    for name, inner in getattr(tree, "commands", {}).items():
        found |= _found(inner, (*path, name))
    return found


def test_every_command_has_the_options_of_the_golden_list() -> None:
    found = _found(typer.main.get_command(app))
    assert found.keys() == GOLDEN.keys()
    for name, described in found.items():
        assert described == GOLDEN[name], name


@pytest.mark.parametrize("verb", COMMANDS)
def test_help_shows_every_option_in_full(
    spp: Callable[..., Outcome], verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    found = spp(verb, "--help")
    assert found.code == 0 and max(map(len, found.out.splitlines())) <= 80
    for described in GOLDEN[verb]:
        for name in described["names"]:
            shown = {"repo_id": "REPO", "adapters": "ADAPTER[:WEIGHT]", "runs": "RUN"}.get(name, name)
            shown = shown if name.startswith("--") else shown.upper()
            assert any(f" {shown}{end}" in found.out for end in (" ", ",")), name


CONFIGS = [
    (
        PruneConfig,
        None,
        {
            "model": "m",
            "output": Path("o"),
            "pattern": "0.5",
            "owl": OWL(3.0),
            "calibration": "o/w",
            "keep_zeros": False,
        },
    ),
    (
        PruneConfig,
        None,
        {"model": "m", "output": Path("a b"), "method": "magnitude", "pattern": {"q": "1:4", ".*": "0.5"}},
    ),
    (PruneConfig, None, {"model": "m", "output": Path("o"), "method": "magnitude", "target_modules": ("a", "b")}),
    (
        TuneConfig,
        TuneConfig.from_recipe,
        {"model": "m", "output_dir": "o", "data": ("a", "b"), "bf16": True, "completions_only": False, "lr": 1e-3},
    ),
    (MergeConfig, None, {"base": "b", "adapters": (("a", 0.5), ("c", 1.0)), "output": Path("o"), "every": True}),
    (EvalConfig, None, {"model": "m", "text": Path("t"), "tasks": ("boolq", "rte"), "strict": False}),
]


@pytest.mark.parametrize(("config", "build", "values"), CONFIGS)
def test_a_config_is_typed_as_the_words_that_make_it(config: type, build: Any, values: dict[str, Any]) -> None:
    found: list[Any] = []
    program = typer.Typer()
    program.command()(command(config, build)(lambda config: found.append(config)))
    typer.main.get_command(program)(typed(config(**values)), standalone_mode=False)
    assert found == [config(**values)]


def test_the_groups_come_in_their_order(spp: Callable[..., Outcome]) -> None:
    out = spp("tune", "--help").out
    places = [out.index(f"─ {group} ─") for group in GROUPS]
    assert places == sorted(places)
    assert "Exchange" not in out and "-h, --help" in out


def test_the_help_of_the_program_says_how_to_complete(spp: Callable[..., Outcome]) -> None:
    assert "spp --install-completion" in spp("--help").out


def _run(arguments: list[str], **environment: str) -> tuple[str, list[str]]:
    """What a fresh process prints, and which heavy packages it has loaded."""
    code = (
        f"import os, sys\nos.environ.update({environment!r})\nfrom spp.cli.main import main\n"
        f"sys.argv = ['spp', *{arguments!r}]\ntry: main()\nexcept SystemExit: pass\n"
        f"print('LOADED', *[name for name in {HEAVY!r} if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    out, _, loaded = run.stdout.partition("LOADED")
    return out, loaded.split()


@pytest.mark.slow
@pytest.mark.parametrize("verb", [(), *((name,) for name in COMMANDS)], ids=" ".join)
def test_help_loads_no_torch(verb: tuple[str, ...]) -> None:
    out, loaded = _run([*verb, "--help"])
    assert "Usage: spp" in out and loaded == []


@pytest.mark.slow
def test_the_version_a_mistake_and_completion_load_no_torch() -> None:
    assert _run(["--version"])[1] == []
    assert _run(["compare"])[1] == []  # a usage error
    shell = {"_SPP_COMPLETE": "complete_bash", "COMP_CWORD": "4"}
    out, loaded = _run([], **shell, COMP_WORDS="spp tune model --saved-activations ")
    assert out.split() == ["full", "bfloat16"] and loaded == []
    out, loaded = _run([], **(shell | {"COMP_CWORD": "1"}), COMP_WORDS="spp ver")
    assert out.split() == ["verify"] and loaded == []
    assert "torch" in _run(["inspect", "/no/such/model"])[1]  # the check can fail


PRUNE = COMMANDS["prune"].spellings


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (f"Pass {arg('target_modules', ...)} with some names.", "Pass --target-modules with some names."),
        (f"{arg('target_modules', 'x')} matches nothing", "--target-modules x matches nothing"),
        (f"{arg('target_modules', ['x', 'y'])} match", "--target-modules x --target-modules y match"),
        (f"{arg('target_modules')}: no linear", "--target-modules: no linear"),
        (f"no name in {arg('pattern', {'a': '2:4', 'b': 0.5})}", "no name in --pattern a=2:4 --pattern b=0.5"),
        (f"use {arg('method', 'magnitude')}", "use --method magnitude"),
        (f"pass {arg('overwrite', True)}", "pass --overwrite"),
        (f"{arg('seqlen', 32)}; pass more", "--seqlen 32; pass more"),
        (f"with {arg('dtype', torch.float32)}", "with --dtype float32"),
        (f"{arg('owl_spread')} is", "--owl-spread is"),
        (f"another {arg('output')}", "another OUTPUT"),
        (f"with {arg('tokenizer', ...)} for text", "with tokenizer for text"),  # no option of this command
        (f"{arg('other', 5)} is", "other 5 is"),
        (f"{call('certify', 'dir', deep=True)} writes", "spp certify DIRECTORY --deep writes"),
        (f"{call('verify', 'a, b')} needs none", "spp verify BEFORE AFTER needs none"),
        (f"{call('export_dense')} makes it", "spp export DIRECTORY OUTPUT --dense makes it"),
        (f"{call('prune', 'model, method, pattern')} first", "spp prune MODEL OUTPUT first"),
        ("target_modules=5 in a path stays", "target_modules=5 in a path stays"),
    ],
)
def test_what_a_command_says(message: str, said: str) -> None:
    assert spoken(ConfigError(message), PRUNE) == said
    assert spoken(SPPWarning(message), PRUNE) == said


def test_an_option_that_is_switched_off() -> None:
    spellings = {"strict": Spelling("--strict", "--no-strict"), "overwrite": Spelling("--overwrite")}
    assert spoken(ConfigError(f"pass {arg('strict', False)}"), spellings) == "pass --no-strict"
    assert spoken(ConfigError(f"{arg('overwrite', False)} is"), spellings) == "no --overwrite is"  # cannot be typed


def test_the_benchmarks_spell_every_argument_as_an_option() -> None:
    assert spoken(ConfigError(f"{arg('out_file')} exists; pass {arg('overwrite', True)}"), None) == (
        "--out-file exists; pass --overwrite"
    )


def test_of_other_messages_nothing_is_changed() -> None:
    assert spoken(KeyboardInterrupt("overwrite=True"), PRUNE) == "overwrite=True"


@dataclass(frozen=True)
class _Extra:
    size: Annotated[int, Option("Size.")] = 2


@dataclass(frozen=True, kw_only=True)
class _Config:
    place: Annotated[str, Option("Where.", argument=True)]
    names: Annotated[tuple[str, ...], Option("Names.", many=True, parse=tuple)] = ()
    good: Annotated[bool, Option("Good.", negatable=True)] = True
    extra: Annotated[_Extra | None, Option("Extra.")] = None
    kind: Annotated[str, Option("Kind.", MODEL, choices=("one", "two"))] = "one"


def _made(**values: Any) -> tuple[_Config, dict[str, Any]]:
    """What a command of this config hands to its function."""
    got: list[Any] = []

    @command(_Config)
    def run(config: _Config, plot: Annotated[str | None, Option("Plot.")] = None) -> None:
        got.extend((config, {"plot": plot}))

    run(**{name: values.get(name) for name in inspect.signature(run).parameters})
    return got[0], got[1]


def test_what_is_not_given_keeps_the_default_of_its_field() -> None:
    assert _made(place="p") == (_Config(place="p"), {"plot": None})
    given = {"names": ["a", "b"], "good": False, "extra": True, "extra_size": 5, "kind": "two", "plot": "x"}
    config = _Config(place="p", names=("a", "b"), good=False, extra=_Extra(5), kind="two")
    assert _made(place="p", **given) == (config, {"plot": "x"})
    assert _made(place="p", extra=True)[0].extra == _Extra()
    with pytest.raises(ConfigError, match="extra_size is an option of EXTRA: add extra=True, or leave it out"):
        _made(place="p", extra_size=5)


def test_a_builder_has_options_too() -> None:
    def build(base: Annotated[str, Option("Base.")] = "b", **options: Any) -> _Config:
        return _Config(**{**options, "place": f"{base}/{options['place']}"})

    got: list[_Config] = []

    @command(_Config, build=build)
    def run(config: _Config) -> None:
        got.append(config)

    assert list(inspect.signature(run).parameters) == [
        *("place", "kind", "names", "good", "extra", "extra_size", "base", "follow_links", "json"),
    ]
    run(**{**dict.fromkeys(inspect.signature(run).parameters), "place": "p", "base": "c"})
    assert got == [_Config(place="c/p")]
    assert run.spellings["good"] == Spelling("--good", "--no-good")
    assert run.spellings["place"] == Spelling("PLACE", placed=True)
