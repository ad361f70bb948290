"""Training through the library takes the same steps as the published formula with its branches written out.

    Y = X Wᵀ + s · X (W ⊙ repeat_interleave(W_α, m / r) ⊙ W_β)ᵀ

The reference below is plain torch: its own layer, its own AdamW loop, clip, warm-up and decay; it shares with the
library nothing but the initial α and the order of the batches.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

import spp
from spp.evaluation import tokenize
from spp.training import Collator, SPPTrainer
from spp.training.data import Item, TokenBlocks
from spp.wrapping.adapters import adapter_state_dict
from tests.helpers.models import prune_nm_, tiny_llama
from tests.helpers.tolerances import STEP_LOSS
from tests.training.helpers import arguments, losses

LR, DECAY, WARMUP, CLIP, SCALING = 4e-3, 0.001, 0.03, 1.0, 2.0
SMALL_DATA = TokenBlocks(torch.randint(3, 20, (30, 32), generator=torch.Generator().manual_seed(1)))


def small() -> Any:
    """A model with weights large enough to learn something in 40 steps."""
    return prune_nm_(tiny_llama(initializer_range=0.2))


class Branches(nn.Module):
    """The two branches, kept apart."""

    def __init__(self, linear: nn.Linear, alpha: Tensor) -> None:
        super().__init__()
        self.weight = linear.weight.detach()
        self.alpha = nn.Parameter(alpha.clone())  # (r, n)
        self.beta = nn.Parameter(torch.zeros(linear.out_features, 1))  # (m, 1)

    def forward(self, x: Tensor) -> Tensor:
        blocks = self.alpha.repeat_interleave(len(self.weight) // len(self.alpha), dim=0)  # (m, n)
        return functional.linear(x, self.weight) + SCALING * functional.linear(x, self.weight * blocks * self.beta)


class Recording(Collator):
    """Remembers every batch."""

    def __init__(self) -> None:
        super().__init__(0)
        self.batches: list[Tensor] = []

    def __call__(self, items: Any) -> dict[str, Tensor]:
        batch = super().__call__(items)
        self.batches.append(batch["input_ids"])
        return batch


def train_reference(model: Any, alphas: dict[str, Tensor], batches: list[Tensor], lr: float) -> list[float]:
    """Train plain torch on the batches and return each step's loss."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    layers = {}
    for path, alpha in alphas.items():
        parent, _, name = path.rpartition(".")
        layers[path] = Branches(model.get_submodule(path), alpha)
        setattr(model.get_submodule(parent), name, layers[path])
    trained = [p for layer in layers.values() for p in (layer.alpha, layer.beta)]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=DECAY)
    warmup = math.ceil(WARMUP * len(batches))
    found = []
    model.train()
    for step, ids in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(step / warmup, (len(batches) - step) / (len(batches) - warmup))
        logits = model(ids).logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        found.append(loss.item())
    return found


def train_ours(
    model: Any, data: TokenBlocks, directory: Path, steps: int, lr: float
) -> tuple[list[float], dict[str, Tensor], list[Tensor]]:
    """Train through SPPTrainer; return losses, the initial α, and the batches in order."""
    spp.wrap(model, r=16, scaling=SCALING, seed=0)
    alphas = {
        key.removesuffix(".spp_alpha"): tensor.clone()
        for key, tensor in adapter_state_dict(model).items()
        if key.endswith(".spp_alpha")
    }
    recording = Recording()
    made = SPPTrainer(
        model,
        arguments(
            directory,
            max_steps=steps,
            learning_rate=lr,
            weight_decay=DECAY,
            warmup_steps=math.ceil(WARMUP * steps),
            max_grad_norm=CLIP,
        ),
        train_dataset=data,
        data_collator=recording,
    )
    made.remove_callback(PrinterCallback)
    made.train()
    return losses(made), alphas, recording.batches[:steps]


def check(ours: list[float], theirs: list[float], steps: int) -> None:
    assert len(ours) == len(theirs) == steps
    worst = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
    assert worst <= STEP_LOSS, f"a step's loss differs by {worst:.2e}"


@pytest.mark.slow
@pytest.mark.parametrize("lr", [LR, 2e-2])
def test_small_model(tmp_path: Path, lr: float) -> None:
    steps = 40
    ours, alphas, batches = train_ours(small(), SMALL_DATA, tmp_path, steps, lr)
    theirs = train_reference(small(), alphas, batches, lr)
    assert theirs[-1] < theirs[0] - 0.1, "too little was learned to compare"
    check(ours, theirs, steps)


@pytest.mark.slow
def test_the_comparison_notices_tiled_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """repeat_interleave and tile have the same mean; the check must tell them apart."""
    steps = 40
    ours, alphas, batches = train_ours(small(), SMALL_DATA, tmp_path, steps, 2e-2)

    def tiled(self: Tensor, repeats: int, dim: int) -> Tensor:
        return self.repeat(repeats, 1)

    monkeypatch.setattr(Tensor, "repeat_interleave", tiled)
    theirs = train_reference(small(), alphas, batches, 2e-2)
    with pytest.raises(AssertionError, match="a step's loss differs"):
        check(ours, theirs, steps)


@pytest.mark.slow
def test_smollm2(smollm2: Path, tmp_path: Path) -> None:
    """Its first blocks, 2:4, float32, 2 × 48 tokens a step, the short recipe; text that every CPython carries."""
    from pydoc_data import topics

    steps, blocks, lr = 6, 3, 2e-2
    text = topics.topics["class"] + topics.topics["function"]  # more than is used
    rows = tokenize(AutoTokenizer.from_pretrained(smollm2), text)[: 2 * 48].view(-1, 48)
    tokens = rows.repeat(steps, 1)  # the same rows again and again, so that so few steps learn something

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    del model.model.layers[blocks:]
    prune_nm_(model)

    ours, alphas, batches = train_ours(copy.deepcopy(model), TokenBlocks(tokens), tmp_path, steps, lr)
    theirs = train_reference(model, alphas, batches, lr)
    assert theirs[-1] < theirs[0] - 0.1, "nothing was learned to compare"
    check(ours, theirs, steps)


def test_items_are_whole_blocks() -> None:
    item: Item = TokenBlocks(torch.arange(6).view(2, 3))[1]
    assert item["input_ids"].tolist() == item["labels"].tolist() == [3, 4, 5]
