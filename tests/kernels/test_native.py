"""The compiled products: against the separate branches in float64, and bit for bit whatever the blocks and threads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spp.errors import ConfigError
from spp.functional import effective_weight, spp_linear
from spp.kernels import backend, native, use_kernels
from spp.kernels.linear import linear
from spp.kernels.native import compiler
from spp.kernels.native.products import EFFECTIVE, Products, Update, block_of, library
from spp.masks.patterns import Pattern
from spp.pruning import magnitude_mask
from spp.rules import Adapter, get_rule
from spp.weights import PackedWeight
from tests.helpers.forks import in_threads
from tests.helpers.layers import SHAPES, Case, make_case
from tests.helpers.tolerances import assert_matches, assert_same_bits
from tests.kernels.test_linear import (  # noqa: F401  # what must hold whoever computes runs here again
    check,
    run,
    run_reference,
    test_a_layer_without_inputs_gives_its_bias,
    test_a_second_derivative_is_refused_with_the_way_out,
    test_activation_checkpointing_gives_the_same_gradients,
    test_in_place_changes_between_forward_and_backward_are_detected,
    test_inference_mode_before_training_leaves_a_usable_workspace,
    test_meta_tensors_give_shapes,
    test_mixed_dtypes_and_wrong_shapes_are_explained,
    test_only_what_requires_a_gradient_gets_one,
    test_retain_graph_and_repeated_calls_give_the_same_gradients,
    test_the_weight_is_frozen_even_when_it_requires_a_gradient,
)
from tests.kernels.test_sources import Forgetful

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LARGER = [  # across the edges of a tile of tokens, of 64 columns, of a thread's share; groups of one and of many rows
    (70, 67, 5, (100,)),
    (300, 130, 300, (97,)),
    (64, 576, 16, (3, 33)),
    (1, 200, 1, (50,)),
    (530, 9, 7, (193,)),
]

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=f"no compiled products: {native.why_not()}")


@pytest.fixture(autouse=True)
def _compiled() -> Iterator[None]:
    with use_kernels("native"):
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the compiled functions that were called."""
    found: list[str] = []
    for name in ("product", "reduce"):
        original = getattr(Products, name)

        def logged(self: Products, *args: object, original=original, name=name, **options: object) -> None:  # type: ignore[no-untyped-def]
            found.append(name)
            original(self, *args, **options)

        monkeypatch.setattr(Products, name, logged)
    return found


@pytest.mark.sampled(24)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "r", "leading"), SHAPES + LARGER)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_values_and_gradients(
    m: int, n: int, r: int, leading: tuple[int, ...], dtype: torch.dtype, bias: bool, calls: list[str]
) -> None:
    case = make_case(m, n, r, leading, dtype, bias=bias)
    y, grads = run(case)
    check(case, y, grads, dtype)
    assert calls == ([] if 0 in leading else ["product", "product", "reduce"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "r", "leading"), SHAPES + LARGER)
def test_input_dropout_is_the_papers_formula_with_the_mask_of_torch(
    m: int, n: int, r: int, leading: tuple[int, ...], dtype: torch.dtype, calls: list[str]
) -> None:
    case = make_case(m, n, r, leading, dtype)
    torch.manual_seed(7)
    mask = torch.nn.functional.dropout(torch.ones_like(case.x), 0.3)
    torch.manual_seed(7)
    y, grads = run(case, dropout=0.3)
    check(case, y, grads, dtype, mask)
    assert calls == ([] if 0 in leading else ["product"] * 4 + ["reduce"])


def test_a_wrong_value_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(70, 67, 5, (100,))
    original = Products.product

    def off(self: Products, tiles: object, block: object, out: Tensor, **options: object) -> None:
        original(self, tiles, block, out, **options)  # type: ignore[arg-type]
        out[-1, 0] += 0.01 * out.abs().max()

    monkeypatch.setattr(Products, "product", off)
    y, grads = run(case)
    with pytest.raises(AssertionError, match="output"):
        check(case, y, grads, torch.float32)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.9, 1.0])
def test_any_share_of_zeros(share: float) -> None:
    case = make_case(66, 130, 4, (40,))
    case.weight.copy_(torch.randn(66, 130) * (torch.rand(66, 130) >= share))
    y, grads = run(case)
    check(case, y, grads, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_multiplied_weight_is_the_effective_weight_bit_for_bit(dtype: torch.dtype) -> None:
    m, n = 66, 130
    case = make_case(m, n, 4, (n,), dtype, bias=False)
    weight = case.weight
    tiny = torch.finfo(dtype).smallest_normal
    with torch.no_grad():
        case.beta[0], case.alpha[0] = -0.5, 1.0  # 1 + s·β·α = 0: every kept weight of row 0 is rescued
        weight[1, :4] = torch.tensor([tiny, -tiny, -0.0, 0.0], dtype=dtype)
        case.beta[1] = 0.25 - 0.5  # halves them: subnormal, or the rescue's
    expected = effective_weight(weight, case.alpha, case.beta, 2.0).float()
    identity, products = torch.eye(n), Products(library())
    update = Update((2.0 * case.beta).detach(), case.alpha.detach())
    found = torch.empty(n, m)
    block = block_of(weight, 0, m, update, EFFECTIVE, dtype)
    products.product(products.tiles("x", identity), block, found, transposed=False, add=False)
    assert_same_bits(found.T + 0.0, expected + 0.0)  # + 0.0: a sum that starts at 0.0 has no −0.0
    assert torch.equal(found.T != 0, weight != 0)
    turned = torch.empty(m, n)
    products.product(products.tiles("x", torch.eye(m)), block, turned, transposed=True, add=False)
    assert_same_bits(turned + 0.0, expected + 0.0)
    assert bool((found[:, 0] != 0).any())


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_rounds_to_the_stored_then_to_the_autocast_dtype(
    dtype: torch.dtype, autocast_dtype: torch.dtype, calls: list[str]
) -> None:
    m, n = 24, 72
    case = make_case(m, n, 4, (n,), dtype, bias=False)
    with torch.autocast("cpu", dtype=autocast_dtype):
        y = spp_linear(torch.eye(n, dtype=dtype), case.weight, None, case.alpha, case.beta, 2.0)
        stored = effective_weight(case.weight, case.alpha, case.beta, 2.0)
    assert calls == ["product"]
    assert_same_bits(y.detach().T + 0.0, stored.to(autocast_dtype) + 0.0)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("elements", [2**22, 256])
def test_blocks_do_not_change_a_bit(dtype: torch.dtype, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "BLOCK_ELEMENTS", elements)
    monkeypatch.setattr(backend, "_THIN", elements)
    for m, n, r, leading in LARGER:
        case = make_case(m, n, r, leading, dtype)
        log: list[tuple[int, ...]] = []
        results = []
        by_columns = case.weight.T.contiguous().T  # as a Conv1D stores it
        for weight in (case.weight, by_columns, Forgetful(log, case.weight)):
            y = linear(case.x, weight, case.bias, Adapter(get_rule("spp"), (case.alpha, case.beta), 2.0))
            results.append([y, *torch.autograd.grad(y, case.inputs(), case.dy)])
        for other in results[1:]:
            for found, expected in zip(other, results[0], strict=True):
                assert_same_bits(found, expected, f"{m} × {n}")
        assert len(log) >= 3 and (elements > m * n or len(log) > 3)


@pytest.mark.sampled(12)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "2:8", "1:4", "1:2", 0.5, 0.8, 0.0])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_packed_weights_give_the_bits_of_dense_ones(pattern: str | float, dtype: torch.dtype, dropout: float) -> None:
    for m, n in ((13, 72), (300, 40), (5, 2104), (64, 576)):
        case = make_case(m, n, 5, (50,), dtype)
        dense = torch.randn(m, n)
        dense *= magnitude_mask(dense, Pattern.parse(pattern))
        dense[0, : n // 2] = 0  # fewer than the pattern keeps
        case.weight = dense.to(dtype)
        results = []
        packed = PackedWeight.pack(case.weight)
        for weight in (case.weight, packed):
            torch.manual_seed(3)
            y = linear(case.x, weight, case.bias, Adapter(get_rule("spp"), (case.alpha, case.beta), 2.0, dropout))
            results.append([y, *torch.autograd.grad(y, case.inputs(), case.dy)])
        for found, expected in zip(results[1], results[0], strict=True):
            assert_same_bits(found, expected, f"{m} × {n}, {packed.layout}")


def test_threads_do_not_change_a_bit() -> None:
    before = torch.get_num_threads()
    case = make_case(530, 260, 7, (193,))
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append([(y := run(case))[0], *y[1]])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            assert_same_bits(found, expected)


def test_inputs_of_any_stride_and_gradients_that_are_not_needed(calls: list[str]) -> None:
    case = make_case(33, 70, 4, (41,), bias=False)
    whole = torch.randn(41, 140)
    transposed = torch.randn(70, 41)
    for x in (whole[:, ::2], whole[:, 35:105], transposed.T):
        here = Case(x.detach().requires_grad_(), case.weight, None, case.alpha, case.beta, case.dy)
        y, grads = run(here)
        check(here, y, grads, torch.float32)
    expected = run_reference(case.to(torch.float64))[1]
    for wanted in ([0], [1], [2], [1, 2]):
        inputs = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(case.inputs())]
        calls.clear()
        y = spp_linear(inputs[0], case.weight, None, inputs[1], inputs[2], 2.0)
        grads = torch.autograd.grad(y, [inputs[i] for i in wanted], case.dy.expand_as(y))
        for i, grad in zip(wanted, grads, strict=True):
            assert_matches(grad, expected[i], torch.float32)
        assert calls == ["product", *(["product"] if 0 in wanted else []), *(["reduce"] if wanted != [0] else [])]


def test_a_changed_weight_is_counted_again_and_few_tokens_stay_with_torch(calls: list[str]) -> None:
    case = make_case(40, 80, 4, (64,), bias=False)
    with use_kernels("auto"):
        run(case)
        assert calls
        calls.clear()
        case.weight.copy_(torch.randn(40, 80))  # dense
        run(case)
        assert not calls
        case.weight[:, ::2] = 0
        run(case)
        assert calls
        calls.clear()
        run(make_case(40, 80, 4, (native.FEWEST_TOKENS - 1,)))
        assert not calls
    with use_kernels("torch"):
        run(case)
    assert not calls


def test_threads_do_not_share_scratch_memory() -> None:
    cases = [make_case(40, 70, 8, (50,), seed=seed) for seed in range(4)]
    expected = [[(y := run(case))[0], *y[1]] for case in cases]

    def work(index: int) -> None:
        for _ in range(20):
            y, grads = run(cases[index])
            for found, wanted in zip([y, *grads], expected[index], strict=True):
                assert_same_bits(found, wanted)

    in_threads(work, 4)


def test_one_bit_an_entry_is_kept_with_input_dropout_and_nothing_without() -> None:
    case = make_case(32, 64, 4, (48,), bias=False)
    for dropout, extra in ((0.0, 0), (0.25, 48 * 64 // 8)):
        sizes: dict[int, int] = {}

        def pack(t: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = spp_linear(case.x, case.weight, None, case.alpha, case.beta, 2.0, dropout)
        owned = {t.untyped_storage().data_ptr() for t in (case.x, case.weight, case.alpha, case.beta)}
        assert sum(size for place, size in sizes.items() if place not in owned) == extra
        del y


def test_not_finite_values_come_out_as_they_go_in() -> None:
    case = make_case(16, 72, 4, (40,), bias=False)
    with torch.no_grad():
        case.x[3, 5] = float("nan")
        case.weight[:, 5] = 1.0
    y, (d_x, d_alpha, _) = run(case)
    assert bool(y[3].isnan().all()) and not bool(y[:3].isnan().any())
    assert bool(d_alpha[:, 5].isnan().all()) and not bool(d_alpha[:, 6:].isnan().any()) and not bool(d_x.isnan().any())


def _in_child(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).resolve().parents[2])
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": root, **environment},
    )


ONE_LAYER = """
import torch
from spp.functional import spp_linear
from spp.kernels.native import why_not
w = torch.randn(8, 64) * (torch.arange(64) % 2)
y = spp_linear(torch.ones(40, 64), w, None, torch.ones(2, 64), torch.ones(8, 1), 1.0)
assert torch.allclose(y, 2 * w.sum(1).expand(40, 8), atol=1e-4)
print(why_not())
"""


def _quick_compiler(folder: Path) -> str:
    """Return a compiler that optimises nothing, which takes a quarter of the time."""
    script = folder / "quick"
    script.write_text(f'#!/bin/sh\nexec {compiler._compiler()} "$@" -O0\n')
    script.chmod(0o755)
    return str(script)


@pytest.mark.slow
def test_without_a_compiler_torch_does_the_work(tmp_path: Path) -> None:
    wanted = ONE_LAYER + (
        "from spp.kernels import use_kernels\n"
        "with use_kernels('native'):\n"
        "    spp_linear(torch.ones(40, 64), w, None, torch.ones(2, 64), torch.ones(8, 1), 1.0)\n"
    )
    done = _in_child(wanted, SPP_CACHE=str(tmp_path), SPP_CC="no-such-compiler", SPP_KERNELS="auto")
    assert "there is no C compiler (no-such-compiler" in done.stdout
    assert "ConfigError: SPP_KERNELS=native: there is no C compiler" in done.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["fails", "writes nonsense"])
def test_a_broken_compiler_is_explained(what: str, tmp_path: Path) -> None:
    script = tmp_path / "cc"
    script.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit 0\n'
        + ("echo no such flag >&2; exit 1\n" if what == "fails" else "exit 0\n")
    )
    script.chmod(0o755)
    done = _in_child(ONE_LAYER, SPP_CACHE=str(tmp_path), SPP_CC=str(script), SPP_KERNELS="auto")
    assert done.returncode == 0, done.stderr
    assert ("no such flag" if what == "fails" else "cannot be loaded") in done.stdout


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_is_no_hindrance(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    here = {"SPP_CC": _quick_compiler(tmp_path), "SPP_KERNELS": "native"}
    done = _in_child(ONE_LAYER, SPP_CACHE=str(blocked), **here)
    assert (done.returncode, done.stdout) == (0, "None\n"), done.stderr
    others = tmp_path / "others" / "native"
    others.mkdir(parents=True)
    others.chmod(0o777)  # anybody could put a library there
    done = _in_child(ONE_LAYER, SPP_CACHE=str(tmp_path / "others"), **here)
    assert (done.returncode, done.stdout) == (0, "None\n"), done.stderr
    assert not list(others.iterdir())


@pytest.mark.slow
def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    here = {"SPP_CC": _quick_compiler(tmp_path), "SPP_CACHE": str(tmp_path), "SPP_KERNELS": "native"}
    assert _in_child(ONE_LAYER, **here).returncode == 0
    (made,) = (tmp_path / "native").iterdir()
    before = made.stat().st_mtime_ns
    assert _in_child(ONE_LAYER, **here).returncode == 0
    (again,) = (tmp_path / "native").iterdir()
    assert (again, again.stat().st_mtime_ns) == (made, before)


def test_a_choice_of_native_refuses_nothing_that_torch_computes() -> None:
    case = make_case(12, 16, 4, (5,), torch.float64)
    y, grads = run(case)
    check(case, y, grads, torch.float64)


def test_an_unknown_choice_is_an_error() -> None:
    with pytest.raises(ConfigError, match="known: auto, torch, native, triton"), use_kernels("c"):
        pass


def test_a_quantized_weight_is_counted_by_its_values() -> None:
    pytest.importorskip("bitsandbytes")
    from spp.kernels.backend import density
    from spp.layers.linear import SPPLinear
    from spp.weights import QuantizedWeight
    from tests.helpers.quantized import quantized_llama

    model = quantized_llama("nf4")
    linear = model.model.layers[0].self_attn.q_proj
    source = SPPLinear(linear, r=2).frozen()
    assert isinstance(source, QuantizedWeight)
    dense = source.block(slice(None), slice(None))
    assert density(source) == int(torch.count_nonzero(dense)) / dense.numel()
    assert 0.2 < density(source) < 0.8
