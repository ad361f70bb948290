"""No storage of a model is marked as one that can never be resized: FSDP2 resizes those of parameters.

`Tensor.numpy` leaves that mark for good; `spp.masks.patterns.as_array` does not.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import spp
from spp.errors import SPPWarning
from spp.files import content_crc32, content_sha256, mask_sha256
from spp.masks.patterns import as_array
from tests.helpers.models import moe_model, prune_nm_, tiny_llama

ROOT = Path(__file__).resolve().parents[1]


def marked(model: nn.Module) -> list[str]:
    """Names of the parameters and buffers that cannot be resized any more."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return sorted(name for name, t in tensors.items() if not t.is_meta and not t.untyped_storage().resizable())


def step(model: Any) -> None:
    """One training step, and one call in eval."""
    ids = torch.arange(3, 12).view(1, -1)
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    with torch.no_grad():
        for parameter in spp.adapter_parameters(model):
            parameter += 0.3  # enough for bfloat16
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whatever_is_done_to_a_model(tmp_path: Path, dtype: torch.dtype, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        life_of_a_model(tmp_path, dtype)
    finally:
        torch.set_num_threads(before)


def life_of_a_model(tmp_path: Path, dtype: torch.dtype) -> None:
    model = prune_nm_(tiny_llama()).to(dtype)
    assert marked(model) == []
    model.lm_head.weight.detach().view(torch.int16).numpy()
    assert marked(model) == ["lm_head.weight"], "the mark that is looked for"
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())

    def check(what: str) -> None:
        assert marked(model) == [], what

    spp.sparsity(model)
    check("sparsity")
    for t in model.state_dict().values():
        content_crc32(t), content_sha256(t), mask_sha256(t)
    check("hashes")
    spp.prune(model, "magnitude", "2:4")
    check("prune")
    spp.wrap(model, r=2)
    check("wrap")
    step(model)
    check("a step")
    spp.save_adapter(model, tmp_path / "adapter")
    check("save_adapter")
    spp.merge(model)
    check("merge")
    spp.save_model(model, tmp_path / "merged")
    spp.verify(tmp_path / "merged")
    spp.verify(model, tmp_path / "merged")
    check("save and verify")
    for pack in (spp.pack, lambda model: spp.wrap(model, r=2, packed=True)):
        pack(model)
        check("packed")
        if not hasattr(model.model.layers[0].self_attn.q_proj, "spp_alpha"):
            spp.unpack(model)
            check("unpacked")
    step(model)
    check("a packed step")
    with pytest.warns(SPPWarning, match="values"):  # those that the merge made
        spp.load_adapter(model, tmp_path / "adapter")
    check("load_adapter")
    spp.merge(model)
    check("a packed merge")


def test_fused_experts_of_any_pattern() -> None:
    model = moe_model("mixtral")
    spp.prune(model, "magnitude", 0.6)
    for packed in (False, True):
        spp.wrap(model, r=2, packed=packed)
        assert marked(model) == []
        step(model)
        assert marked(model) == []
        spp.unwrap(model)
        assert marked(model) == []


def test_an_array_shares_the_memory_of_its_tensor() -> None:
    whole = torch.arange(24, dtype=torch.float32).view(4, 6)
    for t in (whole, whole[1:3], whole.T, whole[::2, 1::2], whole[0, 3], nn.Parameter(whole)):
        array = as_array(t)
        assert array.dtype == np.float32 and array.shape == tuple(t.shape)
        assert array.tolist() == t.tolist()
        array += 1
        assert array.tolist() == t.tolist()
    assert whole.untyped_storage().resizable()
    for dtype in (torch.bool, torch.uint8, torch.int16, torch.int64, torch.float16, torch.float64):
        t = torch.tensor([1, 0, 1]).to(dtype)
        assert torch.equal(torch.from_numpy(as_array(t)), t)


def test_an_array_keeps_its_tensor_alive() -> None:
    array = as_array(torch.full((1000, 1000), 7.0))
    others = [torch.zeros(1000, 1000) for _ in range(3)]
    assert (array == 7).all() and len(others) == 3
    assert memoryview(as_array(torch.full((3,), 5, dtype=torch.uint8))).tolist() == [5, 5, 5]


def test_arrays_of_nothing_and_of_what_has_no_memory() -> None:
    for shape in ((0,), (3, 0), (0, 4)):
        array = as_array(torch.empty(shape, dtype=torch.int16))
        assert array.shape == shape and array.dtype == np.int16
    with pytest.raises(TypeError, match="on meta, a Tensor, has no memory"):
        as_array(torch.empty(3, device="meta"))
    with pytest.raises(TypeError, match="bfloat16"):
        as_array(torch.ones(3, dtype=torch.bfloat16))


def test_the_library_calls_numpy_of_no_tensor() -> None:
    found = []
    for path in sorted((ROOT / "spp").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "numpy":
                found.append(f"{path}:{node.lineno}")
    assert found == []
