"""The loss with a teacher against the plain formula in float64 under autograd: value, gradients, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from spp.configs.distillation import Distillation
from spp.errors import ConfigError
from spp.training.causal_loss import CACHED, Form, _loss
from spp.training.distillation import FromLogits, FromTop, TaughtBatch, Weights, relative_error, top_of
from tests.helpers.tolerances import assert_matches

TOKENS, WIDTH, VOCABULARY, K = 13, 6, 29, 5
CASES = [
    Weights(0.3, 0.7),
    Weights(0.0, 1.0),
    Weights(0.3, 0.7, 0.0, 2.5),
    Weights(0.0, 1.5, 0.0, 0.5),
    Weights(0.2, 0.5, 0.4, 3.0),
]
FORMS = [Form(), Form(0.5, 2.0)]


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labelled() -> Tensor:
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(3))
    labels[::5] = -100
    return labels


def formed(form: Form, outputs: Tensor) -> Tensor:
    outputs = outputs * form.scale
    return outputs if form.softcap is None else form.softcap * torch.tanh(outputs / form.softcap)


def head_of(seed: int, bias: bool = True) -> nn.Linear:
    head = nn.Linear(WIDTH, VOCABULARY, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(drawn(seed, VOCABULARY, WIDTH))
    return head


def plain(weights: Weights, z: Tensor, y: Tensor, labels: Tensor) -> Tensor:
    """The sum over the tokens that count."""
    counts = labels != -100
    z, y, heat = z[counts], y[counts], weights.temperature
    ce = F.cross_entropy(z, labels[counts], reduction="sum")
    p, q = F.log_softmax(z / heat, 1), F.log_softmax(y / heat, 1)
    return weights.ce * ce + weights.kl * heat**2 * (q.exp() * (q - p)).sum()


@pytest.mark.parametrize("adapted", [False, True], ids=["linear head", "other head"])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("weights", CASES, ids=str)
def test_value_and_gradients(weights: Weights, form: Form, adapted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spp.training.causal_loss.CACHED", 2 * VOCABULARY)  # two rows at a time
    hidden, other = drawn(1, TOKENS, WIDTH).requires_grad_(), drawn(2, TOKENS, WIDTH)
    head, his, labels = head_of(4), head_of(5, bias=False), labelled()
    states = [drawn(6 + i, TOKENS, WIDTH).requires_grad_() for i in range(2)]
    outputs = [drawn(8 + i, TOKENS, WIDTH) for i in range(2)]
    lesson = TaughtBatch(weights, lambda places: FromLogits(weights, his, FORMS[1], other[places]), outputs, states)
    used: Any = nn.Sequential(head) if adapted else head
    loss = _loss(used, hidden, labels, 4, 7, form, lesson)
    expected = plain(weights, formed(form, head(hidden)), formed(FORMS[1], his(other)), labels)
    counts = labels != -100
    for mine, target in zip(states, outputs, strict=True):
        ratio = (mine - target).square().sum(1) / target.square().sum(1)
        expected = expected + weights.hidden * ratio[counts].sum() / 2
    expected = expected / 7
    assert_matches(loss, expected, torch.float64)
    leaves = [hidden, head.weight, head.bias, *(states if weights.hidden else [])]
    found, wanted = torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves)
    for actual, oracle in zip(found, wanted, strict=True):
        assert_matches(actual, oracle, torch.float64)
    assert not bool(found[0][~counts].any())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("weights", CASES[:2], ids=str)
def test_the_highest_and_the_rest_as_one(weights: Weights, form: Form, dtype: torch.dtype) -> None:
    head, labels = head_of(4).to(dtype), labelled()
    hidden = drawn(1, TOKENS, WIDTH).to(dtype).requires_grad_()
    y = formed(FORMS[1], drawn(9, TOKENS, VOCABULARY) * 3)
    ids, logs, rest = top_of(drawn(9, TOKENS, VOCABULARY) * 3, FORMS[1], K)
    log_q = F.log_softmax(y, 1)
    assert ids.dtype == torch.int32 and torch.equal(ids.long(), log_q.topk(K, 1).indices)
    assert_matches(logs, log_q.topk(K, 1).values, torch.float32)
    assert_matches(rest, (1 - log_q.exp().topk(K, 1).values.sum(1)).log(), torch.float32)

    def make(places: Tensor) -> FromTop:
        return FromTop(weights, ids.long()[places], logs[places], rest[places])

    loss = _loss(head, hidden, labels, 4, None, form, TaughtBatch(weights, make))
    counts = labels != -100
    wide, at, q, q_rest = hidden.double()[counts], ids.long()[counts], logs.double()[counts], rest.double()[counts]
    z = formed(form, F.linear(wide, head.weight.double(), head.bias.double()))
    p = F.softmax(z, 1)
    top = p.gather(1, at)
    kl = (q.exp() * (q - top.log())).sum() + (q_rest.exp() * (q_rest - (1 - top.sum(1)).log())).sum()
    expected = weights.ce * F.cross_entropy(z, labels[counts], reduction="sum") + weights.kl * kl
    expected = expected / int(counts.sum())
    assert_matches(loss, expected, dtype)
    leaves = [hidden, head.weight]
    found, wanted = torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves)
    for actual, oracle in zip(found, wanted, strict=True):
        assert_matches(actual, oracle, dtype)


def test_a_student_that_is_sure_of_a_token_has_a_finite_loss() -> None:
    weights, labels = Weights(0.5, 0.5), torch.tensor([1, 2])
    ids, logs, rest = top_of(drawn(9, 2, VOCABULARY), Form(), K)
    logits = torch.zeros(2, VOCABULARY)
    logits[:, 0] = 1e4
    for objective in (
        FromTop(weights, ids.long(), logs, rest),
        FromLogits(weights, nn.Identity(), Form(), drawn(9, 2, VOCABULARY).float()),
    ):
        held = logits.clone()
        objective.chunk(slice(0, 2))
        total = objective.measure_(held, labels, slice(0, 2), True)
        assert bool(torch.isfinite(total)) and bool(torch.isfinite(held).all())


def test_no_second_tensor_of_logits_is_larger_than_a_chunk() -> None:
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, Tensor) and tensor.shape[1:] == (VOCABULARY,):
                    self.size = max(self.size, len(tensor))
            return result

    weights, hidden = Weights(0.3, 0.7), drawn(1, 40, WIDTH).requires_grad_()
    head, his, other = head_of(4).requires_grad_(False), head_of(5), drawn(2, 40, WIDTH)
    lesson = TaughtBatch(weights, lambda places: FromLogits(weights, his, Form(), other[places]))
    labels = torch.arange(40) % VOCABULARY
    with Largest() as largest:
        _loss(head, hidden, labels, 8, None, Form(), lesson).backward()
    assert largest.size == 8 and CACHED > 8 * VOCABULARY
    with Largest() as largest:
        plain(weights, head(hidden), his(other), labels).backward()
    assert largest.size == 40  # which the check would find


def test_a_frozen_head_gets_no_gradient() -> None:
    weights, hidden, head = Weights(0.3, 0.7), drawn(1, TOKENS, WIDTH).requires_grad_(), head_of(4)
    head.requires_grad_(False)
    lesson = TaughtBatch(weights, lambda places: FromLogits(weights, head_of(5), Form(), drawn(2, TOKENS, WIDTH)))
    _loss(head, hidden, torch.arange(TOKENS), 4, None, Form(), lesson).backward()
    assert head.weight.grad is None and hidden.grad is not None


def test_states_of_other_shapes_or_without_gradients_are_refused() -> None:
    places = torch.arange(2)
    with pytest.raises(ConfigError, match=r"\(3, 4\), those of teacher \(3, 5\)"):
        relative_error(torch.zeros(3, 4), torch.zeros(3, 5), places)
    with pytest.raises(ConfigError, match="no gradients"):
        relative_error(torch.zeros(3, 4), torch.zeros(3, 4), places)
    zero = torch.zeros(3, 4, requires_grad=True)
    assert float(relative_error(zero, torch.zeros(3, 4), places).detach()) == 0


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"teacher": "x"}, "kl_weight and hidden_weight are 0"),
        ({"teacher": "x", "kl_weight": -1.0}, "kl_weight is -1.0"),
        ({"teacher": "x", "kl_weight": float("nan")}, "kl_weight is nan"),
        ({"teacher": "x", "kl_weight": 1.0, "temperature": 0}, "temperature is 0"),
        ({"teacher": "x", "kl_weight": 1.0, "teacher_bits": 3}, "teacher_bits is 3"),
        ({"teacher": "x", "teacher_cache": "y", "kl_weight": 1.0}, "two teachers"),
        ({"teacher_cache": "y", "teacher_bits": 8, "kl_weight": 1.0}, "teacher_bits is 8, but teacher= is missing"),
        ({"teacher_cache": "y", "kl_weight": 1.0, "hidden_weight": 0.1}, "teacher_cache holds no hidden states"),
        ({"teacher_cache": "y", "kl_weight": 1.0, "temperature": 2.0}, "exact at 1 only"),
        ({"teacher": "", "kl_weight": 1.0}, "teacher is ''"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        Distillation(**options)


@pytest.mark.parametrize("name", ["kl_weight", "hidden_weight", "temperature", "ce_weight"])
def test_weights_without_a_teacher(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} is 0.5, but there is no teacher"):
        Distillation(**{name: 0.5}).require_weights(False)
    Distillation(kl_weight=0.5).require_weights(True)  # of one in memory


@pytest.mark.parametrize("weights", CASES[:3], ids=str)
def test_a_vocabulary_that_is_filled_up_has_logits_of_minus_infinity(weights: Weights) -> None:
    """Teacher and student, or the teacher alone, give the last tokens −∞: value and gradient are those without them."""
    z, y, labels = drawn(1, TOKENS, VOCABULARY), drawn(2, TOKENS, VOCABULARY), labelled().clamp(max=VOCABULARY - 4)
    counts = labels != -100
    places = slice(0, int(counts.sum()))
    short = z[:, :-3].clone().requires_grad_()
    expected = plain(weights, short, y[:, :-3], labels)
    (wanted,) = torch.autograd.grad(expected, short)
    filled, other = (torch.cat([t[:, :-3], torch.full((TOKENS, 3), -torch.inf, dtype=t.dtype)], 1) for t in (z, y))
    head = nn.Identity()
    objectives: list[Any] = [FromLogits(weights, head, Form(), other[counts])]
    if weights.temperature == 1.0:
        ids, logs, rest = top_of(other[counts].clone(), Form(), VOCABULARY - 1)  # −∞ among the highest, nothing left
        objectives.append(FromTop(weights, ids.long(), logs.double(), rest.double()))
    for objective in objectives:
        objective.chunk(places)
        logits = filled[counts].clone()
        value = objective.measure_(logits, labels[counts], places, True)
        assert_matches(value, expected.detach(), torch.float32)
        assert_matches(logits[:, :-3], wanted[counts], torch.float32)
        assert not logits[:, -3:].any()
