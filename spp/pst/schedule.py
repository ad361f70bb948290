"""How sparse the layers are at a step: the cubic schedule of PST with a warm-up at both ends.

    s(t) = s_i                                                  t ≤ w_i·T
           s_f + (s_i − s_f)·(1 − (t − w_i·T) / (T − w_i·T − w_f·T))³    between
           s_f                                                  t > T − w_f·T

T steps in all, w_i and w_f the shares of them that stay at the initial and at the final sparsity.
"""

from __future__ import annotations

from spp.configs.pst import check_schedule
from spp.errors import ConfigError


def sparsity_schedule(
    step: int,
    total_steps: int,
    initial_warmup: float = 0.1,
    final_warmup: float = 0.3,
    initial_sparsity: float = 0.0,
    final_sparsity: float = 0.9,
) -> float:
    """Return the sparsity after `step` optimizer steps of `total_steps`; the defaults are the authors'.

    Args:
        step: t, at least 0; the forward passes of the first optimizer step are at 0.
        total_steps: T, at least 1.
        initial_warmup: w_i, the share of the steps that stays at `initial_sparsity`.
        final_warmup: w_f, the share that stays at `final_sparsity`; together at most 1.
        initial_sparsity: s_i in [0, 1), at most `final_sparsity`.
        final_sparsity: s_f in [0, 1).

    Raises:
        ConfigError: a number is out of its range.

    Example:
        >>> sparsity_schedule(0, 100, final_sparsity=0.5), sparsity_schedule(100, 100, final_sparsity=0.5)
        (0.0, 0.5)
    """
    check_schedule(initial_warmup, final_warmup, initial_sparsity, final_sparsity)
    if total_steps < 1 or step < 0:
        raise ConfigError(f"step is {step} of {total_steps}; a step is at least 0, and of at least 1")
    start, end = initial_warmup * total_steps, total_steps - final_warmup * total_steps
    if step <= start:
        return initial_sparsity
    span = total_steps - (final_warmup + initial_warmup) * total_steps
    if step > end or span <= 0:  # rounding can leave a step between two warm-ups that take all steps
        return final_sparsity
    left = 1 - (step - start) / span
    sparsity = final_sparsity + (initial_sparsity - final_sparsity) * left**3
    return min(max(sparsity, initial_sparsity), final_sparsity)
