"""Messages of the library, as the command line says them."""

from __future__ import annotations

import pytest
import typer

from spp.cli.main import app
from spp.cli.wording import as_options, options_of

PRUNE = {
    "target_modules": ("--target-modules", None),
    "pattern": ("--pattern", None),
    "method": ("--method", None),
    "dtype": ("--dtype", None),
    "overwrite": ("--overwrite", None),
    "seqlen": ("--seqlen", None),
    "strict": ("--strict", "--no-strict"),
    "owl": ("--owl", None),
}


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("Pass target_modules= with some names.", "Pass --target-modules with some names."),
        ("target_modules='x' matches nothing", "--target-modules x matches nothing"),
        ("target_modules=['x', 'y'] matches nothing", "--target-modules x --target-modules y matches nothing"),
        ("target_modules: no linear is called z", "--target-modules: no linear is called z"),
        ("no name in pattern={'a': '2:4', 'b': 0.5} fits", "no name in --pattern a=2:4 --pattern b=0.5 fits"),
        ('use method="magnitude" for them', "use --method magnitude for them"),
        ("pass another, or overwrite=True (--overwrite)", "pass another, or --overwrite"),
        ("pass overwrite=True", "pass --overwrite"),
        ("or pass strict=False to load it", "or pass --no-strict to load it"),
        ("overwrite=False is", "overwrite=False is"),
        ("seqlen=32; pass more", "--seqlen 32; pass more"),
        ("seqlen is 0; it must be", "--seqlen is 0; it must be"),
        ("the seqlen is 0", "the seqlen is 0"),
        ("target_modules is empty; pass None", "--target-modules is empty; pass None"),
        ("dtype is torch.int8; known: float32", "--dtype is torch.int8; known: float32"),
        ("pattern is packed already", "pattern is packed already"),  # a folder of that name
        ("owl= gives blocks", "--owl gives blocks"),
        ("with dtype=torch.float32, or", "with --dtype float32, or"),
        ("SPPConfig.dtype=torch.float32", "SPPConfig.dtype=torch.float32"),
        ("other=5 and mydtype=3", "other=5 and mydtype=3"),
        ("spp.certify(dir, deep=True) writes them", "spp certify DIRECTORY --deep writes them"),
        (
            "spp.certify writes one, spp.verify(a, b) none",
            "spp certify DIRECTORY writes one, spp verify BEFORE AFTER none",
        ),
        ("spp.export_dense(dir, out) gives it", "spp export DIRECTORY OUTPUT --dense gives it"),
        ("Prune first: spp.prune(model, method, pattern)", "Prune first: spp prune MODEL OUTPUT"),
        ("a path=/a/dtype=5 stays", "a path=/a/dtype=5 stays"),
    ],
)
def test_python_becomes_options(message: str, said: str) -> None:
    assert as_options(message, PRUNE) == said


def test_without_options_only_calls_change() -> None:
    assert as_options("target_modules= and spp.certify(dir)", {}) == "target_modules= and spp certify DIRECTORY"


def test_the_options_of_a_command_are_found() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    found = options_of(commands["prune"])
    assert found["target_modules"] == ("--target-modules", None)
    assert found["every"] == ("--all", None)
    assert "model" not in found and "output" not in found
    assert options_of(None) == {}
