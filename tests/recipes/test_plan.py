"""What a recipe says, and what is wrong with one: with the file and the line, before anything runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from spp.configs.checkpoints import RunConfig
from spp.configs.pruning import OWL
from spp.configs.tuning import TuneConfig
from spp.errors import SPPError
from spp.recipes.reading import parse, shipped
from spp.recipes.stages import Plan, make_plan

FULL = """\
model: dense
data: text.txt
text: text.txt
prune:
  method: wanda
  pattern: 2:4
tune:
  lr: 1e-2
  steps: 3
merge:
verify:
eval:
  - window: 8
  - text: text.txt
    window: 16
    models: [merged, tuned]
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("some text\n")
    Path("dense").mkdir()
    return tmp_path


def planned(recipe: str, **options: Any) -> Plan:
    Path("my.yaml").write_text(recipe)
    return make_plan(RunConfig(recipe="my.yaml", **options))


def test_a_teacher_is_the_dense_model_or_a_cache_of_it() -> None:
    Path("big").mkdir()
    named = FULL.replace("model: dense", "model: ./big").replace("lr: 1e-2", "teacher: dense\n  kl_weight: 0.7")
    tune = planned(named).steps[1]
    assert tune.config.teacher == tune.reads["teacher"] == "./big"
    assert "teacher" not in planned(named.replace("./big", "dense")).steps[1].reads  # tune asks the certificate
    cached = FULL.replace("lr: 1e-2", "kl_weight: 0.7\n  block_length: 16")
    cached = cached.replace("merge:", "teacher:\n  top_k: 8\nmerge:")
    plan = planned(cached)
    assert [step.name for step in plan.steps][:3] == ["prune", "teacher", "tune"]
    teacher, tune = plan.steps[1], plan.steps[2]
    assert (teacher.config.model, teacher.config.top_k, teacher.config.block_length) == ("dense", 8, 16)
    assert teacher.config.data == ("text.txt",) and tune.config.teacher is None
    assert tune.config.teacher_cache == tune.reads["teacher_cache"] == "my-run/teacher"


def test_a_recipe_makes_the_steps_and_their_configs() -> None:
    plan = planned(FULL)
    assert [step.name for step in plan.steps] == [
        *("prune", "tune", "merge", "verify", "eval/dense-text-8", "eval/pruned-text-8", "eval/merged-text-8"),
        *("eval/merged-text-16", "eval/tuned-text-16"),
    ]
    prune, tune, merge, verify, *_, tuned = (step.config for step in plan.steps)
    assert (prune.pattern, prune.calibration, str(prune.output)) == ("2:4", "text.txt", "my-run/pruned")
    assert (tune.lr, tune.steps, tune.data, tune.model) == (1e-2, 3, ("text.txt",), "my-run/pruned")
    assert (merge.base, merge.adapters) == ("my-run/pruned", (("my-run/tuned/adapter", 1.0),))
    assert verify.pair == ("my-run/pruned", "my-run/merged")
    assert (tuned.model, str(tuned.adapter)) == ("my-run/pruned", "my-run/tuned/adapter")


@pytest.mark.parametrize("written", ["2:4", "'2:4'", "0.5", "[2:4]", "{q_proj: 2:4, .*: 0.5}", "[q_proj=2:4, 0.5]"])
def test_a_pattern_is_what_it_looks_like_and_no_number_to_the_base_of_sixty(written: str) -> None:
    found = planned(FULL.replace("2:4", written)).steps[0].config.pattern
    expected: Any = {"q_proj": "2:4", ".*": 0.5} if "q_proj" in written else "2:4"
    expected = 0.5 if written == "0.5" else expected
    assert found == (expected if "=" not in written else {"q_proj": "2:4", ".*": "0.5"})


def test_a_measurement_may_repeat_another_one_with_changes() -> None:
    text = FULL.replace(
        "  - window: 8", "  - &small\n    window: 8\n  - <<: *small\n    window: 4\n    models: [merged]"
    )
    found = {step.name: step.config.window for step in planned(text).steps if step.stage == "eval"}
    assert found["eval/merged-text-8"] == 8 and found["eval/merged-text-4"] == 4


def test_scalars_are_those_of_yaml_1_2() -> None:
    contents, places = parse("a: 1e-3\nb: on\nc: 007\nd: 2024-01-01\ne: 1_0\nf: ~\ng: true\nh: 4:3", "x")
    assert list(contents.values()) == [1e-3, "on", "007", "2024-01-01", "1_0", None, True, "4:3"]
    assert places[("c",)] == "x, line 3"


def test_spellings_of_the_command_line_and_settings() -> None:
    text = FULL.replace("  lr: 1e-2", "  block-length: 64\n  window: 32\n  strict: true")
    tune = planned(text, settings=("tune.block_length=16", "tune.target-modules=q_proj", "merge.dtype=float32")).steps[
        1
    ]
    assert (tune.config.block_length, tune.config.eval_window, tune.config.strict_values) == (16, 32, True)
    assert tune.config.target_modules == ("q_proj",)


@pytest.mark.parametrize("written", ["owl: {threshold: 3}", "owl: true\n  owl-threshold: 3"])
def test_owl_has_its_options(written: str) -> None:
    plan = planned(FULL.replace("pattern: 2:4", f"pattern: 0.5\n  {written}"))
    assert plan.steps[0].config.owl == OWL(threshold=3)


def test_the_command_line_fills_what_is_open() -> None:
    text = FULL.replace("model: dense\ndata: text.txt\ntext: text.txt", "model: null\ndata:\ntext:\nout: null")
    plan = planned(text, model="dense", data=("text.txt",), text=Path("text.txt"), out=Path("there"))
    assert plan.out == Path("there") and plan.steps[1].config.eval_text == "text.txt"


def test_a_pruned_model_pst_and_mask_updates_have_their_roads() -> None:
    pruned = planned(FULL.replace("prune:\n  method: wanda\n  pattern: 2:4\n", "")).steps
    assert pruned[0].config.model == "dense" and pruned[2].config.pair == ("dense", "my-run/merged")
    assert "eval/dense-text-8" not in [step.name for step in pruned]
    text = re.sub(r"prune:\n.*\n.*\ntune:\n  lr: 1e-2", "tune:\n  method: pst\n  pattern: 2:4", FULL)
    tune, merge, verify, dense, *_ = planned(text).steps
    assert (merge.config.base, verify.config.pair, dense.config.model) == ("dense", ("my-run/merged", None), "dense")
    assert tune.config.method == "pst"
    updates = planned(FULL.replace("  lr: 1e-2", "  mask_update_every: 1")).steps
    assert updates[1].config.dense_model == "dense"
    assert updates[2].config.base == "my-run/tuned/base" and updates[3].config.before == "my-run/tuned/base"


WRONG = [  # what is written in place of what, and what the message says
    ("  lr: 1e-2", "  lrr: 1e-2", "my.yaml, line 8: tune has no option 'lrr'; did you mean lr?"),
    ("  lr: 1e-2", "  lr: fast", "my.yaml, line 8: tune.lr is 'fast'; it must be a number or null"),
    ("  lr: 1e-2", "  lr: 0", "my.yaml, line 8: tune: lr is 0; it must be a finite number above 0"),
    ("  lr: 1e-2", "  bf16: yes", "line 8: tune.bf16 is 'yes'; it must be true or false"),
    ("  lr: 1e-2", "  steps: 4", "my.yaml, line 9: the key 'steps' occurs twice, first in line 8"),
    ("  lr: 1e-2", "  window: 8\n  eval_window: 8", "line 9: tune.eval_window is set in my.yaml, line 8 already"),
    ("  lr: 1e-2", "  weight_rank: 4", "line 8: tune: weight_rank is 4, which means nothing to method='spp'"),
    ("  lr: 1e-2", "  method: pst", "line 8: tune.method is pst, which prunes a dense model itself: leave out prune"),
    ("  lr: 1e-2", "  overwrite: true", "line 8: tune.overwrite is set by the run itself"),
    ("  lr: 1e-2", "  data: gone.txt", "line 8: tune reads gone.txt, and there is no such file"),
    ("  method: wanda", "  method: wonda", "line 5: prune: method is 'wonda'; known: magnitude"),
    ("  method: wanda", "  owl-threshold: 3\n  owl: false", "line 5: prune: there is no owl"),
    ("pattern: 2:4", "pattern: 3:2", "my.yaml, line 6: prune: "),
    ("pattern: 2:4", "pattern: [2:4", "my.yaml, line 7: "),
    ("merge:", "merge: 3", "my.yaml, line 10: merge is 3; it must be a mapping"),
    ("merge:", "merge: [a]", "my.yaml, line 10: merge is a list"),
    ("merge:", "merrge:", "my.yaml, line 10: 'merrge' is no key of a recipe; did you mean merge?"),
    ("merge:", "reconstruct: {train: adapter}", "line 10: reconstruct.train is adapter, whose adapter no later"),
    ("prune:\n  method: wanda\n  pattern: 2:4", "reconstruct:", "line 4: reconstruct: the dense model is not known"),
    ("merge:", "teacher: {}", "line 7: tune: there is a teacher, but kl_weight and hidden_weight are 0"),
    ("prune:\n  method: wanda\n  pattern: 2:4", "teacher:", "line 4: teacher without prune: the dense model is not"),
    ("tune:\n  lr: 1e-2\n  steps: 3\nmerge:\n", "teacher:\n", "my.yaml, line 7: teacher without tune"),
    ("  lr: 1e-2", "  teacher: dense", "line 8: tune: there is a teacher, but kl_weight and hidden_weight are 0"),
    ("  lr: 1e-2\n  steps: 3\n", "tune: false\n", "line 8: the key 'tune' occurs twice, first in line 7"),
    ("tune:\n  lr: 1e-2\n  steps: 3\n", "", "my.yaml, line 7: merge without tune"),
    ("  - window: 8", "  - window: 1", "line 13: eval: window is 1; it must be an int of at least 2"),
    ("window: 16", "window: 8", "line 14: two measurements have the name eval/merged-text-8"),
    ("[merged, tuned]", "[mergd]", "line 16: eval.models names mergd; did you mean merged?"),
    ("model: dense\n", "", "my.yaml leaves the model open"),
    ("data: text.txt\n", "", "my.yaml, line 4: prune: method 'wanda' needs calibration data"),
    ("data: text.txt", "data: 3", "my.yaml, line 2: data is 3; it must be a path or an id"),
    ("model: dense", "model: !!python/name:os.system x", "my.yaml, line 1: could not determine a constructor"),
    ("model: dense", "model: &a [*a]", "my.yaml"),
    ("model: dense", "? [a]\n: 3", "my.yaml, line 1: a key must be text"),
    (FULL, "- a\n- b\n", "my.yaml holds a sequence"),
    (FULL, "", "my.yaml is empty"),
    (FULL, "a: \x07", "my.yaml, line 1: a character that YAML does not allow"),
    (FULL, "a: b\nc: [" + "*" * 3, "my.yaml, line 2: "),
    (FULL, "model: dense\n", "my.yaml has no stage; known: prune, reconstruct, teacher, tune"),
]


@pytest.mark.parametrize(("text", "written", "message"), WRONG)
def test_what_is_wrong_is_told_with_its_line(text: str, written: str, message: str) -> None:
    assert text in FULL
    with pytest.raises(SPPError, match=re.escape(message)):
        planned(FULL.replace(text, written, 1))


def test_every_unknown_key_is_told_at_once() -> None:
    text = FULL.replace("  lr: 1e-2", "  lrr: 1e-2\n  json: true").replace("merge:", "merrge:")
    with pytest.raises(SPPError) as raised:
        planned(text)
    lines = str(raised.value).splitlines()
    assert [line.partition(": ")[0] for line in lines] == [f"my.yaml, line {number}" for number in (8, 9, 11)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"settings": ("tune.lr=high",)}, "--set tune.lr: tune.lr is 'high'"),
        ({"settings": ("tune.lrr=1",)}, "--set tune.lrr: tune has no option 'lrr'; did you mean lr?"),
        ({"settings": ("tone.lr=1",)}, "--set tone.lr: 'tone' is no key of a recipe; did you mean tune?"),
        ({"settings": ("tune.lr",)}, "write STAGE.OPTION=VALUE"),
        ({"settings": ("tune.lr=[1",)}, "--set tune.lr, line 1: "),
        ({"text": Path("gone.txt")}, "reads gone.txt, and there is no such file"),
    ],
)
def test_what_is_wrong_on_the_command_line_is_told_by_its_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SPPError, match=re.escape(message)):
        planned(FULL, **options)


def test_repeated_aliases_do_not_grow() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 6)]
    with pytest.raises(SPPError, match="more than 100000 values"):
        planned("\n".join(lines))


def test_the_recipes_are_package_data() -> None:
    assert '"recipes/*.yaml"' in (Path(__file__).parents[2] / "pyproject.toml").read_text()


def test_a_recipe_by_name_and_one_that_is_not_there() -> None:
    assert shipped() == ["best", "demo", "fast", "paper-7b"]
    with pytest.raises(SPPError, match="paper7b is no file; did you mean paper-7b"):
        make_plan(RunConfig(recipe="paper7b"))
    with pytest.raises(SPPError, match="fast leaves the model open"):
        make_plan(RunConfig(recipe="fast"))


def test_the_recipes_of_the_package_are_the_quickstart_and_the_paper() -> None:
    for name in shipped():
        make_plan(RunConfig(recipe=name, model="dense"))
    tune = make_plan(RunConfig(recipe="paper-7b", model="dense")).steps[1].config
    paper = TuneConfig.from_recipe("paper", data="x", output_dir="y")
    names = ("r", "scaling", "lr", "dropout", "dropout_mode", "weight_decay", "warmup_ratio", "schedule")
    assert [getattr(tune, name) for name in names] == [getattr(paper, name) for name in names]
    prune = make_plan(RunConfig(recipe="paper-7b", model="dense")).steps[0].config
    assert (prune.calibration, prune.nsamples, prune.seqlen) == ("allenai/c4:en", 128, 2048)
    _, prune, tune, *_ = (step.config for step in make_plan(RunConfig(recipe="demo", model="dense")).steps)
    assert (prune.nsamples, prune.seqlen, prune.calibration) == (16, 512, "demo-run/train.txt")
    assert (tune.steps, tune.batch_size, tune.block_length, tune.lr, tune.eval_window) == (80, 2, 256, 2e-2, 512)
    assert tune.eval_text == "demo-run/held-out.txt"
