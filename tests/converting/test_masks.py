"""Ready-made masks prune a dense checkpoint exactly; what is no mask, or fits no weight, is refused by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import spp
from spp.certifying.certificate import Certificate
from spp.converting.masks import MaskFile
from spp.errors import CheckpointError, ConfigError, MaskError, SPPError
from spp.files import read_json, write_json
from spp.pruning import magnitude_mask
from tests.helpers.checkpoints import Q0, UP1, tensors_of
from tests.helpers.models import tiny_llama, tiny_tokenizer
from tests.helpers.tolerances import assert_same_bits

EMBEDDING = "model.embed_tokens.weight"
Masks = dict[str, Tensor]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "dense"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def masks(dense: Path) -> Masks:
    """2:4 masks of all projections, by the names of the weights."""
    return {key: magnitude_mask(t, "2:4") for key, t in tensors_of(dense).items() if "_proj" in key}


def write_npz(path: Path, masks: Masks, *, packed: bool) -> Path:
    """As MaskLLM writes them: NAME.mask, the bits packed."""
    arrays = {f"{key}.mask": mask.numpy() for key, mask in masks.items()}
    np.savez_compressed(path, **{key: np.packbits(a) if packed else a for key, a in arrays.items()})
    return path


def write(path: Path, masks: Masks) -> Path:
    path.parent.mkdir(exist_ok=True)
    save_file({key: mask.contiguous() for key, mask in masks.items()}, path)
    return path


WAYS: dict[str, Callable[[Path, Masks], Path]] = {
    "booleans": lambda folder, masks: write(folder / "masks.safetensors", masks),
    "bytes of modules": lambda folder, masks: write(
        folder / "m.safetensors", {key.removesuffix(".weight"): m.to(torch.uint8) for key, m in masks.items()}
    ),
    "floats": lambda folder, masks: write(folder / "m.safetensors", {f"{k}_mask": m.half() for k, m in masks.items()}),
    "a folder": lambda folder, masks: write(folder / "model.safetensors", masks).parent,
    "packed bits": lambda folder, masks: write(
        folder / "m.safetensors", {key: torch.from_numpy(np.packbits(m.numpy())) for key, m in masks.items()}
    ),
    "npz": lambda folder, masks: write_npz(folder / "masks.npz", masks, packed=False),
    "MaskLLM": lambda folder, masks: write_npz(folder / "mask_compressed.npz", masks, packed=True).parent,
}


@pytest.mark.parametrize("way", WAYS)
def test_the_zeros_are_those_of_the_masks(way: str, dense: Path, masks: Masks, tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    report = spp.convert(WAYS[way](tmp_path / "masks", masks), tmp_path / "out", dense=dense)
    before, after = tensors_of(dense), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert_same_bits(after[key], torch.where(masks[key], tensor, 0) if key in masks else tensor, key)
    assert (report.sparsity, report.pattern, len(report.tensors)) == (0.5, "2:4", 14)
    assert Certificate.read(tmp_path / "out").origin == str(dense)
    assert spp.verify(tmp_path / "out").sparsity == 0.5
    assert {p.name for p in dense.iterdir()} | {"sparsity.json"} == {p.name for p in (tmp_path / "out").iterdir()}


def test_some_masks(dense: Path, masks: Masks, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    some = {Q0: masks[Q0], "lm_head.weight": torch.rand(tensors_of(dense)["lm_head.weight"].shape) > 0.3}
    some["model.norm.weight"] = torch.ones(64)  # keeps all, of what is never pruned
    with caplog.at_level("INFO", "spp"):
        report = spp.convert(write(tmp_path / "m.safetensors", some), tmp_path / "out", dense=dense)
    assert "13 projections have no mask and stay as they are" in caplog.text
    assert report.tensors["lm_head.weight"].zeros == int((~some["lm_head.weight"]).sum())
    assert report.tensors[UP1].zeros == 0 and report.tensors[Q0].pattern == "2:4"


def npz(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path, Masks], Path]:
    def make(folder: Path, masks: Masks) -> Path:
        arrays: dict[str, Any] = {key: np.packbits(mask.numpy()) for key, mask in masks.items()}
        change(arrays)
        np.savez(folder / "masks.npz", **arrays)
        return folder / "masks.npz"

    return make


def st(change: Callable[[Masks], Any]) -> Callable[[Path, Masks], Path]:
    def make(folder: Path, masks: Masks) -> Path:
        own = dict(masks)
        change(own)
        return write(folder / "masks.safetensors", own)

    return make


def pickled(folder: Path, masks: Masks) -> Path:
    torch.save(masks, folder / "mask.pt")
    return folder / "mask.pt"


def cut(folder: Path, masks: Masks) -> Path:
    path = write_npz(folder / "masks.npz", masks, packed=True)
    path.write_bytes(path.read_bytes()[:-300])
    return path


def damaged(folder: Path, masks: Masks) -> Path:
    path = npz(lambda arrays: None)(folder, masks)
    data = bytearray(path.read_bytes())
    data[400] ^= 255
    path.write_bytes(data)
    return path


LIES: dict[str, tuple[Callable[[Path, Masks], Path], type[SPPError], str]] = {
    "a value of 2": (
        st(lambda m: m.update({Q0: m[Q0].to(torch.uint8) * 2})),
        CheckpointError,
        r"q_proj.weight is no mask: it holds 2",
    ),
    "half a value": (st(lambda m: m.update({UP1: m[UP1] / 2})), CheckpointError, r"up_proj.weight .* holds 0\.5"),
    "NaN": (st(lambda m: m.update({UP1: m[UP1] * torch.nan})), CheckpointError, "up_proj.weight .* holds nan"),
    "a transposed one": (
        st(lambda m: m.update({UP1: m[UP1].T})),
        MaskError,
        r"up_proj.weight: the mask is \(64, 160\), the weight model.*up_proj.weight is \(160, 64\)",
    ),
    "another name": (
        st(lambda m: m.update({"layers.0.self_attn.q_proj.weight": m.pop(Q0)})),
        MaskError,
        rf"there is no such weight; the nearest are .*{Q0}",
    ),
    "twice": (st(lambda m: m.update({f"{Q0}.mask": m[Q0].clone()})), MaskError, "are both masks of"),
    "nothing kept": (st(lambda m: m.update({Q0: m[Q0] & False})), MaskError, "keeps nothing of"),
    "an embedding": (
        st(lambda m: m.update({EMBEDDING: torch.rand(256, 64) > 0.5})),
        MaskError,
        "is no weight of a linear",
    ),
    "all ones": (st(lambda m: (m.clear(), m.update({"model.norm.weight": torch.ones(64)}))), MaskError, "keep every"),
    "no mask": (npz(lambda a: a.clear()), CheckpointError, "holds no mask"),
    "bits too few": (npz(lambda a: a.update({Q0: a[Q0][:-1]})), MaskError, r"the mask is \(511,\), the weight"),
    "objects": (npz(lambda a: a.update({Q0: np.array([{}], object)})), CheckpointError, "pickled objects"),
    "text": (npz(lambda a: a.update({Q0: np.array(["a"])})), CheckpointError, "cannot be read as a file of masks"),
    "a pickle": (pickled, CheckpointError, r"mask.pt is pickled, which is not read"),
    "a folder of a pickle": (lambda f, m: pickled(f, m).parent, CheckpointError, r"mask.pt is pickled"),
    "cut short": (cut, CheckpointError, "masks.npz cannot be read as a file of masks, or is cut short"),
    "damaged": (damaged, CheckpointError, "cannot be read as a file of masks, or is cut short"),
    "two files": (
        lambda f, m: (write(f / "a.safetensors", m), npz(lambda a: None)(f, m))[0].parent,
        CheckpointError,
        "holds a.safetensors, masks.npz: pass the one",
    ),
    "another kind": (
        lambda f, m: (f / "masks.txt", (f / "masks.txt").write_text("1"))[0],
        CheckpointError,
        "no file of masks",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_what_is_no_mask(lie: str, dense: Path, masks: Masks, tmp_path: Path) -> None:
    make, error, says = LIES[lie]
    source = make(tmp_path, masks)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=says):
        spp.convert(source, tmp_path.parent / f"{tmp_path.name}-out", dense=dense)
    assert sorted(tmp_path.iterdir()) == before and not tmp_path.with_name(f"{tmp_path.name}-out").exists()


def test_bits_behind_the_last_weight(tmp_path: Path) -> None:
    mask = torch.rand(3, 5) > 0.5
    bits = np.packbits(mask.numpy())
    np.savez(tmp_path / "m.npz", good=bits, bad=bits | np.array([0, 1], np.uint8), signed=bits.view(np.int8))
    with MaskFile(tmp_path / "m.npz") as masks:
        assert torch.equal(masks.mask("good", (3, 5)), mask)
        with pytest.raises(CheckpointError, match=r"bad is no mask of \(3, 5\): it has bits behind"):
            masks.mask("bad", (3, 5))
        with pytest.raises(CheckpointError, match=r"has the length of packed bits .* but no bytes"):
            masks.mask("signed", (3, 5))


def test_tied_weights(dense: Path, masks: Masks, tmp_path: Path) -> None:
    head = "lm_head.weight"
    tied = tmp_path / "tied"
    tiny_llama(tie_word_embeddings=True).save_pretrained(tied)
    shape = tensors_of(tied)[EMBEDDING].shape
    file = write(tmp_path / "m.safetensors", {**masks, head: torch.rand(shape) > 0.5})
    with pytest.raises(MaskError, match=r"lm_head.weight: there is no such weight \(the output head is tied"):
        spp.convert(file, tmp_path / "out", dense=tied)
    both = tmp_path / "both"  # stored twice, whatever the config says
    shutil.copytree(dense, both)
    tensors = tensors_of(both)
    save_file({**tensors, head: tensors[EMBEDDING].clone()}, both / "model.safetensors", {"format": "pt"})
    for says in (False, True):
        write_json(both / "config.json", {**read_json(both / "config.json", "config"), "tie_word_embeddings": says})
        with pytest.raises(MaskError, match=f"lm_head.weight is tied to {EMBEDDING}.*leave its mask out"):
            spp.convert(file, tmp_path / "out", dense=both)
    assert not (tmp_path / "out").exists()


def test_the_sources(dense: Path, masks: Masks, tmp_path: Path) -> None:
    file = write(tmp_path / "masks" / "masks.safetensors", masks)
    with pytest.raises(ConfigError, match=r"holds masks: name the dense checkpoint that they prune, dense="):
        spp.convert(file, tmp_path / "out")
    with pytest.raises(ConfigError, match="lies inside the folder of masks"):
        spp.convert(file.parent, file.parent / "out", dense=dense)
    with pytest.raises(ConfigError, match="lies inside the dense model"):
        spp.convert(file, dense / "out", dense=dense)
    with pytest.raises(ConfigError, match="expected the path"):
        spp.convert(5, tmp_path / "out")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_an_output_that_holds_the_masks_is_refused(dense: Path, masks: Masks, tmp_path: Path) -> None:
    """Of a name that overwriting would take for a checkpoint's own weights."""
    held = write(shutil.copytree(dense, tmp_path / "out") / "pytorch_model.safetensors", masks)
    before = held.read_bytes()
    with pytest.raises(ConfigError, match="contains the masks"):
        spp.convert(held, tmp_path / "out", dense=dense, overwrite=True)
    assert held.read_bytes() == before
