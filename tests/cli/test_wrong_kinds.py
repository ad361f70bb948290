"""Every command on input of a wrong kind: exit code 1 or 2 and one message, or its work; never a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.conftest import Outcome

Q0, EMBEDDING = "model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"


def config(**values: Any) -> Callable[[Path], object]:
    """Change fields of a model's config; None takes one out."""

    def change(model: Path) -> None:
        found = {**json.loads((model / "config.json").read_text()), **values}
        (model / "config.json").write_text(json.dumps({k: v for k, v in found.items() if v is not None}))

    return change


def weight(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], object]:
    """Change one tensor of a model."""

    def changed(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        tensors[key] = change(tensors[key]).contiguous()
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})

    return changed


def text(name: str, content: str) -> Callable[[Path], object]:
    """Give a file of a model another content."""
    return lambda model: (model / name).write_text(content)


def folder(name: str) -> Callable[[Path], object]:
    """Put a folder in the place of a file."""
    return lambda model: ((model / name).unlink(), (model / name).mkdir())


MODELS: dict[str, Callable[[Path], object]] = {
    "config is a list": text("config.json", "[1]"),
    "config is empty": text("config.json", ""),
    "config is a folder": folder("config.json"),
    "config without model_type": config(model_type=None, architectures=None),
    "model_type is a list": config(model_type=["llama"]),
    "model_type of no language model": config(model_type="clip"),
    "heads that do not divide": config(num_attention_heads=7),
    "layers below 0": config(num_hidden_layers=-1),
    "layers in words": config(num_hidden_layers="two"),
    "no such activation": config(hidden_act="nonsense"),
    "no such dtype": config(dtype="float31"),
    "no such quantization": config(quantization_config={"quant_method": "nonsense"}),
    "quantization is a list": config(quantization_config=[1]),
    "no weights": lambda model: (model / "model.safetensors").unlink(),
    "weights are empty": text("model.safetensors", ""),
    "weights are text": text("model.safetensors", "abc" * 99),
    "weights are a folder": folder("model.safetensors"),
    "index of no map": lambda m: ((m / "model.safetensors").unlink(), text("model.safetensors.index.json", "5")(m)),
    "NaN": weight(Q0, lambda t: t * torch.nan),
    "infinite embedding": weight(EMBEDDING, lambda t: t * torch.inf),
    "integers": weight(Q0, lambda t: t.to(torch.int32)),
    "another shape": weight(Q0, lambda t: t[:-1]),
    "fewer embeddings": weight(EMBEDDING, lambda t: t[:50]),
    "no tokenizer": lambda model: [file.unlink() for file in model.glob("tokenizer*")],
    "tokenizer is a list": text("tokenizer.json", "[]"),
    "certificate is a list": text("sparsity.json", "[]"),
    "nothing at all": lambda model: [file.unlink() for file in model.iterdir()],
}
SHORT = ("--seqlen", "16", "--nsamples", "2")
COMMANDS: dict[str, tuple[str, ...]] = {
    "verify": ("verify", "{x}"),
    "inspect": ("inspect", "{x}"),
    "eval": ("eval", "{x}", "--text", "{text}", "--window", "16", "--max-windows", "1"),
    "prune": ("prune", "{x}", "{out}", "--calibration", "{text}", *SHORT),
    "prune in memory": ("prune", "{x}", "{out}", "--calibration", "{text}", *SHORT, "--in-memory"),
    "tune": ("tune", "{x}", "{out}", "--data", "{text}", "--block-length", "16", "--window", "16", "--steps", "1"),
    "merge": ("merge", "{x}", "{adapter}", "{out}"),
    "export": ("export", "{x}", "{out}", "--packed"),
    "certify": ("certify", "{x}"),
    "push": ("push", "{x}", "owner/name", "--dry-run"),
    "compare": ("compare", "{x}", "{out}", "--data", "{text}", "--steps", "1"),
    "adapter": ("merge", "{pruned}", "{x}", "{out}"),
    "calibration": ("prune", "{pruned}", "{out}", "--calibration", "{x}", *SHORT),
    "data": ("tune", "{pruned}", "{out}", "--data", "{x}", "--block-length", "16", "--steps", "1"),
    "text": ("eval", "{pruned}", "--text", "{x}"),
}
# Each model with two commands that take turns, so that every command meets many of them.
TURNS = [(m, c) for i, m in enumerate(MODELS) for c in [list(COMMANDS)[(i + k) % 11] for k in (0, 5)]]
FILES = ("text", "pruned", "empty", "bytes", "list", "/no/such", " ", "a" * 300, "nul\0", "folder.txt")
PATHS = [(x, c) for i, x in enumerate(FILES) for c in [list(COMMANDS)[(4 * i + k) % 15] for k in (0, 4, 8, 11)]]
OPTIONS = [
    ("tune", "--seed", "99999999999"),
    ("tune", "--batch-size", "9" * 20),
    ("tune", "--block-length", "9" * 12),
    ("tune", "--rank-pattern", "k_proj"),
    ("tune", "--rank-pattern", "(=4"),
    ("tune", "--rank-pattern", "k_proj=99"),
    ("tune", "--target-modules", "("),
    ("tune", "--epochs", "inf"),
    ("eval", "--batch-size", "9" * 20),
    ("prune", "--pattern", "4:2"),
    ("prune", "--pattern", "nan"),
    ("prune", "--nsamples", "9" * 20),
    ("prune", "--report", "/dev/null/report.json"),
    ("prune", "--dtype", "float64"),
    ("merge", "--dtype", "int8"),
    ("merge", "--dense", "/no/such"),
    ("compare", "--contenders", "spp:r=x"),
    ("compare", "--plot", "/dev/null/x.png"),
]


@pytest.fixture
def run(spp: Callable[..., Outcome], tmp_path: Path, pruned: Path, adapter: Path) -> Callable[..., Outcome]:
    """Call a command of the table on `x`, and see that it did not fall over."""
    passage = tmp_path / "text.txt"
    passage.write_text("a text of some words. " * 40)

    def call(command: str, x: object, *more: str) -> Outcome:
        places = {"x": x, "text": passage, "pruned": pruned, "adapter": adapter, "out": tmp_path / "out"}
        found = spp(*(part.format(**places) for part in COMMANDS[command]), *more)
        assert found.code in (0, 1, 2) and "Traceback" not in found.err, found.err
        if found.code == 1:
            assert "error: " in found.err or "verif" in found.err, found.err
        return found

    return call


@pytest.mark.filterwarnings("ignore")
@pytest.mark.sampled(10)
@pytest.mark.parametrize(("model", "command"), TURNS)
def test_models(run: Callable[..., Outcome], model: str, command: str, pruned: Path, tmp_path: Path) -> None:
    made = Path(shutil.copytree(pruned, tmp_path / "model"))
    MODELS[model](made)
    run(command, made)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.sampled(10)
@pytest.mark.parametrize(("kind", "command"), PATHS)
def test_paths(run: Callable[..., Outcome], kind: str, command: str, pruned: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "empty").write_text("")
    (tmp_path / "bytes").write_bytes(bytes(range(256)) * 9)
    (tmp_path / "list").write_text("[1, 2]")
    known = {"text": tmp_path / "text.txt", "pruned": pruned}
    run(command, known.get(kind, tmp_path / kind if (tmp_path / kind[:100]).exists() else kind))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.sampled(5)
@pytest.mark.parametrize("option", OPTIONS, ids=" ".join)
def test_options(run: Callable[..., Outcome], option: tuple[str, ...], pruned: Path) -> None:
    assert run(option[0], pruned, *option[1:]).code in (1, 2)


def test_what_no_check_has_stumbled_over(spp: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "/some/file")

    monkeypatch.setattr("spp.certifying.verify.sparsity", denied)
    monkeypatch.setattr("spp.files.hub.local_directory", lambda *_, **__: Path("/some"))
    found = spp("inspect", "/some")
    assert (found.code, found.err.splitlines()[-1]) == (1, "error: /some/file: Permission denied")
    with pytest.raises(PermissionError):
        spp("--debug", "inspect", "/some")
