"""Measurements of a language model.

windows.py      perplexity of a text in windows, and of labelled rows
harness.py      tasks, zero-shot and few-shot, through lm-eval
documents.py    the documents of tasks, from the hub or from local files
scores.py       TaskResults, made of what lm-eval returns
"""

from spp.data.tokens import IGNORED
from spp.evaluation.harness import LoadedTasks, evaluate_tasks, load_tasks, tasks
from spp.evaluation.scores import TaskFacts, TaskResults
from spp.evaluation.windows import (
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
    "LoadedTasks",
    "PerplexityResult",
    "TaskFacts",
    "TaskResults",
    "evaluate_tasks",
    "evaluating",
    "load_tasks",
    "mean_loss",
    "perplexity",
    "perplexity_result",
    "rows_perplexity",
    "tasks",
    "token_perplexity",
    "tokenize",
]
