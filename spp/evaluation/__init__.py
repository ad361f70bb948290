"""Measurements of a language model.

windows.py      perplexity of a text in windows, and of labelled rows
harness.py      tasks, zero-shot and few-shot, through lm-eval
texts.py        the texts whose perplexity papers report, from the hub or from local files
documents.py    the documents of tasks, from the hub or from local files
scores.py       TaskResults, made of what lm-eval returns
"""

from spp.data.tokens import IGNORED
from spp.evaluation.harness import LoadedTasks, evaluate_tasks, load_tasks, tasks
from spp.evaluation.scores import TaskFacts, TaskResults
from spp.evaluation.texts import dataset_text, dataset_windows, paper_window
from spp.evaluation.windows import (
    PerplexityResult,
    evaluating,
    mean_loss,
    perplexity,
    perplexity_result,
    rows_perplexity,
    token_perplexity,
    tokenize,
    with_provenance,
)

__all__ = [
    "IGNORED",
    "LoadedTasks",
    "PerplexityResult",
    "TaskFacts",
    "TaskResults",
    "dataset_text",
    "dataset_windows",
    "evaluate_tasks",
    "evaluating",
    "load_tasks",
    "mean_loss",
    "paper_window",
    "perplexity",
    "perplexity_result",
    "rows_perplexity",
    "tasks",
    "token_perplexity",
    "tokenize",
    "with_provenance",
]
