"""Put PST layers into a model, set their sparsity, and take them out again, as they were or masked for good."""

from __future__ import annotations

import logging
import re
from typing import Any, TypeVar, overload

from torch import nn

from spp.certifying.verify import PRUNED_FROM
from spp.configs.checks import is_suffix
from spp.configs.pst import PSTConfig, check_pattern
from spp.errors import TargetError, arg
from spp.models.projection import Projection
from spp.models.targets import text_side
from spp.pst.layer import PSTLinear, check_base
from spp.wrapping.state import Wrapping, layer_generator, uncompiled
from spp.wrapping.wrap import refuse_wrapped

logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nn.Module)
_PST = Wrapping(
    "_pst_state",
    PSTConfig,
    (PSTLinear,),
    linear="spp.pst.PSTLinear",
    wrap="spp.pst.wrap",
    load="spp.pst.load",
    ways_out="spp.pst.unwrap(model) takes the layers out, spp.pst.convert(model) makes their masks permanent",
)
require_layers = _PST.require
_ENCODER_BLOCK = r"(.*\.)?(encoder|transformer)\.layer\.\d+\..*"  # BERT, RoBERTa, …; DistilBERT
# What transformers' classifiers and the like add to a model, with random values.
_HEADS = ("classifier", "pre_classifier", "score", "qa_outputs", "logits_proj", "sequence_summary")


def wrap(
    model: Model,
    weight_rank: int | PSTConfig = 8,
    weight_scale: float = 1.0,
    mask_rank: int = 8,
    low_rank_scale: float = 1.0,
    structured_scale: float = 1.0,
    *,
    pattern: str | None = None,
    target_modules: str | list[str] | tuple[str, ...] | None = None,
    exclude_modules: str | list[str] | tuple[str, ...] | None = None,
    modules_to_save: list[str] | tuple[str, ...] | None = None,
    seed: int | None = None,
) -> Model:
    """Prepare a dense model for PST in place: its projections become PSTLinear at sparsity 0, the rest is frozen.

    The wrapped model computes what the dense one did until a sparsity is set. The new head of a classifier trains too.
    The mask is PST's own: zeros that a weight has are weights like any other, and are filled.

    Args:
        model: any torch module with linears; causal language models and encoders of Hugging Face need no arguments.
        weight_rank: the rank of the update, or a whole PSTConfig (then no other option).
        weight_scale, mask_rank, low_rank_scale, structured_scale, pattern, target_modules, exclude_modules,
            modules_to_save, seed: as in PSTConfig.

    Returns:
        The same object.

    Raises:
        WrapError: the model is wrapped already.
        TargetError: nothing matches, or a match cannot be used.
        ConfigError: an option makes no sense or does not fit a layer, which is named.
        NonFiniteError: a weight holds NaN or infinity.
        In each case the model is left as it was.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
        >>> model = wrap(model, target_modules="all-linear")  # doctest: +SKIP
    """
    options: dict[str, Any] = {
        "weight_scale": weight_scale,
        "mask_rank": mask_rank,
        "low_rank_scale": low_rank_scale,
        "structured_scale": structured_scale,
        "pattern": pattern,
        "target_modules": target_modules,
        "exclude_modules": exclude_modules,
        "modules_to_save": modules_to_save,
        "seed": seed,
    }
    config = _PST.options(weight_rank, options)
    given, model = model, uncompiled(model)
    refuse_wrapped(model)
    _PST.refuse(model)
    targets = _PST.targets(model, _targets(model, config), config.exclude_modules)
    whole = _trained_whole(model, config)
    parsed, sparse = check_pattern(config.pattern), 0
    for path, target in targets.items():
        if target.fused:
            raise TargetError(
                f"{path} holds fused experts, which PST does not prune; leave it out with {arg('exclude_modules')}"
            )
        if any(path == name or path.startswith(f"{name}.") for name in whole):
            raise TargetError(f"{path} is among the targets and in modules_to_save; it can only be one of them")
        found = check_base(target.module, parsed, path)
        sparse += found.numel - found.kept > PRUNED_FROM * found.numel
    if sparse:
        logger.warning("PST fills the zeros of %d layers that are sparse already: pass the dense model", sparse)

    def make(target: Projection) -> PSTLinear:
        return PSTLinear(
            target.module,
            config.weight_rank,
            config.weight_scale,
            config.mask_rank,
            config.low_rank_scale,
            config.structured_scale,
            pattern=config.pattern,
            generator=None if config.seed is None else layer_generator(config.seed, target.path),
            where=target.path,
            checked=True,
        )

    layers = _PST.put_in(model, config, targets, make, whole.values())
    logger.info("wrapped %d layers for PST", len(layers))
    return given


def unwrap(model: Model) -> Model:
    """Take the layers out: the dense model again, bit for bit, its requires_grad flags as before wrap.

    Modules that trained as a whole keep what they learned.

    Args:
        model: wrapped; it is changed in place.

    Returns:
        The same object.

    Raises:
        WrapError: the model is not wrapped.

    Example:
        >>> dense = unwrap(model)  # doctest: +SKIP
    """
    _PST.take_out(model, PSTLinear.restore)
    return model


@overload
def convert(layer_or_model: PSTLinear) -> nn.Module: ...
@overload
def convert(layer_or_model: Model) -> Model: ...
def convert(layer_or_model: nn.Module) -> nn.Module:
    """Make the mask and the update permanent: plain linears of the class that was wrapped, with the masked weight.

    Args:
        layer_or_model: a PSTLinear, which stays as it is, or a wrapped model, which is changed in place.

    Returns:
        A new linear, or the same model; `spp.save_model` writes it with the certificate of its zeros.

    Raises:
        WrapError: the model is not wrapped.
        NonFiniteError: a masked weight holds NaN or infinity; the model is left as it was.

    Example:
        >>> layer = PSTLinear(nn.Linear(8, 4), weight_rank=2, mask_rank=2)
        >>> layer.sparsity = 0.5
        >>> int((convert(layer).weight == 0).sum())
        16
    """
    if isinstance(layer_or_model, PSTLinear):
        return layer_or_model.convert()
    _PST.take_out(layer_or_model, PSTLinear.convert)
    return layer_or_model


def set_sparsity(model: nn.Module, sparsity: float) -> None:
    """Set the share of weights that the mask of every PST layer prunes.

    Args:
        model: wrapped.
        sparsity: in [0, 1).

    Raises:
        WrapError: the model is not wrapped.
        ConfigError: it is no such share, or above what a layer's pattern prunes.

    Example:
        >>> set_sparsity(model, 0.5)  # doctest: +SKIP
    """
    for layer in require_layers(model).values():
        layer.sparsity = sparsity


def pst_layers(model: nn.Module) -> dict[str, PSTLinear]:
    """Return the PST layers of a model, {path: layer} in module order.

    Args:
        model: any module.

    Example:
        >>> pst_layers(nn.Linear(4, 4))
        {}
    """
    return _PST.layers(model)


def is_wrapped(model: nn.Module) -> bool:
    """Whether a model holds PST layers.

    Args:
        model: any module.

    Example:
        >>> is_wrapped(nn.Linear(4, 4))
        False
    """
    return _PST.is_in(model)


def config_of(model: nn.Module) -> PSTConfig:
    """Return the config that the model was wrapped with."""
    config: PSTConfig = _PST.state(model).config
    return config


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return {name: parameter} of what PST trains and saves, in module order: the factors, and whole modules."""
    layers, model = require_layers(model), uncompiled(model)
    found = {id(p) for layer in layers.values() for p in layer.factors()}
    found |= {id(p) for module in _trained_whole(model, config_of(model)).values() for p in module.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) in found}


def _targets(model: nn.Module, config: PSTConfig) -> str | tuple[str, ...] | None:
    """Return what target_modules means: in an encoder of text, every linear of its blocks, as the authors have it."""
    if config.target_modules is not None:
        return config.target_modules
    text = text_side(model)
    blocks = (path for path, _ in model.named_modules() if re.fullmatch(_ENCODER_BLOCK, path))
    encoder = any(not side or path.startswith(f"{side}.") for path in blocks for side in text)
    return _ENCODER_BLOCK if encoder else None


def _trained_whole(model: nn.Module, config: PSTConfig) -> dict[str, nn.Module]:
    """Return {path: module} of modules_to_save; a TargetError for a name that means none."""
    if config.modules_to_save is None:
        return {path: module for path, module in model.named_children() if path in _HEADS}
    modules = dict(model.named_modules())
    unknown = [name for name in config.modules_to_save if not any(is_suffix(path, name) for path in modules)]
    if unknown:
        raise TargetError(f"modules_to_save: no module is called {', '.join(unknown)}")
    return {p: m for p, m in modules.items() if p and any(is_suffix(p, name) for name in config.modules_to_save)}
