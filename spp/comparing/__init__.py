"""spp compare: what repairs a pruned model best, SPP or a peer, under one trainer, on one model and one data set.

    from spp.configs.comparing import CompareConfig
    from spp.comparing.study import compare
    results = compare(CompareConfig(model="pruned", output_dir="out", data="train.txt", contenders=("spp", "hira")))

(spp.configs.comparing and .contenders: what is compared, and what names such as "spp:r=8" mean)
methods.py      how each contender adapts a pruned model, and how it gives a plain one back
data.py         training rows, and validation and test rows that share nothing
trial.py        one contender, learning rate and seed: train, merge, measure
cost.py         a step's time and memory against SPP's, in processes of their own
results.py      results.json: atomic, shared by several processes, resumable
study.py        which trial is next: the search for a learning rate, then more seeds
summary.py      one line a contender
tables.py       the table and its Markdown
chart.py        quality against cost
"""
