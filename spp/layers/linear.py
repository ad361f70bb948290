"""SPPLinear: a pruned linear layer, frozen, with the two small matrices that scale it (the maths: spp.rules.spp)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spp.configs.adapter import SPPConfig
from spp.distributed.sharded import is_sharded
from spp.errors import ConfigError, NonFiniteError
from spp.layers.adapted import AdaptedLinear, HoldsAdapter
from spp.layers.checks import check_linear, check_values
from spp.layers.host import LinearHost, PackedLinear, pack_linear
from spp.models.projection import Projection, input_axis_of
from spp.weights import Weight, quantized_kind, read_quantized
from spp.weights.offload import let_go_on_error, offloader, parameter_weight


class SPPLinear(HoldsAdapter, LinearHost, AdaptedLinear):
    """A frozen linear layer whose weight W computes as W ⊙ (1 + s·β·A), with trained W_α and W_β (SPP, §3.2).

    Args:
        linear: the nn.Linear (or subclass, or transformers' Conv1D) to adapt; its Parameters are used, not copied, and
            frozen. With packed=True its weight is freed until `restore`; a PackedLinear hands over its packed one.
        r, scaling, dropout, dropout_mode, rule: as in SPPConfig.
        packed: store the weight packed (spp.weights.packed.layout) and decode it a block at a time.
        dtype: of an 8-bit weight of bitsandbytes where it is multiplied, which does not say itself; None is its
            bias's, or float32.
        generator: where W_α is drawn from; None is torch's global generator. Drawn on the CPU, whatever the device.
        where: the layer's name in error messages.
        checked: whether `check_linear` and `check_values` have found it good: they are not asked again.

    Attributes:
        weight (m, n), bias (m,) or None: the frozen base; of a packed weight, `weight` is a dense copy at each access,
            and that of a Conv1D is stored (n, m). While accelerate has it offloaded it is on the meta device, between
            the calls; `held().dense()` has the values.
        spp_alpha: W_α (r, n). spp_beta: W_β (m, 1). With another rule its own, such as hira_A and hira_B.
        cache_effective: whether evaluation without gradients keeps W_eff (m, n) between calls of a few tokens, so that
            generation does not build it for each. False for a packed, offloaded or sharded weight, whose saving it
            would undo:
            set it to True where there is memory for the dense weights after all.

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

    def __init__(
        self,
        linear: nn.Linear | PackedLinear,
        r: int = 16,
        scaling: float = 2.0,
        dropout: float = 0.0,
        dropout_mode: str = "input",
        rule: str = "spp",
        *,
        packed: bool = False,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
        where: str = "SPPLinear",
        checked: bool = False,
    ) -> None:
        super().__init__()
        try:
            config = SPPConfig(
                r=r, scaling=scaling, dropout=dropout, dropout_mode=dropout_mode, rule=rule, packed=packed
            )
        except ConfigError as error:
            raise ConfigError(f"{where}: {error.marked}") from None
        if not checked:
            check_linear(linear, config, where)
            check_values(Projection(where, linear, input_axis=input_axis_of(linear)))
        held: Weight | None = None
        if isinstance(linear, PackedLinear):
            held = linear.held()
        elif quantized_kind(linear):
            held = read_quantized(linear, f"{where}.weight", dtype)
        elif packed:
            held = pack_linear(linear, where)
        self.cache_effective = held is None
        self.take(linear, held)
        self.add_adapter(config, where, held or parameter_weight(linear), generator)
        self.stored_weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.release()

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
            inner = self.linear()
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

    def forward(self, x: Tensor) -> Tensor:
        if "_hf_hook" not in self.__dict__:
            return AdaptedLinear.forward(self, x)
        with let_go_on_error(self):
            return AdaptedLinear.forward(self, x)

    def frozen(self) -> Weight:
        return self.held()

    def frozen_bias(self) -> Tensor | None:
        return self._parameters["bias"]

    def hook_changed(self) -> None:
        """Keep no W_eff of a weight that is offloaded or sharded: whole, it would undo that."""
        self._cached = None
        sharded = is_sharded(self._parameters.get("weight"))
        self.cache_effective = self.packed_layout is None and offloader(self) is None and not sharded
