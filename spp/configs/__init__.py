"""The options of every verb, each a frozen dataclass that is checked once, when it is made.

This room loads no torch, so that help, completion and a refusal of an option come at once. What needs torch is checked
here by name (dtypes, rules, devices) and looked up where it is used. A field that the command line has as an option
says so in its annotation, once for everybody: `r: Annotated[int, Option("Rank.", ADAPTER)] = 16` (options.py).

options.py      Option: what a field says of itself, and the groups of the help
checks.py       checks that several configs share
pattern.py      Pattern: "2:4" or a fraction
adapter.py      SPPConfig
pst.py          PSTConfig, and checks of its schedule
distillation.py Distillation: a loss with a teacher; TeacherCacheConfig
tuning.py       TuneConfig and its recipes
pruning.py      PruneOptions, OWL, the methods by name, names of calibration data, mask updates; PruneConfig
reconstruction.py  Reconstruction
comparing.py    CompareConfig, and the contenders by name
checkpoints.py  the configs of merge, verify, certify, inspect, eval, reconstruct, export and push
"""
