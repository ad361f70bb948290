"""SPPLinear: a pruned linear layer, frozen, with the two small matrices that scale it (the maths: spp.rules.spp)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spp.config import SPPConfig
from spp.errors import ConfigError, NonFiniteError, TargetError
from spp.kernels import linear
from spp.patterns import all_finite
from spp.rules import Rule, effective_weight, get_rule
from spp.rules.canonical import arithmetic_dtype

CACHED_TOKENS = 32  # in eval without gradients, calls of at most this many tokens keep W_eff: generation's steps
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_opaque_forward: Callable[[SPPLinear, Tensor], Tensor] | None = None


class SPPLinear(nn.Module):
    """A frozen linear layer whose weight W computes as W ⊙ (1 + s·β·A), with trained W_α and W_β (SPP, §3.2).

    Args:
        linear: the nn.Linear (or subclass) to adapt; its Parameters are used, not copied, and frozen.
        r, scaling, dropout, dropout_mode, init, rule: as in SPPConfig.
        generator: where W_α is drawn from; None is torch's global generator. Drawn on the CPU, whatever the device.
        where: the layer's name in error messages.

    Attributes:
        weight (m, n), bias (m,) or None: the frozen base. spp_alpha: W_α (r, n). spp_beta: W_β (m, 1).

    Raises:
        ConfigError: r > m or r < 1, or an option makes no sense.
        NonFiniteError: the weight holds NaN or infinity.
        TargetError: `linear` is not a linear layer of floating-point weights.

    Example:
        >>> layer = SPPLinear(nn.Linear(8, 4), r=2)
        >>> layer(torch.ones(3, 8)).shape
        torch.Size([3, 4])
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    spp_alpha: nn.Parameter
    spp_beta: nn.Parameter

    def __init__(
        self,
        linear: nn.Linear,
        r: int = 16,
        scaling: float = 2.0,
        dropout: float = 0.0,
        dropout_mode: str = "input",
        init: str = "paper",
        rule: str = "spp",
        *,
        generator: torch.Generator | None = None,
        where: str = "SPPLinear",
    ) -> None:
        super().__init__()
        config = SPPConfig(r=r, scaling=scaling, dropout=dropout, dropout_mode=dropout_mode, init=init, rule=rule)
        check_linear(linear, config, where)
        self.spp_rule: Rule = get_rule(rule)
        self.spp_init = init
        self.spp_name = where
        self.r = r
        self.scaling = scaling
        self.dropout = dropout
        self.dropout_mode = dropout_mode
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.disabled = False
        self._linear = (linear,)  # in a tuple: not a submodule, so that its weight has one name
        self._cached: _Cached | None = None
        self.register_parameter("weight", linear.weight)  # type: ignore[arg-type]  # a Parameter, by its base class
        self.register_parameter("bias", linear.bias)
        for hooks in _HOOKS:
            setattr(self, hooks, getattr(linear, hooks))
        self._requires_grad = {name: p.requires_grad for name, p in linear.named_parameters(recurse=False)}
        dtype = arithmetic_dtype(self.weight.dtype)
        shapes = self.spp_rule.shapes(self.out_features, self.in_features, r)
        for name, shape in zip(self.spp_rule.attribute_names(), shapes, strict=True):
            empty = torch.empty(shape, dtype=dtype, device="meta" if self.weight.is_meta else "cpu")
            self.register_parameter(name, nn.Parameter(empty))
        if not self.weight.is_meta:
            self.reset_parameters(generator)
            for parameter in self.adapter_parameters():
                parameter.data = parameter.data.to(self.weight.device)
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.training = linear.training
        _prepare_opaque_forward()

    def adapter_parameters(self) -> list[nn.Parameter]:
        """Return [W_α, W_β]."""
        return [getattr(self, name) for name in self.spp_rule.attribute_names()]

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the adapter anew in place, as its `init` says; a generator must be on the parameters' device."""
        self.spp_rule.init_(self.adapter_parameters(), self.spp_init, generator)

    def effective_weight(self) -> Tensor:
        """Return W_eff (m, n) in the base's dtype: what the forward multiplies by and a merge stores, bit for bit."""
        return effective_weight(self.spp_rule, self.weight, self.adapter_parameters(), self.scaling)

    def merge(self) -> nn.Linear:
        """Return a plain nn.Linear with the effective weight; this layer stays as it is.

        Raises:
            NonFiniteError: the adapter or the result holds NaN or infinity.
        """
        merged = self.effective_weight()
        if not bool(torch.isfinite(merged).all()):
            raise NonFiniteError(
                f"{self.spp_name}: the merged weight is not finite; the adapter holds NaN, infinity or too much"
            )
        plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(merged, requires_grad=self._requires_grad["weight"])
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self._requires_grad["bias"])
        return plain.train(self.training)

    def restore(self) -> nn.Linear:
        """Return the module that was wrapped, holding this layer's weight and bias as they are now, flags as before."""
        original = self._linear[0]
        original.weight = self.weight
        original.register_parameter("bias", self.bias)
        for name, flag in self._requires_grad.items():
            getattr(original, name).requires_grad_(flag)
        return original.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """Compute Y (…, m) from x (…, n)."""
        if torch.compiler.is_compiling():
            assert _opaque_forward is not None
            return _opaque_forward(self, x)
        return self._compute(x)

    def _compute(self, x: Tensor) -> Tensor:
        if self.disabled:
            return F.linear(x, self.weight, self.bias)
        params: Sequence[Tensor] = self.adapter_parameters()
        dropout = self.dropout if self.training else 0.0
        if dropout and self.dropout_mode == "alpha":
            params = [F.dropout(params[0], dropout), *params[1:]]
            dropout = 0.0
        if self._may_cache(x):
            return F.linear(x, self._cached_weight(), self.bias)
        return linear(x, self.weight, self.bias, self.spp_rule, params, self.scaling, dropout)

    def _may_cache(self, x: Tensor) -> bool:
        if self.training or torch.is_grad_enabled():
            self._cached = None  # an optimizer's step may follow, and not every one leaves a trace on the tensors
            return False
        return (
            not self.weight.is_meta
            and x.numel() <= CACHED_TOKENS * self.in_features
            and not torch.is_autocast_enabled(x.device.type)
        )

    def _cached_weight(self) -> Tensor:
        params = self.adapter_parameters()
        if any(t.is_inference() for t in (self.weight, *params)):
            return self.effective_weight()  # such tensors have no version to tell whether they changed
        if self._cached is None or not self._cached.is_current(self.weight, params, self.scaling):
            with torch.inference_mode(False):
                self._cached = _Cached(self.weight, params, self.scaling, self.effective_weight())
        return self._cached.effective

    def train(self, mode: bool = True) -> SPPLinear:
        """Set the mode; a cached W_eff is dropped."""
        self._cached = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SPPLinear:
        """Convert or move; W_α and W_β follow the device, but stay float32 (float64 for a float64 base)."""
        self._cached = None
        names = self.spp_rule.attribute_names()
        adapter = {name: self._parameters.pop(name) for name in names}
        try:
            super()._apply(fn, recurse)
            for name, parameter in adapter.items():
                assert parameter is not None
                adapter[name] = _convert(parameter, fn, arithmetic_dtype(self.weight.dtype))
        finally:
            self._parameters.update(adapter)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _prepare_opaque_forward()

    def extra_repr(self) -> str:
        """Return what `repr` shows between the brackets."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"r={self.r}, scaling={self.scaling}, dropout={self.dropout}"
        )


class _Cached:
    """W_eff, and what it was computed from.

    A write through `.data` or by a fused optimizer changes no version counter, so α and β, which are small, are
    compared by value where that does not stall a device; W, which is frozen, by address and version.
    """

    def __init__(self, weight: Tensor, params: Sequence[Tensor], scaling: float, effective: Tensor) -> None:
        self.effective = effective
        self.state = self._state(weight, params, scaling)
        self.values = [p.detach().clone() for p in params]

    def is_current(self, weight: Tensor, params: Sequence[Tensor], scaling: float) -> bool:
        """Whether W_eff computed anew would be the same."""
        if self.state != self._state(weight, params, scaling):
            return False
        return weight.device.type != "cpu" or all(torch.equal(p, v) for p, v in zip(params, self.values, strict=True))

    @staticmethod
    def _state(weight: Tensor, params: Sequence[Tensor], scaling: float) -> tuple[object, ...]:
        return (scaling, *((t.data_ptr(), t._version) for t in (weight, *params)))


def check_linear(linear: nn.Module, config: SPPConfig, where: str, r: int | None = None) -> None:
    """Raise unless `linear` can be adapted: a floating-point, finite nn.Linear that r fits."""
    if not isinstance(linear, nn.Linear):
        raise TargetError(f"{where} is a {type(linear).__name__}; SPP adapts torch.nn.Linear and its subclasses")
    if torch.nn.utils.parametrize.is_parametrized(linear):
        names = [name for name, _ in linear.parametrizations.named_children()]  # type: ignore[union-attr]
        raise TargetError(
            f"{where} has a parametrization on {', '.join(names)}; make it permanent first "
            f"with torch.nn.utils.parametrize.remove_parametrizations"
        )
    weight = linear.weight
    if weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise TargetError(
            f"{where}.weight is {weight.dtype}; SPP adapts float64, float32, bfloat16 and float16 weights"
        )
    if config.packed:
        raise ConfigError(f"{where}: packed=True is not available in this version of spp; pass packed=False")
    get_rule(config.rule).check_rank(linear.out_features, linear.in_features, r or config.r, where)
    if not weight.is_meta and not all_finite(weight):
        bad = int((~torch.isfinite(weight)).sum())
        raise NonFiniteError(
            f"{where}.weight holds {bad} NaN or infinite values of {weight.numel()}; mend or re-load the model first"
        )


def _convert(parameter: nn.Parameter, fn: Callable[[Tensor], Tensor], dtype: torch.dtype) -> nn.Parameter:
    with torch.no_grad():
        applied = fn(parameter)
        data = applied if applied.dtype == dtype else parameter.detach().to(applied.device, dtype)
        if applied.is_meta != parameter.is_meta:  # a Parameter cannot change to or from meta in place
            return nn.Parameter(data, requires_grad=parameter.requires_grad)
        parameter.data = data
        if parameter.grad is not None:
            parameter.grad.data = parameter.grad.to(data.device, dtype)
    return parameter


def _prepare_opaque_forward() -> None:
    """Make the layer one opaque call for torch.compile, so that its numbers are those of eager mode.

    Not at import time: torch.compiler.disable imports the compiler, which takes seconds.
    """
    global _opaque_forward
    if _opaque_forward is None:
        _opaque_forward = torch.compiler.disable(SPPLinear._compute)
