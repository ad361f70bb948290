"""SPP with TRL: supervised fine-tuning of a pruned model on chats, through PEFT or on a wrapped model.

    python examples/trl_sft.py --model PRUNED --data chats.jsonl --out trl-out
    python examples/trl_sft.py --model PRUNED --data chats.jsonl --out trl-out --wrapped

The data is what TRL takes, such as {"messages": [{"role": …, "content": …}, …]} or {"text": …} a line. Without
--wrapped it is TRL's own trainer with a peft_config, as TRL's other trainers take it too (trl_dpo.py).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import spp
from spp.integrations.peft import SPPPeftConfig
from spp.integrations.trl import SPPSFTTrainer


def main(model_dir: Path, data: Path, out: Path, *, steps: int, wrapped: bool) -> None:
    """Tune, merge and save."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    arguments = SFTConfig(
        output_dir=str(out / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=2e-2,
        warmup_steps=3,
        logging_steps=5,
        max_length=256,
        bf16=False,
        report_to="none",
    )
    rows = load_dataset("json", data_files=str(data), split="train")
    if wrapped:
        model = spp.wrap(model, r=16, seed=0)
        SPPSFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer).train()
        print(spp.merge(model))
    else:
        config = SPPPeftConfig(r=16, seed=0, task_type="CAUSAL_LM")
        trainer = SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer, peft_config=config)
        trainer.train()
        model = trainer.model.merge_and_unload(safe_merge=True)
    spp.save_model(model, out / "merged", tokenizer=tokenizer, overwrite=True)
    print(spp.verify(model_dir, out / "merged").pattern)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory of a pruned model")
    parser.add_argument("--data", type=Path, required=True, help="JSONL file of chats or texts")
    parser.add_argument("--out", type=Path, default=Path("trl-out"), help="folder to write to (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--wrapped", action="store_true", help="wrap the model with spp.wrap instead of PEFT")
    options = parser.parse_args()
    main(options.model, options.data, options.out, steps=options.steps, wrapped=options.wrapped)
