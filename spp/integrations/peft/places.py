"""Where tuner layers are in a model. PEFT looks at the first of a module's names only; it may have several."""

from __future__ import annotations

from torch import Tensor, nn

from spp.experts_forward import adapters_of
from spp.integrations.peft.layer import Place, SPPPeftLinear
from spp.integrations.peft.method import PREFIX
from spp.integrations.peft.terms import TermsLayer
from spp.targets_layout import Projection


def repeated(model: nn.Module) -> dict[int, tuple[Place, ...]]:
    """Return {id of a module: its places} of the modules that are registered in more than one."""
    places: dict[int, list[Place]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            places.setdefault(id(child), []).append((parent, name))
    return {key: tuple(found) for key, found in places.items() if len(found) > 1}


def layer_of(target: Projection) -> TermsLayer | None:
    """Return the tuner layer that a target has already."""
    found = adapters_of(target.module).get(target.name) if target.fused else target.module
    return found if isinstance(found, TermsLayer) else None


def place_of(model: nn.Module, path: str) -> Place:
    """Return the place of the module at a path."""
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name


def under_all_names(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return adapter tensors by name, those of layers in several places, saved once, under each of their names."""
    first: dict[int, str] = {}
    found = dict(state)
    for path, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, SPPPeftLinear) and layer.also_at:
            known = first.setdefault(id(layer), path)
            for key in [key for key in state if key.startswith(f"{known}.{PREFIX}")]:
                found[path + key.removeprefix(known)] = state[key]
    return found
