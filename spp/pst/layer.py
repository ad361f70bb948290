"""PSTLinear: a frozen linear layer with a low-rank update and a learned mask (the maths: spp.pst.function)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from spp.configs.adapter import SPPConfig
from spp.configs.pst import check_options, check_pattern
from spp.errors import ConfigError, NonFiniteError, TargetError
from spp.layers.checks import Survey, check_linear, check_values
from spp.layers.host import LinearHost, Opaque, PackedLinear
from spp.masks.patterns import Pattern
from spp.models.projection import Projection, features, input_axis_of
from spp.pst.function import Factors, Scales, masked_weight, pruned_by, pst_linear
from spp.rules.adapter import arithmetic_dtype
from spp.weights import quantized_kind

FACTORS = ("weight_U", "weight_V", "score_A", "score_B", "score_R", "score_C")


class PSTLinear(LinearHost):
    """A linear layer that computes with M ⊙ (W + b·U V), W frozen, M the mask of the learned importance (PST, §3).

    Args:
        linear: the nn.Linear (or subclass, or transformers' Conv1D); its Parameters are used, not copied, and frozen.
        weight_rank: k of U and V. weight_scale: b, the factor of U V.
        mask_rank: k of A and B. low_rank_scale: a₁, the factor of A B.
        structured_scale: a₂, the factor of R ⊕ C.
        pattern: "N:M" for masks that prune no more than M − N of every M inputs; None prunes wherever scores are low.
        generator: where U and A are drawn from; None is torch's global generator. Drawn on the CPU.
        where: the layer's name in error messages.
        checked: whether `check_base` has found the linear good: it is not asked again.

    Attributes:
        weight (m, n), bias (m,) or None: the frozen base; that of a Conv1D is stored (n, m).
        weight_U (m, k): normal. weight_V (k, n): zeros.
        score_A (m, k): normal. score_B (k, n), score_R (m,), score_C (n,): zeros.
        sparsity: the share of weights that the mask prunes, in [0, 1), 0 at the start: the schedule sets it.
        pruned: their number: ⌊m·n·sparsity⌋, with a pattern too.

    Raises:
        ConfigError, TargetError, NonFiniteError: an option makes no sense, or the linear cannot be used.

    Example:
        >>> layer = PSTLinear(nn.Linear(8, 4), weight_rank=2, mask_rank=2)
        >>> layer.sparsity = 0.5
        >>> int(layer.mask().sum())
        16
    """

    save_refusal = (
        "the model is still wrapped for PST, and save_pretrained would write a checkpoint that transformers cannot "
        "load. Save its state with spp.pst.save(model, path), or convert first: spp.pst.convert(model), then "
        "spp.save_model(model, path)"
    )
    way_out = "make plain masked linears of them first (spp.pst.convert), or take them out (spp.pst.unwrap)"

    weight_U: nn.Parameter
    weight_V: nn.Parameter
    score_A: nn.Parameter
    score_B: nn.Parameter
    score_R: nn.Parameter
    score_C: nn.Parameter

    def __init__(
        self,
        linear: nn.Module,
        weight_rank: int = 8,
        weight_scale: float = 1.0,
        mask_rank: int = 8,
        low_rank_scale: float = 1.0,
        structured_scale: float = 1.0,
        *,
        pattern: str | Pattern | None = None,
        generator: torch.Generator | None = None,
        where: str = "PSTLinear",
        checked: bool = False,
    ) -> None:
        super().__init__()
        check_options(weight_rank, weight_scale, mask_rank, low_rank_scale, structured_scale)
        parsed = check_pattern(pattern)
        if not checked:
            check_base(linear, parsed, where)
        self.weight_rank, self.mask_rank = weight_rank, mask_rank
        self.weight_scale, self.low_rank_scale = float(weight_scale), float(low_rank_scale)
        self.structured_scale = float(structured_scale)
        self.pattern = parsed
        self.pst_name = where
        self._sparsity = 0.0
        self.take(linear)
        weight, bias = self.weight, self.bias
        dtype = arithmetic_dtype(weight.dtype)
        shapes = factor_shapes(self.out_features, self.in_features, weight_rank, mask_rank)
        for name, shape in shapes.items():
            value = torch.zeros(shape, dtype=dtype, device="cpu")
            if name in ("weight_U", "score_A"):
                value.normal_(generator=generator)
            self.register_parameter(name, nn.Parameter(value.to(weight.device)))
        for parameter in (weight, bias):
            if parameter is not None:
                parameter.requires_grad_(False)
        self.release()
        Opaque.prepare()

    @property
    def sparsity(self) -> float:
        """The share of weights that the mask prunes."""
        return self._sparsity

    @sparsity.setter
    def sparsity(self, value: float) -> None:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 <= value < 1:
            raise ConfigError(f"{self.pst_name}: sparsity is {value!r}; it must be a number in [0, 1)")
        if self.pattern is not None and value > self.pattern.sparsity:
            raise ConfigError(
                f"{self.pst_name}: sparsity is {value}, above the {self.pattern.sparsity} of pattern {self.pattern}"
            )
        self._sparsity = float(value)

    @property
    def pruned(self) -> int:
        """How many weights the mask prunes."""
        return pruned_by(self._scales(), self.out_features * self.in_features)

    def resident_names(self) -> tuple[str, ...]:
        """Return the names of what trains."""
        return FACTORS

    def factors(self) -> Factors:
        """Return U, V, A, B, R, C: what trains."""
        return self.weight_U, self.weight_V, self.score_A, self.score_B, self.score_R, self.score_C

    def forward(self, x: Tensor) -> Tensor:
        """Return (…, m) for (…, n)."""
        if torch.compiler.is_compiling():
            assert Opaque.call is not None
            y: Tensor = Opaque.call(PSTLinear._compute, self, x)
            return y
        return self._compute(x)

    def _compute(self, x: Tensor) -> Tensor:
        return pst_linear(x, self.matrix, self.bias, self.factors(), self._scales())

    @torch.no_grad()
    def mask(self) -> Tensor:
        """Return the mask as bool (m, n), computed now: True is kept."""
        return masked_weight(self.matrix, self.factors(), self._scales())[1]

    def effective_weight(self) -> Tensor:
        """Return the masked weight in the dtype and layout of `weight`: what the forward multiplies by."""
        effective = masked_weight(self.matrix, self.factors(), self._scales())[0].to(self.weight.dtype)
        return effective if self.input_axis == -1 else effective.T.contiguous()

    def convert(self) -> nn.Module:
        """Return a plain linear, of the class that was wrapped, with the masked weight; this layer stays as it is.

        Raises:
            NonFiniteError: the masked weight holds NaN or infinity.
        """
        effective = self.effective_weight()
        finite = all(bool(torch.isfinite(t).all()) for t in (effective, *self.factors()))
        if not finite:
            raise NonFiniteError(f"{self.pst_name}: the masked weight or a score is not finite; training diverged")
        original: Any = self.linear()
        plain: nn.Module = copy.deepcopy(original, {id(p): p for p in original.parameters(recurse=False)})
        flags = self._requires_grad
        plain.register_parameter("weight", nn.Parameter(effective, requires_grad=flags["weight"]))
        if self.bias is not None:
            bias = nn.Parameter(self.bias.detach().clone(), requires_grad=flags["bias"])
            plain.register_parameter("bias", bias)
        return plain.train(self.training)

    def extra_repr(self) -> str:
        """Return what `repr` shows between the brackets."""
        ranks = f"weight_rank={self.weight_rank}", f"mask_rank={self.mask_rank}"
        return self.describe(*ranks, f"sparsity={self.sparsity:.4g}")

    def _scales(self) -> Scales:
        return Scales(self.weight_scale, self.low_rank_scale, self.structured_scale, self._sparsity, self.pattern)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        Opaque.prepare()


def factor_shapes(m: int, n: int, weight_rank: int, mask_rank: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of each factor of a layer of weight (m, n)."""
    k, q = weight_rank, mask_rank
    return dict(zip(FACTORS, ((m, k), (k, n), (m, q), (q, n), (m,), (n,)), strict=True))


def check_base(linear: nn.Module, pattern: Pattern | None, where: str) -> Survey:
    """Return what a linear's values are; raise unless it is dense, loaded, finite and in whole groups."""
    if isinstance(linear, PackedLinear) or quantized_kind(linear):
        raise TargetError(f"{where} is packed or quantized; PST learns which weights of a dense linear to prune")
    check_linear(linear, SPPConfig(r=1), where)
    if linear.get_parameter("weight").is_meta:
        raise ConfigError(f"{where}.weight is on the meta device and has no values; load the model first")
    if pattern is not None:
        pattern.require_fit(features(linear)[1], where)
    found = check_values(Projection(where, linear, input_axis=input_axis_of(linear)))
    assert found is not None  # not on the meta device
    return found
