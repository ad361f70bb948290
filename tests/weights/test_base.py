"""What every form of a frozen weight answers: the same W, in blocks, whole, as it is stored, and made again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from spp.files import values_sha256
from spp.rules import Adapter, effective_weight, get_rule
from spp.weights import DenseWeight, PackedStack, PackedWeight, Weight, as_weight
from spp.weights.offload import OffloadedWeight, parameter_weight
from tests.helpers.tolerances import assert_same_bits

M, N = 12, 24


def pruned(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.5)


def transposed(weight: Weight) -> Weight:
    weight.input_axis = -2
    return weight


def offloaded(stored: Tensor, input_axis: int = -1) -> Weight:
    return OffloadedWeight(stored.to("meta"), input_axis, lambda: stored, stored.device, stored)


def stacked(w: Tensor, inputs_first: bool = False) -> Weight:
    return PackedStack.pack(lambda expert: w[expert], len(w), transposed=inputs_first)


# (the shape of W, how it is held, whether inputs come first where it is stored)
FORMS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Weight], bool]] = {
    "dense": ((M, N), as_weight, False),
    "a parameter": ((M, N), lambda w: as_weight(nn.Parameter(w)), False),
    "dense, inputs first": ((M, N), lambda w: DenseWeight(w.T.contiguous(), -2), True),
    "dense experts": ((3, M, N), DenseWeight, False),
    "dense experts, inputs first": ((3, M, N), lambda w: DenseWeight(w.mT.contiguous(), -2), True),
    "packed": ((M, N), PackedWeight.pack, False),
    "packed, inputs first": ((M, N), lambda w: transposed(PackedWeight.pack(w)), True),
    "packed experts": ((3, M, N), stacked, False),
    "packed experts, inputs first": ((3, M, N), lambda w: stacked(w, True), True),
    "offloaded": ((M, N), offloaded, False),
    "offloaded, inputs first": ((M, N), lambda w: offloaded(w.T.contiguous(), -2), True),
    "offloaded experts": ((3, M, N), offloaded, False),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_answers_for_the_same_weight(name: str) -> None:
    shape, hold, inputs_first = FORMS[name]
    w = pruned(*shape) + 0.0  # no −0.0, which what is packed gives back as 0.0
    weight = hold(w)
    stored = w.mT.contiguous() if inputs_first else w
    assert (weight.shape, weight.dtype, weight.device) == (shape, w.dtype, w.device)
    assert (weight.numel, weight.count_kept()) == (w.numel(), int(torch.count_nonzero(w)))
    assert_same_bits(weight.matrix().detach().contiguous(), w)
    assert_same_bits(weight.dense().detach(), stored)
    for rows, cols in ((slice(None), slice(None)), (slice(2, 7), slice(3, 20)), (slice(5, 5), slice(None))):
        assert_same_bits(weight.block(rows, cols).clone(), w[..., rows, cols].contiguous())
        out = torch.full((*shape[:-2], *w[..., rows, cols].shape[-2:]), 7.0)
        assert_same_bits(weight.decode(rows, cols, out), w[..., rows, cols].contiguous())
    assert not any(t.requires_grad for t in weight.tensors())
    again = weight.maker()(*weight.tensors())
    assert_same_bits(again.matrix().contiguous(), w)
    assert float(weight.bounds()[weight.bounds() != 0].abs().min()) <= float(w[w != 0].abs().min())
    found, given = weight.entries().flatten(), w.flatten()
    assert_same_bits(found[found != 0].sort().values, given[given != 0].sort().values)
    matrices = [one.matrix() for one in weight.experts()]
    assert_same_bits(torch.stack(list(matrices)).detach(), w if w.dim() == 3 else w.unsqueeze(0))
    assert weight.form == "float32" and weight.values_sha256() == values_sha256(stored)
    assert weight.values_sha256("bfloat16") == values_sha256(stored, torch.bfloat16)
    assert weight.values_sha256("nf4 in blocks of 64") is None


def test_a_write_gives_another_hash() -> None:
    held = pruned(M, N)
    weight = as_weight(held)
    before = weight.values_sha256()
    held[0, 0] = 5.0
    assert weight.values_sha256() == values_sha256(held) != before


def test_a_weight_without_values_has_no_hash() -> None:
    assert as_weight(torch.empty(M, N, device="meta")).values_sha256() is None
    assert PackedWeight.pack(pruned(M, N)).to("meta").is_meta


class Reads:
    """Gives a tensor, and counts how often."""

    def __init__(self, stored: Tensor) -> None:
        self.stored, self.count = stored, 0

    def __call__(self) -> Tensor:
        self.count += 1
        return self.stored


def test_what_is_offloaded_is_read_when_it_is_asked_for_and_not_before() -> None:
    stored = pruned(M, N)
    reads = Reads(stored)
    weight = OffloadedWeight(stored.to("meta"), -1, reads, stored.device)
    assert (weight.shape, weight.dtype, weight.device) == ((M, N), stored.dtype, stored.device)
    assert weight.tensors() == () and weight.storage() == () and not reads.count
    assert_same_bits(weight.matrix(), stored)
    assert_same_bits(weight.block(slice(1, 3), slice(None)), stored[1:3])
    assert reads.count == 1
    assert_same_bits(weight.maker()().matrix(), stored)
    assert reads.count == 2, "backward reads it again"


def test_backward_reads_a_fused_weight_once_for_all_of_its_experts() -> None:
    stored = pruned(3, M, N)
    reads = Reads(stored)
    weight = OffloadedWeight(stored, -1, reads)
    makers = [expert.maker() for expert in weight.experts()]
    for expert, make in enumerate(makers):
        assert_same_bits(make().matrix(), stored[expert])
    assert reads.count == 1


def test_a_parameter_is_held_and_not_copied() -> None:
    linear = nn.Linear(N, M)
    held = parameter_weight(linear)
    assert type(held) is DenseWeight and held.dense() is linear.weight
    assert held.tensors()[0].data_ptr() == linear.weight.data_ptr() and not held.tensors()[0].requires_grad


def test_the_effective_weight_is_that_of_the_adapter_in_its_order() -> None:
    w, rule = pruned(M, N), get_rule("spp")
    params = [torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in rule.shapes(M, N, 3)]
    spread = params[0].repeat_interleave(M // 3, 0)
    expected = w * (1 + (2.0 * params[1]) * spread)
    assert_same_bits(effective_weight(w, Adapter(rule, params, 2.0)), expected)
    assert_same_bits(effective_weight(w, Adapter(rule, params, 2.0, dropout=0.5)), expected)
