"""A teacher beside the labels: in trainers and in tune, in memory, by name and from a cache; what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn

import spp
from spp.errors import CheckpointError, ConfigError, DataError, NonFiniteError, OutputExistsError
from spp.training import Collator, SPPTrainer, TrainingInterrupted, tune
from spp.training.data import TokenRows, load_data
from spp.training.loading import load_model
from spp.training.teacher import dense_of
from spp.training.teacher_cache import FILE, TeacherCache, write_cache
from tests.helpers.models import tiny_llama, tiny_tokenizer
from tests.helpers.tolerances import assert_matches
from tests.training.helpers import SignalAt, arguments, blocks, bytes_of, config, losses, pruned, trainer, wrapped

KL = {"ce_weight": 0.3, "kl_weight": 0.7}
FEW = {**KL, "steps": 3, "eval_windows": 1}


def dense(**options: Any) -> Any:
    """A model whose distributions are not all alike."""
    return tiny_llama(**{"initializer_range": 0.2, **options})


def rows(count: int = 8) -> TokenRows:
    """Rows of several lengths, the first tokens of which are not learned."""
    generator = torch.Generator().manual_seed(2)
    made = [torch.randint(3, 256, (5 + i,), generator=generator) for i in range(count)]
    return TokenRows([(ids, torch.where(torch.arange(len(ids)) < 3, -100, ids)) for ids in made])


def taught(directory: Path, teacher: Any, data: Any = None, model: Any = None, **options: Any) -> SPPTrainer:
    own = {
        name: options.pop(name) for name in (*KL, "temperature", "hidden_weight", "teacher_cache") if name in options
    }
    collate, made = Collator(2), arguments(directory, **options)
    student = wrapped() if model is None else model
    return SPPTrainer(student, made, train_dataset=data or rows(), data_collator=collate, teacher=teacher, **own)


def oracle(student: Any, teacher: Any, batch: dict[str, Tensor], count: int, weights: dict[str, float]) -> Tensor:
    """The loss of a batch by its formula, under autograd."""
    ce, kl = weights.get("ce_weight", 1.0), weights.get("kl_weight", 0.0)
    heat, hidden = weights.get("temperature", 1.0), weights.get("hidden_weight", 0.0)
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    kept: dict[str, list[Tensor]] = {"s": [], "t": []}
    logits = {}
    for name, model in (("s", student), ("t", teacher)):
        hooks = [
            layer.register_forward_hook(
                lambda m, a, out, n=name: kept[n].append(out if torch.is_tensor(out) else out[0])
            )
            for layer in model.model.layers
        ]
        with torch.set_grad_enabled(name == "s"):
            logits[name] = model(**given).logits[:, :-1]
        for hook in hooks:
            hook.remove()
    labels = batch["labels"][:, 1:]
    counts = labels != -100
    z, y = logits["s"][counts], logits["t"][counts]
    p, q = F.log_softmax(z / heat, 1), F.log_softmax(y / heat, 1)
    loss = ce * F.cross_entropy(z, labels[counts], reduction="sum") + kl * heat**2 * (q.exp() * (q - p)).sum()
    for h, g in zip(kept["s"], kept["t"], strict=True):
        h, g = h[:, :-1][counts], g[:, :-1][counts]
        loss = loss + hidden / len(kept["s"]) * ((h - g).square().sum(1) / g.square().sum(1)).sum()
    return loss / count


@pytest.mark.parametrize(
    "weights", [{**KL, "temperature": 2.0}, {"ce_weight": 0.5, "kl_weight": 0.5, "hidden_weight": 0.3}], ids=str
)
def test_a_step_of_the_trainer_is_the_formula_with_padding_and_accumulation(tmp_path: Path, weights: Any) -> None:
    student, teacher = wrapped().double(), dense().double()
    options = {"gradient_accumulation_steps": 2, "max_steps": 1, "max_grad_norm": 0.0, "learning_rate": 0.0}
    made = taught(tmp_path, teacher, model=student, **weights, **options)
    seen: list[dict[str, Tensor]] = []
    grads: list[list[Tensor]] = []
    compute, parameters = made.compute_loss, spp.adapter_parameters(student)
    made.compute_loss = lambda model, inputs, *a, **k: (  # type: ignore[method-assign]
        seen.append(dict(inputs)) or compute(model, inputs, *a, **k)
    )
    torch.nn.init.normal_(parameters[1], 0, 0.1)
    step, training = torch.optim.AdamW.step, [module.training for module in teacher.modules()]

    def watched(self: Any, *rest: Any, **given: Any) -> Any:
        grads.append([p.grad.clone() for p in parameters if p.grad is not None])
        return step(self, *rest, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", watched)
        made.train()
    assert len(seen) == 2 and any(bool((batch["attention_mask"] == 0).any()) for batch in seen)
    count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in seen)
    student.train()
    expected = sum(oracle(student, teacher, batch, count, weights) for batch in seen)
    assert losses(made)[0] == pytest.approx(float(expected.detach()), rel=1e-4)  # type: ignore[union-attr]
    for found, wanted in zip(grads[0], torch.autograd.grad(expected, parameters), strict=True):  # type: ignore[arg-type]
        assert_matches(found, wanted, torch.float64)
    assert [module.training for module in teacher.modules()] == training
    assert all(p.grad is None for p in teacher.parameters()) and not teacher.lm_head._forward_pre_hooks


def test_evaluation_measures_the_cross_entropy_alone(tmp_path: Path) -> None:
    made = taught(tmp_path, dense(), blocks(), **KL)
    made.eval_dataset = blocks(4)
    assert made.evaluate()["eval_loss"] == pytest.approx(trainer(tmp_path, eval_data=True).evaluate()["eval_loss"])


@pytest.mark.parametrize("packed", [False, True])
def test_a_packed_student_and_checkpointed_activations(tmp_path: Path, packed: bool) -> None:
    found = []
    for name, options in (("plain", {}), ("again", {"gradient_checkpointing": True})):
        model = spp.wrap(spp.pack(pruned()) if packed else pruned(), spp.SPPConfig(r=4, seed=0, packed=packed))
        made = taught(tmp_path / name, dense(), model=model, **KL, hidden_weight=0.2, max_steps=2, **options)
        made.train()
        found.append(losses(made))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


REFUSED: list[tuple[Callable[[], Any], dict[str, Any], str]] = [
    (lambda: dense(vocab_size=260), KL, "vocabulary 260, the model that learns has 256"),
    (lambda: dense(num_hidden_layers=3), {"hidden_weight": 0.5}, "blocks 3, the model that learns has 2"),
    (lambda: dense(hidden_size=32), {"hidden_weight": 0.5}, "hidden size 32, the model that learns has 64"),
    (dense, {}, "kl_weight and hidden_weight are 0"),
    (lambda: None, KL, "ce_weight is 0.3, but there is no teacher"),
    (lambda: "dense", KL, r"teacher='dense': .*has no certificate.*teacher='DIR'"),
    (lambda: "no/such/folder", KL, "there is no model directory"),
]


@pytest.mark.parametrize(("make", "options", "complaint"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_what_does_not_fit_is_refused(
    tmp_path: Path, make: Callable[[], Any], options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises((ConfigError, CheckpointError), match=complaint):
        taught(tmp_path, make(), **options)


def test_the_model_itself_and_what_needs_logits_are_refused(tmp_path: Path) -> None:
    model = wrapped()
    with pytest.raises(ConfigError, match="is the model that learns"):
        taught(tmp_path, model, model=model, **KL)
    with pytest.raises(ConfigError, match="teacher does not go together with label_smoothing_factor"):
        taught(tmp_path, dense(), **KL, label_smoothing_factor=0.1)
    taught(tmp_path, dense(hidden_size=32, num_hidden_layers=1), **KL)  # of another size: only its logits count


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense checkpoint, and a pruned one whose certificate names it."""
    folder = tmp_path_factory.mktemp("teachers")
    dense().save_pretrained(folder / "dense")
    tiny_tokenizer().save_pretrained(folder / "dense")
    spp.prune_checkpoint(folder / "dense", folder / "pruned", method="magnitude", pattern="2:4")
    return folder


@pytest.fixture(scope="module")
def cache(folders: Path, text: Path) -> Path:
    data = load_data([str(text)], tiny_tokenizer(), block_length=32)
    report = write_cache(load_model(folders / "dense"), tiny_tokenizer(), data, folders / "cache", top_k=255)
    assert report.tokens == data.summary.labelled and report.rows == data.summary.rows and 0 < report.rest < 0.1
    return folders / "cache"


def test_dense_is_the_origin_that_the_certificate_names(folders: Path, text: Path, tmp_path: Path) -> None:
    by_name = tune(config(text, tmp_path / "a", model=folders / "pruned", teacher="dense", **FEW))
    options = json.loads((tmp_path / "a/config.json").read_text())
    assert options["tune"]["teacher"] == "dense" and len(options["teacher"]["fingerprint"]) == 64
    model, teacher = load_model(folders / "pruned"), load_model(folders / "dense")
    in_memory = tune(config(text, tmp_path / "b", **FEW), model=model, tokenizer=tiny_tokenizer(), teacher=teacher)
    assert in_memory.perplexity_after == by_name.perplexity_after
    alone = tune(config(text, tmp_path / "c", model=folders / "pruned", steps=3, eval_windows=1))
    assert alone.perplexity_after != by_name.perplexity_after
    moved = shutil.copytree(folders / "pruned", tmp_path / "moved")
    certificate = json.loads((moved / "sparsity.json").read_text())
    (moved / "sparsity.json").write_text(json.dumps({**certificate, "origin": str(tmp_path / "gone")}))
    with pytest.raises(ConfigError, match=r"names .*gone, which is not there"):
        dense_of(str(moved))


def test_what_tune_refuses_before_it_writes(folders: Path, text: Path, tmp_path: Path) -> None:
    def refused(complaint: str, teacher: Any = None, **options: Any) -> None:
        with pytest.raises((ConfigError, DataError, CheckpointError), match=complaint):
            tune(config(text, tmp_path / "run", model=folders / "pruned", **options), teacher=teacher)
        assert not (tmp_path / "run").exists()

    other = shutil.copytree(folders / "dense", tmp_path / "other")
    words = json.loads((other / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(words))
    refused("kl_weight is 0.7, but there is no teacher", kl_weight=0.7)
    with pytest.raises(ConfigError, match="another tokenizer"):
        tune(config(text, tmp_path / "run", model=folders / "pruned", teacher=other, **FEW))
    with pytest.raises(ConfigError, match="two teachers"):
        tune(config(text, tmp_path / "run", model=folders / "pruned", teacher="dense", **FEW), teacher=dense())
    assert not (tmp_path / "run").exists()


def test_a_cache_of_nearly_all_is_the_teacher(folders: Path, cache: Path, text: Path, tmp_path: Path) -> None:
    by_model = tune(config(text, tmp_path / "a", model=folders / "pruned", teacher="dense", **FEW))
    by_cache = tune(config(text, tmp_path / "b", model=folders / "pruned", teacher_cache=cache, **FEW))
    assert by_cache.perplexity_after == pytest.approx(by_model.perplexity_after, rel=1e-4)
    with pytest.raises(ConfigError, match="its teacher was another then"):
        (tmp_path / "cache").mkdir()
        shutil.copytree(cache, tmp_path / "cache", dirs_exist_ok=True)
        head = json.loads((tmp_path / "cache/teacher_cache.json").read_text())
        (tmp_path / "cache/teacher_cache.json").write_text(json.dumps({**head, "teacher_fingerprint": "another"}))
        path = tmp_path / "b/config.json"
        path.write_text(path.read_text().replace(str(cache), str(tmp_path / "cache")))
        again = config(text, tmp_path / "b", model=folders / "pruned", teacher_cache=tmp_path / "cache", **FEW)
        tune(replace(again, resume=True))


def test_a_cache_of_rows_with_padding(tmp_path: Path) -> None:
    """Rows of several lengths, in an order of their own."""
    teacher, data = dense(), rows()
    summary = load_data_of(data)
    write_cache(teacher, tiny_tokenizer(), summary, tmp_path / "cache", top_k=255, batch_size=3)
    found = []
    for name, options in (("a", {"teacher": teacher}), ("b", {"teacher": None, "teacher_cache": tmp_path / "cache"})):
        made = taught(tmp_path / name, data=data, **options, **KL, max_steps=4)
        made.train()
        found.append(losses(made))
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    shifted = TokenRows([(ids, ids) for ids, _ in data.rows])  # the same tokens, but more of them to learn
    with pytest.raises(DataError, match=r"lacks 8 of 8 training rows, such as row 1.*completions_only"):
        taught(tmp_path / "c", None, shifted, teacher_cache=tmp_path / "cache", **KL).train()


def load_data_of(data: TokenRows) -> Any:
    from spp.training.data import DataSummary, TrainingData

    summary = DataSummary("instruction", len(data), 0, 0, 0, 0, 0, 0, "")
    return TrainingData(data, None, None, summary, Collator(2))


def test_caches_that_are_no_use(folders: Path, cache: Path, text: Path, tmp_path: Path) -> None:
    def spoiled(name: str, file: str, change: Callable[[bytes], bytes]) -> Path:
        folder = shutil.copytree(cache, tmp_path / name)
        (folder / file).write_bytes(change((folder / file).read_bytes()))
        return folder

    head = "teacher_cache.json"
    bad = [
        (spoiled("short", FILE, lambda b: b[: len(b) // 2]), "teacher_cache.safetensors"),
        (spoiled("newer", head, lambda b: b.replace(b"cache-1", b"cache-9")), "has the format 'spp-teacher-cache-9'"),
        (spoiled("count", head, lambda b: b.replace(b'"top_k": 255', b'"top_k": 64')), "does not belong to"),
        (tmp_path / "none", "holds no teacher_cache.json"),
    ]
    for folder, complaint in bad:
        with pytest.raises(CheckpointError, match=complaint):
            tune(config(text, tmp_path / "run", model=folders / "pruned", teacher_cache=folder, **FEW))
    rows_of = json.loads((cache / head).read_text())["rows_sha256"].encode()
    with pytest.raises(CheckpointError, match="other rows"):
        TeacherCache.open(spoiled("rows", head, lambda b: b.replace(rows_of, b"0" * 64)))
    for name in ("ids", "log_probs", "rest", "starts"):
        changed = load_file(cache / FILE)
        changed[name] = changed[name].flip(0).contiguous()
        with pytest.raises(CheckpointError, match=f"other {name}"):
            TeacherCache.open(spoiled(name, FILE, lambda b, new=changed: save(new)))
    found = TeacherCache.open(cache)
    with pytest.raises(ConfigError, match="vocabulary 256, the model that learns 300"):
        found.check(300)
    with pytest.raises(ConfigError, match="another tokenizer"):
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens(["zz"])
        found.check(256, tokenizer)
    with pytest.raises(DataError, match=r"lacks \d+ of \d+ training rows.*block_length"):
        options = {"block_length": 16, "eval_window": 16}
        tune(config(text, tmp_path / "run", model=folders / "pruned", teacher_cache=cache, **FEW, **options))
    assert not (tmp_path / "run").exists()
    data = load_data([str(text)], tiny_tokenizer(), block_length=32)
    with pytest.raises(OutputExistsError):
        write_cache(dense(), tiny_tokenizer(), data, cache)
    with pytest.raises(ConfigError, match="top_k is 256; it must be less than the vocabulary"):
        write_cache(dense(), tiny_tokenizer(), data, tmp_path / "new", top_k=256)
    assert not (tmp_path / "new").exists()
    write_cache(dense(), tiny_tokenizer(), data, tmp_path / "short", top_k=3, overwrite=True)  # of a damaged one
    assert TeacherCache.open(tmp_path / "short").head["top_k"] == 3


@pytest.mark.parametrize("everywhere", [True, False])
def test_a_teacher_that_is_not_finite_is_not_cached(everywhere: bool, text: Path, tmp_path: Path) -> None:
    """Nor where it is finite on the first row, and an earlier cache stays."""
    data, model = load_data([str(text)], tiny_tokenizer(), block_length=32), dense()
    rows = [set(data.train[i]["input_ids"].tolist()) for i in range(len(data.train))]
    later = set().union(*rows) - rows[0]
    with torch.no_grad():
        (model.model.norm.weight if everywhere else model.model.embed_tokens.weight[later.pop()]).fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="check"):
        write_cache(model, tiny_tokenizer(), data, tmp_path / "cache", top_k=3)
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_bytes(
    folders: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str, **options: Any) -> Any:
        given = config(
            text, tmp_path / name, **{**FEW, "steps": 5}, temperature=2.0, hidden_weight=0.1, dropout=0.1, **options
        )
        return tune(given, model=pruned(), tokenizer=tiny_tokenizer(), teacher=dense())

    whole = run("whole")
    with monkeypatch.context() as patch:
        patch.setattr("spp.training.tuning.ProgressBar", SignalAt)
        with pytest.raises(TrainingInterrupted):
            run("cut")
    with pytest.raises(ConfigError, match="its teacher was another then"):
        given = config(
            text, tmp_path / "cut", **{**FEW, "steps": 5}, temperature=2.0, hidden_weight=0.1, dropout=0.1, resume=True
        )
        tune(given, model=pruned(), tokenizer=tiny_tokenizer(), teacher=dense(initializer_range=0.3))
    resumed = run("cut", resume=True)
    assert bytes_of(resumed.adapter_dir) == bytes_of(whole.adapter_dir)


@pytest.mark.slow
def test_a_teacher_in_fewer_bits(folders: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    whole = dense(intermediate_size=128)  # whole blocks of 64 weights a row
    whole.save_pretrained(tmp_path / "whole")
    plain = taught(tmp_path, whole, **KL, max_steps=1)
    plain.train()
    for bits, kind in ((8, "Linear8bitLt"), (4, "Linear4bit")):
        model = load_model(tmp_path / "whole", bits=bits)
        assert type(model.model.layers[0].mlp.up_proj).__name__ == kind
        made = taught(tmp_path, model, **KL, max_steps=1)
        made.train()
        assert losses(made)[0] != losses(plain)[0]
        assert losses(made)[0] == pytest.approx(losses(plain)[0], rel=0.05)
    spp.export_packed(folders / "pruned", tmp_path / "packed")
    with pytest.raises(ConfigError, match="is small already"):
        load_model(tmp_path / "packed", bits=4)


def test_pst_learns_from_a_teacher(folders: Path, text: Path, tmp_path: Path) -> None:
    given = config(text, tmp_path / "run", method="pst", pattern="2:4", r=16, **KL, steps=2, eval_fraction=0.0)
    result = tune(given, model=dense(), tokenizer=tiny_tokenizer(), teacher=dense())
    assert result.steps == 2 and isinstance(result.model, nn.Module)
