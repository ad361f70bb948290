"""The contenders of a whole model's training step: what adapts a pruned causal language model, and one step of each.

SPP in every mode, PST, PEFT's LoRA and HiRA, all on the same seven projections of the same pruned model and the same
tokens.

    spp-bf16-saved      layers keep their inputs for backward in bfloat16 (spp.kernels.autograd)
    spp-chunked-loss    the loss is taken over LOSS_CHUNK tokens at a time (spp.training.causal_loss)
    spp-low-memory      both
    pst                 PST at the final sparsity, with --peft-rank for its ranks
    pst-autograd        the same by its plain formula, left to autograd (below)
    hira-rule, masked-lora
                        the peers that are rules of spp, of --peft-rank
    spp-nf4, spp-int8   on weights that bitsandbytes has quantized to 4 or 8 bits
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.models import add_model_options, load_dense, model_arguments
from spp.errors import ConfigError
from spp.masks.patterns import Pattern
from spp.models.targets import resolve_projections
from spp.pruning import magnitude_mask
from spp.pst import PSTLinear, pst_layers, set_sparsity
from spp.pst import wrap as wrap_pst
from spp.training.causal_loss import causal_lm_loss
from spp.wrapping.state import replace_modules
from spp.wrapping.wrap import set_saved_activations, wrap

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DROPOUT = 0.05  # of the contenders with dropout: the paper's
MEMORY_STEPS = 3  # the first creates the optimizer's state; the peak is reached from the second on
LOSS_CHUNK = 256  # tokens


def contenders(rank: int, peft_rank: int, pattern: str = "2:4") -> dict[str, Callable[[nn.Module], nn.Module]]:
    """Return what adapts a pruned model, by the name of the contender."""

    def lora(model: nn.Module) -> nn.Module:
        peft = harness.require_peft("lora")
        config = peft.LoraConfig(r=peft_rank, lora_alpha=2 * peft_rank, target_modules=list(PROJECTIONS))
        return peft.get_peft_model(model, config)

    def hira(model: nn.Module) -> nn.Module:
        peft = harness.require_peft("hira")
        if not hasattr(peft, "HiraConfig"):
            raise ConfigError(f"peft {harness.installed('peft')} has no HiRA; leave hira out of --contenders")
        config = peft.HiraConfig(r=peft_rank, target_modules=list(PROJECTIONS))
        return peft.get_peft_model(model, config)

    names = list(PROJECTIONS)

    def saved_in_bfloat16(model: nn.Module) -> nn.Module:
        wrap(model, rank, target_modules=names)
        set_saved_activations(model, "bfloat16")
        return model

    def pst(model: nn.Module) -> nn.Module:
        parsed = Pattern.parse(pattern)
        nm = str(parsed) if parsed.is_nm else None
        wrap_pst(model, peft_rank, mask_rank=peft_rank, pattern=nm, target_modules=names)
        set_sparsity(model, parsed.sparsity)
        return model

    return {
        "spp": lambda model: wrap(model, rank, target_modules=names),
        "spp-input-dropout": lambda model: wrap(model, rank, target_modules=names, dropout=DROPOUT),
        "spp-alpha-dropout": lambda model: wrap(
            model, rank, target_modules=names, dropout=DROPOUT, dropout_mode="alpha"
        ),
        "spp-packed": lambda model: wrap(model, rank, target_modules=names, packed=True),
        "spp-bf16-saved": saved_in_bfloat16,
        "spp-chunked-loss": lambda model: wrap(model, rank, target_modules=names),
        "spp-low-memory": saved_in_bfloat16,
        "pst": pst,
        "pst-autograd": lambda model: use_plain_formula(pst(model)),
        "spp-nf4": lambda model: wrap(quantize(model, "nf4"), rank, target_modules=names),
        "spp-int8": lambda model: wrap(quantize(model, "int8"), rank, target_modules=names),
        "hira-rule": lambda model: wrap(model, peft_rank, target_modules=names, rule="hira"),
        "masked-lora": lambda model: wrap(model, peft_rank, target_modules=names, rule="masked_lora"),
        "lora": lora,
        "hira": hira,
    }


def quantize(model: nn.Module, form: str) -> nn.Module:
    """Have bitsandbytes quantize the projections of a model, in place, one after the other.

    Args:
        form: "nf4" or "int8".
    """
    bnb = harness.require_bitsandbytes()
    for path, target in resolve_projections(model, PROJECTIONS).items():
        linear: Any = target.module
        weight, sizes = linear.weight.detach(), (linear.in_features, linear.out_features)
        made: Any
        if form == "nf4":
            made = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=weight.dtype, quant_type=form, device="meta")
            made.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type=form, module=made)
        else:
            made = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False, device="meta")
            made.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        made.bias = linear.bias
        model.set_submodule(path, made.to(weight.device))  # which quantizes
    return model


def load_model(options: argparse.Namespace) -> nn.Module:
    """Return the pruned model of the run: a dense one is pruned by magnitude."""
    model = load_dense(options)
    pattern = Pattern.parse(options.pattern)
    with torch.no_grad():
        for target in resolve_projections(model, PROJECTIONS).values():
            weight: Any = target.module.weight
            if int((weight == 0).sum()) < weight.numel() // 4:  # a model that is pruned already stays as it is
                weight.mul_(magnitude_mask(weight, pattern))
    return model


class Training:
    """One contender, ready to be trained.

    Args:
        options: of `add_training_options`.
        name: the contender's.
    """

    def __init__(self, options: argparse.Namespace, name: str) -> None:
        torch.manual_seed(0)
        self.model = contenders(options.rank, options.peft_rank, options.pattern)[name](load_model(options)).train()
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=1e-4)
        self.chunked = name in ("spp-chunked-loss", "spp-low-memory")
        config: Any = self.model.config
        generator = torch.Generator().manual_seed(0)  # building a contender may have drawn from the global one
        tokens = torch.randint(config.vocab_size, (options.batch, options.tokens), generator=generator)
        self.tokens = tokens.to(options.device)

    def loss(self) -> Tensor:
        """Compute the loss."""
        inputs = {"input_ids": self.tokens, "labels": self.tokens}
        if self.chunked:
            return causal_lm_loss(self.model, inputs, chunk=LOSS_CHUNK)
        loss: Tensor = self.model(**inputs).loss
        return loss

    def step(self) -> None:
        """Take one step: forward, backward, AdamW."""
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def parameters(self) -> int:
        """Return the number of trainable parameters."""
        return sum(p.numel() for p in self.trainable)


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that describe the model and a step."""
    add_model_options(parser, "directory or hub id; a dense one is pruned by magnitude first")
    parser.add_argument("--batch", type=int, default=4, help="rows of a step (default: 4)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a row (default: 256)")
    parser.add_argument("--rank", type=int, default=16, help="r of SPP (default: 16)")
    parser.add_argument("--peft-rank", type=int, default=8, help="r of LoRA and HiRA, ranks of PST (default: 8)")
    parser.add_argument("--pattern", default="2:4", help="pruned to this where the model is dense (default: 2:4)")


def check_training_options(options: argparse.Namespace) -> None:
    """Refuse a step that cannot be."""
    harness.require_positive(options, "batch", "tokens", "rank", "peft-rank")
    Pattern.parse(options.pattern)


def measure_in_child(module: str, options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Return what a benchmark measures of one contender in a fresh process."""
    shared = ("pattern", "batch", "tokens", "rank", "peft-rank", "device", "dtype", "threads")
    arguments = ["--child", name, *model_arguments(options), *harness.child_arguments(options, *shared)]
    return harness.in_child(module, arguments)


def describe(row: Any) -> str:
    """Return what a row's step is of, for a title."""
    return f"{row['batch']} × {row['tokens']} tokens, {row['model']} at {row['pattern']}"


def conditions(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Return the fields of a row that say what was run."""
    return {
        "contender": name,
        "model": str(options.model or options.shape),
        "pattern": options.pattern,
        "batch": options.batch,
        "tokens": options.tokens,
        "rank": options.rank if name.startswith("spp") else options.peft_rank,
    }


def add_contenders_option(parser: argparse.ArgumentParser, default: Sequence[str]) -> None:
    """Add --contenders."""
    parser.add_argument(
        "--contenders",
        nargs="+",
        default=list(default),
        choices=sorted(contenders(1, 1)),
        metavar="NAME",
        help=f"of {', '.join(contenders(1, 1))}; ratios are of the first to the others (default: {' '.join(default)})",
    )


# ---- PST as its formula stands, left to autograd: scores and mask in full, a sort, an m × n gradient for each of them.
#
#     W' = W + b·U V        S = |W'| + a₁·A B + a₂·(R ⊕ C)        Y = X (mask(S) ⊙ W')ᵀ + bias
#
# It takes the parameters of PST layers, and gives their outputs and gradients.


class PlainPST(nn.Module):
    """A PST layer by the plain formula.

    Args:
        layer: whose parameters are used, and whose sparsity holds; with a pattern, at the pattern's own sparsity.
    """

    def __init__(self, layer: PSTLinear) -> None:
        super().__init__()
        self._parameters["weight"] = layer._parameters["weight"]
        self.register_parameter("bias", layer.bias)
        self.factors = nn.ParameterList(layer.factors())
        self.scales = layer.weight_scale, layer.low_rank_scale, layer.structured_scale
        self.group = None if layer.pattern is None else layer.pattern.group
        rows = 1 if self.group is None else layer.weight.numel() // self.group
        self.pruned = layer.pruned // rows

    def forward(self, x: Tensor) -> Tensor:
        """Return (…, m) for (…, n)."""
        u, v, a, b, r, c = self.factors
        updated = self.weight + self.scales[0] * u @ v
        scores = updated.abs() + self.scales[1] * a @ b + self.scales[2] * (r.unsqueeze(1) + c.unsqueeze(0))
        mask: Any = _StraightThrough.apply(scores, self.pruned, self.group)
        return F.linear(x, mask * updated, self._parameters["bias"])


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, pruned: int, group: int | None) -> Tensor:
        rows = scores.reshape(1, -1) if group is None else scores.reshape(-1, group)
        return torch.ones_like(rows).scatter_(1, rows.argsort(dim=1)[:, :pruned], 0.0).view_as(scores)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None, None


def use_plain_formula(model: nn.Module) -> nn.Module:
    """Replace the PST layers of a wrapped model by the plain formula, in place."""
    replace_modules(model, {id(layer): PlainPST(layer) for layer in pst_layers(model).values()})
    return model
