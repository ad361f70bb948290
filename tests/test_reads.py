"""How often the values of a weight are read: a pass over all of them costs a good part of a training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import spp
import spp.pst
from spp.layers.checks import survey
from spp.models.targets import resolve_projections

_VIEWS = ("view", "detach", "t", "transpose", "slice", "select", "split", "unbind", "alias", "unsqueeze", "as_strided")


class Reads(TorchDispatchMode):
    """Counts the entries of some weights that operations read; views of them read nothing."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.storages = {p.untyped_storage().data_ptr() for p in model.parameters() if p.dim() == 2}
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
