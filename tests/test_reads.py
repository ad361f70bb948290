"""How often the values of a weight are read: a pass over all of them costs a good part of a training step."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainingArguments

import spp
import spp.pst
from spp.errors import MaskError, SPPWarning
from spp.layers.checks import survey
from spp.models.targets import resolve_projections
from spp.training import MaskUpdates, PSTTrainer, SPPTrainer
from spp.wrapping.adapters import base_masks, base_values
from spp.wrapping.wrap import adapter_layers

_VIEWS = ("view", "detach", "t", "transpose", "slice", "select", "split", "unbind", "alias", "unsqueeze", "as_strided")


class Reads(TorchDispatchMode):
    """Counts the entries of some weights that operations read; views of them read nothing."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.storages = {p.untyped_storage().data_ptr() for p in model.parameters() if p.shape == (24, 24)}
        self.entries = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name not in _VIEWS and not name.endswith("view"):
            found = [t for t in args if isinstance(t, Tensor) and not t.is_meta]
            self.entries += sum(t.numel() for t in found if t.untyped_storage().data_ptr() in self.storages)
        return function(*args, **(kwargs or {}))


def model() -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(*(nn.Linear(24, 24, bias=False) for _ in range(3)))
    for layer in made:
        # Stored otherwise than in rows, so that every look goes through torch's operations, which are counted.
        weight = torch.randn(24, 24).t()
        assert isinstance(layer, nn.Linear)
        layer.weight = nn.Parameter(weight * (torch.rand(24, 24) < 0.5).t())
    return made


def reads(made: nn.Module, call: Callable[[], object]) -> int:
    with Reads(made) as counted:
        call()
    return counted.entries


def test_the_counter_counts() -> None:
    made = model()
    assert reads(made, lambda: [layer.weight.detach().t() for layer in made]) == 0
    assert reads(made, lambda: [layer.weight.sum() for layer in made]) == 3 * 24 * 24


@pytest.mark.parametrize("wrap", [spp.wrap, spp.pst.wrap], ids=["spp", "pst"])
def test_wrap_reads_each_weight_once(wrap: Callable[..., nn.Module]) -> None:
    made = model()
    once = reads(made, lambda: [survey(t) for t in resolve_projections(made, "all-linear", None).values()])
    assert once >= 3 * 24 * 24
    assert reads(made, lambda: wrap(made, 2, target_modules="all-linear")) == once


def wrapped_spp() -> nn.Module:
    return spp.wrap(model(), 2, target_modules="all-linear", seed=0)


def test_save_adapter_reads_each_mask_and_each_value_once(tmp_path: Path) -> None:
    made, other = wrapped_spp(), wrapped_spp()
    masks = reads(other, lambda: base_masks(other))
    values = reads(other, lambda: base_values((p, layer.held()) for p, layer in adapter_layers(other).items()))
    again = reads(other, lambda: base_values((p, layer.held()) for p, layer in adapter_layers(other).items()))
    assert masks >= 3 * 24 * 24 and again < values  # known values: a sample tells that they are the same
    with pytest.warns(SPPWarning, match="changes no weight"):
        assert reads(made, lambda: spp.save_adapter(made, tmp_path / "first")) == masks + values
    with pytest.warns(SPPWarning, match="changes no weight"):
        assert reads(made, lambda: spp.save_adapter(made, tmp_path / "again")) == masks + again


@pytest.mark.parametrize("saves", ["adapter", "pst"])
def test_a_save_looks_once_whether_what_trains_is_finite(saves: str, tmp_path: Path) -> None:
    made = wrapped_spp() if saves == "adapter" else spp.pst.wrap(model(), 2, target_modules="all-linear", seed=0)
    trained = {id(p): p for p in made.parameters() if p.requires_grad}
    looked: list[int] = []

    class Looks(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function.overloadpacket.__name__ in ("aminmax", "isfinite"):
                looked.append(args[0].untyped_storage().data_ptr())
            return function(*args, **(kwargs or {}))

    with warnings.catch_warnings(), Looks():
        warnings.simplefilter("ignore", SPPWarning)
        (spp.save_adapter if saves == "adapter" else spp.pst.save)(made, tmp_path / "saved")
    assert sorted(looked) == sorted(p.untyped_storage().data_ptr() for p in trained.values())


def trainer_of(kind: str, directory: Path) -> SPPTrainer | PSTTrainer:
    arguments = TrainingArguments(str(directory), report_to="none", use_cpu=True, save_strategy="no")
    if kind == "pst":
        made = spp.pst.wrap(model(), 2, target_modules="all-linear", seed=0)
        return PSTTrainer(made, arguments, final_sparsity=0.5)
    updates = MaskUpdates(dense_model(), every=2) if kind == "mask updates" else None
    return SPPTrainer(wrapped_spp(), arguments, mask_updates=updates)


def dense_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(*(nn.Linear(24, 24, bias=False) for _ in range(3)))


@pytest.mark.filterwarnings("ignore:.*hardly resembles")
@pytest.mark.parametrize("kind", ["masks", "mask updates", "pst"])
def test_a_trainer_that_saves_looks_once_at_what_is_frozen(kind: str, tmp_path: Path) -> None:
    made = trainer_of(kind, tmp_path / "run")
    frozen = reads(made.model, lambda: made.frozen(made.model))
    assert frozen >= 3 * 24 * 24
    known = 0
    if kind != "pst":
        layers = adapter_layers(made.model)
        base_values((path, layer.held()) for path, layer in layers.items())
        known = reads(made.model, lambda: base_values((path, layer.held()) for path, layer in layers.items()))
    for name in ("checkpoint", "checkpoint", "final"):  # the second one in place of the first
        assert reads(made.model, lambda name=name: made._save(str(tmp_path / name))) == frozen + known  # type: ignore[misc]


@pytest.mark.filterwarnings("ignore:.*hardly resembles")
@pytest.mark.parametrize("kind", ["masks", "mask updates", "pst"])
def test_a_weight_that_is_written_between_two_saves_is_found(kind: str, tmp_path: Path) -> None:
    made = trainer_of(kind, tmp_path / "run")
    made._save(str(tmp_path / "one"))
    layer: Any = made.model[1]
    layer.weight.data[3, 4] = 0.0 if layer.weight[3, 4] else 1.0  # which no counter of torch sees
    with pytest.raises(MaskError, match=r"changed during training: 1\. Nothing was saved"):
        made._save(str(tmp_path / "two"))
    assert not (tmp_path / "two").exists()
