"""SPP with TRL: preferences (DPO) on a pruned model, through PEFT.

    python examples/trl_dpo.py --model PRUNED --data pairs.jsonl --out dpo-out

The data is what TRL takes, such as {"prompt": …, "chosen": …, "rejected": …} a line. No second model is loaded: the
reference that DPO compares with is the model with its adapter disabled, which is the pruned one, bit for bit.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import spp
from spp.integrations.peft import SPPPeftConfig


def main(model_dir: Path, data: Path, out: Path, *, steps: int) -> None:
    """Tune, merge and save."""
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(model_dir),
        args=DPOConfig(
            output_dir=str(out / "checkpoints"),
            max_steps=steps,
            per_device_train_batch_size=2,
            learning_rate=2e-2,
            warmup_steps=3,
            logging_steps=5,
            max_length=256,
            bf16=False,
            report_to="none",
        ),
        train_dataset=load_dataset("json", data_files=str(data), split="train"),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
        peft_config=SPPPeftConfig(r=16, seed=0, task_type="CAUSAL_LM"),
    )
    assert trainer.ref_model is None
    trainer.train()
    model = trainer.model.merge_and_unload(safe_merge=True)
    spp.save_model(model, out / "merged", tokenizer=trainer.processing_class, overwrite=True)
    print(spp.verify(model_dir, out / "merged").pattern)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory of a pruned model")
    parser.add_argument("--data", type=Path, required=True, help="JSONL file of preferences")
    parser.add_argument("--out", type=Path, default=Path("dpo-out"), help="folder to write to (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps (default: %(default)s)")
    options = parser.parse_args()
    main(options.model, options.data, options.out, steps=options.steps)
