"""A merged model in OpenVINO's format, with every zero where it was.

    pip install openvino
    python examples/openvino_export.py --model merged --out merged-openvino

torch.export traces the model without a cache of keys and values, for sequences of one length; OpenVINO converts that
and writes an .xml and a .bin. Then each pruned weight is looked for among the constants of the file that was written.

Tried with openvino 2026.4.1, torch 2.13 and transformers 5.23 on a CPU: a two-layer 2:4 Llama in float32 and with
weights compressed to float16, and SmolLM2-135M at 2:4 with compressed ones; all masks were there. Whether OpenVINO is
faster with such weights was not tried, nor was generation with a cache, nor another device.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import openvino
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import spp


class Logits(torch.nn.Module):
    """The model as a function of token ids alone."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return logits (1, tokens, vocabulary)."""
        return self.model(input_ids=ids, use_cache=False).logits


def masks_of(path: Path) -> set[bytes]:
    """Return the shape and mask of every matrix among the constants of a converted model."""
    operations = openvino.Core().read_model(path).get_ops()
    constants = (op.data for op in operations if op.get_type_name() == "Constant")
    return {mask_of(torch.from_numpy(data != 0)) for data in constants if data.ndim == 2}


def mask_of(kept: torch.Tensor) -> bytes:
    """Return a shape and a mask as bytes that can be compared."""
    return repr(tuple(kept.shape)).encode() + kept.numpy().tobytes()


def main(source: Path, out: Path, tokens: int, half: bool) -> None:
    """Convert, look for the masks, and compare the logits."""
    report = spp.verify(source)  # against its certificate
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()
    ids = torch.randint(3, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    converted = openvino.convert_model(torch.export.export(Logits(model), (ids,)))
    out.mkdir(parents=True, exist_ok=True)
    openvino.save_model(converted, out / "model.xml", compress_to_fp16=half)

    written = masks_of(out / "model.xml")
    lost = [name for name in report.tensors if mask_of(model.get_parameter(name) != 0) not in written]
    if lost:
        raise SystemExit(f"{len(lost)} of {len(report.tensors)} weights have other zeros now, such as {lost[0]}")
    print(f"all {len(report.tensors)} pruned weights have the zeros that they had ({report.pattern})")

    with torch.no_grad():
        expected = model(ids).logits
    exact = {"INFERENCE_PRECISION_HINT": "f32"}  # by default a CPU that has bfloat16 computes in it
    found = openvino.Core().compile_model(out / "model.xml", "CPU", exact)([ids.numpy()])[0]
    difference = float((torch.from_numpy(found) - expected).abs().max() / expected.abs().max())
    print(f"largest difference of a logit: {difference:.4f} of the largest one")
    print(f"wrote {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory of a merged checkpoint, certified")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--tokens", type=int, default=16, help="length of the sequences that the output takes")
    parser.add_argument("--half", action="store_true", help="compress weights to float16")
    options = parser.parse_args()
    main(options.model, options.out, options.tokens, options.half)
