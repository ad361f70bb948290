"""Who does the element-wise work: the choice, what it says when it cannot be followed, and the probe of a GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from spp.errors import ConfigError, SPPWarning
from spp.functional import spp_linear
from spp.kernels import choice
from spp.kernels.choice import by_triton, kernels, use_kernels
from tests.helpers.layers import make_case

DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_the_default_is_plain_torch_on_a_cpu() -> None:
    assert kernels() == "auto"
    assert not by_triton(CPU, torch.float32, "spp")


def test_a_choice_ends_with_its_block() -> None:
    with use_kernels("torch"):
        assert kernels() == "torch"
        with use_kernels("triton"):
            assert kernels() == "triton"
        assert kernels() == "torch"
    assert kernels() == "auto"
    with pytest.raises(ConfigError, match="'cuda'; known: auto, torch, native, triton"), use_kernels("cuda"):
        pass


@pytest.mark.slow
def test_the_environment_chooses_and_a_wrong_value_is_explained() -> None:
    code = (
        "import torch; from spp.functional import spp_linear\n"
        "spp_linear(torch.ones(1, 2), torch.ones(2, 2), None, torch.ones(1, 2), torch.ones(2, 1), 1.0)"
    )
    environment = {"SPP_KERNELS": "fast", "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode != 0
    assert "ConfigError: SPP_KERNELS is 'fast'; known: auto, torch, native, triton" in run.stderr


@pytest.mark.parametrize(
    ("device", "dtype", "rule", "complaint"),
    [
        (torch.device("mps"), torch.float32, "spp", "the weight is on mps"),
        (CPU, torch.float64, "spp", "no kernels for float64"),
        (CPU, torch.float32, "other", "no kernels for the rule 'other'"),
    ],
)
def test_what_triton_cannot_do_is_refused_where_it_was_asked_for(
    device: torch.device, dtype: torch.dtype, rule: str, complaint: str, triton_device: torch.device
) -> None:
    with use_kernels("triton"), pytest.raises(ConfigError, match=complaint):
        by_triton(device, dtype, rule)
    if device != GPU:
        assert not by_triton(device, dtype, rule)


def test_interpreted_kernels_run_when_asked_for(triton_device: torch.device) -> None:
    case = make_case(12, 8, 4, (5,))
    x, weight, alpha, beta = (t.detach().to(triton_device) for t in (case.x, case.weight, case.alpha, case.beta))
    with use_kernels("triton"):
        assert by_triton(triton_device, torch.float32, "spp")
        found = spp_linear(x, weight, None, alpha, beta, 2.0)
    with use_kernels("torch"):
        assert torch.equal(found, spp_linear(x, weight, None, alpha, beta, 2.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_probe_passes_and_finds_what_is_wrong(
    dtype: torch.dtype, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    import spp.kernels.triton as module

    module.probe(triton_device, dtype)
    build, reduce = module.build, module.reduce
    monkeypatch.setattr(module, "build", lambda weight, factors, out: build(weight * 2, factors, out))
    with pytest.raises(ArithmeticError, match="W_eff differs"):
        module.probe(triton_device, dtype)
    monkeypatch.setattr(module, "build", build)
    monkeypatch.setattr(module, "reduce", lambda weight, *rest, **options: reduce(weight * 1.01, *rest, **options))
    with pytest.raises(ArithmeticError, match="gradients differ"):
        module.probe(triton_device, dtype)


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "pretended")
    choice._works.cache_clear()
    yield
    choice._works.cache_clear()


def test_a_gpu_that_the_kernels_fail_on_is_left_to_torch_with_one_warning(
    pretended_gpu: None, monkeypatch: pytest.MonkeyPatch, triton_device: torch.device
) -> None:
    import spp.kernels.triton as module

    def fail(device: torch.device) -> None:
        raise ArithmeticError("W_eff differs from plain torch's")

    monkeypatch.setattr(module, "probe", fail)
    with pytest.warns(SPPWarning, match=r"do not work on pretended.*slower: ArithmeticError: W_eff differs"):
        assert not by_triton(GPU, torch.bfloat16, "spp")
    assert not by_triton(GPU, torch.bfloat16, "spp")


def test_a_gpu_that_the_kernels_work_on_is_theirs(
    pretended_gpu: None, monkeypatch: pytest.MonkeyPatch, triton_device: torch.device
) -> None:
    import spp.kernels.triton as module

    monkeypatch.setattr(module, "probe", lambda device: None)
    assert by_triton(GPU, torch.bfloat16, "spp")
    assert not by_triton(GPU, torch.float64, "spp")
    with use_kernels("torch"):
        assert not by_triton(GPU, torch.bfloat16, "spp")
    choice._works.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not by_triton(GPU, torch.bfloat16, "spp")
