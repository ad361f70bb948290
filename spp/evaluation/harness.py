"""Zero-shot and few-shot tasks through EleutherAI's lm-eval, on a model in memory.

lm-eval defines the tasks, makes the prompts, asks the model and scores its answers; nothing of that is done here, so a
score equals that of `lm_eval --model hf` on the same model. Here is decided which tasks a name means and where their
documents come from (documents.py), and the model is kept as it was.

The pruning papers report seven tasks, 0-shot, by `acc`, and the mean of the seven: `paper`.
"""

from __future__ import annotations

import copy
import difflib
import functools
import logging
import os
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spp.configs.evaluating import check_limits, parse_tasks
from spp.data.tokens import tokenizer_sha256
from spp.errors import ConfigError, DataError, DependencyError, NonFiniteError, SPPError, arg
from spp.evaluation.documents import Documents, Source
from spp.evaluation.scores import MEAN_OF, TaskFacts, TaskResults, facts_of, mean_of, metrics_of
from spp.evaluation.windows import evaluating
from spp.files.hashes import weights_fingerprint
from spp.files.provenance import Provenance, installed
from spp.models.targets import require_model
from spp.models.tokens import refuse_ids
from spp.supported import numbers

# Names of several tasks, and the number of examples in their prompts.
SUITES: Mapping[str, tuple[tuple[str, ...], int]] = {
    "paper": (("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"), 0),
    "mmlu": (("mmlu",), 5),
}
OLDEST = "0.4.13"  # lm-eval whose TaskManager loads tasks and groups; as in pyproject
_OFFLINE = (  # what `datasets` and the hub's client look at before they use the network
    ("datasets.config", "HF_HUB_OFFLINE"),
    ("datasets.config", "HF_DATASETS_OFFLINE"),
    ("huggingface_hub.constants", "HF_HUB_OFFLINE"),
)
_EVALUATE, _EVALUATE_OFFLINE = "evaluate.config", "HF_EVALUATE_OFFLINE"  # of `evaluate`, which some metrics import


@dataclass(frozen=True)
class Run:
    """Tasks of lm-eval that run with the same number of examples.

    Args:
        shots: number of examples in a prompt; None for that of each task's definition.
        objects: lm-eval's tasks and groups.
    """

    shots: int | None
    objects: tuple[Any, ...]


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks with their documents, ready for a model.

    Args:
        names: tasks and groups that were asked for, each once.
        runs: the same as lm-eval's objects.
        documents: {task: the documents it is measured on}.
        data_dir: folder of local files; None for the hub.
    """

    names: tuple[str, ...]
    runs: tuple[Run, ...]
    documents: Mapping[str, Documents]
    data_dir: str | None


def tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: str | Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    data_dir: str | Path | None = None,
    batch_size: int = 1,
    apply_chat_template: bool = False,
    split: str | None = None,
    progress: bool = False,
) -> TaskResults:
    """Measure a model on tasks of lm-eval.

    Args:
        model: a causal language model as it is in memory: dense, wrapped, packed, quantized, PEFT's. Its weights, its
            train / eval mode and the random state are as before afterwards.
        tokenizer: the model's own; lm-eval decides about BOS.
        tasks: "paper" (BoolQ, RTE, HellaSwag, WinoGrande, ARC-e, ARC-c and OpenBookQA without examples), "mmlu" (with
            5 examples), names of tasks, groups or tags that lm-eval knows, patterns such as "mmlu_*", or a YAML file
            with a task's definition; one, several with commas between them, or a sequence.
        limit: measure the first documents of each task only; None for all.
        num_fewshot: number of examples in a prompt; None for that of the suite or of the task's definition. As in
            lm-eval, a task that is defined with 0 keeps 0.
        data_dir: folder of local files with the documents (spp.evaluation.documents has the layouts); the hub is not
            asked then.
        batch_size: requests of one forward pass.
        apply_chat_template: put prompts into the tokenizer's chat template.
        split: measure on this split; None for that of each task's definition, which is the one that papers report.
        progress: show progress bars if standard error is a terminal.

    Returns:
        The scores, their mean, and where they come from.

    Raises:
        ConfigError: an option makes no sense, or a task is not known; the message has the nearest names.
        DataError: a task's documents cannot be found or read, or the tokenizer is another model's.
        DependencyError: lm-eval is missing, or a package that a task needs.
        NonFiniteError: the model computes NaN, or a score is not finite.

    Reference:
        Sun et al., Wanda (arXiv 2306.11695), and Lu et al., SPP (arXiv 2405.16057), for the seven tasks of `paper`.

    Example:
        >>> tasks(model, tokenizer, "paper", limit=100).mean  # doctest: +SKIP
        0.4471
    """
    require_model(model)
    check_limits(limit, num_fewshot, batch_size)
    loaded = load_tasks(tasks, num_fewshot=num_fewshot, data_dir=data_dir, split=split, progress=progress)
    return evaluate_tasks(
        model,
        tokenizer,
        loaded,
        limit=limit,
        batch_size=batch_size,
        apply_chat_template=apply_chat_template,
        progress=progress,
    )


def load_tasks(
    tasks: str | Sequence[str],
    *,
    num_fewshot: int | None = None,
    data_dir: str | Path | None = None,
    split: str | None = None,
    progress: bool = False,
) -> LoadedTasks:
    """Load tasks with their documents, before any model: what is wrong with them shows at once.

    Args:
        tasks, num_fewshot, data_dir, split, progress: as for `tasks`.

    Returns:
        The tasks, and which documents they are measured on.

    Raises:
        ConfigError, DataError, DependencyError: as `tasks`.

    Example:
        >>> load_tasks("boolq, rte", data_dir="data").names  # doctest: +SKIP
        ('boolq', 'rte')
    """
    check_limits(None, num_fewshot)
    folder = None if data_dir is None else Path(data_dir)
    if folder is not None and not folder.is_dir():
        raise DataError(f"{arg('data_dir')} is {str(data_dir)!r}, which is no folder")
    wanted = _names(tasks)
    with _lm_eval(progress, offline=folder is not None), _random_state():
        manager = _manager()
        runs: dict[int | None, list[Any]] = {}
        names: list[str] = []
        askers: dict[str, str] = {}
        documents: dict[str, Documents] = {}
        for name, shots in _known(wanted, manager).items():
            source = Source(folder, split, shots if num_fewshot is None else num_fewshot)
            with source.in_use():
                objects = _load(manager, name)
            for task in (leaf for part in objects for leaf in _leaves(part)):
                if (other := askers.setdefault(task.task_name, name)) != name:
                    raise ConfigError(f"{arg('tasks')} names {task.task_name} twice, by {other} and by {name}")
            names += [getattr(part, "task_name", None) or part.name for part in objects]
            runs.setdefault(source.shots, []).extend(objects)
            documents |= source.found
    made = tuple(Run(shots, tuple(objects)) for shots, objects in runs.items())
    return LoadedTasks(tuple(names), made, documents, None if folder is None else str(folder))


def evaluate_tasks(
    model: nn.Module,
    tokenizer: Any,
    loaded: LoadedTasks,
    *,
    limit: int | None = None,
    batch_size: int = 1,
    apply_chat_template: bool = False,
    progress: bool = False,
) -> TaskResults:
    """Measure a model on tasks that are loaded.

    Args:
        model, tokenizer, limit, batch_size, apply_chat_template, progress: as for `tasks`.
        loaded: of `load_tasks`.

    Returns:
        The scores, their mean, and where they come from.

    Raises:
        ConfigError, DataError, NonFiniteError: as `tasks`.

    Example:
        >>> evaluate_tasks(model, tokenizer, load_tasks("rte")).scores["rte"]["acc"]  # doctest: +SKIP
        0.5271
    """
    import transformers

    require_model(model)
    check_limits(limit, None, batch_size)
    if not isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
        raise ConfigError(f"{arg('tokenizer')} is a {type(tokenizer).__name__}; tasks need a tokenizer of transformers")
    if apply_chat_template and not tokenizer.chat_template:
        raise ConfigError(
            f"{arg('apply_chat_template', True)} needs a tokenizer with a chat template; this one has none"
        )
    start = time.perf_counter()
    results: list[Mapping[str, Any]] = []
    with ExitStack() as around:
        around.enter_context(_lm_eval(progress, offline=loaded.data_dir is not None))
        from lm_eval import evaluator
        from lm_eval.models.huggingface import HFLM

        around.enter_context(_random_state())
        around.enter_context(_as_before(model))
        # Of the environment and the folder's git history, both asked for in processes of their own, nothing is used.
        around.enter_context(_set(evaluator, "add_env_info", lambda results: None))
        around.enter_context(_set(evaluator, "get_git_commit_hash", lambda: None))
        lm = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        for run in loaded.runs:
            results.append(
                evaluator.simple_evaluate(
                    model=lm,
                    tasks=list(run.objects),
                    task_manager=_manager(),
                    num_fewshot=run.shots,
                    limit=limit,
                    log_samples=False,
                    apply_chat_template=apply_chat_template,
                    fewshot_as_multiturn=apply_chat_template,  # as lm-eval's command line does
                )
            )
    scores: dict[str, dict[str, float]] = {}
    stderr: dict[str, dict[str, float]] = {}
    facts: dict[str, TaskFacts] = {}
    for run, result in zip(loaded.runs, results, strict=True):
        for name, metrics in result["results"].items():
            scores[name], stderr[name] = metrics_of(name, metrics)
        facts |= facts_of(result, run.shots, loaded.documents)
    read = {"tokenizer_sha256": tokenizer_sha256(tokenizer), "model_fingerprint": weights_fingerprint(model)}
    provenance = Provenance.here(
        str(lm.device),
        getattr(model, "dtype", None),
        seconds=time.perf_counter() - start,
        hashes={name: found for name, found in read.items() if found is not None},
    )
    packages = {name: found for name in ("lm_eval", "datasets") if (found := installed(name))}
    return TaskResults(
        scores={name: metrics for name, metrics in scores.items() if metrics},
        mean=mean_of([scores.get(name, {}).get(MEAN_OF) for name in loaded.names]),
        stderr={name: metrics for name, metrics in stderr.items() if metrics},
        tasks=facts,
        limit=limit,
        apply_chat_template=apply_chat_template,
        data_dir=loaded.data_dir,
        provenance=replace(provenance, versions={**(provenance.versions or {}), **packages}),
    )


def _names(tasks: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names that `tasks` has, each once."""
    given = [tasks] if isinstance(tasks, (str, Path)) else tasks
    if not isinstance(given, Sequence) or not all(isinstance(name, (str, Path)) for name in given):
        raise ConfigError(f"{arg('tasks')} is {tasks!r}; it must be names of tasks")
    names = parse_tasks([str(name) for name in given])
    if not names:
        raise ConfigError(f"{arg('tasks')} is empty; pass names, such as {', '.join(SUITES)} or hellaswag")
    return names


def _known(names: Sequence[str], manager: Any) -> dict[str, int | None]:
    """Return {name that lm-eval knows, or a YAML file: number of examples}, suites and patterns resolved."""
    found: dict[str, int | None] = {}
    unknown = []
    for name in names:
        if name in SUITES:
            members, shots = SUITES[name]
            found |= {member: shots for member in members if member not in found}
        elif name in manager.task_index or (name.endswith((".yaml", ".yml")) and Path(name).is_file()):
            found.setdefault(name, None)
        elif "*" in name and (matches := manager.match_tasks([name])):
            found |= {match: None for match in matches if match not in found}
        else:
            near = difflib.get_close_matches(name, [*SUITES, *manager.all_tasks], 3)
            unknown.append(f"{name!r}" + (f" (nearest: {', '.join(near)})" if near else ""))
    if unknown:
        raise ConfigError(
            f"{arg('tasks')}: lm-eval {installed('lm_eval')} has no {', '.join(sorted(unknown))}",
            remedy="`lm_eval ls tasks` lists all",
        )
    return found


def _load(manager: Any, name: str) -> list[Any]:
    """Return lm-eval's objects of a name: a group, or tasks."""
    try:
        loaded = manager.load([name])
    except SPPError:
        raise
    except ImportError as error:
        raise DependencyError(f"the task {name} needs a package that is missing: {error}") from error
    except Exception as error:  # whatever a task's definition raises: on its documents, its template, its code
        reason = str(error).strip().split("\n")[0]
        raise DataError(f"the task {name} cannot be loaded: {type(error).__name__}: {reason}") from error
    inner = {child for children in loaded["group_map"].values() for child in children}
    objects = [part for part in (*loaded["groups"].values(), *loaded["tasks"].values()) if _name(part) not in inner]
    for task in loaded["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False):
            raise ConfigError(
                f"the task {task.task_name} runs code that the model writes; only lm-eval itself does that"
            )
        if getattr(task, "MULTIMODAL", False):
            raise ConfigError(f"the task {task.task_name} has pictures or sounds, and a language model reads text")
    return objects


def _name(part: Any) -> str:
    return str(part.task_name if hasattr(part, "task_name") else part.name)


def _leaves(part: Any) -> list[Any]:
    """Return the tasks of a task or a group."""
    return list(part.get_all_tasks()) if hasattr(part, "get_all_tasks") else [part]


@functools.cache
def _manager() -> Any:
    """Return lm-eval's index of tasks, which takes seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


@contextmanager
def _lm_eval(progress: bool, *, offline: bool) -> Iterator[None]:
    """Use lm-eval without its log, without bars but on a terminal, and offline if asked to: a context manager.

    Raises:
        DependencyError: it is missing.
    """
    try:
        import datasets  # noqa: F401  before it is told to be offline
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise DependencyError(f"tasks need lm-eval: pip install 'spp[eval]' ({error})") from error
    from tqdm.std import tqdm

    if (found := installed("lm_eval")) is not None and numbers(found) < numbers(OLDEST):
        raise DependencyError(f"tasks need lm-eval {OLDEST} or later; {found} is installed: pip install 'spp[eval]'")
    logger, make = logging.getLogger("lm_eval"), tqdm.__init__
    level = logger.level

    def silent(bar: Any, *arguments: Any, **options: Any) -> None:
        make(bar, *arguments, **{**options, "disable": True})

    with ExitStack() as changed:
        changed.enter_context(redirect_stdout(sys.stderr))  # some tasks print where results are read
        logger.setLevel(logging.ERROR)
        changed.callback(logger.setLevel, level)
        if not (progress and sys.stderr.isatty()):
            changed.enter_context(_set(tqdm, "__init__", silent))
        if offline:
            changed.enter_context(_offline())
        yield


@contextmanager
def _offline() -> Iterator[None]:
    """Keep the libraries that load data and metrics off the network: a context manager."""
    before, there = os.environ.get(_EVALUATE_OFFLINE), _EVALUATE in sys.modules
    with ExitStack() as changed:
        for module, name in (*_OFFLINE, (_EVALUATE, _EVALUATE_OFFLINE)):
            changed.enter_context(_set(sys.modules.get(module), name, True))
        os.environ[_EVALUATE_OFFLINE] = "1"  # read where a metric imports `evaluate` meanwhile
        try:
            yield
        finally:
            del os.environ[_EVALUATE_OFFLINE]
            if before is not None:
                os.environ[_EVALUATE_OFFLINE] = before
            if not there and _EVALUATE in sys.modules:
                setattr(sys.modules[_EVALUATE], _EVALUATE_OFFLINE, before == "1")


@contextmanager
def _set(owner: Any, name: str, value: object) -> Iterator[None]:
    """Set an attribute of something that has it, and set it back: a context manager."""
    if not hasattr(owner, name):
        yield
        return
    own = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


@contextmanager
def _random_state() -> Iterator[None]:
    """Give the random generators back the state they have, which lm-eval seeds: a context manager."""
    import numpy as np

    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Keep a model's modes and ties, and refuse NaN and foreign tokens on the way: a context manager."""
    with ExitStack() as around:
        around.enter_context(evaluating(model))
        # lm-eval ties the weights of a model that it is given; a head that was untied must stay so.
        around.enter_context(_set(model, "tie_weights", lambda *arguments, **options: None))
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
        if embedding is not None and hasattr(embedding, "weight"):
            around.callback(embedding.register_forward_pre_hook(_refuse_foreign_tokens).remove)
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if head is not None:
            around.callback(head.register_forward_hook(_refuse_nan).remove)
        yield


def _refuse_foreign_tokens(embedding: Any, arguments: tuple[Any, ...]) -> None:
    if arguments:
        refuse_ids(len(embedding.weight), arguments[0], "a task")


def _refuse_nan(head: Any, arguments: object, logits: Any) -> None:
    if isinstance(logits, torch.Tensor) and bool(logits.isnan().any()):
        raise NonFiniteError(
            "the model's logits are NaN: its weights or activations are not finite "
            "(half precision may overflow: try bfloat16 or float32)"
        )
