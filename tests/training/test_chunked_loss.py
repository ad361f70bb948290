"""The loss in chunks against torch's cross-entropy of all logits in float64: value, every gradient, what is held."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spp.errors import ConfigError
from spp.training import chunked_cross_entropy
from tests.helpers.tolerances import assert_matches, assert_same_bits

TOKENS, WIDTH, VOCABULARY = 13, 6, 29
FORMS: list[dict[str, Any]] = [{}, {"scale": 0.5}, {"softcap": 2.0}, {"scale": 3.0, "softcap": 1.5}]


def case(dtype: torch.dtype, leading: tuple[int, ...] = (TOKENS,)) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*leading, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64)
    bias = torch.randn(VOCABULARY, generator=generator, dtype=torch.float64)
    labels = torch.randint(VOCABULARY, leading, generator=generator)
    labels.view(-1)[::5] = -100
    return (*(t.to(dtype).requires_grad_() for t in (hidden, weight, bias)), labels)  # type: ignore[return-value]


def plain(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    logits = F.linear(hidden, weight, bias).reshape(-1, VOCABULARY)
    logits = (logits if logits.dtype == torch.float64 else logits.float()) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, labels.reshape(-1))


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("chunk", [1, 4, 13, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_value_and_gradients(dtype: torch.dtype, chunk: int, form: dict[str, Any]) -> None:
    *tensors, labels = case(dtype)
    *tensors64, _ = case(torch.float64)
    low = plain(*tensors, labels, **form)
    low_grads = torch.autograd.grad(low, tensors)
    oracle = plain(*tensors64, labels, **form)
    grads64 = torch.autograd.grad(oracle, tensors64)
    loss = chunked_cross_entropy(tensors[0], tensors[1], labels, bias=tensors[2], chunk=chunk, **form)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_matches(loss, oracle, dtype, low)
    grads = torch.autograd.grad(loss, tensors, retain_graph=True)
    for name, actual, expected, rough in zip(("hidden", "weight", "bias"), grads, grads64, low_grads, strict=True):
        assert actual.dtype == dtype
        assert_matches(actual, expected, dtype, rough, name)
    for one, two in zip(grads, torch.autograd.grad(loss, tensors), strict=True):
        assert_same_bits(one, two)


def test_leading_dimensions_no_bias_and_a_count_of_its_own() -> None:
    hidden, weight, _, labels = case(torch.float64, (3, 5))
    expected = plain(hidden, weight, None, labels) * (labels != -100).sum() / 7
    for count in (7, torch.tensor(7)):
        assert_matches(chunked_cross_entropy(hidden, weight, labels, chunk=4, num_items=count), expected, torch.float64)


@pytest.mark.parametrize("trains", ["hidden", "weight", "bias", ""])
def test_only_what_requires_a_gradient_gets_one(trains: str) -> None:
    *tensors, labels = case(torch.float64)
    named = dict(zip(("hidden", "weight", "bias"), tensors, strict=True))
    expected = dict(zip(named, torch.autograd.grad(plain(*tensors, labels), tensors), strict=True))
    for name, tensor in named.items():
        tensor.requires_grad_(name == trains)
    loss = chunked_cross_entropy(tensors[0], tensors[1], labels, bias=tensors[2], chunk=4)
    assert loss.requires_grad == bool(trains)
    if trains:
        loss.backward()
        assert_matches(named[trains].grad, expected[trains], torch.float64)  # type: ignore[arg-type]


def test_autocast_computes_in_its_dtype() -> None:
    hidden, weight, bias, labels = case(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = chunked_cross_entropy(hidden, weight, labels, bias=bias, chunk=4)
        low = plain(hidden, weight, bias, labels)
    *tensors64, _ = case(torch.float64)
    assert loss.dtype == torch.float32
    assert_matches(loss, plain(*tensors64, labels), torch.bfloat16, low)
    (grad,) = torch.autograd.grad(loss, hidden)
    (expected,) = torch.autograd.grad(plain(*tensors64, labels), tensors64[:1])
    assert grad.dtype == torch.float32
    assert_matches(grad, expected, torch.bfloat16, torch.autograd.grad(low, hidden)[0])


def test_no_tensor_is_larger_than_a_chunk_of_logits() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, Tensor) and tensor.shape[1:] == (VOCABULARY,) and len(tensor) != WIDTH:
                    self.size = max(self.size, tensor.numel())
            return result

    hidden, weight, bias, labels = case(torch.float32)
    for tensor in (weight, bias):
        tensor.requires_grad_(False)
    with Largest() as largest:
        chunked_cross_entropy(hidden, weight, labels, bias=bias, chunk=3).backward()
    assert largest.size == 3 * VOCABULARY
    with Largest() as largest:
        plain(hidden, weight, bias, labels).backward()
    assert largest.size == TOKENS * VOCABULARY


def test_large_logits_stay_finite() -> None:
    hidden, weight, bias, labels = case(torch.float32)
    loss = chunked_cross_entropy(hidden * 1e4, weight, labels, bias=bias, chunk=4)
    assert bool(torch.isfinite(loss)) and bool(torch.isfinite(torch.autograd.grad(loss, hidden)[0]).all())


def test_no_target_is_nan_as_in_torch_and_zero_of_a_count() -> None:
    hidden, weight, _, labels = case(torch.float32)
    none = torch.full_like(labels, -100)
    assert bool(chunked_cross_entropy(hidden, weight, none).isnan())
    assert float(chunked_cross_entropy(hidden, weight, none, num_items=3).detach()) == 0


@pytest.mark.parametrize("chunk", [0, -1, 2.0, True])
def test_a_chunk_is_a_number_of_tokens(chunk: Any) -> None:
    hidden, weight, _, labels = case(torch.float32)
    with pytest.raises(ConfigError, match="chunk is"):
        chunked_cross_entropy(hidden, weight, labels, chunk=chunk)


def test_labels_have_to_fit() -> None:
    hidden, weight, _, labels = case(torch.float32)
    with pytest.raises(ConfigError, match=r"labels are \(12,\)"):
        chunked_cross_entropy(hidden, weight, labels[1:])
