"""The whole road on a real model: prune SmolLM2-135M to 2:4, tune it without losing a zero, merge, verify.

    python examples/quickstart.py            or: make demo

The text is Python's own reference, which every CPython carries: some topics to tune on, others held out.
Everything is written to demo-out/; demo-out/merged is a plain checkpoint that loads anywhere.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

from smollm2 import smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer

import spp
from spp.evaluation import perplexity
from spp.recipes.stages import python_reference
from spp.report import Table, byte_text, time_text
from spp.training import TuneConfig, tune

WINDOW = 512  # tokens of a window of every perplexity below
PROMPT = "Assert statements are a convenient way to"


def sample(model, tokenizer) -> str:
    """Continue the prompt greedily."""
    inputs = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False, repetition_penalty=1.2)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def main(model_dir: Path, out: Path, steps: int) -> None:
    """Run the road; every output under `out` is replaced."""
    start = time.perf_counter()
    train_text, held_out = python_reference()
    out.mkdir(parents=True, exist_ok=True)
    (out / "train.txt").write_text(train_text, encoding="utf-8")
    (out / "held-out.txt").write_text(held_out, encoding="utf-8")

    # A dense model from anywhere; here SmolLM2-135M-Instruct.
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    dense = perplexity(model, tokenizer, held_out, window=WINDOW, progress=True)

    # Prune: keep 2 weights of every 4, chosen by magnitude × input norm on some training text.
    spp.prune(model, "wanda", "2:4", [train_text], tokenizer=tokenizer, nsamples=16, seqlen=WINDOW)
    spp.save_model(model, out / "pruned", tokenizer=tokenizer, overwrite=True)
    before = sample(model, tokenizer)

    # Tune: wraps the model, trains α and β only, measures perplexity before and after.
    # The paper's learning rate, 4e-3, is meant for 1,200 steps; so few want more.
    config = TuneConfig(
        data=out / "train.txt",
        eval_text=out / "held-out.txt",
        eval_window=WINDOW,
        output_dir=out / "run",
        steps=steps,
        batch_size=2,
        block_length=256,
        lr=2e-2,
        overwrite=True,
    )
    tuned = tune(config, model=model, tokenizer=tokenizer)

    # Merge: every zero stays a zero, and the model is a plain one again. Then prove it, from the files alone.
    spp.merge(tuned.model)
    spp.save_model(tuned.model, out / "merged", tokenizer=tokenizer, overwrite=True)
    report = spp.verify(out / "pruned", out / "merged")  # raises MaskError if a zero pattern differs

    # Anyone can load it: plain transformers, no spp.
    plain = AutoModelForCausalLM.from_pretrained(out / "merged")
    merged = perplexity(plain, tokenizer, held_out, window=WINDOW, progress=True)

    seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rows = [
        ("perplexity, dense", f"{dense:.2f}"),
        ("perplexity, pruned to 2:4", f"{tuned.perplexity_before:.2f}"),
        (f"perplexity, tuned {tuned.steps} steps", f"{tuned.perplexity_after:.2f}"),
        ("perplexity, merged and reloaded", f"{merged:.2f}"),
        ("sparsity", f"{report.sparsity:.4f} ({report.pattern})"),
        ("mask", f"verified: every zero of {len(report.tensors)} weights is where it was"),
        ("time", f"{time_text(seconds)}, of it tuning {time_text(tuned.seconds)}"),
        ("peak memory", byte_text(peak)),
    ]
    title = f"\n{model_dir.name}; perplexity on held-out topics, window {WINDOW}"
    print(Table(title, ("what", "result"), tuple(rows)).text())
    print(f"\npruned says:   {before!r}\ntuned says:    {sample(plain, tokenizer)!r}")
    print(f"\nwrote {out / 'merged'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="directory of a dense model (default: SmolLM2, downloaded)")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder to write to (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=80, help="optimizer steps (default: %(default)s)")
    options = parser.parse_args()
    main(options.model or smollm2(), options.out, options.steps)
