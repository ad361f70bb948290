"""SPPTrainer: what it trains, saves, resumes and refuses."""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import spp
from spp.errors import AdapterError, CheckpointError, ConfigError, MaskError, OutputError, SPPWarning, WrapError
from spp.files import values_sha256
from spp.training import SPPTrainer
from spp.training.checkpoints import MARKER_NAME, last_complete, mark_complete, rotate, why_incomplete
from spp.wrapping.adapters import adapter_state_dict, base_masks, load_adapter, save_adapter
from spp.wrapping.wrap import adapter_layers
from tests.helpers.models import prune_nm_, tiny_llama
from tests.training.helpers import StopAt, arguments, blocks, bytes_of, losses, pruned, trainer, wrapped


def adapter_of(model: Any) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in adapter_state_dict(model).items()}


def test_only_the_adapter_changes(finished: SPPTrainer) -> None:
    before = dict(wrapped().named_parameters())
    optimized = {id(p) for group in finished.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in spp.adapter_parameters(finished.model)}
    for name, parameter in finished.model.named_parameters():
        is_ours = name.endswith(("spp_alpha", "spp_beta"))
        assert torch.equal(parameter, before[name]) != is_ours, name


def test_alpha_and_beta_are_both_decayed(tmp_path: Path) -> None:
    made = trainer(tmp_path, weight_decay=0.25)
    made.create_optimizer()
    assert {group["weight_decay"] for group in made.optimizer.param_groups if group["params"]} == {0.25}


def test_every_train_log_has_the_sparsity(finished: SPPTrainer) -> None:
    entries = [entry for entry in finished.state.log_history if "loss" in entry]
    assert len(entries) == 6
    assert {entry["sparsity"] for entry in entries} == {0.5}


def test_the_sparsity_is_measured_again_after_a_write(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    assert made.sparsity == 0.5
    layers = adapter_layers(made.model)
    with torch.no_grad():
        next(iter(layers.values())).weight.zero_()
    total = sum(layer.weight.numel() for layer in layers.values())
    zeros = sum(int((layer.weight == 0).sum()) for layer in layers.values())
    assert zeros > total / 2
    assert made.sparsity == zeros / total


@pytest.mark.sampled(1)
@pytest.mark.parametrize("dropout_mode", ["input", "alpha"])
@pytest.mark.parametrize("stop", [2, 4, 5, 7])  # 5 steps an epoch: within one, at its end, in the second
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path, stop: int, dropout_mode: str) -> None:
    def options(name: str) -> dict[str, Any]:
        return {
            "model": wrapped(dropout=0.3, dropout_mode=dropout_mode),
            "directory": tmp_path / name,
            "gradient_accumulation_steps": 2,
            "max_steps": 9,
        }

    whole = trainer(**options("whole"))
    whole.train()
    whole.save_model(str(tmp_path / "whole" / "final"))
    trainer(**options("cut"), callbacks=[StopAt(stop)]).train()
    resumed = trainer(**options("cut"))
    torch.manual_seed(999)  # a new process has another random state
    resumed.train(resume_from_checkpoint=True)
    resumed.save_model(str(tmp_path / "cut" / "final"))
    assert len(losses(whole)) == 9
    assert losses(resumed) == losses(whole)
    assert bytes_of(tmp_path / "cut" / "final") == bytes_of(tmp_path / "whole" / "final")


def test_resuming_a_finished_run_trains_no_further(finished: SPPTrainer, checkpoints: Path) -> None:
    again = trainer(checkpoints)
    repeated = again.train(resume_from_checkpoint=True)
    assert repeated.global_step == again.state.global_step == 6
    assert repeated.training_loss == pytest.approx(finished.state.log_history[-1]["train_loss"])
    expected = adapter_of(finished.model)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in adapter_of(again.model).items())


def test_resuming_with_more_steps_goes_on(checkpoints: Path) -> None:
    longer = trainer(checkpoints, max_steps=9)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 9


def test_another_seed_is_another_run(finished: SPPTrainer, tmp_path: Path) -> None:
    second = trainer(tmp_path, seed=4)
    second.train()
    assert losses(finished) != losses(second)


def test_a_checkpoint_holds_the_adapter_alone(finished: SPPTrainer) -> None:
    directory = Path(finished.args.output_dir) / "checkpoint-4"
    assert {file.name for file in directory.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        MARKER_NAME,
    }
    marker = json.loads((directory / MARKER_NAME).read_text())
    assert marker["step"] == 4
    assert marker["files"] == {f.name: f.stat().st_size for f in directory.iterdir() if f.name != MARKER_NAME}


def test_a_checkpoint_is_an_adapter_that_loads(finished: SPPTrainer) -> None:
    model = load_adapter(pruned(), Path(finished.args.output_dir) / "checkpoint-6")
    for key, tensor in adapter_of(finished.model).items():
        assert torch.equal(adapter_state_dict(model)[key], tensor), key


def test_save_model_writes_the_adapter(finished: SPPTrainer, tmp_path: Path) -> None:
    finished.save_model(str(tmp_path / "out"))
    assert set(bytes_of(tmp_path / "out")) == {"adapter_config.json", "adapter_model.safetensors"}
    save_adapter(finished.model, tmp_path / "saved")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "saved")


def fail_at(monkeypatch: pytest.MonkeyPatch, name: str, call: int) -> None:
    """Make a function of `spp.training.checkpoints`, or of its `os`, fail at one of its calls."""
    from spp.training import checkpoints

    where = checkpoints.os if name == "replace" else checkpoints
    real, calls = getattr(where, name), iter(range(100))

    def failing(*arguments: Any) -> Any:
        if next(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(where, name, failing)


@pytest.mark.filterwarnings("ignore:the adapter changes no weight")  # not trained
@pytest.mark.parametrize(("name", "call"), [("_sync", 0), ("_sync", 1), ("replace", 0)])
def test_a_save_that_fails_leaves_the_old_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: int
) -> None:
    made, out = trainer(tmp_path), tmp_path / "out"
    made.save_model(str(out))
    (out / "notes.txt").write_text("mine")
    before = bytes_of(out)
    with torch.no_grad():
        for parameter in spp.adapter_parameters(made.model):
            parameter.fill_(0.5)
    with monkeypatch.context() as patch, pytest.raises(OutputError, match="disk is full"):
        fail_at(patch, name, call)
        made.save_model(str(out))
    assert bytes_of(out) == before and len(list(out.iterdir())) == 3
    load_adapter(pruned(), out)
    made.save_model(str(out))
    assert all((t == 0.5).all() for t in adapter_of(load_adapter(pruned(), out)).values())
    assert (out / "notes.txt").read_text() == "mine" and len(list(out.iterdir())) == 3


@pytest.mark.filterwarnings("ignore:the adapter changes no weight")  # not trained
@pytest.mark.parametrize("same_config", [True, False])
def test_a_save_cut_off_between_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_config: bool) -> None:
    out = tmp_path / "out"
    trainer(tmp_path, wrapped(scaling=2.0)).save_model(str(out))
    second = trainer(tmp_path, wrapped(scaling=2.0 if same_config else 3.0))
    with torch.no_grad():
        for parameter in spp.adapter_parameters(second.model):
            parameter.fill_(0.5)
    with monkeypatch.context() as patch, pytest.raises(OutputError):
        fail_at(patch, "replace", 1)
        second.save_model(str(out))
    if same_config:  # what is there is the new adapter
        found = adapter_of(load_adapter(pruned(), out))
        assert all(torch.equal(found[key], t) for key, t in adapter_of(second.model).items())
    else:
        with pytest.raises(CheckpointError, match="missing"):
            load_adapter(pruned(), out)


@pytest.mark.filterwarnings("ignore:the adapter changes no weight")  # not trained
def test_leftovers_of_a_killed_save_are_removed(tmp_path: Path) -> None:
    made, out = trainer(tmp_path), tmp_path / "out"
    made.save_model(str(out))
    left = out / ".adapter_model.safetensors.spp-tmp-0123456789ab"
    left.mkdir()
    (left / "adapter_model.safetensors").write_text("half")
    made.save_model(str(out))
    assert not left.exists()


@pytest.mark.sampled(1)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(tmp_path: Path, reentrant: bool) -> None:
    plain = trainer(tmp_path / "a", wrapped(dropout=0.2))
    plain.train()
    checkpointed = trainer(
        tmp_path / "b",
        wrapped(dropout=0.2),
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    checkpointed.train()
    assert losses(checkpointed) == losses(plain)
    expected = adapter_of(plain.model)
    for key, tensor in adapter_of(checkpointed.model).items():
        assert torch.equal(tensor, expected[key]), key


def test_bf16_autocast_trains(finished: SPPTrainer, tmp_path: Path) -> None:
    half = trainer(tmp_path, bf16=True)
    half.train()
    assert losses(half) != losses(finished)
    assert all(p.dtype == torch.float32 for p in spp.adapter_parameters(half.model))
    for a, b in zip(losses(half), losses(finished), strict=True):
        assert a == pytest.approx(b, rel=2e-2)


@pytest.mark.slow
def test_epochs_and_evaluation(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=-1, num_train_epochs=2, eval_data=True, eval_strategy="epoch")
    made.train()
    assert made.state.global_step == 20
    evaluations = [entry["eval_loss"] for entry in made.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 2
    assert made.evaluate()["eval_loss"] == evaluations[-1]


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "eval_data": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "learning_rate": 1.0,  # far too much: the first evaluation is the best
    }
    made = trainer(tmp_path, **options)
    made.train()
    best = Path(made.state.best_model_checkpoint)
    assert best.name != "checkpoint-6"
    expected = adapter_state_dict(load_adapter(pruned(), best))
    for key, tensor in adapter_of(made.model).items():
        assert torch.equal(tensor, expected[key]), key


def test_rotation_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    made = trainer(tmp_path, save_strategy="steps", save_steps=1, save_total_limit=2)
    made.train()
    assert sorted(d.name for d in tmp_path.iterdir()) == ["checkpoint-5", "checkpoint-6"]
    assert made.args.save_total_limit == 2


@pytest.mark.slow
def test_model_init_builds_a_wrapped_model(tmp_path: Path) -> None:
    made = SPPTrainer(args=arguments(tmp_path), model_init=lambda: wrapped(), train_dataset=blocks())
    made.train()
    assert made.state.global_step == 6
    with pytest.raises(WrapError, match="not wrapped"):
        SPPTrainer(args=arguments(tmp_path), model_init=lambda: pruned(), train_dataset=blocks())


class TestHalfWritten:
    @pytest.mark.sampled(1)
    @pytest.mark.parametrize("damage", ["marker", "file", "size"])
    def test_is_skipped_with_a_warning(self, checkpoints: Path, damage: str) -> None:
        last = checkpoints / "checkpoint-6"
        if damage == "marker":
            (last / MARKER_NAME).unlink()
        elif damage == "file":
            (last / "scheduler.pt").unlink()
        else:
            (last / "optimizer.pt").write_bytes(b"")
        made = trainer(checkpoints)
        with pytest.warns(SPPWarning, match="skipping .*checkpoint-6"):
            made.train(resume_from_checkpoint=True)
        assert made.state.global_step == 6
        assert len(losses(made)) == 6

    def test_is_refused_by_name(self, checkpoints: Path) -> None:
        (checkpoints / "checkpoint-6" / MARKER_NAME).unlink()
        with pytest.raises(
            CheckpointError, match=r"checkpoint-6 cannot be resumed from: .*last whole one .*checkpoint-4"
        ):
            trainer(checkpoints).train(resume_from_checkpoint=str(checkpoints / "checkpoint-6"))

    def test_a_name_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="no such directory"):
            trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))

    def test_nothing_to_resume(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="no whole checkpoint"):
            trainer(tmp_path).train(resume_from_checkpoint=True)

    def test_a_malformed_marker(self, checkpoints: Path) -> None:
        last = checkpoints / "checkpoint-6"
        (last / MARKER_NAME).write_text("{")
        assert "checkpoint marker" in str(why_incomplete(last))
        (last / MARKER_NAME).write_text("{}")
        assert "lists no files" in str(why_incomplete(last))

    def test_a_kill_while_saving_leaves_no_marker(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        made = trainer(tmp_path, save_strategy="steps", save_steps=2)
        real = made._save_rng_state

        def killed(output_dir: str) -> None:
            if output_dir.endswith("checkpoint-4"):
                raise KeyboardInterrupt
            real(output_dir)

        monkeypatch.setattr(made, "_save_rng_state", killed)
        with pytest.raises(KeyboardInterrupt):
            made.train()
        assert why_incomplete(tmp_path / "checkpoint-4") is not None
        assert last_complete(tmp_path, warn=False) == tmp_path / "checkpoint-2"

    def test_saving_again_over_a_whole_one_unmarks_it_first(
        self, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = trainer(checkpoints, save_strategy="steps", save_steps=2)

        def killed(output_dir: str) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(made, "_save_rng_state", killed)
        with pytest.raises(KeyboardInterrupt):
            made.train()
        assert MARKER_NAME in str(why_incomplete(checkpoints / "checkpoint-2"))


class TestRotate:
    def make(self, run: Path, step: int, whole: bool = True) -> Path:
        directory = run / f"checkpoint-{step}"
        directory.mkdir(parents=True)
        (directory / "optimizer.pt").write_text("x")
        if whole:
            mark_complete(directory, step)
        return directory

    def test_halves_neither_count_nor_go(self, tmp_path: Path) -> None:
        kept, half = self.make(tmp_path, 10), self.make(tmp_path, 20, whole=False)
        assert rotate(tmp_path, 1) == []
        assert kept.exists()
        assert half.exists()

    def test_by_steps_not_by_name_or_time(self, tmp_path: Path) -> None:
        made = [self.make(tmp_path, step) for step in (100, 20, 3)]
        assert rotate(tmp_path, 1) == [made[2], made[1]]
        assert last_complete(tmp_path) == made[0]

    def test_the_best_stays(self, tmp_path: Path) -> None:
        made = [self.make(tmp_path, step) for step in (1, 2, 3, 4)]
        assert rotate(tmp_path, 2, best=made[0]) == [made[1], made[2]]

    # public report: rotating checkpoints deletes what a user put into one
    @pytest.mark.parametrize("name", ["notes.txt", "README.md", "results/table.csv", "figures/README.md"])
    def test_what_no_trainer_writes_stays_and_counts_no_longer(self, tmp_path: Path, name: str) -> None:
        made = [self.make(tmp_path, step) for step in (1, 2, 3, 4)]
        path = made[0] / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
        with pytest.warns(SPPWarning, match=f"checkpoint-1 is not deleted, .*: {name} in it") as said:
            assert rotate(tmp_path, 2) == [made[1]]
        assert len(said) == 1 and path.read_text() == "mine" and why_incomplete(made[0]) is None
        path.unlink()
        if path.parent != made[0]:
            path.parent.rmdir()
        assert rotate(tmp_path, 2) == [made[0]]

    def test_what_cannot_be_looked_into_stays(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        made = [self.make(tmp_path, step) for step in (1, 2)]

        def denied(*arguments: object) -> Iterator[str]:
            raise PermissionError(13, "Permission denied", str(made[0]))

        monkeypatch.setattr("spp.training.checkpoints.foreign", denied)
        with pytest.warns(SPPWarning, match="Permission denied"):
            assert rotate(tmp_path, 1) == []
        assert why_incomplete(made[0]) is None

    def test_no_limit(self, tmp_path: Path) -> None:
        self.make(tmp_path, 1)
        self.make(tmp_path, 2)
        assert rotate(tmp_path, None) == []

    def test_other_folders_are_not_touched(self, tmp_path: Path) -> None:
        for name in ("checkpoint-x", "checkpoint-1-old", "my-checkpoint-2"):
            (tmp_path / name).mkdir()
        self.make(tmp_path, 1)
        self.make(tmp_path, 2)
        rotate(tmp_path, 1)
        assert sorted(p.name for p in tmp_path.iterdir()) == [
            "checkpoint-1-old",
            "checkpoint-2",
            "checkpoint-x",
            "my-checkpoint-2",
        ]


class TestRefused:
    def test_a_model_that_is_not_wrapped(self, tmp_path: Path) -> None:
        with pytest.raises(WrapError, match=r"spp\.wrap\(model\)"):
            trainer(tmp_path, pruned())

    def test_other_parameters_that_train(self, tmp_path: Path) -> None:
        model = wrapped()
        model.model.norm.weight.requires_grad_(True)
        with pytest.raises(WrapError, match=r"model\.norm\.weight"):
            trainer(tmp_path, model).train()

    @pytest.mark.parametrize("revive", [True, False])
    def test_a_base_whose_zeros_changed(self, tmp_path: Path, revive: bool) -> None:
        class Writes(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
                if state.global_step == 3:
                    weight = made.model.model.layers[1].mlp.up_proj.weight
                    row = weight.data[0]
                    row[(row == 0) if revive else (row != 0)] = 1e-3 if revive else 0.0

        made = trainer(tmp_path, save_strategy="steps", save_steps=2, callbacks=[Writes()])
        with pytest.raises(MaskError, match=r"model\.layers\.1\.mlp\.up_proj"):
            made.train()
        assert [d.name for d in tmp_path.iterdir()] == ["checkpoint-2"]

    def test_a_checkpoint_of_another_rank(self, checkpoints: Path) -> None:
        model = wrapped(r=8)
        before = adapter_of(model)
        with pytest.raises(AdapterError):
            trainer(checkpoints, model).train(resume_from_checkpoint=True)
        assert all(torch.equal(tensor, before[key]) for key, tensor in adapter_of(model).items())

    def test_a_checkpoint_of_another_model(self, checkpoints: Path) -> None:
        other = spp.wrap(prune_nm_(tiny_llama(intermediate_size=128)), r=4)
        with pytest.raises(AdapterError):
            trainer(checkpoints, other).train(resume_from_checkpoint=True)

    def test_a_checkpoint_of_another_mask(self, checkpoints: Path) -> None:
        other = pruned()
        with torch.no_grad():
            other.model.layers[0].mlp.up_proj.weight[0, :4] = 0
        with pytest.raises(MaskError):
            trainer(checkpoints, spp.wrap(other, r=4)).train(resume_from_checkpoint=True)

    def test_a_checkpoint_of_other_values(self, checkpoints: Path) -> None:
        made = trainer(checkpoints, max_steps=9)
        made.train(resume_from_checkpoint=True)  # on its own base, without a word
        other = pruned()
        with torch.no_grad():
            other.model.layers[0].mlp.up_proj.weight.mul_(2)
        model = spp.wrap(other, r=4)
        before = adapter_of(model)
        strict = SPPTrainer(model, arguments(checkpoints, max_steps=9), train_dataset=blocks(), strict_values=True)
        with pytest.raises(AdapterError, match="1 of 14 layers"):
            strict.train(resume_from_checkpoint=True)
        assert all(torch.equal(tensor, before[key]) for key, tensor in adapter_of(model).items())
        with pytest.warns(SPPWarning, match=r"1 of 14 layers, first in model\.layers\.0\.mlp\.up_proj"):
            trainer(checkpoints, model, max_steps=9).train(resume_from_checkpoint=True)

    def test_deepspeed_and_fsdp(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = SPPTrainer.create_accelerator_and_postprocess

        def pretend(self: SPPTrainer) -> None:
            real(self)
            self.is_fsdp_enabled = True

        monkeypatch.setattr(SPPTrainer, "create_accelerator_and_postprocess", pretend)
        with pytest.raises(ConfigError, match="FSDP"):
            trainer(tmp_path)


def test_saves_after_the_first_hash_no_value_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[torch.Size] = []

    def counted(weight: torch.Tensor, *rest: Any) -> str | None:
        hashed.append(weight.shape)
        return values_sha256(weight, *rest)

    monkeypatch.setattr("spp.weights.base.values_sha256", counted)
    trainer(tmp_path, save_strategy="steps", save_steps=2, save_total_limit=3).train()
    assert len(list(tmp_path.glob("checkpoint-*"))) == 3 and len(hashed) == 14


def test_masks_are_compared_by_value(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.check(made.model)
    assert base_masks(made.model) == made._masks
    assert math.isclose(made.sparsity, 0.5)
