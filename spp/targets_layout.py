"""How projection weights are stored: which parameters are projections, and along which axis their inputs run.

    nn.Linear             (out, in)        input axis −1
    transformers' Conv1D  (in, out)        input axis −2        GPT-2
    experts, fused        (E, out, in)     input axis −1        Mixtral, Qwen-MoE, DeepSeek, …
    experts, transposed   (E, in, out)     input axis −2        gpt_oss, Llama 4, Aria

N:M groups always run along the input axis. A pair of fused expert weights tells its own layout: with hidden size h and
intermediate size i, gate_up is (2i, h) and down (h, i), or, transposed, (h, 2i) and (i, h); both never fit at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spp.offload import values
from spp.packed import quantized_kind, read_quantized

EXPERT_WEIGHTS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
# Checkpoints whose 2-D weights of that model_type are stored (in, out): those of transformers' Conv1D.
_CONV1D_TYPES = ("gpt2", "imagegpt", "openai-gpt", "decision_transformer", "clvp_decoder")


@dataclass(frozen=True, eq=False)
class Projection:
    """A projection's weight in a module, seen as matrices (out, in) whatever its storage.

    Args:
        path: of the module; for a fused expert weight with the parameter's name behind it.
        module: that holds the parameter.
        name: of the parameter.
        input_axis: −1 for (…, out, in), −2 for (…, in, out).
    """

    path: str
    module: nn.Module
    name: str = "weight"
    input_axis: int = -1

    @property
    def weight(self) -> Tensor:
        """The parameter as it is stored now: (out, in), (in, out), either with experts; quantized, a copy."""
        if quantized_kind(self.module):
            return read_quantized(self.module, self.path).dense()
        weight = getattr(self.module, self.name)
        assert isinstance(weight, Tensor)
        return weight

    def dense_weight(self) -> Tensor:
        """Return `weight` with its numbers, to be read only: where accelerate has it offloaded, a copy."""
        weight = self.weight
        return values(self.module, self.name) if weight.is_meta and self.name in self.module._parameters else weight

    @property
    def parameter_path(self) -> str:
        """The path of the parameter, its key in the model's state dict."""
        return self.path if self.path.endswith(f".{self.name}") else f"{self.path}.{self.name}"

    @property
    def fused(self) -> bool:
        """Whether it holds the matrices of several experts."""
        return len(self.shape) == 3

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight as it is stored; of a packed one, as it would be."""
        parameter = self.module._parameters.get(self.name)
        if parameter is not None and not quantized_kind(self.module):
            return tuple(parameter.shape)
        return int(self.module.out_features), int(self.module.in_features)  # type: ignore[arg-type]

    @property
    def in_features(self) -> int:
        """n, the length of the input axis."""
        return self.shape[self.input_axis]

    @property
    def out_features(self) -> int:
        """m, the length of the other axis."""
        return self.shape[-3 - self.input_axis]

    def write(self, weight: Tensor) -> None:
        """Store a weight of this shape; the Parameter keeps its identity unless the dtype changes."""
        parameter = self.module._parameters[self.name]
        assert parameter is not None
        if weight.dtype == parameter.dtype:
            with torch.no_grad():
                parameter.copy_(weight)
        else:
            self.module._parameters[self.name] = nn.Parameter(weight, requires_grad=parameter.requires_grad)

    def matrices(self) -> list[Tensor]:
        """Return views (out, in): one, or one an expert; what is written to them is written to the parameter."""
        return as_matrices(self.weight.detach(), transposed=self.input_axis == -2)


def as_matrices(weight: Tensor, *, transposed: bool) -> list[Tensor]:
    """Return a weight, (out, in) or (E, out, in), or with inputs first, as views (out, in): one, or one an expert."""
    stored = list(weight.unbind(0)) if weight.dim() == 3 else [weight]
    return [matrix.T for matrix in stored] if transposed else stored


def is_linear(module: nn.Module) -> bool:
    """Whether the module is nn.Linear (or a subclass), or a layer of ours around one."""
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False  # nn.MultiheadAttention's own: it reads the weight and never calls the module
    if isinstance(module, nn.Linear) or hasattr(module, "packed_layout"):
        return True
    return hasattr(module, "spp_rule") and not hasattr(module, "num_experts")  # an expert's adapter holds no weight


def is_conv1d(module: nn.Module) -> bool:
    """Whether the module is transformers' Conv1D, a linear that stores (in, out)."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def find_projections(model: nn.Module) -> list[Projection]:
    """Return every linear, Conv1D and fused expert weight of a model, in module order, each once."""
    found: list[Projection] = []
    inside = "\0"
    for path, module in model.named_modules():
        if path.startswith(inside):
            continue
        if is_linear(module):
            found.append(Projection(path, module, input_axis=getattr(module, "input_axis", -1)))
            inside = f"{path}." if path else "\0"  # a layer around a linear counts as that linear
        elif is_conv1d(module):
            found.append(Projection(path, module, input_axis=-2))
        else:
            found += _expert_projections(path, module)
    return found


def disk_input_axes(shapes: Mapping[str, tuple[int, ...]], model_type: str | None) -> dict[str, int]:
    """Return the input axis, counted from the front, of every 2-D and 3-D weight of a checkpoint.

    Args:
        shapes: of its tensors by key.
        model_type: of its config.json, if it has one.
    """
    matrix_axis = 0 if model_type in _CONV1D_TYPES else 1
    axes = {}
    for key, shape in shapes.items():
        if len(shape) == 2:
            axes[key] = matrix_axis
        elif len(shape) == 3:
            prefix = key.rpartition(".")[0]
            pair = (shapes.get(f"{prefix}.gate_up_proj"), shapes.get(f"{prefix}.down_proj"))
            axes[key] = 1 if _transposed(*pair) else 2
    return axes


def _expert_projections(path: str, module: nn.Module) -> list[Projection]:
    fused = {n: p for n, p in module._parameters.items() if p is not None and p.dim() == 3 and n in EXPERT_WEIGHTS}
    if not fused:  # lists of expert matrices under one name, as JetMoE has them
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() == 3 and hasattr(module, "num_experts"):
            return [Projection(path, module)]
        return []
    declared = getattr(module, "is_transposed", None)
    if isinstance(declared, bool):
        transposed = declared
    else:
        shapes = [None if (p := fused.get(name)) is None else tuple(p.shape) for name in ("gate_up_proj", "down_proj")]
        transposed = _transposed(*shapes)
    axis = -2 if transposed else -1
    return [Projection(f"{path}.{name}" if path else name, module, name, axis) for name in fused]


def _transposed(gate_up: tuple[int, ...] | None, down: tuple[int, ...] | None) -> bool:
    """Whether a pair of fused expert weights is stored (E, in, out), as their shapes tell."""
    if gate_up is None or down is None or len(gate_up) != 3 or len(down) != 3:
        return False
    return gate_up[1] == down[2] and gate_up[2] == 2 * down[1]
