"""Which modules of a model are adapted or pruned: the projections of its decoder blocks.

`None` means q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj and, where an architecture has other names
for the same projections, those (the tables below). Embeddings and output heads are never meant by default, nor are
routers: they have few rows and decide which expert works.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from spp.config import is_suffix, name_matches
from spp.errors import TargetError

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# The same projections under the names of other architectures, as the last component of the module path.
OTHER_PROJECTIONS = (
    *("qkv_proj", "gate_up_proj"),  # Phi-3, fused
    *("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),  # GPT-NeoX, Falcon, BLOOM
    *("out_proj", "fc1", "fc2", "fc_in", "fc_out"),  # OPT, Phi, GPT-J
    *("Wqkv", "c_proj", "c_fc"),  # MPT, StarCoder2
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),  # DeepSeek's latent attention
)
ALL_LINEAR = "all-linear"
_ROUTERS = ("gate", "router", "shared_expert_gate")
_NEVER = ("embed", "wte", "wpe", "lm_head", "embed_out", "score", "classifier")
_NOT_PROJECTION = re.compile(
    r"(^|\.)(lm_head|embed_out|score|classifier|router|gate|shared_expert_gate|wte|wpe|[^.]*embed[^.]*|[^.]*norm[^.]*)"
    r"(\.[^.]*)?$"
)


def resolve_targets(
    model: nn.Module,
    target_modules: str | Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] | None = None,
) -> list[tuple[str, nn.Module]]:
    """Return (path, module) of the modules that are meant, in module order, each module once under its first path.

    Args:
        model: any module; a layer that is wrapped already counts as its linear.
        target_modules: None (the projections), "all-linear" (every linear but the head and routers), a sequence of
            name suffixes, or a regular expression for the whole path.
        exclude_modules: name suffixes or a regular expression of what to leave out.

    Raises:
        TargetError: nothing matches (the message lists the linears that there are), or a matched module shares its
            weight with the embedding.
    """
    linears = dict(linear_modules(model))
    head = output_head(model)
    chosen = {path: module for path, module in linears.items() if _is_target(path, module, target_modules, head)}
    if exclude_modules is not None:
        excluded = _excluded(linears, exclude_modules)
        chosen = {path: module for path, module in chosen.items() if path not in excluded}
    if "" in chosen:
        raise TargetError("the model itself is a linear, which cannot be replaced in place; use spp.SPPLinear(linear)")
    if not chosen:
        raise TargetError(_nothing_matched(linears, target_modules, exclude_modules))
    _refuse_tied(model, chosen)
    return list(chosen.items())


def linear_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return (path, module) of every linear, plain or wrapped, in module order; one registered twice comes once."""
    return [(path, module) for path, module in model.named_modules() if is_linear(module)]


def is_linear(module: nn.Module) -> bool:
    """Whether the module is nn.Linear (or a subclass), or a layer of ours around one."""
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False  # nn.MultiheadAttention's own: it reads the weight and never calls the module
    return isinstance(module, nn.Linear) or hasattr(module, "spp_rule")


def output_head(model: nn.Module) -> nn.Module | None:
    """Return the module that makes the logits, where the model can say which it is."""
    getter = getattr(model, "get_output_embeddings", None)
    try:
        head = getter() if callable(getter) else None
    except (NotImplementedError, AttributeError):
        head = None
    return head if isinstance(head, nn.Module) else None


def is_projection_key(key: str, ndim: int) -> bool:
    """Whether a state-dict key names a projection's weight: 2-D or 3-D, no embedding, output head, router or norm.

    Args:
        key: such as "model.layers.0.mlp.up_proj.weight", in memory or on disk.
        ndim: number of dimensions of the tensor.
    """
    if ndim not in (2, 3) or _NOT_PROJECTION.search(key) or key.endswith((".spp_alpha", ".spp_beta", ".bias")):
        return False
    return key.endswith(".weight") if ndim == 2 else True


def projection_weights(model: nn.Module) -> Iterator[tuple[str, Tensor, int]]:
    """Yield (parameter name, weight, input axis) of every projection, the frozen weight of a wrapped one too."""
    for name, parameter in model.named_parameters():
        if is_projection_key(name, parameter.ndim):
            yield name, parameter.detach(), -1


def _is_target(path: str, module: nn.Module, wanted: str | Sequence[str] | None, head: nn.Module | None) -> bool:
    last = path.rsplit(".", 1)[-1]
    if wanted is None:
        never = module is head or any(part in _NEVER for part in path.split("."))
        return (last in PROJECTIONS or last in OTHER_PROJECTIONS) and not never
    if wanted == ALL_LINEAR:
        return module is not head and last not in _NEVER and last not in _ROUTERS
    if isinstance(wanted, str):
        return re.fullmatch(wanted, path) is not None
    return any(is_suffix(path, name) for name in wanted)


def _excluded(linears: dict[str, nn.Module], names: str | Sequence[str]) -> set[str]:
    """Return the paths that `exclude_modules` means; a TargetError where a name of a list means none."""
    if isinstance(names, str):
        return {path for path in linears if name_matches(path, names)}
    unknown = sorted(name for name in names if not any(is_suffix(path, name) for path in linears))
    if unknown:
        raise TargetError(f"exclude_modules: no linear module is called {', '.join(unknown)}")
    return {path for path in linears if any(is_suffix(path, name) for name in names)}


def _nothing_matched(linears: dict[str, nn.Module], wanted: object, excluded: object) -> str:
    if not linears:
        return "the model has no linear modules, so there is nothing to adapt or prune"
    suffixes: dict[str, list[str]] = {}
    for path, module in linears.items():
        weight = getattr(module, "weight", None)
        shape = f" {tuple(weight.shape)}" if isinstance(weight, Tensor) else ""
        suffixes.setdefault(path.rsplit(".", 1)[-1] + shape, []).append(path)
    listing = "\n".join(f"  {name}: {len(paths)} ×, such as {paths[0]}" for name, paths in sorted(suffixes.items()))
    without = f" without exclude_modules={excluded!r}" if excluded is not None else ""
    return (
        f"target_modules={wanted!r}{without} matches no linear module. The model has these:\n{listing}\n"
        f"Pass target_modules= with some of these names."
    )


def _refuse_tied(model: nn.Module, chosen: dict[str, nn.Module]) -> None:
    """Raise where a chosen module shares a parameter with any other: adapting one would change both."""
    ids = {id(module) for module in chosen.values()}
    elsewhere: dict[int, str] = {}
    for path, module in model.named_modules():
        if id(module) not in ids:
            for name, parameter in module.named_parameters(recurse=False):
                elsewhere.setdefault(id(parameter), f"{path}.{name}" if path else name)
    for path, module in chosen.items():
        for name, parameter in module.named_parameters(recurse=False):
            owner = elsewhere.setdefault(id(parameter), f"{path}.{name}")
            if owner != f"{path}.{name}":
                raise TargetError(
                    f"{path}.{name} is the same tensor as {owner} (tied weights): changing one would "
                    f"change the other. Leave {path} out, or untie first: "
                    f"module.weight = torch.nn.Parameter(module.weight.clone())"
                )
