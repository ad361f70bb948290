"""Tasks: the scores are lm-eval's own, the documents come from local files, and the model is as it was."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import logging
import os
import random
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import spp
from spp.errors import ConfigError, DataError, DependencyError, NonFiniteError
from spp.evaluation import TaskResults, harness, load_tasks, tasks
from spp.report import tasks_table
from tests.cli.conftest import Outcome
from tests.cli.conftest import spp as program  # noqa: F401  the fixture
from tests.helpers.models import projections, prune_nm_, tiny_llama, tiny_tokenizer
from tests.helpers.quantized import own_dense, quantized_llama

pytest.importorskip("lm_eval")
datasets = pytest.importorskip("datasets")

# Of which files lm-eval's index is made here: all of them take seconds.
FOLDERS = ("super_glue/boolq", "glue/rte", "arc")

Json = dict[str, Any]


def words(seed: int, count: int) -> list[str]:
    letters = random.Random(seed)
    return ["".join(letters.choice("abcdefgh ") for _ in range(letters.randint(2, 9))) + "." for _ in range(count)]


def rte(count: int) -> list[Json]:
    return [
        {"sentence1": first, "sentence2": second, "label": number % 2, "idx": number}
        for number, (first, second) in enumerate(words(i, 2) for i in range(count))
    ]


def arc(count: int) -> list[Json]:
    return [
        {
            "question": f"Which is {i}?",
            "choices": {"text": words(i, 4), "label": ["A", "B", "C", "D"]},
            "answerKey": "ABCD"[i * 7 % 4],
        }
        for i in range(count)
    ]


def write(path: Path, rows: list[Json]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RTE with a training split, and ARC with a validation and a test split."""
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 8), ("validation", 9)):
        write(folder / "glue" / "rte" / f"{split}.jsonl", rte(count))
    for split, count in (("validation", 6), ("test", 20)):
        write(folder / "allenai" / "ai2_arc" / "ARC-Easy" / f"{split}.jsonl", arc(count))
    return folder


def index_of(*folders: str) -> Any:
    from lm_eval import tasks as lm_eval_tasks

    root = Path(lm_eval_tasks.__file__).parent
    return lm_eval_tasks.TaskManager(include_defaults=False, include_path=[root / folder for folder in folders])


@pytest.fixture(scope="module")
def index() -> Any:
    return index_of(*FOLDERS)


@pytest.fixture(autouse=True)
def small_index(index: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_manager", lambda: index)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned model on disk, with weights large enough for scores to differ."""
    directory = tmp_path_factory.mktemp("models") / "model"
    prune_nm_(tiny_llama(initializer_range=0.3)).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def load(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory)


@pytest.fixture(scope="module")
def model(saved: Path) -> Any:
    """The model, which tests leave as it is."""
    return load(saved)


def own(directory: Path, data: Path, index: Any, names: tuple[str, ...], **options: Any) -> Json:
    """The scores of lm-eval alone: its model from a directory, its tasks with `datasets` reading the same files."""
    from lm_eval import simple_evaluate

    places = {"rte": "glue/rte", "arc_easy": "allenai/ai2_arc/ARC-Easy"}
    with contextlib.redirect_stderr(io.StringIO()), pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # which starts processes
        cache = str(directory.parent / "cache")
        configs = []
        for name in names:
            files = {p.stem: str(p) for p in sorted((data / places[name]).glob("*.jsonl"))}
            splits = {} if "train" in files else {"training_split": None}
            local = {"dataset_path": "json", "dataset_name": None}
            spec = index.task_index[name].cfg | splits | local | {"task": f"own_{name}"}
            configs.append(spec | {"dataset_kwargs": {"data_files": files, "cache_dir": cache}, "tag": None})
        found = simple_evaluate(
            "hf",
            {"pretrained": str(directory), "dtype": "float32"},
            tasks=configs,
            task_manager=index,
            device="cpu",
            batch_size=1,
            **options,
        )
    assert found is not None
    return {name: found["results"][f"own_{name}"] for name in names}


def assert_own(found: TaskResults, expected: Json) -> None:
    """Every score and standard error is the expected one, exactly."""
    assert found.scores.keys() == expected.keys()
    for name, metrics in expected.items():
        numbers = {key.removesuffix(",none"): v for key, v in metrics.items() if "," in key}
        errors = {f"{metric}_stderr": value for metric, value in found.stderr[name].items()}
        assert {**found.scores[name], **errors} == numbers


def test_scores_are_those_of_lm_eval_exactly(saved: Path, model: Any, data: Path, index: Any) -> None:
    found = tasks(model, tiny_tokenizer(), "rte,arc_easy", data_dir=data)
    expected = own(saved, data, index, ("rte", "arc_easy"))
    assert_own(found, expected)
    assert len({*found.scores["rte"].values(), *found.scores["arc_easy"].values()}) == 3  # acc, acc and acc_norm
    assert found.mean == (found.scores["rte"]["acc"] + found.scores["arc_easy"]["acc"]) / 2
    other = dataclasses.replace(found, scores={**found.scores, "rte": {"acc": found.scores["rte"]["acc"] + 1e-9}})
    with pytest.raises(AssertionError):
        assert_own(other, expected)


@pytest.mark.slow
def test_with_examples_a_limit_and_a_chat_template_too(saved: Path, model: Any, data: Path, index: Any) -> None:
    found = tasks(model, tiny_tokenizer(), ["rte"], data_dir=data, num_fewshot=2, limit=7)
    assert_own(found, own(saved, data, index, ("rte",), num_fewshot=2, limit=7))
    assert (found.tasks["rte"].num_fewshot, found.tasks["rte"].items, found.limit) == (2, 7, 7)
    options = {"apply_chat_template": True, "num_fewshot": 1}
    found = tasks(model, tiny_tokenizer(), ["rte"], data_dir=data, **options)
    assert_own(found, own(saved, data, index, ("rte",), fewshot_as_multiturn=True, **options))


@pytest.mark.slow
def test_scores_are_those_of_its_command_line(
    saved: Path, model: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.tasks
    from lm_eval.__main__ import cli_evaluate

    full = lm_eval.tasks.TaskManager
    definition, out = tmp_path / "own.yaml", tmp_path / "out"
    original = Path(lm_eval.tasks.__file__).parent / "glue" / "rte" / "default.yaml"
    files = {split: str(data / "glue" / "rte" / f"{split}.jsonl") for split in ("train", "validation")}
    definition.write_text(
        f"include: {original}\ntask: own\ntag: null\ndataset_path: json\ndataset_name: null\n"
        f"dataset_kwargs: {json.dumps({'data_files': files, 'cache_dir': str(tmp_path / 'cache')})}\n"
    )
    options = f"--model hf --model_args pretrained={saved},dtype=float32 --device cpu --num_fewshot 3 --limit 8"
    monkeypatch.setattr(sys, "argv", ["lm_eval", "run", *options.split(), "--output_path", str(out)])
    sys.argv += ["--tasks", str(definition)]
    # Its index of all tasks takes seconds, and it logs through a handler of its own.
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", functools.partial(full, include_defaults=False))
    monkeypatch.setattr("lm_eval.utils.setup_logging", lambda *arguments, **options: None)
    cli_evaluate()
    (results,) = out.rglob("results_*.json")
    found = tasks(model, tiny_tokenizer(), "rte", data_dir=data, num_fewshot=3, limit=8)
    assert_own(found, {"rte": json.loads(results.read_text())["results"]["own"]})


def tuned(saved: Path) -> Any:
    model = spp.wrap(load(saved), r=4, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in spp.adapter_parameters(model):
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model


def with_peft(saved: Path) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(
        load(saved), LoraConfig(r=4, lora_alpha=64, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    )
    return model.eval()


@pytest.mark.slow
def test_a_model_is_measured_as_it_is_in_memory(saved: Path, data: Path, index: Any, tmp_path: Path) -> None:
    tokenizer, names = tiny_tokenizer(), ("rte", "arc_easy")
    base = tasks(load(saved), tokenizer, names, data_dir=data).scores
    assert tasks(spp.pack(load(saved)), tokenizer, names, data_dir=data).scores == base
    model = tuned(saved)
    unmerged = tasks(model, tokenizer, names, data_dir=data)
    assert unmerged.scores != base
    with spp.disabled(model):
        assert tasks(model, tokenizer, names, data_dir=data).scores == base
    spp.merge(model)
    assert_own(unmerged, own(saved_as(model, tmp_path / "merged"), data, index, names))
    peft = with_peft(saved)
    found = tasks(peft, tokenizer, names, data_dir=data)
    assert found.scores != base
    assert_own(found, own(saved_as(peft.merge_and_unload(), tmp_path / "peft"), data, index, names))


@pytest.mark.slow
def test_a_quantized_model_is_measured_as_it_is_in_memory(data: Path) -> None:
    pytest.importorskip("bitsandbytes")
    quantized = quantized_llama("nf4", initializer_range=0.3, intermediate_size=128)
    dense = prune_nm_(tiny_llama(initializer_range=0.3, intermediate_size=128))
    before = tasks(dense, tiny_tokenizer(), "rte,arc_easy", data_dir=data).scores
    with torch.no_grad():  # before the first call: on a CPU bitsandbytes then puts its weights into another order
        for path, linear in projections(dense).items():
            linear.weight.copy_(own_dense(quantized.get_submodule(path)))
    found = tasks(quantized, tiny_tokenizer(), "rte,arc_easy", data_dir=data).scores
    assert found == tasks(dense, tiny_tokenizer(), "rte,arc_easy", data_dir=data).scores != before


def saved_as(model: Any, directory: Path) -> Path:
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def test_a_generative_task_has_its_filters_and_no_mean(model: Any, tmp_path: Path) -> None:
    rows = [{"question": f"{i} and {i}?", "answer": f"So.\n#### {2 * i}"} for i in range(3)]
    write(tmp_path / "gsm8k" / "test.jsonl", rows)
    short = tmp_path / "short.yaml"
    short.write_text(
        "task: sums\ndataset_path: openai/gsm8k\ndataset_name: main\noutput_type: generate_until\ntest_split: test\n"
        'doc_to_text: "Question: {{question}}"\ndoc_to_target: "{{answer}}"\n'
        "generation_kwargs: {until: ['Question:'], do_sample: false, max_gen_toks: 4}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
        "filter_list: [{name: strict-match, filter: [{function: regex, regex_pattern: '#### (-?[0-9.,]+)'}, "
        "{function: take_first}]}]\n"
    )
    found = tasks(model, tiny_tokenizer(), str(short), data_dir=tmp_path)
    assert found.scores == {"sums": {"exact_match,strict-match": 0.0}}
    assert found.mean is None and found.tasks["sums"].items == 3


def test_results_say_where_they_come_from(model: Any, data: Path) -> None:
    found = tasks(model, tiny_tokenizer(), "rte", data_dir=data, limit=3)
    values = json.loads(json.dumps(found.to_dict()))
    assert values["scores"]["rte"]["acc"] == values["mean"] and values["stderr"] == found.stderr
    rows = [json.dumps(row, sort_keys=True) + "\n" for row in rte(9)]
    assert values["tasks"]["rte"] == {
        "version": 1.0,
        "num_fewshot": 0,
        "items": 3,
        "split": "validation",
        "documents_sha256": hashlib.sha256("".join(rows).encode()).hexdigest(),
    }
    assert values["limit"] == 3 and values["data_dir"] == str(data) and values["dtype"] == "float32"
    assert {"lm_eval", "datasets", "spp", "transformers"} <= values["versions"].keys() and values["seconds"] > 0


def test_the_table_has_a_row_a_task_and_the_mean(model: Any, data: Path) -> None:
    found = tasks(model, tiny_tokenizer(), "rte,arc_easy", data_dir=data, limit=4)
    table = tasks_table(found, "pruned")
    assert table.columns == ("task", "examples", "documents", "split", "acc", "acc_norm")
    (first, second, last) = table.rows
    acc, error = found.scores["rte"]["acc"], found.stderr["rte"]["acc"]
    assert first == ("rte", "0", "4", "validation", f"{acc:.4f} ± {error:.4f}", "–")
    assert second[:4] == ("arc_easy", "0", "4", "test") and "±" in second[5]
    assert last == ("mean", "", "", "", f"{found.mean:.4f}", "")
    assert "pruned" in table.title and str(data) in table.title and "first 4 documents" in table.title


class TestSuites:
    def test_paper_is_the_seven_tasks_without_examples(self) -> None:
        names, shots = harness.SUITES["paper"]
        assert names == ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
        assert shots == 0

    def test_a_suite_has_its_own_number_of_examples_unless_told(
        self, data: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(harness, "SUITES", {"one": (("rte",), 3)})
        loaded = load_tasks(["one", "arc_easy,arc_easy", "rte"], data_dir=data)
        assert loaded.names == ("rte", "arc_easy")
        assert [(run.shots, len(run.objects)) for run in loaded.runs] == [(3, 1), (None, 1)]
        assert [run.shots for run in load_tasks("one,arc_easy", data_dir=data, num_fewshot=0).runs] == [0]

    def test_a_tag_and_a_pattern_are_their_tasks(self, data: Path) -> None:
        write(data / "ai2_arc" / "ARC-Challenge" / "test.jsonl", arc(3))
        assert set(load_tasks("ai2_arc", data_dir=data).names) == {"arc_challenge", "arc_easy"}
        assert set(load_tasks("arc_[ce]*y,arc_*ge", data_dir=data).names) == {"arc_challenge", "arc_easy"}

    @pytest.mark.slow
    def test_mmlu_is_a_group_with_5_examples(self, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        index = index_of("mmlu/default")
        monkeypatch.setattr(harness, "_manager", lambda: index)
        subjects = [name.removeprefix("mmlu_") for name in index.all_subtasks]
        for number, subject in enumerate(sorted(subjects)):
            for split, count in (("dev", 5), ("test", 1 + number % 2)):
                rows = [{"question": f"{i}?", "choices": list("abcd"), "answer": i % 4} for i in range(count)]
                write(tmp_path / "hails" / "mmlu_no_train" / subject / f"{split}.jsonl", rows)
        found = tasks(model, tiny_tokenizer(), "mmlu", data_dir=tmp_path, batch_size=16)
        whole = found.tasks["mmlu"]
        assert len(subjects) == 57 and whole.num_fewshot == 5 and whole.items == 57 + 28
        parts = [(found.scores[f"mmlu_{s}"]["acc"], found.tasks[f"mmlu_{s}"].items) for s in subjects]
        assert found.mean == found.scores["mmlu"]["acc"] == pytest.approx(sum(a * n for a, n in parts) / whole.items)


def as_arrow(folder: Path, rows: dict[str, list[Json]]) -> None:
    for split, some in rows.items():
        datasets.Dataset.from_list(some).save_to_disk(str(folder / split))


def as_saved_whole(folder: Path, rows: dict[str, list[Json]]) -> None:
    whole = {split: datasets.Dataset.from_list(some) for split, some in rows.items()}
    datasets.DatasetDict(whole).save_to_disk(str(folder))


def as_parquet(folder: Path, rows: dict[str, list[Json]]) -> None:
    folder.mkdir(parents=True)
    for split, some in rows.items():
        half = len(some) // 2
        for number, part in enumerate((some[:half], some[half:])):
            datasets.Dataset.from_list(part).to_parquet(str(folder / f"{split}-0000{number}-of-00002.parquet"))


def as_json(folder: Path, rows: dict[str, list[Json]]) -> None:
    folder.mkdir(parents=True)
    for split, some in rows.items():
        (folder / f"{split}.json").write_text(json.dumps(some))


class TestLocalFiles:
    @pytest.mark.sampled(4)
    @pytest.mark.parametrize("place", ["nyu-mll/glue/rte", "glue/rte", "rte", "rte/none"])
    @pytest.mark.parametrize("form", [as_arrow, as_saved_whole, as_parquet, as_json])
    def test_every_layout_has_the_same_documents(
        self, form: Callable[..., None], place: str, data: Path, tmp_path: Path
    ) -> None:
        form(tmp_path / place, {"train": rte(8), "validation": rte(9)})
        before = sorted(tmp_path.rglob("*"))
        (run,) = load_tasks("rte", data_dir=tmp_path, num_fewshot=2).runs
        assert load_tasks("rte", data_dir=tmp_path).documents == load_tasks("rte", data_dir=data).documents
        assert list(run.objects[0].eval_docs) == rte(9) and list(run.objects[0].training_docs()) == rte(8)
        assert sorted(tmp_path.rglob("*")) == before  # no cache is left beside the files

    def test_other_documents_have_another_hash(self, data: Path, tmp_path: Path) -> None:
        write(tmp_path / "rte" / "validation.jsonl", [*rte(8), {**rte(9)[8], "label": 1}])
        other = load_tasks("rte", data_dir=tmp_path).documents["rte"]
        assert other.sha256 != load_tasks("rte", data_dir=data).documents["rte"].sha256

    def test_boolq_as_its_authors_hand_it_out(self, tmp_path: Path) -> None:
        rows = [{"question": f"is it {i}", "passage": "It is.", "answer": i % 2 == 0} for i in range(4)]
        write(tmp_path / "boolq" / "none" / "validation.jsonl", rows)
        (run,) = load_tasks("boolq", data_dir=tmp_path).runs
        assert [doc["label"] for doc in run.objects[0].eval_docs] == [1, 0, 1, 0]

    def test_a_row_may_lack_a_column_of_another(self, tmp_path: Path) -> None:
        write(tmp_path / "rte" / "validation.jsonl", [rte(1)[0], {**rte(2)[1], "source": "a book"}])
        (run,) = load_tasks("rte", data_dir=tmp_path).runs
        assert [doc["source"] for doc in run.objects[0].eval_docs] == [None, "a book"]

    def test_a_split_that_is_missing(self, tmp_path: Path) -> None:
        write(tmp_path / "ai2_arc" / "ARC-Easy" / "validation.jsonl", arc(3))
        with pytest.raises(
            DataError, match=r"lacks the split 'test' of the task arc_easy; it has validation; .*split='v"
        ):
            load_tasks("arc_easy", data_dir=tmp_path)
        loaded = load_tasks("arc_easy", data_dir=tmp_path, split="validation")
        assert loaded.documents["arc_easy"].split == "validation"
        assert len(loaded.runs[0].objects[0].eval_docs) == 3
        with pytest.raises(DataError, match=r"lacks the split 'train', from which the task arc_easy takes the 2 exam"):
            load_tasks("arc_easy", data_dir=tmp_path, split="validation", num_fewshot=2)

    def test_another_split_is_measured(self, model: Any, data: Path, tmp_path: Path) -> None:
        write(tmp_path / "arc_easy" / "test.jsonl", arc(6))
        found = tasks(model, tiny_tokenizer(), "arc_easy", data_dir=data, split="validation")
        assert found.scores == tasks(model, tiny_tokenizer(), "arc_easy", data_dir=tmp_path).scores
        assert found.tasks["arc_easy"].items == 6 and found.tasks["arc_easy"].split == "validation"

    def test_no_document_is_an_example_of_itself(self, data: Path, tmp_path: Path) -> None:
        definition = tmp_path / "own.yaml"
        definition.write_text(
            "task: own\ndataset_path: allenai/ai2_arc\ndataset_name: ARC-Easy\noutput_type: multiple_choice\n"
            "validation_split: validation\ntest_split: test\ndoc_to_text: question\ndoc_to_target: 0\n"
            "doc_to_choice: '{{choices.text}}'\n"
        )
        (run,) = load_tasks(str(definition), data_dir=data, split="validation", num_fewshot=5).runs
        (task,) = run.objects
        task.set_config("num_fewshot", run.shots)
        task.set_fewshot_seed(1234)
        task.build_all_requests()
        prompts = [instance.args[0] for instance in task.instances]
        assert len(prompts) == 6 * 4
        assert all(prompt.count(f"Which is {i}?") == 1 for prompt in prompts for i in range(6))

    def test_a_task_that_is_missing(self, data: Path, tmp_path: Path) -> None:
        with pytest.raises(
            DataError, match=r"no documents of the task boolq: expected .*super_glue/boolq.* it has .*rte"
        ):
            load_tasks("boolq", data_dir=data)
        write(tmp_path / "ai2_arcs" / "ARC-Easy" / "test.jsonl", arc(3))
        with pytest.raises(DataError, match=r"nearest: ai2_arcs/ARC-Easy"):
            load_tasks("arc_easy", data_dir=tmp_path)
        with pytest.raises(DataError, match=r"data_dir is '.*none', which is no folder"):
            load_tasks("rte", data_dir=tmp_path / "none")

    def test_files_that_are_malformed(self, tmp_path: Path) -> None:
        path = write(tmp_path / "rte" / "validation.jsonl", rte(3))
        path.write_text(path.read_text() + "{not json\n")
        with pytest.raises(DataError, match=r"validation\.jsonl, line 4"):
            load_tasks("rte", data_dir=tmp_path)
        path.unlink()
        path.with_suffix(".arrow").write_bytes(b"no arrow")
        with pytest.raises(DataError, match=r"validation\.arrow cannot be read"):
            load_tasks("rte", data_dir=tmp_path)
        path.with_suffix(".arrow").unlink()
        write(path, [{"question": "of another task"}])
        with pytest.raises(DataError, match=r"the task rte cannot be loaded: .*sentence1"):
            load_tasks("rte", data_dir=tmp_path)

    def test_caches_that_cannot_be_written_are_no_hindrance(
        self, model: Any, data: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import huggingface_hub.constants as hub

        for owner, name in (
            (hub, "HF_HUB_CACHE"),
            *((datasets.config, f"HF_{n}_CACHE") for n in ("DATASETS", "MODULES")),
        ):
            monkeypatch.setattr(owner, name, "/proc/no-home")
        monkeypatch.setenv("HOME", "/proc/no-home")
        assert tasks(model, tiny_tokenizer(), "rte", data_dir=data, limit=2).tasks["rte"].items == 2

    def test_the_network_is_not_tried(self, model: Any, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def connect(*arguments: object) -> None:
            raise AssertionError(f"a connection to {arguments[1:]}")

        import huggingface_hub.constants as hub

        monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(socket.socket, "connect", connect)
        monkeypatch.setattr(socket, "getaddrinfo", connect)
        assert tasks(model, tiny_tokenizer(), "rte", data_dir=data).mean is not None
        with pytest.raises(DataError, match="of the task boolq"):
            load_tasks("boolq", data_dir=data)
        assert hub.HF_HUB_OFFLINE is False and datasets.config.HF_HUB_OFFLINE is False
        assert os.environ.get("HF_EVALUATE_OFFLINE") is None

    def test_without_local_files_the_hub_is_asked(self, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []

        def load_dataset(path: str, name: str, **options: object) -> Any:
            asked.append((path.rpartition("/")[2], name, options))
            splits = {"train": rte(8), "validation": rte(9)}
            return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in splits.items()})

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        loaded = load_tasks("rte")
        assert asked == [("glue", "rte", {})]
        assert loaded.documents == load_tasks("rte", data_dir=data).documents and loaded.data_dir is None
        assert load_tasks("rte", split="train").documents["rte"].split == "train"
        with pytest.raises(DataError, match=r"glue lacks the split 'test' of the task rte; it has train, validation; "):
            load_tasks("rte", split="test")

    def test_without_local_files_the_hub_is_named(self) -> None:
        with pytest.raises(DataError, match=r"the data set .*glue of the task rte cannot be loaded: .*pass data_dir="):
            load_tasks("rte")


class TestAsBefore:
    def test_the_model_the_tokenizer_and_the_random_state(self, saved: Path, data: Path) -> None:
        model, tokenizer = tuned(saved), tiny_tokenizer()
        tokenizer.pad_token = None
        model.train()
        model.model.layers[0].eval()
        modes = [module.training for module in model.modules()]
        values = {name: value.clone() for name, value in model.state_dict().items()}
        hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
        states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
        tasks(model, tokenizer, "rte", data_dir=data, batch_size=4)
        assert [module.training for module in model.modules()] == modes
        assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
        assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]
        assert torch.equal(torch.get_rng_state(), states[2])
        assert tokenizer.pad_token is None and tokenizer.padding_side == "right"
        assert [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()] == hooks

    def test_a_head_that_was_untied_stays_untied(self, data: Path) -> None:
        model = tiny_llama(tie_word_embeddings=True)
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
        tasks(model, tiny_tokenizer(), "rte", data_dir=data, limit=1)
        assert not model.lm_head.weight.any() and "tie_weights" not in vars(model)

    def test_lm_eval_after_an_error(self, saved: Path, tmp_path: Path) -> None:
        from lm_eval.api.task import ConfigurableTask, Task
        from tqdm.std import tqdm

        before = ConfigurableTask.download, Task.download, tqdm.__init__, logging.getLogger("lm_eval").level
        with pytest.raises(DataError):
            load_tasks("rte", data_dir=tmp_path)
        after = ConfigurableTask.download, Task.download, tqdm.__init__, logging.getLogger("lm_eval").level
        assert after == before

    def test_nothing_is_printed(self, model: Any, data: Path, capfd: pytest.CaptureFixture[str]) -> None:
        capfd.readouterr()
        tasks(model, tiny_tokenizer(), "rte,arc_easy", data_dir=data, num_fewshot=0, limit=2, progress=True)
        assert capfd.readouterr() == ("", "")

    def test_what_a_task_prints_is_no_result(
        self, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """As ifeval does, where it fetches data of its tokenizer."""
        (tmp_path / "own.py").write_text("def process(docs):\n    print('fetched')\n    return docs\n")
        definition = tmp_path / "own.yaml"
        definition.write_text(
            "task: own\ndataset_path: nyu-mll/glue\ndataset_name: rte\noutput_type: multiple_choice\n"
            "validation_split: validation\nprocess_docs: !function own.process\ndoc_to_text: sentence1\n"
            "doc_to_target: label\ndoc_to_choice: ['a', 'b']\n"
        )
        load_tasks(str(definition), data_dir=data)
        found = capsys.readouterr()
        assert found.out == "" and "fetched" in found.err

    def test_bars_on_a_terminal(
        self, model: Any, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        tasks(model, tiny_tokenizer(), "rte", data_dir=data, limit=1)
        assert capsys.readouterr().err == ""
        tasks(model, tiny_tokenizer(), "rte", data_dir=data, limit=1, progress=True)
        assert "Running loglikelihood requests: 100%" in capsys.readouterr().err


class TestBadInput:
    def test_lm_eval_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "lm_eval", None)
        with pytest.raises(DependencyError, match=r"tasks need lm-eval: pip install 'spp\[eval\]'"):
            tasks(tiny_llama(), tiny_tokenizer(), "rte")

    def test_lm_eval_is_too_old(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(harness, "installed", lambda package: "0.4.9.1")
        with pytest.raises(DependencyError, match=r"lm-eval 0\.4\.13 or later; 0\.4\.9\.1 is installed: pip"):
            load_tasks("rte")
        declared = (Path(__file__).parents[1] / "pyproject.toml").read_text()
        assert declared.count(f'"lm-eval[ifeval]>={harness.OLDEST}"') == 2

    def test_a_task_that_is_not_known(self) -> None:
        with pytest.raises(ConfigError, match=r"has no 'arc_eazy' \(nearest: .*arc_easy.*'papre' \(nearest: paper\); "):
            tasks(tiny_llama(), tiny_tokenizer(), "rte,papre,arc_eazy")

    @pytest.mark.parametrize(
        "options",
        [
            {"limit": 0},
            {"limit": -1},
            {"limit": 0.5},
            {"num_fewshot": -1},
            {"batch_size": 0},
            {"tasks": ""},
            {"tasks": 5},
        ],
    )
    def test_options(self, options: dict[str, Any], data: Path) -> None:
        with pytest.raises(ConfigError, match=next(iter(options))):
            tasks(tiny_llama(), tiny_tokenizer(), **{"tasks": "rte", "data_dir": data, **options})

    def test_a_task_that_is_asked_for_twice(self, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write(data / "ai2_arc" / "ARC-Challenge" / "test.jsonl", arc(3))
        with pytest.raises(ConfigError, match="names arc_easy twice, by ai2_arc and by arc_easy"):
            load_tasks("ai2_arc,arc_easy", data_dir=data)

    def test_what_is_no_model_or_no_tokenizer(self, data: Path) -> None:
        with pytest.raises(ConfigError, match="load it first"):
            tasks("model", tiny_tokenizer(), "rte", data_dir=data)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="tokenizer is a NoneType"):
            tasks(tiny_llama(), None, "rte", data_dir=data)

    def test_a_chat_template_that_is_missing(self, data: Path) -> None:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = None
        with pytest.raises(ConfigError, match="needs a tokenizer with a chat template"):
            tasks(tiny_llama(), tokenizer, "rte", data_dir=data, apply_chat_template=True)

    def test_logits_that_are_nan(self, data: Path) -> None:
        model = tiny_llama()
        model.lm_head.weight.data[5] = torch.nan
        with pytest.raises(NonFiniteError, match="the model's logits are NaN"):
            tasks(model, tiny_tokenizer(), "rte", data_dir=data)

    def test_a_score_that_is_not_finite(self) -> None:
        from spp.evaluation.scores import metrics_of

        assert metrics_of("lambada", {"perplexity,none": 2.0, "perplexity_stderr,none": "N/A"}) == (
            {"perplexity": 2.0},
            {},
        )
        with pytest.raises(NonFiniteError, match="perplexity of the task lambada is inf"):
            metrics_of("lambada", {"perplexity,none": float("inf")})

    def test_another_models_tokenizer(self, data: Path) -> None:
        with pytest.raises(DataError, match=r"is beyond the model's 50 embeddings, 0 to 49; use the model's own"):
            tasks(tiny_llama(vocab_size=50), tiny_tokenizer(), "rte", data_dir=data)

    def test_code_that_a_model_writes_is_not_run(self, data: Path, tmp_path: Path) -> None:
        definition = tmp_path / "unsafe.yaml"
        definition.write_text(
            "task: unsafe\nunsafe_code: true\ndataset_path: nyu-mll/glue\ndataset_name: rte\n"
            "output_type: generate_until\nvalidation_split: validation\n"
            "doc_to_text: sentence1\ndoc_to_target: sentence2\n"
        )
        with pytest.raises(ConfigError, match="unsafe runs code that the model writes"):
            load_tasks(str(definition), data_dir=data)


class TestCommand:
    @pytest.fixture
    def call(self, program: Callable[..., Outcome]) -> Iterator[Callable[..., Outcome]]:  # noqa: F811
        yield lambda *arguments: program("eval", *arguments)

    def test_json_is_one_object_with_scores_and_perplexity(
        self, call: Callable[..., Outcome], saved: Path, model: Any, data: Path, tmp_path: Path
    ) -> None:
        text = tmp_path / "text.txt"
        text.write_text("A text of some length. " * 20)
        measure = ("--tasks", "rte,arc_easy", "--data-dir", data, "--limit", 3, "--json")
        alone = call(saved, *measure)
        assert alone.code == 0, alone.err
        assert alone.out.count("\n") == 1
        both = json.loads(call(saved, *measure, "--text", text, "--window", 64).out)
        expected = tasks(model, tiny_tokenizer(), "rte,arc_easy", data_dir=data, limit=3)
        for values in (json.loads(alone.out), both):
            assert values["scores"] == expected.scores and values["mean"] == expected.mean
            assert values["model_fingerprint"] and values["versions"]["lm_eval"] and values["limit"] == 3
        assert both["perplexity"] > 1 and both["text_sha256"] and "perplexity" not in json.loads(alone.out)

    def test_an_adapter_and_the_table(
        self, call: Callable[..., Outcome], saved: Path, data: Path, tmp_path: Path
    ) -> None:
        model = tuned(saved)
        adapter = spp.save_adapter(model, tmp_path / "adapter")
        expected = tasks(model, tiny_tokenizer(), "rte", data_dir=data, num_fewshot=1, limit=5)
        options = ("--tasks", "rte", "--data-dir", data, "--num-fewshot", 1, "--limit", 5)
        found = call(saved, "--adapter", adapter, *options)
        assert found.code == 0, found.err
        assert (
            f"rte   1         5          validation  {expected.scores['rte']['acc']:.4f}"
            in " ".join(found.out.split("\n"))
            or str(f"{expected.scores['rte']['acc']:.4f} ±") in found.out
        )
        assert not any(word in found.err for word in ("lm_eval", "Building contexts", "%|", "WARNING"))

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            ((), ("--text", "--tasks")),
            (("--limit", 5), ("--limit without --tasks",)),
            (("--data-dir", "x", "--apply-chat-template"), ("--apply-chat-template and --data-dir without --tasks",)),
            (("--tasks", "rte", "--limit", 0), ("--limit is 0",)),
        ],
    )
    def test_options_that_make_no_sense(
        self, call: Callable[..., Outcome], options: tuple[object, ...], told: tuple[str, ...]
    ) -> None:
        with_text = ("--text", __file__) if options and "--tasks" not in options else ()
        found = call("/no/such/model", *with_text, *options)
        assert found.code == 1 and all(word in found.err for word in told), found.err

    def test_tasks_are_checked_before_the_model(self, call: Callable[..., Outcome], tmp_path: Path) -> None:
        found = call("/no/such/model", "--tasks", "rte", "--data-dir", tmp_path)
        assert found.code == 1 and "no documents of the task rte" in found.err
        write(tmp_path / "arc_easy" / "validation.jsonl", arc(3))
        found = call("/no/such/model", "--tasks", "arc_easy", "--data-dir", tmp_path)
        assert found.code == 1 and "--split validation" in found.err
        found = call("/no/such/model", "--tasks", "arc_easi")
        assert found.code == 1 and "--tasks: lm-eval" in found.err and "arc_easy" in found.err
