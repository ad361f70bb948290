"""torch.set_default_device and `with torch.device(...)`: what is the CPU's stays there.

Tensors that are read from files, drawn by a CPU generator or looked at with numpy cannot be made elsewhere
(pytorch/pytorch#62152, huggingface/accelerate#1627). The meta device stands for a GPU here: it computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import spp
from spp.pruning import calibration_windows
from tests.helpers.checkpoints import contents, pruned_model
from tests.helpers.models import assert_same_model, tiny_tokenizer

IDS = torch.randint(3, 250, (2, 16), generator=torch.Generator().manual_seed(5))
TEXTS = [f"document {number} says some more words" for number in range(8)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("default device")
    spp.save_model(pruned_model(num_hidden_layers=1), folder / "base")
    spp.save_adapter(stirred(), folder / "adapter")
    return folder


def stirred() -> Any:
    model = spp.wrap(pruned_model(num_hidden_layers=1), r=4, seed=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in spp.adapter_parameters(model):
            parameter.normal_(0, 0.3, generator=generator)
    return model


IN_MEMORY: dict[str, Callable[[Any, Path], Any]] = {
    "wrap": lambda model, files: spp.wrap(model, r=4, seed=0),
    "load and merge": lambda model, files: (spp.load_adapter(model, files / "adapter"), spp.merge(model)),
    "pack": lambda model, files: spp.unpack(spp.pack(model)),
    "wanda": lambda model, files: spp.prune(model, "wanda", "2:8", IDS),
    "sparsegpt": lambda model, files: spp.prune(
        model, "sparsegpt", 0.6, TEXTS, tokenizer=tiny_tokenizer(), nsamples=4, seqlen=16
    ),
    "dsnot": lambda model, files: spp.prune(model, "dsnot", 0.6, IDS),
}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("what", IN_MEMORY)
def test_models_are_changed_alike(what: str, files: Path) -> None:
    expected, model = pruned_model(num_hidden_layers=1), pruned_model(num_hidden_layers=1)
    IN_MEMORY[what](expected, files)
    with torch.device("meta"):
        IN_MEMORY[what](model, files)
    assert_same_model(model, expected)


@pytest.mark.slow
def test_files_are_written_alike(files: Path, tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        folder.mkdir()
        spp.merge_checkpoint(files / "base", files / "adapter", folder / "merged")
        spp.export_packed(folder / "merged", folder / "packed")
        spp.prune_checkpoint(files / "base", folder / "pruned", "magnitude", "2:8")
        spp.certify(folder / "pruned", deep=True)
        assert spp.verify(files / "base", folder / "merged").pattern == "2:4"

    write(tmp_path / "plain")
    with torch.device("meta"):
        write(tmp_path / "default device")
    found, expected = contents(tmp_path / "default device"), contents(tmp_path / "plain")
    assert found.keys() == expected.keys()
    assert all(found[name] == expected[name] for name in expected if name.endswith((".safetensors", "sparsity.json")))


def test_windows_are_drawn_alike() -> None:
    options: dict[str, Any] = {"nsamples": 3, "seqlen": 16, "seed": 7}
    expected = calibration_windows(TEXTS, tiny_tokenizer(), **options)
    with torch.device("meta"):
        assert torch.equal(calibration_windows(TEXTS, tiny_tokenizer(), **options), expected)
