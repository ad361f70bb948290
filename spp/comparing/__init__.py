"""spp compare: does SPP or a peer repair a pruned model best, under one trainer, on one model and one data set?

    from spp.configs.comparing import CompareConfig
    from spp.comparing.study import compare
    results = compare(CompareConfig(model="pruned", output_dir="out", data="train.txt", contenders=("spp", "hira")))

methods.py      how each contender adapts a pruned model, and how it gives a plain one back
data.py         training rows, and validation and test rows that share nothing
trial.py        one contender, learning rate and seed: train, merge, measure; a step's time and memory against SPP's
results.py      results.json: atomic, shared by several processes, resumable
measure.py      interleaved rounds, ratios of medians, peak memory, provenance
study.py        which trial is next: the search for a learning rate, then more seeds
tables.py       one line a contender: the table and its Markdown
chart.py        quality against cost
"""
