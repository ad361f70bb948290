"""Which modules of a model are adapted or pruned: the projections of its decoder blocks.

`None` means q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj and, where an architecture has other names
for the same projections, those (the tables below). Embeddings and output heads are never meant by default, nor are
routers: they have few rows and decide which expert works.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spp.configs.checks import is_suffix, name_matches
from spp.errors import ConfigError, TargetError, WrapError, arg
from spp.models.projection import OTHER_PROJECTIONS as OTHER_PROJECTIONS
from spp.models.projection import PROJECTIONS as PROJECTIONS
from spp.models.projection import Projection, find_projections, is_compiled, plain_name
from spp.models.projection import is_projection_key as is_projection_key
from spp.weights import quantized_kind, read_quantized
from spp.weights.offload import is_offloaded, values

ALL_LINEAR = "all-linear"
_ROUTERS = ("gate", "router", "shared_expert_gate")  # themselves, or with their linear below them as "layer"
_OTHER_MODALITIES = ("Vision", "Audio", "Image", "Speech")  # in the name of a config's class
_NEVER = ("embed", "wte", "wpe", "lm_head", "embed_out", "score", "classifier")
_EMBEDDING = re.compile(r"(^|\.)(wte|wpe|(?!embed_out\.)[^.]*embed[^.]*)\.[^.]*$")


def require_model(model: object) -> None:
    """Raise a ConfigError that says what to do where something else is given as a model, such as its path."""
    if not isinstance(model, nn.Module):
        path = f"; load it first: AutoModelForCausalLM.from_pretrained({model!r})" if isinstance(model, str) else ""
        raise ConfigError(f"expected a model, a torch.nn.Module, found a {type(model).__name__}{path}")


def resolve_projections(
    model: nn.Module,
    target_modules: str | Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] | None = None,
) -> dict[str, Projection]:
    """Return {path: projection} of what is meant, in module order, each module once under its first path.

    Linears, fused expert weights and Conv1D; the path of a fused expert weight ends in the parameter's name.

    Args:
        model: any module; a layer that is wrapped already counts as its linear.
        target_modules: None (the projections of the text side), "all-linear" (every linear but the head and routers),
            a sequence of name suffixes, or a regular expression for the whole path.
        exclude_modules: name suffixes or a regular expression of what to leave out.

    Raises:
        TargetError: nothing matches (the message lists the linears that there are), or a matched module shares its
            weight with the embedding.
        WrapError: nothing matches, because the model is wrapped for PST.
    """
    found = {projection.path: projection for projection in find_projections(model)}
    return _choose(model, found, target_modules, exclude_modules)


def name_targets(model: nn.Module, paths: Sequence[str]) -> tuple[str, ...]:
    """Return names that mean exactly these projections: last components of paths where that is so, else the paths."""
    names = {last_name(path) for path in paths}
    meant = {p.path for p in find_projections(model) if last_name(p.path) in names}
    return tuple(sorted(names)) if meant == set(paths) else tuple(paths)


def last_name(path: str) -> str:
    """Return the last component of a projection's path, of the module where its parameter is called "weight"."""
    return path.removesuffix(".weight").rsplit(".", 1)[-1]


def output_head(model: nn.Module) -> nn.Module | None:
    """Return the module that makes the logits, where the model can say which it is."""
    getter = getattr(model, "get_output_embeddings", None)
    try:
        head = getter() if callable(getter) else None
    except (NotImplementedError, AttributeError):
        head = None
    return head if isinstance(head, nn.Module) else None


def input_embedding(model: Any) -> nn.Module | None:
    """Return the module that makes hidden states of token ids; None where the model does not say."""
    try:
        embedding = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    return embedding if isinstance(embedding, nn.Module) else None


def text_side(model: nn.Module) -> list[str]:
    """Return the paths of the modules that hold a model's text side: [""], the whole, unless it has several modalities.

    Such a model's config holds one of its text part, which transformers' `get_text_config` gives; the modules of the
    text side are those with a config of its class. Where the text has no config of its own (Phi-4), it is all but
    `other_sides`.
    """
    config = getattr(model, "config", None)
    getter = getattr(config, "get_text_config", None)
    text = getter() if callable(getter) else config
    if text is None or text is config or type(text) is type(config):
        return [""]
    found: list[str] = []
    for path, module in model.named_modules():
        if type(getattr(module, "config", None)) is type(text) and not any(path.startswith(f"{f}.") for f in found):
            found.append(path)
    return found or [""]


def other_sides(model: nn.Module) -> list[str]:
    """Return the paths of the modules whose config is one of images or sound."""
    named = ((path, type(getattr(module, "config", None)).__name__) for path, module in model.named_modules() if path)
    return [path for path, name in named if any(part in name for part in _OTHER_MODALITIES)]


def is_other_matrix(key: str, ndim: int, dtype: torch.dtype) -> bool:
    """Whether a key names a 2-D floating weight that is neither a projection by its name nor an embedding."""
    wanted = ndim == 2 and dtype.is_floating_point and key.endswith(".weight")
    return wanted and not is_projection_key(key, ndim) and not _EMBEDDING.search(key)


def projection_axes(model: nn.Module) -> dict[str, int]:
    """Return {parameter name: input axis} of every projection, the frozen weight of a wrapped one too: packed last."""
    packed: dict[str, Any] = packed_modules(model)
    axes = {name: int(module.input_axis) for name, module in packed.items()}
    found = {name: axis for name, axis in axes.items() if is_projection_key(name, packed_ndim(packed[name]))}
    return dense_projections(model) | found


def projection_weights(model: nn.Module) -> Iterator[tuple[str, Tensor, int]]:
    """Yield (parameter name, weight, input axis) of every projection, as `projection_axes`.

    A packed, quantized or offloaded weight comes as a dense copy, made when it is reached.
    """
    for name, axis in projection_axes(model).items():
        yield name, weight_of(model, name), axis


def dense_projections(model: nn.Module) -> dict[str, int]:
    """Return {parameter name: input axis} of the projections that are not packed."""
    axes = {id(p.module._parameters.get(p.name)): p.input_axis for p in find_projections(model)}
    quantized = {plain_name(f"{path}.weight") for path, module in model.named_modules() if quantized_kind(module)}
    found = {}
    for name, parameter in ((plain_name(name), parameter) for name, parameter in model.named_parameters()):
        readable = name in quantized or parameter.is_floating_point()  # other integers are codes
        if readable and is_projection_key(name, 2 if name in quantized else parameter.ndim):
            found[name] = axes.get(id(parameter), -1)
    return found


def weight_of(model: nn.Module, name: str) -> Tensor:
    """Return a weight of a model, by the name of its parameter: a packed, quantized or offloaded one as a dense copy.

    One on the meta device comes as it is.
    """
    path, _, last = name.rpartition(".")
    module = _module_at(model, path)
    for holder in (module if last == "weight" else None, module._modules.get(last)):
        if getattr(holder, "packed_layout", None) is not None:
            return holder.weight  # type: ignore[union-attr]
    if quantized_kind(module) and last == "weight" and not module._parameters[last].is_meta:
        return read_quantized(module, name).dense()
    return values(module, last).detach()


def _module_at(model: nn.Module, path: str) -> Any:
    module: Any = model.get_submodule(path)
    return module._orig_mod if is_compiled(module) else module


def has_values(model: nn.Module, name: str) -> bool:
    """Whether a parameter of a model is materialised: not on meta, or offloaded by accelerate."""
    path, _, last = name.rpartition(".")
    module = _module_at(model, path)
    held = module._parameters[last]
    return held is not None and (not held.is_meta or is_offloaded(module, last))


def _choose(
    model: nn.Module,
    found: dict[str, Projection],
    target_modules: str | Sequence[str] | None,
    exclude_modules: str | Sequence[str] | None,
) -> dict[str, Projection]:
    """Return those of the projections found that the arguments mean."""
    head = output_head(model)
    text: list[str] = [""]
    other: tuple[str, ...] = ()
    if target_modules is None:
        text, other = text_side(model), tuple(f"{side}." for side in other_sides(model))

    def is_meant(path: str, module: nn.Module) -> bool:
        inside = any(not t or path.startswith(f"{t}.") for t in text) and not path.startswith(other)
        return inside and _is_target(path, module, target_modules, head)

    chosen = {path: p for path, p in found.items() if is_meant(path, p.module)}
    _refuse_foreign(model, found, is_meant)
    if exclude_modules is not None:
        excluded = _excluded(found, exclude_modules)
        chosen = {path: p for path, p in chosen.items() if path not in excluded}
    if not chosen:
        _refuse_other_method(model)
        raise TargetError(_nothing_matched(found, target_modules, exclude_modules))
    _refuse_tied(model, chosen)
    return chosen


def packed_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return {name of the weight: module} of the modules whose frozen weight is packed, in module order."""
    packed = {plain_name(p): m for p, m in model.named_modules() if getattr(m, "packed_layout", None) is not None}
    return {p if packed_ndim(m) == 3 else f"{p}.weight" if p else "weight": m for p, m in packed.items()}


def packed_ndim(module: nn.Module) -> int:
    """Return the dimensions of a packed module's weight: 3 for experts, which go by the name of their parameter."""
    return 3 if hasattr(module, "num_experts") else 2


def _is_target(path: str, module: nn.Module, wanted: str | Sequence[str] | None, head: nn.Module | None) -> bool:
    last = last_name(path)
    if wanted is None:
        never = module is head or any(part in _NEVER for part in path.split("."))
        return (last in PROJECTIONS or last in OTHER_PROJECTIONS) and not never
    if wanted == ALL_LINEAR:
        return module is not head and last not in _NEVER and path.removesuffix(".layer").split(".")[-1] not in _ROUTERS
    if isinstance(wanted, str):
        return any(re.fullmatch(wanted, p) for p in (path, path.removesuffix(".weight")))
    return any(is_suffix(path, name) for name in wanted)


def _excluded(found: Iterable[str], names: str | Sequence[str]) -> set[str]:
    """Return the paths that `exclude_modules` means; a TargetError where a name of a list means none."""
    if isinstance(names, str):
        return {path for path in found if name_matches(path, names)}
    unknown = sorted(name for name in names if not any(is_suffix(path, name) for path in found))
    if unknown:
        raise TargetError(f"{arg('exclude_modules')}: no linear module is called {', '.join(unknown)}")
    return {path for path in found if any(is_suffix(path, name) for name in names)}


def _nothing_matched(found: Mapping[str, Projection], wanted: object, excluded: object) -> str:
    if not found:
        return "the model has no linear modules, so there is nothing to adapt or prune"
    suffixes: dict[str, list[str]] = {}
    for path, projection in found.items():
        name = f"{last_name(path)} {projection.shape}"
        suffixes.setdefault(name, []).append(path)
    listing = "\n".join(f"  {name}: {len(paths)} ×, such as {paths[0]}" for name, paths in sorted(suffixes.items()))
    without = f" without {arg('exclude_modules', excluded)}" if excluded is not None else ""
    what = "the default" if wanted is None else arg("target_modules", wanted)
    return f"{what}{without} matches no linear module. The model has these:\n{listing}\n{_suggestion(suffixes)}"


def _refuse_other_method(model: nn.Module) -> None:
    """Raise where the linear modules are hidden in layers of another way of training, which say how to get them out."""
    for path, module in model.named_modules():
        if way_out := getattr(module, "way_out", None):
            raise WrapError(f"the model is wrapped for another method ({path} is a {type(module).__name__}): {way_out}")


def _refuse_foreign(
    model: nn.Module, found: Mapping[str, Projection], is_meant: Callable[[str, nn.Module], bool]
) -> None:
    """Raise where projections that are meant are held by modules of another tool, such as GPTQ's linears.

    Names alone are looked at first: a model of plain linears has none that is not found.
    """
    known = {*found, *(path.rpartition(".")[0] for path, one in found.items() if one.fused or one.name != "weight")}
    named = ((plain_name(path), module) for path, module in model.named_modules() if not is_compiled(module))
    suspects = {
        path: module
        for path, module in named
        if path not in known and (module._parameters or module._buffers) and is_meant(path, module)
    }
    suspects = {path: module for path, module in suspects.items() if not _is_inside(path, found)}
    suspects |= {path: one.module for path, one in found.items() if _lacks_weight(one) and is_meant(path, one.module)}
    if not suspects:
        return
    from spp.models.unreadable import READ_IN_MEMORY, describe_unreadable, unreadable_projections

    tensors = {
        f"{path}.{name}": (tensor.ndim, tensor.dtype)
        for path, module in suspects.items()
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }
    forms = {path: how for path, how in unreadable_projections(tensors).items() if path in suspects}
    if forms:
        held = {path: f"{how}, in a {type(suspects[path]).__name__}" for path, how in forms.items()}
        raise TargetError(
            f"{len(held)} projections are held by modules of another tool: {describe_unreadable(held)}. "
            f"{READ_IN_MEMORY}, or name the plain ones in {arg('target_modules')}"
        )


def _lacks_weight(projection: Projection) -> bool:
    """Whether a linear has had its weight taken away, as compressed-tensors does it."""
    module = projection.module
    return isinstance(module, nn.Linear) and "weight" not in module._parameters and not hasattr(module, "weight")


def _is_inside(path: str, layers: Container[str]) -> bool:
    """Whether a module is a part of one of some layers."""
    parts = path.split(".")
    return any(".".join(parts[:count]) in layers for count in range(1, len(parts)))


def _suggestion(names: Mapping[str, Sequence[str]]) -> str:
    """Return the argument to pass: the names that come back in every block, which projections do and heads do not."""
    often = max((len(paths) for paths in names.values()), default=0)
    likely = sorted(
        {
            name.split(" ", 1)[0]
            for name, paths in names.items()
            if len(paths) == often and all(is_projection_key(f"{path}.weight", 2) for path in paths)
        }
    )
    if not likely or any(name.isdigit() for name in likely):
        return f"Pass {arg('target_modules', ...)} with some of these names."
    return f"Pass those that are projections, such as {arg('target_modules', likely)}"


def _refuse_tied(model: nn.Module, chosen: Mapping[str, Projection]) -> None:
    """Raise where a chosen module shares a parameter with any other: adapting one would change both."""
    holders: dict[int, list[tuple[int, str]]] = {}  # {id of a parameter: (id of a module that has it, its name there)}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            holders.setdefault(id(parameter), []).append((id(module), f"{path}.{name}" if path else name))
    for path, projection in chosen.items():
        for parameter in projection.module.parameters(recurse=False):
            mine = next(name for module, name in holders[id(parameter)] if module == id(projection.module))
            other = next((name for module, name in holders[id(parameter)] if module != id(projection.module)), None)
            if other is not None:
                raise TargetError(
                    f"{mine} is the same tensor as {other} (tied weights): changing one would "
                    f"change the other. Leave {path} out, or untie first: "
                    f"module.weight = torch.nn.Parameter(module.weight.clone())"
                )
