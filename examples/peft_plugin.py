"""SPP inside PEFT: tune with transformers' Trainer, keep the adapter as PEFT does, merge without losing a zero.

python examples/peft_plugin.py --out peft-out            on SmolLM2, pruned here
python examples/peft_plugin.py --model PRUNED --text FILE --out peft-out
"""

from __future__ import annotations

import argparse
from pathlib import Path

from peft import AutoPeftModelForCausalLM, get_peft_model
from trainer import example_text
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import spp
from spp.integrations.peft import SPPPeftConfig  # importing it makes SPP one of PEFT's methods
from spp.training import load_data


def main(model_dir: Path, text: Path, out: Path, *, steps: int, block_length: int) -> None:
    """Train, save, load and merge."""
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    if spp.sparsity(base).sparsity < 0.1:  # not pruned yet
        spp.prune(base, "magnitude", "2:4")
        model_dir = spp.save_model(base, out / "pruned", tokenizer=tokenizer, overwrite=True)
        base = AutoModelForCausalLM.from_pretrained(model_dir)

    model = get_peft_model(base, SPPPeftConfig(r=16, seed=0, task_type="CAUSAL_LM"))
    model.print_trainable_parameters()
    data = load_data([str(text)], tokenizer, block_length=block_length)
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(out / "checkpoints"),
            max_steps=steps,
            per_device_train_batch_size=2,
            learning_rate=2e-2,
            warmup_steps=3,
            logging_steps=5,
            report_to="none",
        ),
        train_dataset=data.train,
        data_collator=data.collate,
    )
    trainer.train()
    with model.disable_adapter():
        print(f"loss as pruned {float(trainer.evaluate(data.train)['eval_loss']):.3f}")
    print(f"loss as tuned {float(trainer.evaluate(data.train)['eval_loss']):.3f}")
    model.save_pretrained(out / "adapter")  # also what model.push_to_hub uploads; spp.load_adapter reads it, too

    tuned = AutoPeftModelForCausalLM.from_pretrained(out / "adapter")
    merged = tuned.merge_and_unload(safe_merge=True)  # the bits of spp.merge: checked, every zero where it was
    spp.save_model(merged, out / "merged", tokenizer=tokenizer, overwrite=True)
    print(spp.verify(model_dir, out / "merged").pattern)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="directory of a model (default: SmolLM2, downloaded)")
    parser.add_argument("--text", type=Path, help="text file (default: Python's reference)")
    parser.add_argument("--out", type=Path, default=Path("peft-out"), help="folder to write to (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--block-length", type=int, default=128, help="tokens of a row (default: %(default)s)")
    options = parser.parse_args()
    if options.model is None:
        from smollm2 import smollm2

        options.model = smollm2()
    main(
        options.model,
        options.text or example_text(options.out),
        options.out,
        steps=options.steps,
        block_length=options.block_length,
    )
