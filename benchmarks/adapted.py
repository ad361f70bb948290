"""The contenders for one linear layer: what adapts it, and what no adapter can be faster than.

    full            full fine-tuning of the layer: forward, dX and dW, as autograd runs them
    products        the same three matrix products and nothing else, into memory that is there already
    frozen          forward and dX of a layer that trains nothing
    branches        Y = X Wᵀ + s · X (W ⊙ A ⊙ β)ᵀ with both branches and every intermediate left to autograd
    branches-dropout, blocks-dropout
                    the two published forms of SPP with input dropout: the formula above on Dropout(X), and the one
                    that, for each row k of W_α, multiplies Dropout(X) ⊙ α_k by the rows of W that α_k scales
    hira-rule, masked-lora
                    the peers that are rules of spp, of --peft-rank, computed as SPP is

Every adapter is away from its start, so that no contender can skip what is still zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import installed, require_peft
from spp.errors import ConfigError
from spp.layers.linear import SPPLinear
from spp.masks.patterns import Pattern
from spp.pruning import magnitude_mask
from spp.rules.spp import row_groups

DROPOUT = 0.05  # the paper's
SCALING = 2.0
BETA = 0.05  # standard deviation of the factor that starts at zero


@dataclass(frozen=True)
class LayerSpec:
    """The layer that every contender adapts, and the ranks."""

    out_features: int
    in_features: int
    dtype: torch.dtype
    device: str
    pattern: str
    rank: int
    peft_rank: int

    def linear(self) -> nn.Linear:
        """Return the pruned layer, the same weights at every call, without bias, as in a Llama."""
        m, n = self.out_features, self.in_features
        generator = torch.Generator().manual_seed(0)
        weight = torch.empty(m, n).uniform_(-(n**-0.5), n**-0.5, generator=generator)
        weight.mul_(magnitude_mask(weight, Pattern.parse(self.pattern)))
        linear = nn.Linear(n, m, bias=False, device="meta")
        linear.weight = nn.Parameter(weight.to(self.device, self.dtype))
        return linear

    def rank_of(self, contender: str) -> int:
        """Return the r of a contender, by its name."""
        return self.peft_rank if contender.removesuffix("-16bit") in OF_PEFT_RANK else self.rank


Build = Callable[[LayerSpec], nn.Module]
OF_PEFT_RANK = ("lora", "hira", "hira-rule", "masked-lora")


class Published(nn.Module):
    """The published formula, its branches kept apart; `form` is "branches" or "blocks"."""

    def __init__(self, linear: nn.Linear, r: int, dropout: float, form: str) -> None:
        super().__init__()
        m, n = linear.weight.shape
        options: Any = {"dtype": linear.weight.dtype, "device": linear.weight.device}
        self.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
        self.alpha = nn.Parameter(torch.empty(r, n, **options).uniform_(-(n**-0.5), n**-0.5))
        self.beta = nn.Parameter(torch.empty(m, 1, **options).normal_(0, BETA))
        self.groups = row_groups(m, r, linear.weight.device)
        self.sizes = torch.bincount(self.groups, minlength=r).tolist()
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        """Compute Y (T, m) from x (T, n)."""
        frozen = F.linear(x, self.weight)
        x = self.dropout(x)
        if self.form == "branches":
            return frozen + SCALING * F.linear(x, self.weight * self.alpha[self.groups] * self.beta)
        blocks = zip(self.alpha, self.weight.split(self.sizes), strict=True)
        parts = [F.linear(x * row, block) for row, block in blocks]  # r times (T, m_k)
        return frozen + torch.cat(parts, -1) * self.beta.view(-1) * SCALING


class Products(nn.Module):
    """The three matrix products of a step, without autograd, into memory that is kept."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
        self.gradient = torch.empty_like(self.weight)
        self.outputs: tuple[Tensor, Tensor] | None = None

    def step(self, x: Tensor, dy: Tensor) -> None:
        """Write X Wᵀ, dY W and dYᵀ X."""
        if self.outputs is None:
            self.outputs = torch.empty_like(dy), torch.empty_like(x)
        y, dx = self.outputs
        with torch.no_grad():
            torch.mm(x, self.weight.t(), out=y)
            torch.mm(dy, self.weight, out=dx)
            torch.mm(dy.t(), x, out=self.gradient)


def contenders() -> dict[str, Build]:
    """Return what builds each contender from the layer's description, by name."""
    return {
        "spp": _spp(0.0, "input"),
        "spp-input-dropout": _spp(DROPOUT, "input"),
        "spp-alpha-dropout": _spp(DROPOUT, "alpha"),
        "spp-packed": _spp(0.0, "input", packed=True),
        "spp-bf16-saved": _spp(0.0, "input", saved="bfloat16"),
        "hira-rule": _rule("hira"),
        "masked-lora": _rule("masked_lora"),
        "lora": _peft("lora"),
        "hira": _peft("hira"),
        "branches": _published("branches", 0.0),
        "branches-dropout": _published("branches", DROPOUT),
        "blocks-dropout": _published("blocks", DROPOUT),
        "full": lambda spec: spec.linear().requires_grad_(True),
        "products": lambda spec: Products(spec.linear()),
        "frozen": lambda spec: spec.linear().requires_grad_(False),
    }


def make_layer(name: str, spec: LayerSpec) -> nn.Module:
    """Return a contender, drawn from the same seed at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return contenders()[name](spec).train()


class LayerStep:
    """One training step of one contender: the forward of X (T, n), the backward of a given dY (T, m).

    Args:
        name: the contender's.
        spec: the layer.
        tokens: T.
    """

    def __init__(self, name: str, spec: LayerSpec, tokens: int) -> None:
        self.layer = make_layer(name, spec)
        generator = torch.Generator().manual_seed(2)
        x, dy = (torch.randn(tokens, k, generator=generator) for k in (spec.in_features, spec.out_features))
        self.x, self.dy = x.to(spec.device, spec.dtype), dy.to(spec.device, spec.dtype)
        self.trained = [p for p in self.layer.parameters() if p.requires_grad]
        self.x.requires_grad_(not isinstance(self.layer, Products))

    def forward(self) -> Tensor:
        """Compute Y."""
        y: Tensor = self.layer(self.x)
        return y

    def step(self) -> None:
        """Compute Y and the gradients of X and of what the contender trains."""
        if isinstance(self.layer, Products):
            self.layer.step(self.x, self.dy)
            return
        for tensor in (self.x, *self.trained):
            tensor.grad = None
        self.forward().backward(self.dy)

    def parameters(self) -> int:
        """Return how many values get a gradient besides X."""
        return self.layer.gradient.numel() if isinstance(self.layer, Products) else sum(p.numel() for p in self.trained)


def _spp(dropout: float, mode: str, *, packed: bool = False, saved: str = "full") -> Build:
    def build(spec: LayerSpec) -> nn.Module:
        layer = SPPLinear(spec.linear(), spec.rank, SCALING, dropout, mode, packed=packed)
        layer.saved_activations = saved
        nn.init.normal_(layer.spp_beta, 0, BETA)
        return layer

    return build


def _rule(rule: str) -> Build:
    def build(spec: LayerSpec) -> nn.Module:
        layer = SPPLinear(spec.linear(), spec.peft_rank, rule=rule)
        nn.init.normal_(layer.adapter_parameters()[1], 0, BETA)
        return layer

    return build


def _published(form: str, dropout: float) -> Build:
    return lambda spec: Published(spec.linear(), spec.rank, dropout, form)


def _peft(name: str) -> Build:
    def build(spec: LayerSpec) -> nn.Module:
        peft = require_peft(name)
        kind = {"lora": "LoraConfig", "hira": "HiraConfig"}[name]
        if not hasattr(peft, kind):
            raise ConfigError(f"peft {installed('peft')} has no {kind}; leave {name} out of --contenders")
        options: dict[str, Any] = {"lora_alpha": 2 * spec.peft_rank} if name == "lora" else {}
        config = getattr(peft, kind)(r=spec.peft_rank, target_modules=["linear"], **options)
        model = peft.get_peft_model(nn.ModuleDict({"linear": spec.linear()}), config)
        for key, parameter in model.named_parameters():
            if f"{name}_B" in key:
                nn.init.normal_(parameter, 0, BETA)
        layer: nn.Module = model.base_model.model["linear"]
        return layer

    return build
