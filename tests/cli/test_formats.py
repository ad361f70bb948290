"""The commands name the formats of other tools, and end with exit code 1 where they cannot do their work."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spp.files import write_json
from tests.cli.conftest import Outcome
from tests.helpers.formats import store
from tests.helpers.quantized import quantized_llama

Call = Callable[..., Outcome]
TRAIN = ("--steps", 1, "--block-length", 64, "--window", 64)


def commands(folder: Path, pruned: Path, adapter: Path, text: Path, out: Path) -> dict[str, tuple[object, ...]]:
    """Each command on a checkpoint."""
    return {
        "verify": ("verify", pruned, folder),
        "certify": ("certify", folder),
        "inspect": ("inspect", folder),
        "tune": ("tune", folder, out, "--data", text, *TRAIN),
        "prune": ("prune", folder, out, "--method", "magnitude"),
        "prune in memory": ("prune", folder, out, "--method", "magnitude", "--in-memory"),
        "export": ("export", folder, out, "--packed"),
        "export dense": ("export", folder, out, "--dense"),
        "merge": ("merge", folder, adapter, out),
        "eval": ("eval", folder, "--text", text, "--window", 64),
    }


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("name", "config", "says"),
    [
        ("gptq", True, "quantized as GPTQ"),
        ("gptq", False, "GPTQ"),
        ("sparse-24-bitmask", True, "compressed-tensors, sparse-24-bitmask (compression_config of config.json)"),
        ("bnb8", False, "bitsandbytes, 8 bits"),
        ("awq", True, "quantized as AWQ"),
        ("pack-quantized", True, "compressed-tensors, pack-quantized"),
        ("mlx", True, "quantized as MLX, 4 bits"),
        ("bnb4", False, "bitsandbytes, 4 bits"),
    ],
)
def test_every_command_names_it(
    spp: Call, pruned: Path, adapter: Path, text: Path, tmp_path: Path, name: str, config: bool, says: str
) -> None:
    # Reports of checkpoints that llm-compressor, AutoGPTQ and bitsandbytes wrote, taken for pruned or for dense ones.
    folder, out = store(pruned, tmp_path / "checkpoint", name, config=config), tmp_path / "out"
    for command, arguments in commands(folder, pruned, adapter, text, out).items():
        found = spp(*arguments)
        if command == "verify" and name == "sparse-24-bitmask":
            assert found.code == 0 and "has exactly the zeros of" in found.out
            continue
        assert found.code == 1, (command, found)
        assert ("spp convert SOURCE OUTPUT does" in found.err) == (name == "sparse-24-bitmask"), (command, found.err)
        assert says in found.err or (command == "verify" and "quantized as int8" in found.err), (command, found.err)
        assert "made from" in found.err or "this one was" in found.err or command == "verify", (command, found.err)
        assert "Traceback" not in found.err and "certif" not in found.out and not out.exists(), command
    assert not (folder / "sparsity.json").exists()


def test_the_mask_survived_quantization(spp: Call, pruned: Path, tmp_path: Path) -> None:
    folder, model = tmp_path / "nf4", quantized_llama("nf4")
    folder.mkdir()
    save_file({key: t.contiguous() for key, t in model.state_dict().items()}, folder / "model.safetensors")
    write_json(folder / "config.json", {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}})
    found = spp("verify", pruned, folder)
    assert found.code == 1 and "became zero (quantized as nf4)" in found.err
    assert "No zero was lost: all survived the quantization" in found.err and "--more-zeros-allowed" in found.err
    found = spp("verify", pruned, folder, "--more-zeros-allowed")
    assert found.code == 0 and "has every zero of" in found.out
    lines = {line.split()[0]: line.split()[1:] for line in found.out.splitlines() if " nf4 " in line}
    total = sum(t.numel() for key, t in load_file(pruned / "model.safetensors").items() if "_proj" in key)
    assert "survived" in found.out and lines["all"][:5] == ["nf4", "14", str(total // 2), str(total // 2), "0"]
    assert lines["mlp.up_proj"][:5] == ["nf4", "2", "10240", "10240", "0"] and int(lines["all"][5]) > 0
    every = spp("verify", pruned, folder, "--more-zeros-allowed", "--all").out
    assert ["model.layers.1.mlp.down_proj.weight", "nf4", "1", "5120", "5120", "0"] in [
        line.split()[:6] for line in every.splitlines()
    ]


@pytest.fixture
def pickled(pruned: Path, tmp_path: Path) -> Path:
    """The pruned checkpoint, its weights pickled."""
    folder = tmp_path / "pickled"
    shutil.copytree(pruned, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(pruned / "model.safetensors"), folder / "pytorch_model.bin")
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("always::spp.errors.SPPWarning")  # shown as the program shows them
def test_a_pickled_base(spp: Call, pruned: Path, pickled: Path, adapter: Path, text: Path, tmp_path: Path) -> None:
    # From reports of adapters that were trained for hours on a base that could not be merged then.
    says = (
        f"{pickled} has no model.safetensors, only pytorch_model.bin: pickled checkpoints are not read; convert it once"
    )
    for command, arguments in commands(pickled, pruned, adapter, text, tmp_path / "out").items():
        if command in ("eval", "prune in memory"):
            continue  # these read it through transformers, and nothing follows that could not
        found = spp(*arguments)
        assert says in found.err and ".save_pretrained(out)" in found.err, command
        assert found.code == (0 if command in ("tune", "prune") else 1), found.err
        if command == "tune":
            assert found.err.index("warning: ") < found.err.index(says) < found.err.index("needs a base of safetensors")
            assert "spp merge BASE ADAPTER OUTPUT" in found.err
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


@pytest.mark.slow
def test_gguf(spp: Call, pruned: Path, adapter: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gguf"
    folder.mkdir()
    (folder / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    arguments = commands(folder, pruned, adapter, text, tmp_path / "out")
    arguments["a file"] = ("inspect", folder / "model-Q4_K_M.gguf")
    for command, of_command in arguments.items():
        found = spp(*of_command)
        assert found.code == 1 and "only model-Q4_K_M.gguf: GGUF" in found.err and "gguf_file" in found.err, command
