"""spp run: a whole recipe, from the dense model to the measured and merged one, in one directory that resumes."""

from __future__ import annotations

import contextlib
import gc
import shlex
from typing import TYPE_CHECKING, Any

from spp.cli import console, eval, merge, prune, reconstruct, report, teacher_cache, tune, verify
from spp.cli.options import command, typed
from spp.cli.spelling import Spelling
from spp.configs.checkpoints import RunConfig

if TYPE_CHECKING:
    from spp.recipes.running import Decision, RunFolder
    from spp.recipes.stages import Step

NAME = "run"
# Of each stage, the command that carries it out: a function of its config.
COMMANDS = {module.NAME: module.run.__wrapped__ for module in (prune, reconstruct, tune, merge, verify, eval, report)}
COMMANDS["teacher"] = teacher_cache.run.__wrapped__
# What a shell takes for the texts of Python's reference, of which there is no command.
_TEXTS = (
    "import pathlib as p; from spp.recipes.stages import python_reference as texts; "
    "p.Path({!r}).mkdir(parents=True, exist_ok=True); "
    "[p.Path(name).write_text(text, encoding='utf-8') for name, text in zip({!r}, texts())]"
)


@command(RunConfig)
def run(config: RunConfig) -> None:
    """Run a recipe: prune, tune, merge, verify and measure, as far as it says, in one directory.

    A recipe is a YAML file: model, out, data, text, and for each stage the options of its command. What is finished
    with the same options is skipped; after a kill the same command goes on.

    Example: spp run demo

    Example: spp run fast MODEL --data train.txt --text valid.txt --set tune.steps=100
    """
    from spp.recipes.running import RunFolder
    from spp.recipes.stages import make_plan

    plan = make_plan(config)
    folder = RunFolder(plan, overwrite=config.overwrite)
    console.answer({"recipe": plan.recipe, "out": str(plan.out)})
    if config.dry_run:
        console.answer({"steps": [_planned(step, folder.decide(step)) for step in plan.steps]})
    else:
        console.answer({"steps": _carry_out(folder)})
        console.answer({"results": _show_results(folder)})


# What tune tells to pass to itself: a run does, when it is started again.
run.spellings["resume"] = Spelling("the same command")


def _planned(step: Step, decision: Decision) -> dict[str, Any]:
    """Say what would happen to a step, and which command does the same."""
    words = _words(step, decision)
    console.say(f"# {step.name}: {'runs' if decision.runs else 'skipped'}: {decision.why}")
    console.say(words)
    return {"step": step.name, "runs": decision.runs, "why": decision.why, "command": words}


def _words(step: Step, decision: Decision) -> str:
    """Return a step as one types it."""
    files = [str(path) for path in step.writes]
    if step.config is None:
        return shlex.join(["python", "-c", _TEXTS.format(str(step.writes[0].parent), files)])
    name = teacher_cache.NAME if step.stage == "teacher" else step.stage
    words = shlex.join(["spp", name, *typed(step.ready(decision.replaces, decision.resumes))])
    if step.stage != eval.NAME:
        return words
    folder, file = shlex.quote(str(step.writes[0].parent)), shlex.quote(files[0])
    return f"mkdir -p {folder} && {words} --json > {file}"


def _carry_out(folder: RunFolder) -> list[dict[str, Any]]:
    """Carry out the steps that are not finished; return what became of each."""
    from spp.files.hub import local_directory
    from spp.recipes.stages import CHECKPOINT

    local_directory(folder.plan.model, "model")  # fails, or fetches a hub id, before anything else
    done = []
    with folder.working():
        _check_tasks(folder)
        for step in folder.plan.steps:
            long = step.kind == CHECKPOINT and folder.finished(step)
            with console.step(f"checking {step.writes[0]}") if long else contextlib.nullcontext():
                decision = folder.decide(step)
            if not decision.runs:
                console.say(f"{step.name}: skipped, {decision.why}")
                done.append({"step": step.name, "made": False, "why": decision.why})
                continue
            console.note(f"{step.name}: {decision.why}")
            try:
                with folder.making(step, decision):
                    answer = _do(folder, step, decision)
            except KeyboardInterrupt:
                console.note(f"interrupted; the same command, without --overwrite, goes on with {step.name}")
                raise
            gc.collect()  # the model of this step, before the next one loads its own
            done.append({"step": step.name, "made": True, "why": decision.why, **answer})
    return done


def _check_tasks(folder: RunFolder) -> None:
    """Raise, before anything is carried out, for a task that lm-eval does not know or whose documents are missing."""
    names = ("tasks", "num_fewshot", "data_dir", "split")
    measured = [step.config for step in folder.plan.steps if step.stage == eval.NAME and not folder.finished(step)]
    wanted = dict.fromkeys(tuple(getattr(config, name) for name in names) for config in measured if config.tasks)
    for values in wanted:
        from spp.evaluation import load_tasks

        with console.step(f"loading {', '.join(values[0])}"):
            load_tasks(values[0], **dict(zip(names[1:], values[1:], strict=True)), progress=True)


def _do(folder: RunFolder, step: Step, decision: Decision) -> dict[str, Any]:
    """Carry out a step as its command does, with what that prints; return its answer where it is not printed."""
    ready = step.ready(decision.replaces, decision.resumes)
    if step.config is not None and step.stage != eval.NAME:
        if not console.in_json():
            COMMANDS[step.stage](ready)
            return {}
        with console.collecting() as values:
            COMMANDS[step.stage](ready)
        return {"report": values}
    if step.config is None:
        folder.write_texts(step)
    else:
        with console.collecting() as values:
            COMMANDS[eval.NAME](ready)
        folder.write_result(step, values, decision)
    for path in step.writes:
        console.wrote(path)
    return {}


def _show_results(folder: RunFolder) -> dict[str, Any]:
    """Print what was measured, a row for each measurement; return it."""
    from spp.report import Table

    results = {step.name: folder.result(step) for step in folder.plan.steps if step.stage == eval.NAME}
    rows = []
    for name, found in results.items():
        cells = [found.get(key) for key in ("perplexity", "window", "mean")]
        told = ["–" if one is None else f"{one:.4f}" if isinstance(one, float) else str(one) for one in cells]
        rows.append((name.removeprefix("eval/"), *told))
    if rows:
        console.show(Table(f"{folder.plan.out}", ("measured", "perplexity", "window", "mean of tasks"), tuple(rows)))
    return results
