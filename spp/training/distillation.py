"""The loss with a teacher: cross-entropy, divergence from the teacher's distribution, distance of hidden states.

    ℓ_t = w_ce · CE(z_t, label) + w_kl · T² · KL(q_t ‖ p_t) + w_h · 1/L Σ_l ‖h_l − g_l‖² / ‖g_l‖²
    p_t = softmax(z_t / T)    q_t = softmax(y_t / T)                        z student's, y teacher's logits of token t
    ∂ℓ_t / ∂z_t = w_ce · (softmax(z_t) − onehot(label)) + w_kl · T · (p_t − q_t)

h_l and g_l (hidden,) are the outputs of block l of student and teacher for the token (SquareHead: Kurtic et al. 2023,
arXiv:2310.06927), L is the number of blocks. T² keeps the gradient's size at any temperature T (Hinton et al. 2015,
arXiv:1503.02531). The tokens are those of the cross-entropy, and so is what the sum is divided by.

Of a cache there are the k highest of log q_t at T = 1, and the logarithm of the rest of q_t as one: KL over these k + 1
classes, of which the student's last one is the sum of its probabilities outside of the k.

Both logits exist for a chunk of tokens at a time, and are worked on in place, a few rows at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spp.errors import ConfigError, arg
from spp.training.causal_loss import Form, Objective

SMALLEST = torch.finfo(torch.float32).tiny  # of a squared norm, and of the rest of a sum of exponentials


@dataclass(frozen=True)
class Weights:
    """The weights of the terms, and the temperature of the divergence."""

    ce: float = 1.0
    kl: float = 0.0
    hidden: float = 0.0
    temperature: float = 1.0


class FromLogits(Objective):
    """Cross-entropy, and the divergence from the logits of a teacher.

    Args:
        weights: of the terms.
        head: the teacher's output head; form: what becomes of its outputs.
        states: (k, hidden), what it gets for each of the tokens.
    """

    def __init__(self, weights: Weights, head: nn.Module, form: Form, states: Tensor) -> None:
        self.weights = weights
        self._head, self._form, self._states = head, form, states
        self._start, self._outputs = 0, states
        kind = states.device.type  # the loss calls outside of autocast
        self._autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    def chunk(self, rows: slice) -> None:
        """Compute the teacher's outputs for a chunk."""
        states = self._states[rows]
        with torch.no_grad(), torch.autocast(states.device.type, dtype=self._autocast, enabled=bool(self._autocast)):
            outputs = self._head(states)  # (chunk, V)
        self._start, self._outputs = rows.start, outputs

    def measure_(self, logits: Tensor, labels: Tensor, rows: slice, gradient: bool) -> Tensor:
        """Return the sum of the losses of some tokens; see Objective."""
        ce, kl, heat = self.weights.ce, self.weights.kl, self.weights.temperature
        labels = labels.unsqueeze(1)  # (k, 1)
        found = self._outputs[rows.start - self._start : rows.stop - self._start]
        teacher = found.to(logits.device, logits.dtype, copy=True)  # (k, V)
        if teacher.shape[1] != logits.shape[1]:
            raise ConfigError(
                f"{arg('teacher')} has {teacher.shape[1]} logits for a token, the model {logits.shape[1]}: they must "
                f"have one vocabulary"
            )
        self._form.apply_(teacher)
        logits.sub_(logits.amax(1, keepdim=True))
        teacher.sub_(teacher.amax(1, keepdim=True))
        picked = logits.gather(1, labels)  # (k, 1)
        plain = sums = None
        if heat != 1.0:
            if ce:
                plain = logits.exp()
                sums = plain.sum(1, keepdim=True)
            logits.div_(heat)
            teacher.div_(heat)
        q = teacher.exp()
        gaps = _dot(q, teacher.sub_(logits))  # Σ q (log q − log p), but for the normalisers
        if not bool(gaps.isfinite().all()):  # a vocabulary filled up has logits of −∞, and 0 · (−∞) is no number
            gaps = _dot(q, teacher.masked_fill_(q == 0, 0.0))
        p, q_sum = logits.exp_(), q.sum(1, keepdim=True)
        p_sum = p.sum(1, keepdim=True)
        losses = (gaps / q_sum - q_sum.log() + p_sum.log()) * (kl * heat**2)
        if ce:
            losses += ((p_sum if sums is None else sums).log() - picked) * ce
        if gradient:
            p.mul_((kl * heat + (ce if plain is None else 0.0)) / p_sum)
            p.addcmul_(q, q_sum.reciprocal(), value=-kl * heat)
            if plain is not None and sums is not None:
                p.addcmul_(plain, sums.reciprocal(), value=ce)
            p.scatter_add_(1, labels, torch.full_like(picked, -ce))
        return losses.sum()


class FromTop(Objective):
    """Cross-entropy, and the divergence from the highest log-probabilities of a teacher and the rest as one.

    Args:
        weights: of the terms; the temperature is 1.
        ids: (k, K) int64, the tokens of the highest probabilities. logs: (k, K), their logarithms. rest: (k,), the
            logarithm of what is left.
    """

    def __init__(self, weights: Weights, ids: Tensor, logs: Tensor, rest: Tensor) -> None:
        self.weights = weights
        self._ids, self._logs, self._rest = ids, logs, rest

    def measure_(self, logits: Tensor, labels: Tensor, rows: slice, gradient: bool) -> Tensor:
        """Return the sum of the losses of some tokens; see Objective."""
        ce, kl = self.weights.ce, self.weights.kl
        labels = labels.unsqueeze(1)  # (k, 1)
        ids = self._ids[rows].to(logits.device)  # (k, K)
        logs = self._logs[rows].to(logits.device, logits.dtype)
        rest = self._rest[rows].to(logits.device, logits.dtype).unsqueeze(1)  # (k, 1)
        logits.sub_(logits.amax(1, keepdim=True))
        picked, top = logits.gather(1, labels), logits.gather(1, ids)
        p = logits.exp_()
        p_top = p.gather(1, ids)
        p.scatter_(1, ids, 0.0)
        p_rest = p.sum(1, keepdim=True).clamp_min_(SMALLEST)
        p_sum = p_rest + p_top.sum(1, keepdim=True)
        q, q_rest = logs.exp(), rest.exp()
        divergence = _or_zero(q, logs - top + p_sum.log()).sum(1, keepdim=True)
        divergence += _or_zero(q_rest, rest - p_rest.log() + p_sum.log())
        losses = divergence * kl + (p_sum.log() - picked) * ce
        if gradient:
            mass = kl * (q.sum(1, keepdim=True) + q_rest) + ce  # Σ q = 1, but for rounding
            p.mul_(mass / p_sum - kl * q_rest / p_rest)
            p.scatter_(1, ids, p_top * (mass / p_sum) - q * kl)
            p.scatter_add_(1, labels, torch.full_like(picked, -ce))
        return losses.sum()


def _or_zero(q: Tensor, gap: Tensor) -> Tensor:
    """Return q · gap, 0 where q is: a gap is infinite there for logits of −∞."""
    return torch.where(q == 0, torch.zeros_like(q), q * gap)


def top_of(outputs: Tensor, form: Form, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the highest log-probabilities of some tokens.

    Args:
        outputs: of the head (n, V), written over. form: what becomes of them.
        k: how many; less than V.

    Returns:
        Token ids (n, k) in int32, their log-probabilities (n, k) in float32, and the logarithm of the sum of all others
        (n,).
    """
    form.apply_(outputs)
    total = outputs.logsumexp(1, keepdim=True)
    top, ids = outputs.topk(k, 1)
    outputs.scatter_(1, ids, -torch.inf)
    rest = outputs.logsumexp(1, keepdim=True) - total
    return ids.int(), (top - total).float(), rest.squeeze(1).float()


@dataclass
class TaughtBatch:
    """A Lesson of spp.training.causal_loss in one batch, with the student's hidden states beside the teacher's.

    Args:
        weights: of the terms.
        make: makes the Objective of the tokens at some places (k,) of the batch.
        outputs: of the teacher's blocks, (batch, tokens, hidden) each, where hidden states count.
    """

    weights: Weights
    make: Any
    outputs: Sequence[Tensor] = ()
    student: list[Tensor] = field(default_factory=list)

    def objective(self, places: Tensor) -> Objective:
        """Return the loss of the tokens at `places` (k,) of the batch, flattened."""
        made: Objective = self.make(places)
        return made

    def rest(self, places: Tensor) -> Tensor | float:
        """Return the sum over these tokens of the relative distance of hidden states, times its weight."""
        if not self.weights.hidden:
            return 0.0
        if len(self.student) != len(self.outputs):
            raise ConfigError(
                f"the model ran {len(self.student)} blocks in one forward and {arg('teacher')} {len(self.outputs)}: "
                f"leave {arg('hidden_weight')} out"
            )
        found = [relative_error(mine, his, places) for mine, his in zip(self.student, self.outputs, strict=True)]
        return torch.stack(found).sum() * (self.weights.hidden / len(found))

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Keep the outputs of the student's blocks, where hidden states count: a context manager."""
        if not self.weights.hidden:
            yield
            return
        with block_outputs(model) as self.student:
            yield


def relative_error(student: Tensor, teacher: Tensor, places: Tensor) -> Tensor:
    """Return Σ ‖h − g‖² / ‖g‖² over the tokens at `places` (k,) of states (…, hidden), flattened."""
    if student.shape != teacher.shape:
        raise ConfigError(
            f"hidden states of the model are {tuple(student.shape)}, those of {arg('teacher')} {tuple(teacher.shape)}: "
            f"leave {arg('hidden_weight')} out, or take a teacher of the same widths"
        )
    if torch.is_grad_enabled() and not student.requires_grad:
        raise ConfigError(
            f"the hidden states have no gradients, as under reentrant checkpointing: leave {arg('hidden_weight')} out, "
            f"or use checkpointing that is not reentrant"
        )
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    mine = student.flatten(0, -2)[places].to(wide)  # (k, hidden)
    his = teacher.flatten(0, -2)[places.to(teacher.device)].to(mine.device, wide)
    return ((mine - his).square().sum(1) / his.square().sum(1).clamp_min(SMALLEST)).sum()


@contextlib.contextmanager
def block_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Keep the output of each decoder block (batch, tokens, hidden), in the list that is yielded."""
    found: list[Tensor] = []

    def keep(block: nn.Module, arguments: Any, output: Any) -> None:
        found.append(output if isinstance(output, Tensor) else output[0])

    handles = [block.register_forward_hook(keep) for block in blocks_of(model)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the decoder blocks of a model: the list with the most parameters."""
    for kind in (nn.ModuleList, nn.Sequential):
        lists = [module for module in model.modules() if isinstance(module, kind) and len(module)]
        if lists:
            return list(max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters())))
    raise ConfigError(f"{type(model).__name__} has no list of blocks: leave {arg('hidden_weight')} out")


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the product of each pair of rows: (k, V), (k, V) -> (k, 1)."""
    return torch.bmm(a.unsqueeze(1), b.unsqueeze(2)).squeeze(2)
