"""Tune a pruned model in a training loop of one's own: a wrapped model is a torch module like any other.

python examples/own_loop.py --out loop-out              on SmolLM2, pruned here
python examples/own_loop.py --model PRUNED --text FILE --out loop-out
"""

from __future__ import annotations

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import spp
from spp.evaluation import token_perplexity, tokenize


def main(model_dir: Path, text: str, out: Path, *, steps: int, block_length: int) -> None:
    """Train, save the adapter, load it onto a fresh copy of the base, and merge."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    if spp.sparsity(model).sparsity < 0.1:  # not pruned yet
        spp.prune(model, "magnitude", "2:4")
    spp.save_model(model, out / "pruned", tokenizer=tokenizer, overwrite=True)

    tokens = tokenize(tokenizer, text)[: (steps + 4) * 2 * block_length]
    blocks = tokens[: len(tokens) // block_length * block_length].view(-1, block_length)  # (k, L)
    batches, held_out = blocks[:-4].split(2), blocks[-4:].flatten()
    before = token_perplexity(model, held_out, window=block_length).perplexity

    spp.wrap(model, r=16, seed=0)
    parameters = spp.adapter_parameters(model)  # what an optimizer is given
    optimizer = torch.optim.AdamW(parameters, lr=2e-2, weight_decay=0.001)
    model.train()
    for step in range(steps):
        batch = batches[step % len(batches)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    model.eval()
    after = token_perplexity(model, held_out, window=block_length).perplexity
    print(f"perplexity on text held out: {before:.2f} before, {after:.2f} after (window {block_length})")

    # The adapter is a few hundred kilobytes; it loads onto the pruned model that it was made for, and no other.
    spp.save_adapter(model, out / "adapter", overwrite=True)
    again = spp.load_adapter(AutoModelForCausalLM.from_pretrained(out / "pruned"), out / "adapter")
    spp.merge(again)
    spp.save_model(again, out / "merged", tokenizer=tokenizer, overwrite=True)
    spp.verify(out / "pruned", out / "merged")  # every zero is where it was
    print(f"wrote {out / 'merged'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="directory of a model (default: SmolLM2, downloaded)")
    parser.add_argument("--text", type=Path, help="text file (default: Python's reference)")
    parser.add_argument("--out", type=Path, default=Path("loop-out"), help="folder to write to (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--block-length", type=int, default=128, help="tokens of a row (default: %(default)s)")
    options = parser.parse_args()
    if options.model is None:
        from smollm2 import smollm2

        options.model = smollm2()
    example = "\n\n".join(topics[name] for name in sorted(topics))
    main(
        options.model,
        options.text.read_text(encoding="utf-8") if options.text else example,
        options.out,
        steps=options.steps,
        block_length=options.block_length,
    )
