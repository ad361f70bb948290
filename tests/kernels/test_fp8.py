"""G in 8-bit floating point: how it is rounded, what product it makes, what it leaves alone, where it is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from spp.errors import ConfigError, WrapError
from spp.functional import spp_linear
from spp.inject import adapter_config, adapter_parameters, set_grad_precision, wrap
from spp.kernels import fp8, three_products, use_kernels, whole
from spp.kernels.fp8 import Fp8Gradient, check_fp8
from spp.kernels.sources import DenseWeight
from spp.kernels.work import TorchWork, TritonWork, Work
from spp.rules import get_rule
from tests.layers import make_case
from tests.tolerances import assert_matches, assert_same_bits

DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])
E4M3 = torch.float8_e4m3fn
SPECIAL = [0.0, -0.0, 2.0**-10, 2.0**-9, 3 * 2.0**-10, 0.99 * 2.0**-6, 2.0**-6, 17.0, 18.0, 19.0, -17.0, 1.0625, 1.1875]
SPECIAL += [448.0, 463.9, -448.0, 1e-30, float("nan")]


def make_work(kind: type[Work], device: torch.device) -> Work:
    weight = torch.ones(2, 2, device=device)
    return kind(get_rule("spp"), DenseWeight(weight), None)


def bits(kind: type[Work], x: Tensor, inverse: float, shape: tuple[int, int]) -> Tensor:
    out = torch.full(shape, 77, dtype=torch.uint8, device=x.device).view(E4M3)
    make_work(kind, x.device).quantise(x, torch.tensor(inverse, device=x.device), out)
    return out.view(torch.uint8)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "cols"), [(5, 3), (70, 130), (1, 1), (16, 64), (3, 0)])
def test_the_kernel_rounds_as_torch_does(
    tokens: int, cols: int, dtype: torch.dtype, triton_device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, cols, generator=generator) * 10 ** torch.randn(tokens, cols, generator=generator)
    x = x.to(triton_device, dtype)
    inverse = 448 / float(x.abs().max()) if x.numel() else 1.0
    for given in (x, x.t().contiguous().t()):
        for shape in ((cols, tokens), (-(-cols // 16) * 16, -(-tokens // 16) * 16)):
            assert torch.equal(bits(TritonWork, given, inverse, shape), bits(TorchWork, given, inverse, shape))
            found = bits(TorchWork, given, inverse, shape).view(E4M3).float()
            assert torch.equal(found[:cols, :tokens], (x.float() * inverse).to(E4M3).float().t())
            assert not found[cols:].any() and not found[:, tokens:].any()


def test_the_kernel_rounds_every_kind_of_number(triton_device: torch.device) -> None:
    x = torch.tensor([SPECIAL], device=triton_device)
    found, expected = (bits(kind, x, 1.0, (len(SPECIAL), 1)).flatten() for kind in (TritonWork, TorchWork))
    nan = torch.isnan(x[0])
    assert torch.equal(found[~nan], expected[~nan])
    assert torch.isnan(found.view(E4M3).float()[nan]).all() and torch.isnan(expected.view(E4M3).float()[nan]).all()
    all_codes = torch.arange(256, dtype=torch.uint8, device=triton_device).view(E4M3).float()
    finite = all_codes[torch.isfinite(all_codes)].view(1, -1)
    assert torch.equal(bits(TritonWork, finite, 1.0, (254, 1)).view(E4M3).float().flatten(), finite[0])


@pytest.mark.parametrize("kind", [TorchWork, TritonWork])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "m", "n"), [(5, 3, 7), (33, 20, 50), (16, 16, 32), (1, 1, 1)])
def test_columns_of_g(
    tokens: int, m: int, n: int, dtype: torch.dtype, kind: type[Work], triton_device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(0)
    dy, x = (torch.randn(tokens, k, generator=generator).to(triton_device, dtype) for k in (m, n))
    gradient = Fp8Gradient(dy, x, make_work(kind, triton_device))
    rounded = []
    for t in (dy, x):
        scale = t.float().abs().max() / 448
        rounded.append((t.float() * (1 / scale)).to(E4M3).double() * scale.double())
    exact = rounded[0].t() @ rounded[1]
    for cols in (slice(0, n), slice(0, min(n, 16)), slice(16, n)):
        if cols.start < cols.stop:
            found = gradient.columns(cols)
            assert found.is_contiguous() and found.dtype == dtype
            assert_matches(found, exact[:, cols], dtype, exact[:, cols].to(dtype))


@pytest.fixture
def on_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(three_products, "check_fp8", lambda device, dtype: None)
    monkeypatch.setattr(whole, "takes_whole_layers", lambda device: True)
    monkeypatch.setattr(whole, "COLUMN_UNIT", 128)
    monkeypatch.setattr(whole, "cache_bytes", lambda device: 2**14)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_only_alpha_and_beta_notice_and_by_little(
    dropout: float, kernels: str, on_any_device: None, triton_device: torch.device
) -> None:
    case = make_case(24, 300, 3, (40,))
    x, weight, alpha, beta, dy = (
        t.detach().to(triton_device) for t in (case.x, case.weight, case.alpha, case.beta, case.dy)
    )
    inputs = [t.requires_grad_() for t in (x, alpha, beta)]
    results = []
    for precision in ("auto", "fp8"):
        torch.manual_seed(0)
        with use_kernels(kernels):
            y = spp_linear(x, weight, None, alpha, beta, 2.0, dropout, grad_precision=precision)
            results.append([y, *torch.autograd.grad(y, inputs, dy)])
    for one, two in zip(results[0][:2], results[1][:2], strict=True):
        assert_same_bits(two, one)
    for exact, rounded in zip(results[0][2:], results[1][2:], strict=True):
        relative = float((rounded - exact).norm() / exact.norm())
        assert 1e-4 < relative < 0.06


@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply:RuntimeWarning")  # numpy, interpreting
def test_infinity_in_a_gradient_reaches_the_parameters(on_any_device: None, triton_device: torch.device) -> None:
    case = make_case(8, 16, 2, (4,), torch.float16)
    x, weight, alpha, beta, dy = (
        t.detach().to(triton_device) for t in (case.x, case.weight, case.alpha, case.beta, case.dy)
    )
    dy[1, 2] = float("inf")  # what loss scaling looks for
    for kernels in ("torch", "triton"):
        with use_kernels(kernels):
            alpha.requires_grad_()
            y = spp_linear(x, weight, None, alpha, beta, 2.0, grad_precision="fp8")
            (grad,) = torch.autograd.grad(y, alpha, dy)
        assert not torch.isfinite(grad).all()


def test_an_empty_batch_has_zero_gradients(on_any_device: None, triton_device: torch.device) -> None:
    case = make_case(8, 16, 2, (0,))
    x, weight, alpha, beta = (t.detach().to(triton_device) for t in (case.x, case.weight, case.alpha, case.beta))
    alpha.requires_grad_()
    spp_linear(x, weight, None, alpha, beta, 2.0, grad_precision="fp8").sum().backward()
    assert alpha.grad is not None and not alpha.grad.any()


def test_where_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(8, 16, 2, (4,))
    given = case.x, case.weight, None, case.alpha, case.beta, 2.0
    with pytest.raises(ConfigError, match=r"capability 8\.9 or later, but the layer is on cpu; use"):
        spp_linear(*given, grad_precision="fp8")
    with pytest.raises(ConfigError, match="grad_precision is 'fp4'; known: auto, fp8"):
        spp_linear(*given, grad_precision="fp4")
    with torch.no_grad():
        spp_linear(*given, grad_precision="fp8")  # no gradient, nothing to refuse
    with pytest.raises(ConfigError, match="the layer computes in float64"):
        check_fp8(torch.device("cuda"), torch.float64)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "pretended")
    with pytest.raises(ConfigError, match=r"pretended has 8\.0"):
        check_fp8(torch.device("cuda"), torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: fp8.CAPABILITY)
    check_fp8(torch.device("cuda"), torch.bfloat16)


def test_a_wrapped_model_takes_it_and_saves_nothing_of_it(on_any_device: None) -> None:
    model = nn.Sequential(nn.Linear(16, 8, bias=False), nn.Linear(8, 4, bias=False))
    for linear in model:
        linear.weight.data *= torch.arange(linear.in_features) % 2
    wrap(model, 2, target_modules="all-linear", seed=0, grad_precision="fp8")
    for layer in model:
        torch.nn.init.ones_(layer.spp_beta)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    grads = []
    for precision in ("fp8", "auto"):
        if precision == "auto":
            set_grad_precision(model, precision)
        model.zero_grad()
        model(x).square().sum().backward()
        grads.append([p.grad.clone() for p in adapter_parameters(model)])
    for rounded, exact in zip(*grads, strict=True):
        assert 1e-4 < float((rounded - exact).norm() / exact.norm()) < 0.1
    assert "grad_precision" not in adapter_config(model).to_dict()
    with pytest.raises(ConfigError, match="grad_precision is 'half'"):
        set_grad_precision(model, "half")
    plain = nn.Sequential(nn.Linear(16, 8, bias=False))
    with pytest.raises(ConfigError, match="grad_precision is 'half'"):
        wrap(plain, 2, target_modules="all-linear", grad_precision="half")
    assert isinstance(plain[0], nn.Linear)
    with pytest.raises(WrapError, match="not wrapped"):
        set_grad_precision(plain, "fp8")
