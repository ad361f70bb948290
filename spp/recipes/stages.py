"""The stages of a run, in one table, and the steps that they make of a recipe.

    prune → reconstruct → teacher → tune → merge → verify → eval → report

A stage reads what the stages before it have made, as the Road says, and writes into the run's directory: pruned/,
reconstructed/, teacher/ (the cache of spp teacher-cache), tuned/ (a run of spp tune), merged/,
eval/MODEL-MEASUREMENT.json, report.html. A stage that a recipe leaves out is not there: without prune, the model is
one that is pruned already.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from spp.configs.checkpoints import MergeConfig, ReconstructConfig, ReportConfig, RunConfig, VerifyConfig
from spp.configs.distillation import DENSE, TeacherCacheConfig
from spp.configs.evaluating import EvalConfig
from spp.configs.methods import recipe_of
from spp.configs.pruning import SELF, PruneConfig, own_tokens
from spp.configs.tuning import TuneConfig
from spp.errors import ConfigError, DataError, arg
from spp.recipes.reading import Section, Value, parse, read, told_together

OPEN = ("model", "out", "data", "text")  # what a recipe may leave to the command line, beside the stages
REFERENCE = "python-reference"  # a name of data and text: the texts of `python_reference`
REFERENCE_FILES = ("train.txt", "held-out.txt")
_OPTIONS = {"model": "MODEL", "out": "--out", "data": "--data", "text": "--text"}
TEXTS = "texts"  # the stage that writes them; no key of a recipe
MODELS = ("dense", "pruned", "tuned", "merged")  # that eval measures
CHECKPOINT, RUN, FILE, RESULT, NOTHING = "a checkpoint", "a run", "a file", "a result", "nothing"  # that a step writes
CACHE = "a cache"


@dataclass(frozen=True)
class Step:
    """A part of a stage that is carried out, or skipped, as a whole.

    Args:
        name: of the stage; of several, with what tells them apart: eval/dense-valid-512.
        stage: in STAGES.
        config: of the command.
        reads: {what it is called: a path or an id}; of a field of the config, under the field's name.
        writes: files or folders. kind: what they are.
    """

    name: str
    stage: str
    config: Any
    reads: Mapping[str, str]
    writes: tuple[Path, ...] = ()
    kind: str = NOTHING

    def options(self) -> dict[str, Any]:
        """Return the options that decide the result: no path, and nothing that changes what is shown alone."""
        if self.config is None:
            return {}
        left_out: set[str] = {*self.reads, *STAGES[self.stage].own, *STAGES[self.stage].free}
        values = {one.name: getattr(self.config, one.name) for one in fields(self.config) if one.name not in left_out}
        if isinstance(self.config, PruneConfig):
            values["pattern"] = self.config.described  # 0.5 and "0.5" are one
        return {name: _json_ready(value) for name, value in values.items()}

    def usual(self) -> dict[str, Any]:
        """Return the defaults of the options."""
        found = {} if self.config is None else {one.name: one.default for one in fields(self.config)}
        return {name: _json_ready(value) for name, value in found.items() if value is not MISSING}

    def ready(self, replaces: bool, resumes: bool) -> Any:
        """Return the config for an output that is there, or not."""
        return copy_with(self.config, overwrite=replaces and not resumes, resume=resumes)


def copy_with(value: Any, **values: Any) -> Any:
    """Return a copy of a frozen dataclass with other values, unchecked: a file may be named that a step writes."""
    made = copy.copy(value)
    for name, one in values.items():
        if hasattr(made, name):
            object.__setattr__(made, name, one)
    return made


def _json_ready(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _json_ready(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_ready(one) for one in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return _json_ready(vars(value)) if hasattr(value, "__dict__") and not isinstance(value, Path) else str(value)


@dataclass
class Road:
    """The models and steps that the stages have made so far.

    Args:
        out: the run's directory. data, text: as in the recipe.
        dense: the dense model; None where the recipe's is pruned already. pruned: the pruned one.
        base: what the adapter belongs to. adapter, merged, cache (of a teacher): None where there is none.
    """

    out: Path
    data: tuple[str, ...]
    text: str | None
    dense: str | None
    pruned: str
    base: str = ""
    adapter: str | None = None
    merged: str | None = None
    cache: str | None = None
    steps: list[Step] = field(default_factory=list)

    def add(self, *step: Any, **values: Any) -> None:
        """Add a step."""
        self.steps.append(Step(*step, **values))

    def coming(self, path: object) -> bool:
        """Whether a step writes this path."""
        return any(Path(str(path)) in step.writes for step in self.steps)


Sections = Mapping[str, Sequence[Section]]


@dataclass(frozen=True)
class Stage:
    """A stage.

    Args:
        name: its key in a recipe.
        source: the config whose fields are its options, or what makes one.
        add: adds its steps to the road. own: fields that the run sets. free: fields that do not change the result.
        extra: keys beside the options; with any, a stage may be a list of such mappings.
    """

    name: str
    source: tuple[Any, ...]
    add: Callable[[Road, Section, Sections], None]
    own: tuple[str, ...] = ()
    free: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()


def _prune(road: Road, section: Section, others: Sections) -> None:
    calibrated = section.get("method") != "magnitude" or "owl" in section.values
    source = section.get("calibration", road.data[0] if road.data and calibrated else None)
    if isinstance(source, str) and own_tokens(source) is not None:
        source = SELF  # how many tokens it has, nsamples and seqlen say
    own: dict[str, Any] = {"model": road.pruned, "output": road.out / "pruned"}
    if road.coming(source) and not section.get("calibration"):
        config = section.build(PruneConfig, {"calibration": [""]}, own)  # checked without the file, which is not there
        config = copy_with(config, calibration=str(source))
    else:
        config = section.build(PruneConfig, {} if source is None else {"calibration": source}, own)
    reads = {"model": config.model} | ({} if source is None else {"calibration": str(config.calibration)})
    road.add("prune", "prune", config, reads, (config.output,), CHECKPOINT)
    road.pruned = str(config.output)


def _reconstruct(road: Road, section: Section, others: Sections) -> None:
    if section.get("train", "weights") != "weights":
        raise ConfigError(
            f"{section.place('train')}: reconstruct.train is {section.get('train')}, whose adapter no later stage "
            f"reads; it must be weights"
        )
    usual: dict[str, Any] = {} if road.dense is None else {"dense": road.dense}
    if road.data:
        own_text = own_tokens(road.data[0]) is not None
        usual["calibration"] = SELF if own_text else road.data[0]
    for name, what in (("dense", "the dense model is not known here"), ("calibration", "there is no data")):
        if name not in {**usual, **section.values}:
            raise ConfigError(f"{section.where}: reconstruct: {what}; set reconstruct.{name}")
    own = {"pruned": road.pruned, "output": road.out / "reconstructed"}
    if road.coming(usual.get("calibration")) and not section.get("calibration"):
        config = section.build(ReconstructConfig, {**usual, "calibration": [""]}, own)  # its file is not there yet
        config = copy_with(config, calibration=str(usual["calibration"]))
    else:
        config = section.build(ReconstructConfig, usual, own)
    reads = {"pruned": config.pruned, "dense": config.dense, "calibration": str(config.calibration)}
    road.add("reconstruct", "reconstruct", config, reads, (config.output,), CHECKPOINT)
    road.pruned = str(config.output)


def _teacher(road: Road, section: Section, others: Sections) -> None:
    if "tune" not in others:
        raise ConfigError(f"{section.where}: teacher without tune: nothing would read the cache")
    tune = others["tune"][0]
    if road.dense is None:
        raise ConfigError(
            f"{section.where}: teacher without prune: the dense model is not known here; set tune.teacher instead"
        )
    named = ("data", "data_format", "data_split", "text_field", "block_length", "completions_only", "bos")
    same = {name: found for name in named if (found := tune.get(name)) is not None}
    if not road.data and "data" not in {**same, **section.values}:
        raise ConfigError(f"{section.where}: teacher has no data: pass {arg('data', ...)}, or set tune.data")
    own = {"model": road.dense, "output": road.out / "teacher"}
    config = section.build(TeacherCacheConfig, {"data": road.data, **same}, own)
    reads = {"model": config.model, **{f"data {i}": name for i, name in enumerate(config.data_files, start=1)}}
    road.add("teacher", "teacher", config, reads, (config.output,), CACHE)
    road.cache = str(config.output)


def _tune(road: Road, section: Section, others: Sections) -> None:
    pst, updates = section.get("method") == "pst", section.get("mask_update_every") is not None
    if pst and "prune" in others:
        raise ConfigError(
            f"{section.place('method')}: tune.method is pst, which prunes a dense model itself: leave out prune "
            f"({others['prune'][0].where})"
        )
    if not road.data and "data" not in section.values:
        raise ConfigError(f"{section.where}: tune has no data: pass {arg('data', ...)}, or set tune.data")
    usual: dict[str, Any] = {"data": road.data, "eval_text": road.text}
    if updates and road.dense is not None:
        usual["dense_model"] = road.dense
    own = {"model": road.pruned, "output_dir": road.out / "tuned"}
    if road.cache is not None:
        usual["teacher_cache"] = road.cache
    recipe = recipe_of(section.get("recipe", "default"), section.get("method", "spp"))
    if section.get("teacher", recipe.get("teacher")) == DENSE and road.dense is not None and road.cache is None:
        own["teacher"] = road.dense
    config = section.build(TuneConfig.from_recipe, {k: v for k, v in usual.items() if v}, own)
    reads = {"model": config.model, **{f"data {i}": name for i, name in enumerate(config.data_files, start=1)}}
    named = ("eval_text", "dense_model", "teacher", "teacher_cache")
    reads |= {name: str(found) for name in named if (found := getattr(config, name)) and found != DENSE}
    tuned = Path(config.output_dir)
    road.add("tune", "tune", config, reads, (tuned,), RUN)
    road.adapter, road.base = str(tuned / "adapter"), str(tuned / "base") if updates else road.pruned
    if pst:
        road.dense, road.pruned = road.pruned, ""


def _merge(road: Road, section: Section, others: Sections) -> None:
    if road.adapter is None:
        raise ConfigError(f"{section.where}: merge without tune: there is no adapter to merge")
    if "tune" in others and others["tune"][0].get("method") == "pst":
        for name in ("rounding", "seed"):
            if name in section.values:
                raise ConfigError(f"{section.place(name)}: merge.{name} is for adapters of SPP, and tune.method is pst")
    own = {"base": road.base, "adapters": ((road.adapter, 1.0),), "output": road.out / "merged"}
    config = section.build(MergeConfig, {}, own)
    road.add("merge", "merge", config, {"base": config.base, "adapter": road.adapter}, (config.output,), CHECKPOINT)
    road.merged = str(config.output)


def _verify(road: Road, section: Section, others: Sections) -> None:
    masked = road.pruned and (road.base or road.pruned)
    before, after = (masked, road.merged) if masked else (road.merged, None)
    if before is None:
        raise ConfigError(f"{section.where}: verify without merge: PST's output has its zeros after the merge only")
    config = section.build(VerifyConfig, {}, {"before": before, "after": after})
    road.add("verify", "verify", config, {"before": before} | ({} if after is None else {"after": after}))


def _eval(road: Road, section: Section, others: Sections) -> None:
    there = {
        "dense": (road.dense, None),
        "pruned": (road.pruned, None),
        "tuned": (road.base, road.adapter) if road.adapter else (None, None),
        "merged": (road.merged, None),
    }
    wanted = section.get("models", [name for name in MODELS if there[name][0] and name != "tuned"])
    wanted = [wanted] if isinstance(wanted, str) else wanted
    if not isinstance(wanted, list) or not wanted or not all(isinstance(name, str) for name in wanted):
        raise ConfigError(f"{section.place('models')}: eval.models is {wanted!r}; it must be some of {list(MODELS)}")
    label = section.get("name")
    measured = any(section.get(name) for name in ("text", "tasks", "dataset"))
    usual = {} if measured or road.text is None else {"text": Path(road.text)}
    for name in dict.fromkeys(wanted):
        model, adapter = there.get(name, (None, None))
        if not model:
            near = difflib.get_close_matches(name, MODELS, n=1)
            meant = f"did you mean {near[0]}?" if near and name not in MODELS else f"there is no {name} model here"
            raise ConfigError(f"{section.place('models')}: eval.models names {name}; {meant}")
        own = {"model": model} | ({} if adapter is None else {"adapter": Path(adapter)})
        config = section.build(EvalConfig, usual, own)
        step = f"eval/{name}-{_label(config) if label is None else label}"
        if not re.fullmatch(r"eval/[\w.+-]+", step):
            raise ConfigError(
                f"{section.place('name')}: eval.name is {label!r}; it must be letters, digits, ., + and -"
            )
        if any(step == one.name for one in road.steps):
            raise ConfigError(f"{section.where}: two measurements have the name {step}; give this one a name")
        reads = {"model": str(model)} | ({} if adapter is None else {"adapter": adapter})
        reads |= {name: str(value) for name in ("text", "data_dir") if (value := getattr(config, name, None))}
        road.add(step, "eval", config, reads, (road.out / f"{step}.json",), RESULT)


def _report(road: Road, section: Section, others: Sections) -> None:
    runs = [str(path) for step in road.steps if step.kind in (CHECKPOINT, RUN, RESULT) for path in step.writes]
    if not runs:
        raise ConfigError(f"{section.where}: report without a stage that makes or measures a model")
    usual = {} if road.dense is None else {"dense": road.dense}
    config = section.build(ReportConfig, usual, {"runs": tuple(runs), "out": road.out / "report.html"})
    reads = {f"run {i}": name for i, name in enumerate(runs, start=1)}
    reads |= {name: str(value) for name in ("dense", "prompts") if (value := getattr(config, name)) is not None}
    road.add("report", "report", config, reads, (config.out,), RESULT)


def _label(config: EvalConfig) -> str:
    """Return what tells a measurement from others: what it measures on, and in which windows."""
    tasks = "-".join(getattr(config, "tasks", ()))
    measured = Path(str(config.text)).stem if config.text else str(getattr(config, "dataset", None) or "")
    parts = (f"{measured}-{config.window}" if measured else "", tasks)
    return re.sub(r"[^\w.+-]+", "-", "-".join(filter(None, parts)))[:80]


_SHOWN = ("every", "progress")  # of any command: they change what is shown alone
_OWN = ("overwrite", "resume", "dry_run", "json")  # of any command: the run decides
STAGES = {
    stage.name: stage
    for stage in (
        Stage("prune", (PruneConfig,), _prune, ("model", "output", *_OWN), ("report", *_SHOWN)),
        Stage("reconstruct", (ReconstructConfig,), _reconstruct, ("pruned", "output", *_OWN), ("report", *_SHOWN)),
        Stage("teacher", (TeacherCacheConfig,), _teacher, ("model", "output", *_OWN), ("data", "batch_size", *_SHOWN)),
        Stage(
            "tune",
            (TuneConfig, TuneConfig.from_recipe),
            _tune,
            ("model", "output_dir", *_OWN),
            ("data", "strict_values", "log_every", "save_every", "save_limit", *_SHOWN),
        ),
        Stage("merge", (MergeConfig,), _merge, ("base", "adapters", "output", *_OWN), _SHOWN),
        Stage("verify", (VerifyConfig,), _verify, ("before", "after", "against", *_OWN), _SHOWN),
        Stage("eval", (EvalConfig,), _eval, ("model", "adapter", *_OWN), _SHOWN, extra=("models", "name")),
        Stage("report", (ReportConfig,), _report, ("runs", "out", *_OWN), _SHOWN),
    )
}


@dataclass(frozen=True)
class Plan:
    """The steps of a run.

    Args:
        recipe: its name. out: the run's directory. steps: in their order. model: the model of the recipe.
    """

    recipe: str
    out: Path
    model: str
    steps: tuple[Step, ...]


def make_plan(config: RunConfig) -> Plan:
    """Return the steps of a recipe with the settings of the command line; every option of every stage is checked.

    Raises:
        ConfigError: a key is unknown, contradicts another one, has a wrong type or makes no sense, or what the recipe
            leaves open is not given; the message begins with the file and the line, or the option.
        DataError: a file that a step reads is not there.
    """
    name, contents, places = read(config.recipe)
    opened: dict[str, Value] = {}
    sections: dict[str, list[Section]] = {}
    with told_together() as problems:
        for key, value in contents.items():
            with problems():
                _take(Value(value, places.get((str(key),), name)), str(key), opened, sections, places)
    for setting in config.settings:
        _set(setting, opened, sections)
    given = {"model": config.model, "out": config.out, "data": list(config.data) or None, "text": config.text}
    opened |= {key: Value(value, _OPTIONS[key]) for key, value in given.items() if value is not None}
    model, data = _text(opened, "model"), opened.get("data", Value(None, "")).value
    if model is None:
        raise ConfigError(f"{config.recipe} leaves the model open: name it, as {arg('model')} or model: in the file")
    data = [data] if isinstance(data, str) else data or []
    if not isinstance(data, list) or not all(isinstance(one, str) and one for one in data):
        raise ConfigError(f"{opened['data'].where}: data is {data!r}; it must be a path or an id, or a list of them")
    out = Path(_text(opened, "out") or f"{name}-run")
    text = _text(opened, "text")
    road = Road(out, tuple(data), text, model if "prune" in sections else None, model)
    _reference(road)
    for stage in STAGES.values():
        for section in sections.get(stage.name, []):
            stage.add(road, section, sections)
    if all(step.stage == TEXTS for step in road.steps):
        raise ConfigError(f"{config.recipe} has no stage; known: {', '.join(STAGES)}")
    for step in road.steps:
        _require_inputs(step, road, sections)
    return Plan(name, out, model, tuple(road.steps))


def _take(
    value: Value,
    key: str,
    opened: dict[str, Value],
    sections: dict[str, list[Section]],
    places: Mapping[tuple[Any, ...], str],
) -> None:
    """Take a key of a recipe: a value that it leaves open or sets, or a stage with its options."""
    if key in OPEN:
        opened[key] = value
        return
    stage = STAGES.get(key)
    if stage is None:
        known = (*OPEN, *STAGES)
        near = difflib.get_close_matches(key, known, n=1)
        meant = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        raise ConfigError(f"{value.where}: {key!r} is no key of a recipe; {meant}")
    if value.value is False:
        sections.pop(key, None)
        return
    several = isinstance(value.value, list)
    parts = value.value if several else [value.value]
    if several and not stage.extra:
        raise ConfigError(f"{value.where}: {key} is a list; it must be a mapping of its options")
    sections[key] = []
    with told_together() as problems:
        for i, part in enumerate(parts):
            path = (key, i) if several else (key,)
            section = Section(key, stage.source, places.get(path, value.where))
            if part is not None and not isinstance(part, dict):
                raise ConfigError(f"{section.where}: {key} is {part!r}; it must be a mapping of its options")
            for name, one in (part or {}).items():
                with problems():
                    set_to = Value(one, places.get((*path, str(name)), section.where))
                    section.set(str(name), set_to, stage.own, stage.extra)
            sections[key].append(section)


def _set(text: str, opened: dict[str, Value], sections: dict[str, list[Section]]) -> None:
    """Do what one `--set` says: KEY=VALUE or STAGE.OPTION=VALUE, the value as in YAML."""
    key, equals, written = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"{arg('settings')} {text}: write STAGE.OPTION=VALUE, such as tune.steps=100")
    where = f"--set {key}"
    value = Value(parse(f"value: {written}", where)[0]["value"], where)
    name, dot, option = key.partition(".")
    if not dot:
        _take(value, name, opened, sections, {})
    elif name not in sections:
        _take(Value({option: value.value}, where), name, opened, sections, {})
    else:
        for section in sections[name]:
            section.set(option, value, STAGES[name].own, STAGES[name].extra)


def _text(opened: Mapping[str, Value], key: str) -> str | None:
    found = opened.get(key, Value(None, ""))
    if found.value is None:
        return None
    if not isinstance(found.value, (str, Path)) or not str(found.value):
        raise ConfigError(f"{found.where}: {key} is {found.value!r}; it must be a path or an id, or null")
    return str(found.value)


def _reference(road: Road) -> None:
    """Where the data or the text is Python's reference, let a step write it, and take the files."""
    files = [road.out / name for name in REFERENCE_FILES]
    if REFERENCE in (*road.data, road.text):
        road.add(TEXTS, TEXTS, None, {}, tuple(files), FILE)
    road.data = tuple(str(files[0]) if name == REFERENCE else name for name in road.data)
    if road.text == REFERENCE:
        road.text = str(files[1])


def _require_inputs(step: Step, road: Road, sections: Sections) -> None:
    """Raise a DataError where a file that a step reads is not there; ids of the hub are asked for when it runs."""
    made = [path for one in road.steps for path in one.writes]
    for what, name in step.reads.items():
        path = Path(name)
        if path.exists() or any(path.is_relative_to(one) for one in made):
            continue
        if what in ("text", "eval_text", "data_dir") or path.suffix in (".txt", ".json", ".jsonl"):
            section = next(iter(sections[step.stage]))
            raise DataError(f"{section.place(what.split()[0])}: {step.name} reads {name}, and there is no such file")


def python_reference() -> tuple[str, str]:
    """Return two texts of Python's own reference, which every CPython carries: to train on, and held out.

    Every tenth topic is held out, and no paragraph of the training text occurs in it.
    """
    from pydoc_data.topics import topics

    names = sorted(topics)
    held_out = "\n\n".join(topics[name] for name in names[::10])
    paragraphs = [part for i, name in enumerate(names) if i % 10 for part in topics[name].split("\n\n")]
    seen = set(held_out.split("\n\n"))
    return "\n\n".join(part for part in dict.fromkeys(paragraphs) if part not in seen), held_out
