"""The loss of a causal language model, a chunk of tokens at a time: the logits of a batch never exist together.

    z_t = c · tanh(a · (W h_t + b) / c)    (a = 1 and no c for most models)        ℓ = Σ_t logsumexp(z_t) − z_t[label]
    dh_t = (softmax(z_t) − onehot(label)) ⊙ ∂z W

h (T, hidden) are the states that the output head gets, W (V, hidden) is the head. Logits, their logarithm and their
gradient are each T × V values in float32, which for a small model is most of a step's memory; here they are chunk × V.
The gradient of each chunk is taken while its logits are there, so that no product is computed twice.

`causal_lm_loss` runs a model's own forward, with its wrappers, hooks and checkpointing; only its output head is handed
no tokens, and the states that it would have got are kept. The model's config names a and c; whether the loss computed
so is the model's own is checked on a few tokens, once a model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spp.errors import ConfigError, arg
from spp.evaluation import IGNORED, evaluating

CHECKED_TOKENS = 16  # of the first row, on which the two ways are compared
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # relative; 16 bits: LOW_PRECISION
LOW_PRECISION = 5e-2

_forms: WeakKeyDictionary[nn.Module, _Form] = WeakKeyDictionary()


@dataclass(frozen=True)
class _Form:
    """The function from the head's output to logits: c · tanh(a · … / c)."""

    scale: float = 1.0
    softcap: float | None = None


def causal_lm_loss(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    chunk: int = 256,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Return the loss that `model(**inputs).loss` would be, without the logits of the whole batch.

    Args:
        model: a causal language model of transformers; may be wrapped in DistributedDataParallel.
        inputs: what the model is called with, with "labels" (batch, tokens), which are shifted here.
        chunk: tokens whose logits exist at once.
        num_items_in_batch: divide the sum of the losses by this; None divides by what `inputs` name so, else by the
            number of targets.

    Returns:
        A scalar, with gradients.

    Raises:
        ConfigError: there are no labels, or labels that are shifted already, or the model's loss is another than that
            of its head's logits.

    Example:
        >>> loss = causal_lm_loss(model, batch, chunk=256)  # doctest: +SKIP
        >>> loss.backward()  # doctest: +SKIP
    """
    if inputs.get("labels") is None:
        raise ConfigError("causal_lm_loss needs labels among the inputs")
    if inputs.get("shift_labels") is not None:
        raise ConfigError("causal_lm_loss shifts the labels itself: leave shift_labels out of the inputs")
    if num_items_in_batch is None:
        num_items_in_batch = inputs.get("num_items_in_batch")
    check_form(model, inputs)
    with captured_states(model) as states:
        model(**{name: value for name, value in inputs.items() if name != "labels"})
    return loss_of_states(model, states, inputs["labels"], chunk, num_items_in_batch)


@contextlib.contextmanager
def captured_states(model: nn.Module) -> Iterator[list[Tensor]]:
    """Keep what the output head gets, in the list that is yielded, and hand the head no tokens."""
    states: list[Tensor] = []

    def keep(head: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        states.append(arguments[0])
        return (arguments[0][:, :0], *arguments[1:])

    handle = output_head(model).register_forward_pre_hook(keep, prepend=True)
    try:
        yield states
    finally:
        handle.remove()


def loss_of_states(
    model: nn.Module, states: list[Tensor], labels: Tensor, chunk: int, num_items: Tensor | int | None
) -> Tensor:
    """Return the loss from what `captured_states` kept; labels (batch, tokens) are shifted here."""
    if len(states) != 1:
        raise ConfigError(
            f"{type(unwrapped(model)).__name__} used its output head {len(states)} times in one forward; its loss "
            f"cannot be taken in chunks: leave {arg('loss_chunk')} out"
        )
    form = _forms[unwrapped(model)]
    return _loss(output_head(model), states[0], F.pad(labels, (0, 1), value=IGNORED)[..., 1:], chunk, num_items, form)


def check_form(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Find out, once a model, how its loss follows from its head's logits.

    Raises:
        ConfigError: in no way that is known here.
    """
    bare = unwrapped(model)
    if bare in _forms:
        return
    output_head(bare)
    if getattr(getattr(bare, "config", None), "output_router_logits", False):
        raise ConfigError("a loss in chunks leaves the router's loss out: set config.output_router_logits to False")
    few = _first_tokens(inputs)
    with evaluating(bare), torch.enable_grad():  # without gradients, adapted layers would keep their effective weights
        expected = float(bare(**few).loss.detach())
        with captured_states(bare) as states:
            bare(input_ids=few["input_ids"])
        shifted = F.pad(few["labels"], (0, 1), value=IGNORED)[..., 1:]
        found = {
            form: float(_loss(output_head(bare), states[0], shifted, CHECKED_TOKENS, None, form).detach())
            for form in _known_forms(bare)
        }
    low = torch.is_autocast_enabled(states[0].device.type)
    tolerance = LOW_PRECISION if low else TOLERANCE.get(states[0].dtype, LOW_PRECISION)
    fitting = [form for form, loss in found.items() if abs(loss - expected) <= tolerance * abs(expected)]
    if not fitting:
        losses = ", ".join(f"{loss:.4f}" for loss in found.values())
        raise ConfigError(
            f"the loss of {type(bare).__name__} is not the cross-entropy of its head's logits ({expected:.4f}, not "
            f"{losses}), so it cannot be taken in chunks: leave {arg('loss_chunk')} out"
        )
    _forms[bare] = fitting[0]


def output_head(model: nn.Module) -> nn.Module:
    """Return the module that makes logits of hidden states."""
    bare: Any = unwrapped(model)
    head = bare.get_output_embeddings() if hasattr(bare, "get_output_embeddings") else None
    if not isinstance(head, nn.Module):
        raise ConfigError(f"{type(bare).__name__} has no output head that is known; leave {arg('loss_chunk')} out")
    return head


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel or torch.compile's wrapper."""
    for name in ("module", "_orig_mod"):
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module) and not hasattr(model, "get_output_embeddings"):
            return unwrapped(inner)
    inner = getattr(model, "_orig_mod", None)
    return unwrapped(inner) if isinstance(inner, nn.Module) else model


def _loss(
    head: nn.Module, states: Tensor, labels: Tensor, chunk: int, num_items: Tensor | int | None, form: _Form
) -> Tensor:
    if type(head) is nn.Linear:
        # One that trains beside an adapter is float32, and rounded for the product.
        weight, bias = (p if p is None else p.to(states.dtype) for p in (head.weight, head.bias))
        options: Any = {"bias": bias, "chunk": chunk, "num_items": num_items}
        return chunked_cross_entropy(states, weight, labels, scale=form.scale, softcap=form.softcap, **options)
    # An adapted or quantised head: its logits are computed again in backward.
    states, labels = states.reshape(-1, states.shape[-1]), labels.reshape(-1).to(states.device)
    total: Any = 0.0
    for start in range(0, len(states), chunk):
        rows = slice(start, start + chunk)
        total = total + checkpoint(_sum_of_losses, head, states[rows], labels[rows], form, use_reentrant=False)
    return total / ((labels != IGNORED).sum() if num_items is None else num_items)


def _sum_of_losses(head: nn.Module, states: Tensor, labels: Tensor, form: _Form) -> Tensor:
    logits = head(states)
    logits = (logits if logits.dtype == torch.float64 else logits.float()) * form.scale
    if form.softcap is not None:
        logits = form.softcap * torch.tanh(logits / form.softcap)
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")


def _known_forms(model: nn.Module) -> list[_Form]:
    """Return what may become of the logits: nothing, or what the config names."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    named = _Form(scale, getattr(config, "final_logit_softcapping", None))
    return [_Form()] if named == _Form() else [named, _Form()]


def _first_tokens(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a few tokens of the first row that takes part, each of them its neighbour's label."""
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise ConfigError("a loss in chunks needs input_ids (batch, tokens)")
    few = ids[:1, :CHECKED_TOKENS]
    return {"input_ids": few, "labels": few}


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    chunk: int = 256,
    num_items: Tensor | float | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Return the cross-entropy of labels under the logits of `hidden`, without these logits existing at once.

    The same value and gradients as `F.cross_entropy(logits.float(), labels)` up to the order of summation; under
    autocast the product runs in its dtype. Differentiable once.

    Args:
        hidden: h (…, hidden), what the output head is applied to.
        weight: W (V, hidden); bias: b (V,) or None.
        labels: int64, of the leading shape of `hidden`, each the target of its own position (already shifted); -100
            is no target.
        chunk: tokens at a time.
        num_items: divide the sum by this; None divides by the number of targets.
        scale: a. softcap: c.

    Returns:
        A scalar in float32 (float64 for float64).

    Raises:
        ConfigError: a chunk below 1, or labels that do not fit.

    Example:
        >>> h, w = torch.randn(6, 4), torch.randn(10, 4)
        >>> labels = torch.tensor([1, 2, -100, 9, 0, 3])
        >>> loss = chunked_cross_entropy(h, w, labels, chunk=2)
        >>> torch.allclose(loss, F.cross_entropy(h @ w.T, labels))
        True
    """
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ConfigError(f"chunk is {chunk!r}; it must be an int of at least 1: tokens at a time")
    if labels.shape != hidden.shape[:-1]:
        raise ConfigError(
            f"labels are {tuple(labels.shape)}; for hidden states {tuple(hidden.shape)} they must be "
            f"{tuple(hidden.shape[:-1])}"
        )
    device_type = hidden.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        if hidden.dtype != torch.float64:
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            bias = bias if bias is None else bias.to(dtype)
    labels = labels.reshape(-1).to(hidden.device)
    with torch.autocast(device_type, enabled=False):
        total: Tensor = _Chunked.apply(
            hidden.reshape(-1, hidden.shape[-1]), weight, bias, labels, chunk, scale, softcap
        )
    count = (labels != IGNORED).sum() if num_items is None else num_items
    return total / (count.to(total.device) if isinstance(count, Tensor) else count)


class _Chunked(torch.autograd.Function):
    """The sum of the losses; each chunk's gradients are taken in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        chunk: int,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        total = torch.zeros((), dtype=wide, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if needs_weight else None
        d_bias = torch.zeros(weight.shape[0], dtype=wide, device=weight.device) if needs_bias else None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, min(start + chunk, len(hidden)))
            slope: Tensor | float = scale  # ∂z / ∂(W h + b)
            logits = F.linear(hidden[rows], weight, bias).to(wide)  # (chunk, V)
            if scale != 1.0:
                logits *= scale
            if softcap is not None:
                bent = torch.tanh(logits / softcap)
                slope = (1 - bent.square()) * scale
                logits = bent.mul_(softcap)
            counted = labels[rows] != IGNORED
            target = labels[rows].masked_fill(~counted, 0).unsqueeze(1)  # (chunk, 1)
            logsumexp = logits.logsumexp(1, keepdim=True)
            losses = (logsumexp - logits.gather(1, target)).squeeze(1)
            total += losses.masked_fill(~counted, 0).sum()
            if not any(ctx.needs_input_grad[:3]):
                continue
            gradient = logits.sub_(logsumexp).exp_()  # the softmax
            gradient.scatter_add_(1, target, torch.full_like(losses, -1).unsqueeze(1))
            gradient.masked_fill_(~counted.unsqueeze(1), 0)
            if isinstance(slope, Tensor) or slope != 1.0:
                gradient *= slope
            low = gradient.to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(low, weight, out=d_hidden[rows])
            if d_weight is not None:
                d_weight += low.t() @ hidden[rows]
            if d_bias is not None:
                d_bias += gradient.sum(0)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        dtypes = (None if d_hidden is None else d_hidden.dtype, *ctx.dtypes)
        pairs = zip((d_hidden, d_weight, d_bias), dtypes, strict=True)
        scaled = [None if found is None else (found * grad).to(dtype) for found, dtype in pairs]
        return *scaled, None, None, None, None
