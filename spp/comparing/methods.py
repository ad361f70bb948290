"""How each contender adapts a pruned model, what happens while it trains, and how it gives a plain model back."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import spp.pst as pst
from spp.certifying.scan import report_from_tensors
from spp.comparing.measure import require_peft
from spp.configs.comparing import Contender
from spp.errors import ConfigError, TargetError
from spp.files.provenance import installed
from spp.masks.patterns import nonzero_mask, pack_bits, unpack_bits
from spp.merging.model import merge
from spp.models.targets import name_targets, projection_weights, resolve_projections
from spp.training.mask_updates import MaskUpdates
from spp.training.pst_trainer import SparsitySchedule
from spp.wrapping.wrap import adapter_layers, wrap


@dataclass
class Adapted:
    """A model ready to be trained.

    Attributes:
        model: what trains: the parameters that require gradients.
        finish: gives the plain model, merged; call it once.
        callbacks: of transformers' Trainer.
        settle: brings it to what a step costs most of the time, without training.
    """

    model: nn.Module
    finish: Callable[[], nn.Module]
    callbacks: list[Any] = field(default_factory=list)
    settle: Callable[[], object] = lambda: None

    def trainable(self) -> int:
        """Return the number of parameters that train."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)


@dataclass(frozen=True)
class Goal:
    """The zeros that a contender which makes its own has to end with: as the pruned model has them.

    Attributes:
        pattern: "N:M", or None.
        sparsity: the share of zeros in the pruned weights.
        targets: paths of the pruned layers, the only ones to get zeros; None where they are all of the projections.
    """

    pattern: str | None
    sparsity: float
    targets: tuple[str, ...] | None = None

    @classmethod
    def of(cls, model: nn.Module) -> Goal:
        """Return that of a pruned, plain model."""
        tensors = report_from_tensors(projection_weights(model)).tensors
        pruned = {name: t for name, t in tensors.items() if t.zeros}
        patterns = {t.pattern for t in pruned.values()}
        pattern = patterns.pop() if len(patterns) == 1 else ""
        size = sum(math.prod(t.shape) for t in pruned.values())
        some = 0 < len(pruned) < len(tensors)
        return cls(
            pattern if ":" in pattern else None,
            sum(t.zeros for t in pruned.values()) / size if size else 0.0,
            tuple(name.removesuffix(".weight") for name in pruned) if some else None,
        )


def adapt(
    contender: Contender,
    model: nn.Module,
    seed: int,
    goal: Goal | None = None,
    dense: str | os.PathLike[str] | None = None,
) -> Adapted:
    """Adapt a model in place.

    Args:
        contender: which.
        model: plain and pruned, or dense for a contender that starts from that.
        seed: of the initial values.
        goal: what the pruned model has; None reads it from `model`.
        dense: where the dense model is, for contenders that need it.

    Raises:
        ConfigError: an option makes no sense for the method or the model.
        DependencyError: it is PEFT's, and PEFT is missing.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = dict(contender.options)
        if contender.kind in PST_KINDS:
            return _pst(model, seed, options, goal or Goal.of(model))
        if contender.kind == "spp-mask-updates":
            return _mask_updates(model, seed, options, dense)
        return _METHODS[contender.kind](model, seed, options)


def _wrapped(rule: str, model: nn.Module, seed: int, options: dict[str, Any]) -> Adapted:
    wrap(model, rule=rule, seed=seed, **options)

    def finish() -> nn.Module:
        merge(model)
        return model

    return Adapted(model, finish)


def _without_beta(model: nn.Module, seed: int, options: dict[str, Any]) -> Adapted:
    adapted = _wrapped("spp", model, seed, options)
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            alpha, beta = layer.adapter_parameters()
            alpha.zero_()
            beta.fill_(1.0).requires_grad_(False)
    return adapted


def _random_beta(model: nn.Module, seed: int, options: dict[str, Any]) -> Adapted:
    adapted = _wrapped("spp", model, seed, options)
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            _, beta = layer.adapter_parameters()
            nn.init.uniform_(beta, -1.0, 1.0)  # Kaiming-uniform with a = √5, as α, for its one column
    return adapted


def require_methods(contenders: Sequence[Contender]) -> None:
    """Raise unless what the contenders need of PEFT is there: a DependencyError, or a ConfigError for an old PEFT."""
    for contender in contenders:
        if contender.kind in _PEFT_CONFIGS:
            _peft_config(contender.kind)


def _peft_config(kind: str) -> Any:
    peft, name = require_peft(kind), _PEFT_CONFIGS[kind]
    if not hasattr(peft, name):
        raise ConfigError(f"peft {installed('peft')} has no {name}; leave {kind} out, or install a newer peft")
    return getattr(peft, name)


def _peft(kind: str, model: nn.Module, options: Mapping[str, Any]) -> Adapted:
    config = _peft_config(kind)
    adapted = require_peft(kind).get_peft_model(model, config(**options))

    def finish() -> nn.Module:
        plain: nn.Module = adapted.merge_and_unload()
        return plain

    return Adapted(adapted, finish)


def _hira(model: nn.Module, seed: int, options: dict[str, Any]) -> Adapted:
    return _peft("hira", model, {"r": options["r"], "target_modules": _targets(model)})


def _lora(model: nn.Module, seed: int, options: dict[str, Any]) -> Adapted:
    r = options["r"]
    return _peft("lora", model, {"r": r, "lora_alpha": r * options["scaling"], "target_modules": _targets(model)})


def _lora_remasked(model: nn.Module, seed: int, options: dict[str, Any]) -> Adapted:
    masks = {name: pack_bits(weight) for name, weight, _ in projection_weights(model)}
    adapted = _lora(model, seed, options)
    merged = adapted.finish

    def finish() -> nn.Module:
        plain = merged()
        with torch.no_grad():
            for name, weight, _ in projection_weights(plain):
                weight.mul_(unpack_bits(masks[name], weight.shape).to(weight.device))
        return plain

    return Adapted(adapted.model, finish)


def _ia3(model: nn.Module, seed: int, options: dict[str, Any]) -> Adapted:
    """IA³ where its paper has it; PEFT's own table knows the names of an architecture, and these are the usual ones."""
    names = _targets(model)
    own = {"k_proj", "v_proj", "down_proj"}
    chosen = {} if not own <= set(names) else {"target_modules": sorted(own), "feedforward_modules": ["down_proj"]}
    return _peft("ia3", model, chosen)


def _norms(model: nn.Module, seed: int, options: dict[str, Any]) -> Adapted:
    model.requires_grad_(False)
    trained = [
        parameter
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if name == "bias" or name.endswith("proj_bias") or "norm" in type(module).__name__.lower()
    ]
    if not trained:
        raise TargetError(f"{type(model).__name__} has neither norm weights nor biases to train")
    for parameter in trained:
        parameter.requires_grad_(True)
    return Adapted(model, lambda: model)


def _full(model: nn.Module, seed: int, options: dict[str, Any]) -> Adapted:
    model.requires_grad_(True)
    masks, parameters = masks_of(model), dict(model.named_parameters())
    for name, mask in masks.items():
        if not bool(mask.all()):
            # AdamW leaves a zero whose gradient is always zero where it is.
            parameters[name].register_hook(lambda gradient, mask=mask: gradient * mask.to(gradient.device))
    return Adapted(model, lambda: model)


def _pst(model: nn.Module, seed: int, options: dict[str, Any], goal: Goal) -> Adapted:
    """PST with its authors' schedule; the classifier heads that it would train as a whole are not causal models'."""
    final, r = None if goal.pattern else goal.sparsity, options["r"]
    pst.wrap(model, r, mask_rank=r, pattern=goal.pattern, target_modules=goal.targets, seed=seed)
    schedule = SparsitySchedule(final)
    schedule.fit(model)
    return Adapted(model, lambda: pst.convert(model), [schedule], lambda: pst.set_sparsity(model, schedule.at(1, 1)))


def _mask_updates(
    model: nn.Module, seed: int, options: dict[str, Any], dense: str | os.PathLike[str] | None
) -> Adapted:
    assert dense is not None, "checked by CompareConfig"
    updates = MaskUpdates(dense, every=options.pop("every"), fraction=options.pop("fraction"))
    adapted = _wrapped("spp", model, seed, options)
    updates.attach(model)
    return Adapted(model, adapted.finish, [updates])


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """Return {name: True where a weight is not zero} of the projections of a plain model."""
    return {name: nonzero_mask(weight) for name, weight, _ in projection_weights(model)}


def _targets(model: nn.Module) -> list[str]:
    """Return the names that mean the projections that `spp.wrap` would adapt."""
    return list(name_targets(model, list(resolve_projections(model))))


RULES_OF = {  # the kinds that `spp.wrap` makes, and their rules
    "spp": "spp",
    "spp-no-beta": "spp",
    "spp-random-beta": "spp",
    "spp-mask-updates": "spp",
    "hira-rule": "hira",
    "masked-lora": "masked_lora",
}
_PEFT_CONFIGS = {"hira": "HiraConfig", "lora": "LoraConfig", "lora-remasked": "LoraConfig", "ia3": "IA3Config"}
PST_KINDS = ("pst", "pst-pruned")
_METHODS: Mapping[str, Callable[[nn.Module, int, dict[str, Any]], Adapted]] = {
    "spp": partial(_wrapped, "spp"),
    "spp-no-beta": _without_beta,
    "spp-random-beta": _random_beta,
    "hira": _hira,
    "hira-rule": partial(_wrapped, "hira"),
    "masked-lora": partial(_wrapped, "masked_lora"),
    "lora-remasked": _lora_remasked,
    "lora": _lora,
    "ia3": _ia3,
    "norms": _norms,
    "full": _full,
}
