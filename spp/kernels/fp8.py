"""G = dYᵀ X in 8-bit floating point (e4m3: 4 bits of exponent, 3 of mantissa), where the hardware multiplies it.

    x̂ = round_e4m3(x · 448 / max|x|)        G = (max|dY| / 448) · (max|X| / 448) · (dŶᵀ X̂),  summed in float32

One scale a matrix. Only G is affected: Y and dX are what they are without it, and G goes nowhere but into dα and dβ,
which are sums over m / r rows and over n columns. Rounding a factor to e4m3 is off by at most 2⁻⁴ of it, at random.
What that does to dα and dβ, simulated in float32 on the X and dY of one step of a 135M Llama pruned to 2:4 (2048 tokens
of WikiText-2, five of its blocks, 35 layers), relative to the norm of the exact gradient:

              median      worst layer      least cosine
    dα        0.9 %       2.4 %            0.9997
    dβ        0.8 %       5.9 %            0.9986
    (bfloat16: 0.2 %, worst 0.3 %)

Random matrices, whose G is nothing but noise, come out 3.7 % off in every gradient.

The two factors are also transposed, as the product wants them: temporary memory of T · (m + n) bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spp.errors import ConfigError
from spp.kernels.work import Work

PRECISIONS = ("auto", "fp8")
CAPABILITY = (8, 9)  # Ada; Hopper is 9.0
LARGEST = 448.0  # of e4m3
LEAST = 2.0**-60  # a maximum below it counts as this: its reciprocal must be finite
UNIT = 16  # the product wants all sizes in multiples of it
FAST_ACCUMULATION = False  # True sums in fewer bits, and T is long


class Fp8Gradient:
    """dY and X in e4m3, and the columns of G that they make.

    Args:
        dy: dY (T, m); x: X (T, n); of one dtype, which is that of G; T at least 1.
        work: who rounds and transposes.
    """

    def __init__(self, dy: Tensor, x: Tensor, work: Work) -> None:
        self.dtype = x.dtype
        self.rows = dy.shape[1]
        self.dy, self.dy_scale = _quantised(dy, work)  # (m, T), padded
        self.x, self.x_scale = _quantised(x, work)  # (n, T), padded

    def columns(self, cols: slice) -> Tensor:
        """Return G[:, cols] (m, …), contiguous; `cols` begins at a multiple of UNIT."""
        width = cols.stop - cols.start
        factor = self.x[cols.start : _padded(cols.stop)].t()
        found = torch._scaled_mm(
            self.dy,
            factor,
            scale_a=self.dy_scale,
            scale_b=self.x_scale,
            out_dtype=self.dtype,
            use_fast_accum=FAST_ACCUMULATION,
        )
        return found[: self.rows, :width].contiguous()


def check_grad_precision(precision: str) -> None:
    """Raise a ConfigError unless `precision` is "auto" or "fp8"."""
    if precision not in PRECISIONS:
        raise ConfigError(f"grad_precision is {precision!r}; known: {', '.join(PRECISIONS)}")


def check_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """Raise a ConfigError unless `device` multiplies matrices in e4m3, for a layer computed in `dtype`."""
    if dtype == torch.float64:
        reason = "the layer computes in float64"
    elif device.type != "cuda" or torch.version.cuda is None:
        reason = f"the layer is on {device}"
    elif torch.cuda.get_device_capability(device) < CAPABILITY:
        major, minor = torch.cuda.get_device_capability(device)
        reason = f"{torch.cuda.get_device_name(device)} has {major}.{minor}"
    else:
        return
    raise ConfigError(
        f"grad_precision='fp8' needs a CUDA GPU of capability {CAPABILITY[0]}.{CAPABILITY[1]} or later, but {reason}; "
        f"use grad_precision='auto'"
    )


def _quantised(x: Tensor, work: Work) -> tuple[Tensor, Tensor]:
    largest = torch.linalg.vector_norm(x, torch.inf, dtype=torch.float32).clamp_(min=LEAST)  # NaN and infinity stay
    out = torch.empty(_padded(x.shape[1]), _padded(x.shape[0]), dtype=torch.float8_e4m3fn, device=x.device)
    work.quantise(x, LARGEST / largest, out)
    return out, largest / LARGEST


def _padded(size: int) -> int:
    return -(-size // UNIT) * UNIT
