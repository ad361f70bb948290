"""How projection weights are stored: which parameters are projections, and along which axis their inputs run.

    nn.Linear             (out, in)        input axis −1
    transformers' Conv1D  (in, out)        input axis −2        GPT-2
    experts, fused        (E, out, in)     input axis −1        Mixtral, Qwen-MoE, DeepSeek, …
    experts, transposed   (E, in, out)     input axis −2        gpt_oss, Llama 4, Aria

A packed weight has the shape and axis that the dense one would have.
N:M groups always run along the input axis. A pair of fused expert weights tells its own layout: with hidden size h and
intermediate size i, gate_up is (2i, h) and down (h, i), or, transposed, (h, 2i) and (i, h); both never fit at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spp.weights import Weight, quantized_kind, read_quantized
from spp.weights.base import as_matrices
from spp.weights.offload import parameter_weight

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# The same projections under the names of other architectures, as the last component of the module path.
OTHER_PROJECTIONS = (
    *("qkv_proj", "gate_up_proj"),  # Phi-3, fused
    *("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),  # GPT-NeoX, Falcon, BLOOM
    *("out_proj", "fc1", "fc2", "fc_in", "fc_out"),  # OPT, Phi, GPT-J
    *("Wqkv", "c_attn", "c_proj", "c_fc"),  # MPT, GPT-2, StarCoder2
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),  # DeepSeek's latent attention
    *("w1", "w2", "w3", "in_proj"),  # LFM2; Mamba
    *("in_proj_qkvz", "in_proj_qkv", "in_proj_z"),  # Qwen3-Next and Qwen3.5, linear attention
    *("linear_x", "linear_y", "linear_out", "Wi", "Wo"),  # RecurrentGemma; ModernBERT's decoder
    *("input_linear", "output_linear", "kv_proj"),  # JetMoE, Granite's shared experts
)
EXPERT_WEIGHTS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
_NOT_PROJECTION = re.compile(
    r"(^|\.)(lm_head|embed_out|score|classifier|router(\.layer)?|gate|shared_expert_gate|wte|wpe|[^.]*embed[^.]*|[^.]*norm[^.]*)"
    r"(\.[^.]*)?$"
)
# Checkpoints whose 2-D weights of that model_type are stored (in, out): those of transformers' Conv1D.
_CONV1D_TYPES = ("gpt2", "imagegpt", "openai-gpt", "decision_transformer", "clvp_decoder")


def is_projection_key(key: str, ndim: int) -> bool:
    """Whether a state-dict key names a projection's weight: 2-D or 3-D, no embedding, output head, router or norm.

    Args:
        key: such as "model.layers.0.mlp.up_proj.weight", in memory or on disk.
        ndim: number of dimensions of the tensor.
    """
    if ndim not in (2, 3) or _NOT_PROJECTION.search(key):
        return False
    if ndim == 3 and key.rpartition(".")[2] in EXPERT_WEIGHTS:
        return True
    return key.endswith(".weight") and not (ndim == 3 and "conv" in key)


@dataclass(frozen=True, eq=False)
class Projection:
    """A projection's weight in a module, seen as matrices (out, in) whatever its storage.

    Args:
        path: of the module; for a fused expert weight with the parameter's name behind it.
        module: that holds the parameter; packed experts are held by a submodule of the parameter's name.
        name: of the parameter.
        input_axis: −1 for (…, out, in), −2 for (…, in, out).
    """

    path: str
    module: nn.Module
    name: str = "weight"
    input_axis: int = -1

    @property
    def weight(self) -> Tensor:
        """The parameter as it is stored now: (out, in), (in, out), either with experts; packed or quantized, a copy."""
        if quantized_kind(self.module):
            return read_quantized(self.module, self.path).dense()
        weight = getattr(self.packed or self.module, "weight" if self.packed else self.name)
        assert isinstance(weight, Tensor)
        return weight

    def held(self) -> Weight:
        """Return the weight, however it is held."""
        if (holder := self.packed) is not None:
            held = holder.held()  # type: ignore[operator]
            assert isinstance(held, Weight)
            return held
        if quantized_kind(self.module):
            return read_quantized(self.module, self.path)
        return parameter_weight(self.module, self.name, self.input_axis)

    @property
    def parameter_path(self) -> str:
        """The path of the parameter, its key in the model's state dict."""
        return self.path if f".{self.path}".endswith(f".{self.name}") else f"{self.path}.{self.name}".removeprefix(".")

    @property
    def packed(self) -> nn.Module | None:
        """The module that holds the weight packed or as codes; None where it is a Parameter."""
        holder = self.module if hasattr(self.module, "packed_layout") else self.module._modules.get(self.name)
        return holder if getattr(holder, "packed_layout", None) is not None else None

    @property
    def operand(self) -> Tensor:
        """The tensor that the module's own code multiplies by: the parameter, or the placeholder of packed experts."""
        operand = getattr(self.module, self.name)
        assert isinstance(operand, Tensor)
        return operand

    @property
    def fused(self) -> bool:
        """Whether it holds the matrices of several experts."""
        return len(self.shape) == 3

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight as it is stored; of a packed one, as it would be."""
        parameter = self.module._parameters.get(self.name)
        if parameter is None:
            parameter = self.module.__dict__.get(self.name)  # what stands for packed experts
        if parameter is not None and not quantized_kind(self.module):
            return tuple(parameter.shape)
        out_features, in_features = features(self.module)
        return (out_features, in_features) if self.input_axis == -1 else (in_features, out_features)

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

    def release(self) -> None:
        """Free the parameter of fused experts; the module keeps a meta placeholder.

        It has the shape and dtype that the module's own code asks for, and tells experts apart
        (spp.models.expert_products); as a plain attribute, it is found before the parameters, and belongs to no state
        dict.
        """
        parameter = self.module._parameters[self.name]
        assert parameter is not None
        with torch.inference_mode(False):
            self.module.__dict__[self.name] = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        self.module._parameters[self.name] = None  # in its place, so that the order of keys is kept

    def stand_for(self, dtype: torch.dtype) -> None:
        """Set the dtype of the meta placeholder."""
        if self.operand.dtype != dtype:
            with torch.inference_mode(False):
                self.module.__dict__[self.name] = torch.empty(self.shape, dtype=dtype, device="meta")

    def hold(self, weight: nn.Parameter) -> None:
        """Put a parameter back in place of its placeholder."""
        self.module.__dict__.pop(self.name, None)
        self.module._parameters[self.name] = weight

    def matrices(self) -> list[Tensor]:
        """Return views (out, in): one, or one an expert; what is written to them is written to the parameter."""
        return as_matrices(self.weight.detach(), transposed=self.input_axis == -2)


_INSERTED = ("_orig_mod", "_checkpoint_wrapped_module")


def plain_name(name: str) -> str:
    """Return a module's path or a parameter's name without what torch.compile and checkpoint_wrapper put into it."""
    return ".".join(part for part in name.split(".") if part not in _INSERTED)


def is_compiled(module: object) -> bool:
    """Whether this is what torch.compile returned for a module: it holds that module, and only calls it."""
    return type(module).__name__ == "OptimizedModule" and isinstance(getattr(module, "_orig_mod", None), nn.Module)


def is_linear(module: nn.Module) -> bool:
    """Whether the module is nn.Linear (or a subclass), or a layer of ours around one."""
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False  # nn.MultiheadAttention's own: it reads the weight and never calls the module
    if isinstance(module, nn.Linear):
        return True
    ours = hasattr(module, "packed_layout") or hasattr(module, "spp_rule")
    # What is beside an expert's weight belongs to its module; layers of another method say the way out of it.
    return ours and not hasattr(module, "num_experts") and not hasattr(module, "way_out")


def is_conv1d(module: nn.Module) -> bool:
    """Whether the module is transformers' Conv1D, a linear that stores (in, out)."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def input_axis_of(linear: nn.Module) -> int:
    """Return the axis of a linear's weight, as it is stored, that its inputs run along: −1, of a Conv1D −2."""
    return -2 if is_conv1d(linear) else int(getattr(linear, "input_axis", -1))


def features(linear: nn.Module) -> tuple[int, int]:
    """Return (out_features, in_features) of a linear, whatever its storage."""
    if is_conv1d(linear):
        n, m = linear.get_parameter("weight").shape
        return m, n
    return int(linear.out_features), int(linear.in_features)  # type: ignore[arg-type]


def find_projections(model: nn.Module) -> list[Projection]:
    """Return every linear, Conv1D and fused expert weight of a model, in module order, each once."""
    found: list[Projection] = []
    inside = "\0"
    for name, module in model.named_modules():
        path = plain_name(name)
        if path.startswith(inside) or is_compiled(module):
            continue
        if is_linear(module) or is_conv1d(module):
            found.append(Projection(path, module, input_axis=input_axis_of(module)))
            inside = f"{path}." if path else "\0"  # a layer around a linear counts as that linear
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
    fused = {name: shape for name in EXPERT_WEIGHTS if (shape := _expert_shape(module, name)) is not None}
    if not fused:  # lists of expert matrices under one name, as JetMoE has them
        if hasattr(module, "num_experts") and _expert_shape(module, "weight") is not None:
            return [Projection(f"{path}.weight" if path else "weight", module)]
        return []
    declared = getattr(module, "is_transposed", None)
    if isinstance(declared, bool):
        transposed = declared
    else:
        transposed = _transposed(fused.get("gate_up_proj"), fused.get("down_proj"))
    axis = -2 if transposed else -1
    order = [name for name in module._parameters if name in fused]
    return [Projection(f"{path}.{name}" if path else name, module, name, axis) for name in order]


def _expert_shape(module: nn.Module, name: str) -> tuple[int, ...] | None:
    """Return the shape of a fused weight as it is stored, or would be if it is packed; None where there is none."""
    layout: Any = getattr(module._modules.get(name), "packed_layout", None)
    if name in module._parameters and layout is not None:
        return tuple(layout.shape)
    parameter = module._parameters.get(name)
    return tuple(parameter.shape) if parameter is not None and parameter.dim() == 3 else None


def _transposed(gate_up: tuple[int, ...] | None, down: tuple[int, ...] | None) -> bool:
    """Whether a pair of fused expert weights is stored (E, in, out), as their shapes tell."""
    if gate_up is None or down is None or len(gate_up) != 3 or len(down) != 3:
        return False
    return gate_up[1] == down[2] and gate_up[2] == 2 * down[1]
