"""Measurements of a language model.

windows.py      perplexity of a text in windows, and of labelled rows
"""

from spp.evaluation.windows import (
    IGNORED,
    PerplexityResult,
    evaluating,
    mean_loss,
    perplexity,
    perplexity_result,
    rows_perplexity,
    token_perplexity,
    tokenize,
)

__all__ = [
    "IGNORED",
    "PerplexityResult",
    "evaluating",
    "mean_loss",
    "perplexity",
    "perplexity_result",
    "rows_perplexity",
    "token_perplexity",
    "tokenize",
]
