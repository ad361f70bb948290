"""SPPLinear: a pruned linear layer, frozen, with the two small matrices that scale it (the maths: spp.rules.spp)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spp.configs.adapter import SPPConfig
from spp.errors import ConfigError, NonFiniteError
from spp.kernels import PackedSource, WeightSource, offloaded_weight
from spp.layer_adapted import Active, AdaptedLinear, convert_parameter
from spp.layer_checks import check_linear
from spp.layer_packed import HOOKS, PackedLinear, pack_linear, plain_linear, release_weight
from spp.offload import home, offloader
from spp.offload_hooks import HookedAdapter, let_go_on_error, move_hook
from spp.packed import (
    PackedHolder,
    PackedWeight,
    QuantizedWeight,
    quantized_kind,
    read_quantized,
    release_quantized,
    write_quantized,
)
from spp.rules import Rule, effective_weight, get_rule
from spp.rules.canonical import arithmetic_dtype
from spp.targets_layout import features, input_axis_of


class SPPLinear(HookedAdapter, AdaptedLinear, PackedHolder):
    """A frozen linear layer whose weight W computes as W ⊙ (1 + s·β·A), with trained W_α and W_β (SPP, §3.2).

    Args:
        linear: the nn.Linear (or subclass, or transformers' Conv1D) to adapt; its Parameters are used, not copied, and
            frozen. With packed=True it lets go of its weight until `restore`; a PackedLinear hands over its packed one.
        r, scaling, dropout, dropout_mode, init, rule: as in SPPConfig.
        packed: store the weight packed (spp.packed.layout) and decode it a block at a time.
        dtype: of an 8-bit weight of bitsandbytes where it is multiplied, which does not say itself; None is its
            bias's, or float32.
        generator: where W_α is drawn from; None is torch's global generator. Drawn on the CPU, whatever the device.
        where: the layer's name in error messages.

    Attributes:
        weight (m, n), bias (m,) or None: the frozen base; of a packed weight, `weight` is a dense copy at each access,
            and that of a Conv1D is stored (n, m). While accelerate has it offloaded it is on the meta device, between
            the calls; `dense_weight()` has the numbers.
        spp_alpha: W_α (r, n). spp_beta: W_β (m, 1). With another rule its own, such as hira_A and hira_B.
        cache_effective: whether evaluation without gradients keeps W_eff (m, n) between calls of a few tokens, so that
            generation does not build it for each. False for a packed or offloaded weight, whose saving it would undo:
            set it to True where there is memory for the dense weights after all.
        grad_precision: of the product behind the gradients of W_α and W_β, "auto" or "fp8" (spp.kernels.fp8): a
            property of a run, not of the adapter, and stored nowhere.

    Raises:
        ConfigError: r > m or r < 1, or an option makes no sense.
        NonFiniteError: the weight holds NaN or infinity.
        TargetError: `linear` is not a linear layer of floating-point weights.
        ConfigError: a packed linear without packed=True, or packed=True on the meta device.

    Example:
        >>> layer = SPPLinear(nn.Linear(8, 4), r=2)
        >>> layer(torch.ones(3, 8)).shape
        torch.Size([3, 4])
    """

    bias: nn.Parameter | None
    spp_alpha: nn.Parameter
    spp_beta: nn.Parameter

    def __init__(
        self,
        linear: nn.Linear | PackedLinear,
        r: int = 16,
        scaling: float = 2.0,
        dropout: float = 0.0,
        dropout_mode: str = "input",
        init: str = "paper",
        rule: str = "spp",
        *,
        packed: bool = False,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
        where: str = "SPPLinear",
    ) -> None:
        super().__init__()
        try:
            config = SPPConfig(
                r=r, scaling=scaling, dropout=dropout, dropout_mode=dropout_mode, init=init, rule=rule, packed=packed
            )
        except ConfigError as error:
            raise ConfigError(f"{where}: {error.marked}") from None
        check_linear(linear, config, where)
        self.spp_rule: Rule = get_rule(rule)
        self.spp_init = init
        self.spp_name = where
        self.r = r
        self.scaling = scaling
        self.dropout = dropout
        self.dropout_mode = dropout_mode
        self.out_features, self.in_features = features(linear)
        self.input_axis = input_axis_of(linear)
        self.disabled = False
        self._linear = (linear,)  # in a tuple: not a submodule, so that its weight has one name
        self.cache_effective = not packed and not quantized_kind(linear)
        self._requires_grad = {name: p.requires_grad for name, p in linear.named_parameters(recurse=False)}
        quantized = quantized_kind(linear) is not None
        if quantized:
            self.hold_packed(read_quantized(linear, f"{where}.weight", dtype))
        elif not packed:
            self.register_parameter("weight", linear.weight)  # type: ignore[arg-type]  # a Parameter
        elif isinstance(linear, PackedLinear):
            self.hold_packed(linear.packed_weight())
            self._requires_grad["weight"] = linear.weight_requires_grad
        else:
            self.hold_packed(pack_linear(linear, where))
        self.register_parameter("bias", linear.bias)
        for hooks in HOOKS:
            setattr(self, hooks, getattr(linear, hooks))
        stored = self.stored_weight
        dtype, device = arithmetic_dtype(stored.dtype), home(linear, stored)
        self._adapter_names = self.spp_rule.attribute_names()
        self._tensor_names = ("weight", *self._adapter_names)
        shapes = self.spp_rule.shapes(self.out_features, self.in_features, r)
        for name, shape in zip(self._adapter_names, shapes, strict=True):
            empty = torch.empty(shape, dtype=dtype, device="meta" if device.type == "meta" else "cpu")
            self.register_parameter(name, nn.Parameter(empty))
        if device.type != "meta":
            self.reset_parameters(generator)
            for parameter in self.adapter_parameters():
                parameter.data = parameter.data.to(device)
        stored.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.training = linear.training
        move_hook(linear, self)
        if isinstance(linear, PackedLinear):
            linear.drop_weight()
        elif quantized:
            release_quantized(linear)
        elif packed:
            release_weight(linear)

    def adapter_parameters(self) -> list[nn.Parameter]:
        """Return [W_α, W_β]."""
        held = self._parameters  # straight from it: nn.Module's own look-up would cost as much as the rest of a token
        return [held[name] for name in self._adapter_names]  # type: ignore[misc]

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the adapter anew in place, as its `init` says; a generator must be on the parameters' device."""
        self.spp_rule.init_(self.adapter_parameters(), self.spp_init, generator)

    def effective_weight(self) -> Tensor:
        """Return W_eff in the dtype and layout of `weight`: what the forward multiplies by, and a merge stores."""
        effective = effective_weight(self.spp_rule, self.matrix, self.adapter_parameters(), self.scaling)
        return effective if self.input_axis == -1 else effective.T.contiguous()

    @property
    def matrix(self) -> Tensor:
        """The frozen weight as (m, n), whatever its storage; of a packed or offloaded one a dense copy."""
        if (packed := self.held_packed()) is not None:
            return packed.dense()
        return self.dense_weight() if self.input_axis == -1 else self.dense_weight().T

    def merge(self) -> nn.Linear:
        """Return a plain nn.Linear (of a Conv1D, a Conv1D) with the effective weight; this layer stays as it is.

        Raises:
            NonFiniteError: the adapter or the result holds NaN or infinity.
        """
        merged = self.effective_weight()
        if not bool(torch.isfinite(merged).all()):
            raise NonFiniteError(
                f"{self.spp_name}: the merged weight is not finite; the adapter holds NaN, infinity or too much"
            )
        plain: Any
        if self.input_axis == -1:
            plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        else:
            inner = self._linear[0]
            make: Any = type(inner.linear() if isinstance(inner, PackedLinear) else inner)
            plain = make(self.out_features, self.in_features)
        plain.weight = nn.Parameter(merged, requires_grad=self._requires_grad["weight"])
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self._requires_grad["bias"])
        return plain.train(self.training)

    def hold_dense(self, weight: Tensor) -> None:
        """Take a dense weight, as it is stored, in place of what is held."""
        self._cached = None
        self.drop_weight()
        self.register_parameter("weight", nn.Parameter(weight, requires_grad=False))

    def restore(self) -> nn.Module:
        """Return the module that was wrapped, holding this layer's weight and bias as they are now, flags as before.

        A PackedLinear comes back if the weight is packed still; after a merge it is the linear that had been packed.
        """
        original: nn.Module = self._linear[0]
        held = self.held_packed()
        if isinstance(original, PackedLinear) and held is not None:
            original.hold_packed(held)
        elif quantized_kind(original) and isinstance(held, QuantizedWeight):
            write_quantized(original, held)
        elif quantized_kind(original):
            original = plain_linear(original, self.weight)
        else:
            original = original.linear() if isinstance(original, PackedLinear) else original
            weight = self.weight
            original.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
        original.register_parameter("bias", self.bias)
        move_hook(self, original)
        for name, flag in self._requires_grad.items():
            if name in original._parameters:
                original.get_parameter(name).requires_grad_(flag)
        return original.train(self.training)

    def held_packed(self) -> PackedWeight | QuantizedWeight | None:
        """Return the packed or quantized weight, None where it is dense."""
        return None if self.packed_layout is None else self.packed_matrix()

    def active(self) -> Active | None:
        """Return the adapter, unless it is disabled."""
        if self.disabled:
            return None
        params = self.adapter_parameters()
        return Active(self.spp_rule, params, self.scaling, self.dropout, self.dropout_mode)

    def forward(self, x: Tensor) -> Tensor:
        """Compute Y (…, m) from x (…, n)."""
        cached, held = self._cached, self._parameters
        # Asked for every layer and token that is generated, so at once and without the detours of `active`.
        if (
            cached is not None
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and x.numel() <= cached.most
            and self.cache_effective
            and not (self.disabled or self.training or torch.is_autocast_enabled(cached.device))
            and self.scaling == cached.key[1]
            and cached.holds([held.get(name) for name in self._tensor_names])
        ):
            return F.linear(x, cached.effective, held["bias"])
        if "_hf_hook" not in self.__dict__:
            return super().forward(x)
        with let_go_on_error(self):
            return super().forward(x)

    def frozen(self) -> Tensor | WeightSource:
        """Return the base weight."""
        if (packed := self.held_packed()) is not None:
            return PackedSource(packed)
        return offloaded_weight(self, self.input_axis) or self.matrix

    def frozen_bias(self) -> Tensor | None:
        """Return the bias."""
        return self._parameters["bias"]

    def kept_weight(self) -> Tensor:
        """Return `stored_weight`."""
        return self._parameters["weight"] if self.packed_layout is None else self.stored_weight  # type: ignore[return-value]

    def home(self) -> torch.device:
        """Return the device that the adapter belongs on."""
        return home(self, self.stored_weight)

    def resident_names(self) -> tuple[str, ...]:
        """Return the names of W_α and W_β."""
        return self._adapter_names

    def hook_changed(self) -> None:
        """Keep no W_eff of a weight that is offloaded."""
        self._cached = None
        self.cache_effective = self.packed_layout is None and offloader(self) is None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SPPLinear:
        """Convert or move; W_α and W_β follow the device, but stay float32 (float64 for a float64 base)."""
        self._cached = None
        adapter = {name: self._parameters.pop(name) for name in self._adapter_names}
        try:
            super()._apply(fn, recurse)
            for name, parameter in adapter.items():
                assert parameter is not None
                adapter[name] = convert_parameter(parameter, fn, arithmetic_dtype(self.stored_weight.dtype))
        finally:
            self._parameters.update(adapter)
        return self

    def extra_repr(self) -> str:
        """Return what `repr` shows between the brackets."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"r={self.r}, scaling={self.scaling}, dropout={self.dropout}"
            + ("" if self.packed_layout is None else f", packed={self.packed_layout}")
        )
