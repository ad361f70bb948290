"""Mask updates: every k steps some kept weights of each layer are pruned, and as many pruned ones come back.

    drop    the kept weights with the lowest |W_eff[i, j]| · ‖x_j‖
    grow    the pruned ones with the highest |G[i, j]|, G = dYᵀ X the gradient of the effective weight
    c       ⌊f(t) · kept⌋ of a layer, f(t) falling from `fraction` to 0 at t = until · T

Scores are taken in the backward pass of the step at whose end the exchange happens (with gradient accumulation, of its
last pass), a layer at a time: nothing of a weight's size outlives that but the new mask, a bit a weight. A regrown
weight takes the dense model's value (spp.training.mask_state), scaled by the adapter like any other. Groups of N:M
masks keep their counts (spp.masks.select). A layer whose adapter is frozen keeps its mask.

They did not help where it was measured (examples/comparison: SmolLM2 at Wanda's 2:4, 100 steps of 2 × 128 tokens of
WikiText-2, each at its best learning rate, one seed): updates every 10 steps from a fraction of 0.1 on, which left 18 %
of the zeros elsewhere, end at a perplexity of 36.79, no updates at 25.03.
"""

from __future__ import annotations

import logging
import math
import warnings
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from spp.configs.pruning import DECAYS, MaskUpdateOptions
from spp.errors import SPPWarning, WrapError, arg
from spp.kernels.backend import row_step, slices
from spp.masks.patterns import nonzero_mask, pack_bits
from spp.masks.select import exchange
from spp.rules import effective_weight
from spp.rules.adapter import arithmetic_dtype
from spp.training.mask_state import DenseSource, LayerMask, MaskState

logger = logging.getLogger(__name__)


class MaskUpdates(TrainerCallback):
    """Updates the masks of a wrapped model while SPPTrainer trains it: `SPPTrainer(model, args, mask_updates=…)`.

    Args:
        dense: directory or hub id of the dense model that the pruned one was made of, or the model itself.
        every: k, optimizer steps between two updates.
        fraction: share of a layer's kept weights that the first update exchanges at most, in [0, 1].
        until: part of the steps, in (0, 1], after which masks stay.
        decay: how the fraction shrinks to 0 until then, "cosine" or "cubic".
        drop: by |W_eff| · ‖x‖ ("activation") or |W_eff| ("magnitude").
        grow: by |G| ("gradient"), or by −G ⊙ V, the fall of the loss to first order ("saliency"; only what falls).

    Raises:
        ConfigError: an option makes no sense, or the model cannot be updated.

    Example:
        >>> updates = MaskUpdates("dense", every=10)  # doctest: +SKIP
        >>> SPPTrainer(spp.wrap(model), arguments, mask_updates=updates, train_dataset=rows).train()  # doctest: +SKIP
    """

    def __init__(
        self,
        dense: DenseSource,
        *,
        every: int,
        fraction: float = MaskUpdateOptions.fraction,
        until: float = MaskUpdateOptions.until,
        decay: str = MaskUpdateOptions.decay,
        drop: str = MaskUpdateOptions.drop,
        grow: str = MaskUpdateOptions.grow,
    ) -> None:
        self.dense = dense
        self.options = MaskUpdateOptions(every=every, fraction=fraction, until=until, decay=decay, drop=drop, grow=grow)
        self._state: MaskState | None = None
        self._chosen: dict[str, tuple[npt.NDArray[np.uint8], int]] = {}  # the new mask, and how many weights come back

    @property
    def state(self) -> MaskState:
        """The masks of the model that is trained."""
        if self._state is None:
            raise WrapError("these mask updates belong to no model yet; hand them to SPPTrainer(mask_updates=…)")
        return self._state

    def attach(self, model: nn.Module) -> None:
        """Take a wrapped model, whose weights are those at the start, unless it has been taken already."""
        if self._state is None or not self._state.belongs_to(model):
            self._state = MaskState(model, self.dense)

    def restore(self) -> None:
        """Give the model the masks and weights that it had when it was taken, but for the signs of zeros."""
        if self._state is not None:
            self._forget()
            self._state.restore()

    def fraction_at(self, step: int, total_steps: int) -> float:
        """Return f at the end of a step, counted from 1; 0 where no update is due."""
        options, last = self.options, self.options.until * total_steps
        if step % options.every or step > last:
            return 0.0
        return options.fraction * DECAYS[options.decay](step / last)

    def on_train_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """Forget what a step that failed has left, and warn where no update can come."""
        self._forget()
        last = math.ceil(self.options.until * state.max_steps) - 1  # at the end itself the fraction is 0
        if self.options.every > last:
            warnings.warn(
                SPPWarning(
                    f"the masks stay as they are: the first update would be after step {self.options.every}, and the "
                    f"last may be after step {last} of {state.max_steps}; train for more steps, or lower "
                    f"{arg('mask_update_every', ...)}"
                ),
                stacklevel=2,
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """Have layers choose their new masks in the backward pass of a step that ends in an update."""
        self._forget()
        fraction = self.fraction_at(state.global_step + 1, state.max_steps)
        if fraction:
            for layer in self.state.layers.values():
                if any(parameter.requires_grad for parameter in layer.layer.adapter_parameters()):
                    layer.layer.tap = partial(self._choose, layer, fraction)

    def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """Exchange what was chosen."""
        chosen = self._chosen
        self._forget()
        self.state.write({path: bits for path, (bits, _) in chosen.items()})
        if chosen:
            moved = sum(count for _, count in chosen.values())
            logger.info("step %d: exchanged %d weights in %d layers", state.global_step, moved, len(chosen))

    def _forget(self) -> None:
        self._chosen = {}
        for layer in self.state.layers.values():
            layer.layer.tap = None

    @torch.no_grad()
    def _choose(self, mask: LayerMask, fraction: float, dy: Tensor, x: Tensor) -> None:
        """Choose a layer's new mask from dY (T, m) and X (T, n)."""
        self._chosen.pop(mask.path, None)  # of an earlier pass of this step
        weight, values = mask.layer.matrix, mask.values()
        kept = nonzero_mask(weight)
        count = int(fraction * int(torch.count_nonzero(kept)))
        if not count:
            return
        dtype = arithmetic_dtype(weight.dtype)
        layer = mask.layer
        drop = effective_weight(weight, layer.adapter()).to(dtype).abs_()
        if self.options.drop == "activation":
            drop.mul_(torch.linalg.vector_norm(x, dim=0, dtype=dtype))
        grow = torch.empty_like(drop)
        x = x.to(dy.dtype)
        m, n = weight.shape
        for rows in slices(m, row_step(m, n, 1)):
            grow[rows] = dy[:, rows].T @ x
        if self.options.grow == "gradient":
            grow.abs_()
        else:
            grow.mul_(values).neg_()
        if not bool(torch.isfinite(grow).all() & torch.isfinite(drop).all()):
            logger.warning("%s keeps its mask: the gradient is not finite", mask.path)
            return
        never = ~nonzero_mask(values)
        if self.options.grow == "saliency":
            never |= grow <= 0
        grow.masked_fill_(never, -math.inf)
        new = exchange(kept, drop, grow, count, mask.group)
        self._chosen[mask.path] = pack_bits(new), int(torch.count_nonzero(new & ~kept))
