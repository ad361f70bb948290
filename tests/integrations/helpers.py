"""A small pruned model, the same one each time, and a few steps of training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.helpers.models import prune_nm_, tiny_llama

IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(1))
Q0 = "model.layers.0.self_attn.q_proj"


def pruned(dtype: torch.dtype = torch.float32, **options: object) -> nn.Module:
    """A pruned two-layer Llama; float32 weights are the same for every dtype before rounding."""
    return prune_nm_(tiny_llama(initializer_range=0.2, **options)).to(dtype)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """The logits in eval mode."""
    training = model.training
    result = model.eval()(input_ids=IDS).logits
    model.train(training)
    return result


def train(model: nn.Module, steps: int = 3, seed: int = 0) -> nn.Module:
    """Train what requires gradients, with one random stream whoever wrapped the model."""
    torch.manual_seed(seed)
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=3.0)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def scatter(model: nn.Module, adapter: str = "default", seed: int = 0) -> nn.Module:
    """Fill an adapter of a PEFT model with random numbers large enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith((f"spp_alpha.{adapter}", f"spp_beta.{adapter}")):
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model
