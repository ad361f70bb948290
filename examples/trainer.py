"""Tune a pruned model with transformers' Trainer: SPPTrainer is the same, with checkpoints of the adapter alone.

    python examples/trainer.py --out trainer-out            on SmolLM2, pruned here
    python examples/trainer.py --model PRUNED --text FILE --out trainer-out

Killed in the middle, the same command with --resume goes on from the last whole checkpoint, to the same adapter.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from pydoc_data.topics import topics

from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import spp
from spp.training import SPPTrainer, load_data


def main(model_dir: Path, text: Path, out: Path, *, steps: int, block_length: int, resume: bool) -> None:
    """Train, merge and save."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    if spp.sparsity(model).sparsity < 0.1:  # not pruned yet
        spp.prune(model, "magnitude", "2:4")

    spp.wrap(model, r=16, seed=0)  # everything but α and β is frozen
    spp.print_trainable_parameters(model)

    data = load_data([str(text)], tokenizer, block_length=block_length)
    trainer = SPPTrainer(
        model,
        TrainingArguments(
            output_dir=str(out / "checkpoints"),
            max_steps=steps,
            per_device_train_batch_size=2,
            learning_rate=2e-2,  # the paper's 4e-3 is meant for about 1,200 steps
            weight_decay=0.001,
            warmup_steps=3,
            logging_steps=5,
            save_steps=10,
            save_total_limit=2,
            report_to="none",
        ),
        train_dataset=data.train,
        data_collator=data.collate,
    )
    trainer.train(resume_from_checkpoint=resume)
    spp.save_adapter(model, out / "adapter", overwrite=True)

    print(spp.merge(model).sparsity_report.pattern)
    spp.save_model(model, out / "merged", tokenizer=tokenizer, overwrite=True)
    print(f"wrote {out / 'merged'}")


def example_text(out: Path) -> Path:
    """Python's own reference, which every CPython carries."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "text.txt"
    path.write_text("\n\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="directory of a model (default: SmolLM2, downloaded)")
    parser.add_argument("--text", type=Path, help="text file (default: Python's reference)")
    parser.add_argument(
        "--out", type=Path, default=Path("trainer-out"), help="folder to write to (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--block-length", type=int, default=128, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in --out")
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
        resume=options.resume,
    )
