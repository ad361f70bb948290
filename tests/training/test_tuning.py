"""tune: from a pruned model and a file to a run directory, interrupted and resumed, and what it refuses."""

from __future__ import annotations

import errno
import json
import math
import shutil
import signal
import subprocess
import sys
import textwrap
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback, TrainerControl

from spp.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NonFiniteError,
    OutputError,
    OutputExistsError,
    SPPWarning,
    TargetError,
    WrapError,
)
from spp.evaluation import perplexity
from spp.files.provenance import resident_bytes
from spp.merging.model import merge
from spp.training import SPPTrainer, TrainingInterrupted, TuneConfig, TuneResult, tune
from spp.training.callbacks import StopOnSignal, read_log
from spp.training.checkpoints import MARKER_NAME
from spp.training.run_directory import RunDirectory
from spp.wrapping.adapters import adapter_state_dict, load_adapter
from spp.wrapping.wrap import is_wrapped
from tests.helpers.models import tiny_llama, tiny_tokenizer
from tests.training.helpers import ROWS, TEXT, SignalAt, bytes_of, config, pruned, run_tune


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> TuneResult:
    """A run of six steps with a checkpoint every two; for reading only."""
    return run_tune(config(text, tmp_path_factory.mktemp("tuned") / "run", save_every=2, save_limit=9))


@pytest.fixture
def run(finished: TuneResult, tmp_path: Path) -> Path:
    """A copy of what that run wrote."""
    return Path(shutil.copytree(finished.run_dir, tmp_path / "run"))


def test_the_whole_run(text: Path, tmp_path: Path) -> None:
    model, run = pruned(), tmp_path / "run"
    c = config(text, run, steps=40, save_every=None, warmup_ratio=0.03)
    result = tune(c, model=model, tokenizer=tiny_tokenizer())
    assert result.model is model
    assert is_wrapped(model)
    assert result.steps == 40
    assert result.sparsity == 0.5
    assert result.perplexity_after < 0.9 * result.perplexity_before
    assert {p.name for p in run.iterdir()} == {"config.json", "log.jsonl", "eval.json", "adapter", "checkpoints"}
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["checkpoint-40"]

    saved = json.loads((run / "config.json").read_text())
    assert TuneConfig.from_dict(saved["tune"]) == c
    assert saved["data"] == result.data.to_dict()
    assert 2**20 < saved["peak_bytes"] <= resident_bytes()
    assert saved["versions"]["torch"] == torch.__version__ and saved["threads"] == torch.get_num_threads()
    log = read_log(run / "log.jsonl")
    assert [entry["step"] for entry in log] == list(range(1, 41))
    assert all(set(entry) == {"step", "loss", "lr", "grad_norm", "sparsity", "seconds"} for entry in log)
    warmup = math.ceil(0.03 * 40)
    rates = [2e-2 * min(k / warmup, (40 - k) / (40 - warmup)) for k in range(40)]
    assert [entry["lr"] for entry in log] == pytest.approx(rates, rel=1e-12)
    assert all(a["seconds"] <= b["seconds"] for a, b in pairwise(log))
    assert result.seconds >= log[-1]["seconds"] > 0
    evaluation = json.loads((run / "eval.json").read_text())
    assert evaluation["before"]["perplexity"] == result.perplexity_before
    assert evaluation["after"]["perplexity"] == result.perplexity_after
    assert evaluation["after"]["window"] == result.eval_window == 32
    told = {name: value for name, value in evaluation["after"].items() if name not in ("perplexity", "loss", "window")}
    assert told == result.measured_on and told["bos"] is False and told["protocol"] == "per-window"
    assert evaluation["before"]["text_sha256"] == told["text_sha256"] and len(told["tokenizer_sha256"]) == 64
    loaded = adapter_state_dict(load_adapter(pruned(), result.adapter_dir))
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in adapter_state_dict(model).items())
    assert json.loads(json.dumps(result.to_dict()))["run_dir"] == str(run)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("schedule", "last"), [("constant", 4e-3), ("cosine", 0.0)])
def test_other_schedules(text: Path, tmp_path: Path, schedule: str, last: float) -> None:
    run_tune(config(text, tmp_path / "run", lr=4e-3, schedule=schedule, eval_fraction=0.0, steps=20))
    assert read_log(tmp_path / "run" / "log.jsonl")[-1]["lr"] == pytest.approx(last, abs=1e-4)


@pytest.mark.slow
def test_an_adapter_that_changes_nothing_is_said_once(finished: TuneResult, text: Path, tmp_path: Path) -> None:
    """The learning rate of the first step of a warm-up is zero: one step learns nothing."""
    with pytest.warns(SPPWarning, match="changes no weight: β is zero everywhere; was it trained") as found:
        result = run_tune(config(text, tmp_path / "run", steps=1, save_every=1))
    assert len([one for one in found if issubclass(one.category, SPPWarning)]) == 1
    assert "β is zero everywhere" in result.to_dict()["without_effect"]
    assert result.perplexity_before == result.perplexity_after
    with pytest.warns(SPPWarning, match="changes no weight: it learned an update"):
        result = run_tune(config(text, tmp_path / "low", steps=3, lr=1e-20))
    assert "it learned an update" in str(result.without_effect)
    assert finished.without_effect is None


def test_epochs_are_counted_in_steps(text: Path, tmp_path: Path) -> None:
    options = {"steps": None, "epochs": 1.5, "batch_size": 3, "gradient_accumulation": 2, "block_length": 128}
    result = run_tune(config(text, tmp_path / "run", eval_fraction=0.0, **options))
    per_epoch = math.ceil(math.ceil(result.data.rows / 3) / 2)
    assert result.steps == math.ceil(1.5 * per_epoch)


def test_a_bar_fewer_logs_and_nothing_held_out_when_asked(
    text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = run_tune(config(text, tmp_path / "run", log_every=2, eval_fraction=0.0, progress=True))
    captured = capfd.readouterr()
    assert "tuning" in captured.err and "6/6" in captured.err
    assert captured.out == ""
    assert [entry["step"] for entry in read_log(tmp_path / "run" / "log.jsonl")] == [2, 4, 6]
    assert result.perplexity_before is None
    assert result.perplexity_after is None
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["after"] is None


def test_perplexity_on_a_text_of_its_own(text: Path, tmp_path: Path) -> None:
    held = tmp_path / "held.txt"
    held.write_text("Sphinx of black quartz, judge my vow. " * 5)
    result = run_tune(config(text, tmp_path / "run", eval_text=held, eval_window=24, eval_windows=3))
    tokenizer = tiny_tokenizer()
    options: dict[str, Any] = {"window": 24, "max_windows": 3}
    assert result.data.held_out == 0
    assert result.perplexity_before == pytest.approx(perplexity(pruned(), tokenizer, held.read_text(), **options))
    assert result.perplexity_after == pytest.approx(perplexity(result.model, tokenizer, held.read_text(), **options))
    merge(result.model)
    assert result.perplexity_after == pytest.approx(
        perplexity(result.model, tokenizer, held.read_text(), **options), rel=1e-5
    )


def test_instruction_data(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in ROWS))
    result = run_tune(config(data, tmp_path / "run", block_length=64, steps=12, eval_fraction=0.2))
    assert result.data.kind == "instruction"
    assert result.data.held_out == 5
    assert result.eval_window is None
    assert result.perplexity_after < result.perplexity_before


@pytest.mark.slow
def test_a_model_from_a_directory(text: Path, tmp_path: Path, run: Path) -> None:
    pruned().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    from_files = tune(config(text, tmp_path / "a", model=tmp_path / "model"))
    assert from_files.perplexity_after is not None
    assert (tmp_path / "a/adapter/adapter_model.safetensors").read_bytes() == (
        run / "adapter/adapter_model.safetensors"
    ).read_bytes()
    half = tune(config(text, tmp_path / "c", model=tmp_path / "model", dtype="bfloat16"))
    assert half.model.dtype == torch.bfloat16


def test_the_same_run_gives_the_same_bytes_and_another_seed_others(text: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(hash(name) % 1000)
        run_tune(config(text, tmp_path / name, seed=seed, dropout=0.1, eval_fraction=0.0, steps=3))
    assert bytes_of(tmp_path / "a/adapter") == bytes_of(tmp_path / "b/adapter")
    assert bytes_of(tmp_path / "a/adapter") != bytes_of(tmp_path / "c/adapter")


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "options", [{"gradient_checkpointing": True}, {"bf16": True, "device": "auto"}, {"dropout": 0.05}]
)
def test_other_ways_to_compute(text: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    result = run_tune(config(text, tmp_path / "run", steps=10, **options))
    assert result.perplexity_after < result.perplexity_before


def test_the_models_settings_are_as_before(text: Path, tmp_path: Path) -> None:
    model = pruned()
    model.config.use_cache = True
    tune(config(text, tmp_path / "run", gradient_checkpointing=True), model=model, tokenizer=tiny_tokenizer())
    assert model.config.use_cache is True
    assert not model.training
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def test_quiet_when_asked(text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_tune(config(text, tmp_path / "run"))
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


class TestInterruption:
    @pytest.mark.sampled(1)
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_saves_and_resumes_to_the_same_bytes(
        self, text: Path, tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        options: dict[str, Any] = {"steps": 8, "gradient_accumulation": 2, "dropout": 0.2, "save_every": None}
        run_tune(config(text, tmp_path / "whole", **options))
        before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
        with monkeypatch.context() as patch:
            patch.setattr("spp.training.tuning.ProgressBar", SignalAt)
            patch.setattr(SignalAt, "number", number)
            model = pruned()
            with pytest.raises(
                TrainingInterrupted, match=rf"{number.name} after step 3; .*checkpoint-3; .*resume=True"
            ) as caught:
                tune(config(text, tmp_path / "cut", **options), model=model, tokenizer=tiny_tokenizer())
        assert isinstance(caught.value, KeyboardInterrupt)
        assert (caught.value.step, caught.value.signal_number) == (3, number)
        assert caught.value.checkpoint == tmp_path / "cut/checkpoints/checkpoint-3"
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
        assert not is_wrapped(model)
        assert not (tmp_path / "cut/adapter").exists()

        result = tune(config(text, tmp_path / "cut", resume=True, **options), model=model, tokenizer=tiny_tokenizer())
        assert result.steps == 8
        assert bytes_of(tmp_path / "cut/adapter") == bytes_of(tmp_path / "whole/adapter")
        whole, cut = (read_log(tmp_path / name / "log.jsonl") for name in ("whole", "cut"))
        for entry in whole + cut:
            del entry["seconds"]
        assert cut == whole
        assert (tmp_path / "cut/eval.json").read_bytes() == (tmp_path / "whole/eval.json").read_bytes()

    def test_twice_stops_at_once(self, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("spp.training.tuning.ProgressBar", SignalAt)
        monkeypatch.setattr(SignalAt, "times", 2)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        try:
            with pytest.raises(KeyboardInterrupt) as caught:
                run_tune(config(text, tmp_path / "run"))
        finally:
            signal.signal(signal.SIGINT, before)
        assert not isinstance(caught.value, TrainingInterrupted)

    def test_one_that_comes_while_ranks_agree_waits_for_the_next_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The other ranks were told of no signal: this rank alone must neither stop nor forget it."""

        asked: list[int] = []

        def largest(value: int) -> int:
            asked.append(value)
            if len(asked) == 1:
                signal.raise_signal(signal.SIGTERM)
            return value

        monkeypatch.setattr("spp.training.callbacks.largest", largest)
        control = TrainerControl()
        with StopOnSignal() as stop:
            stop.on_step_end(None, None, control)
            assert not control.should_training_stop and not control.should_save
            stop.on_step_end(None, None, control)
        assert control.should_training_stop and control.should_save
        assert stop.agree() == signal.SIGTERM and asked == [0, signal.SIGTERM, signal.SIGTERM]

    def test_resuming_a_finished_run_changes_nothing(self, finished: TuneResult, text: Path, run: Path) -> None:
        before = bytes_of(run / "adapter"), bytes_of(run)
        again = run_tune(config(text, run, resume=True))
        assert again.steps == finished.steps
        assert again.perplexity_after == finished.perplexity_after
        assert (bytes_of(run / "adapter"), bytes_of(run)) == before

    def test_resuming_nothing_starts(self, text: Path, tmp_path: Path) -> None:
        assert run_tune(config(text, tmp_path / "run", resume=True)).steps == 6

    @pytest.mark.sampled(1)
    def test_a_run_killed_before_its_first_checkpoint_starts_anew(
        self, finished: TuneResult, text: Path, run: Path
    ) -> None:
        shutil.rmtree(run / "checkpoints")
        shutil.rmtree(run / "adapter")
        result = run_tune(config(text, run, resume=True))
        assert result.perplexity_after == finished.perplexity_after
        assert [entry["step"] for entry in read_log(run / "log.jsonl")] == [1, 2, 3, 4, 5, 6]

    def test_logged_steps_after_the_checkpoint_are_dropped(self, text: Path, run: Path) -> None:
        (run / "checkpoints/checkpoint-6" / MARKER_NAME).unlink()
        log = run / "log.jsonl"
        whole = read_log(log)
        log.write_text(log.read_text() + '{"step": 7, "lo')  # cut off by a kill
        with pytest.warns(SPPWarning, match="skipping .*checkpoint-6"):
            run_tune(config(text, run, resume=True, save_every=2, save_limit=9))
        now = read_log(log)
        assert [(e["step"], e["loss"]) for e in now] == [(e["step"], e["loss"]) for e in whole]

    def test_outside_the_main_thread_no_handler_is_installed(self) -> None:
        import threading

        seen: list[Any] = []

        def work() -> None:
            with StopOnSignal():
                seen.append(signal.getsignal(signal.SIGINT))

        before = signal.getsignal(signal.SIGINT)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert seen == [before]

    @pytest.mark.slow
    def test_a_killed_process_resumes_to_the_same_bytes(self, text: Path, tmp_path: Path) -> None:
        pruned().save_pretrained(tmp_path / "model")
        tiny_tokenizer().save_pretrained(tmp_path / "model")
        options: dict[str, Any] = {"model": tmp_path / "model", "steps": 16, "save_every": 1, "dropout": 0.1}
        tune(config(text, tmp_path / "whole", **options))
        program = textwrap.dedent(
            """
            import json, os, signal, sys, threading, time
            from pathlib import Path
            from spp.training import TuneConfig, tune

            def kill_when(folder):  # from inside: quicker than another process would be
                while not folder.exists():
                    time.sleep(0.001)
                os.kill(os.getpid(), signal.SIGKILL)

            threading.Thread(target=kill_when, args=(Path(sys.argv[2]),), daemon=True).start()
            tune(TuneConfig.from_dict(json.loads(sys.argv[1])))
            """
        )
        victim = config(text, tmp_path / "cut", **options)
        arguments = [json.dumps(victim.to_dict()), str(tmp_path / "cut/checkpoints/checkpoint-5")]
        process = subprocess.run([sys.executable, "-c", program, *arguments], timeout=600)
        assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
        assert not (tmp_path / "cut/adapter").exists()

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SPPWarning)  # a half-written checkpoint may have been left, or not
            tune(config(text, tmp_path / "cut", **options, resume=True))
        assert bytes_of(tmp_path / "cut/adapter") == bytes_of(tmp_path / "whole/adapter")


class TestRefused:
    def test_an_earlier_run(self, text: Path, run: Path) -> None:
        before = bytes_of(run)
        with pytest.raises(OutputExistsError, match=r"resume=True.*overwrite=True"):
            run_tune(config(text, run))
        assert bytes_of(run) == before

    def test_overwriting_replaces_what_a_run_writes_and_nothing_else(self, text: Path, run: Path) -> None:
        (run / "notes.txt").write_text("mine")
        run_tune(config(text, run, overwrite=True, steps=3))
        assert (run / "notes.txt").read_text() == "mine"
        assert [p.name for p in (run / "checkpoints").iterdir()] == ["checkpoint-3"]
        assert len(read_log(run / "log.jsonl")) == 3

    def test_overwriting_loses_nothing_that_somebody_put_among_what_a_run_writes(self, text: Path, run: Path) -> None:
        step = run / "checkpoints" / "checkpoint-6"
        for name in ("checkpoints/notes.txt", f"checkpoints/{step.name}/notes.txt", "adapter/train.jsonl"):
            (run / name).write_text("mine")
            before = bytes_of(run)
            with pytest.raises(OutputExistsError, match=Path(name).name):
                run_tune(config(text, run, overwrite=True))
            assert bytes_of(run) == before
            (run / name).unlink()
        (run / "base").mkdir()
        (run / "base/thesis.txt").write_text("mine")
        with pytest.raises(OutputExistsError, match=r"base is a checkpoint, but also holds thesis\.txt"):
            run_tune(config(text, run, overwrite=True))

    def test_overwriting_loses_no_page_that_the_model_has_too(self, text: Path, tmp_path: Path) -> None:
        run, model = tmp_path / "run", tmp_path / "model"
        for folder in (run / "base", model):
            folder.mkdir(parents=True)
            (folder / "LICENSE").write_text("free")
        (run / "config.json").write_text('{"format": "spp-tune-1"}')
        again = config(text, run, model=str(model), overwrite=True)
        RunDirectory(again)
        (run / "base/LICENSE").write_text("mine")
        with pytest.raises(OutputExistsError, match="holds LICENSE, which would be lost"):
            RunDirectory(again)

    def test_overwriting_looks_again_after_the_model_is_loaded(
        self, text: Path, run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        late, real = run / "adapter/late.txt", RunDirectory.begin

        def begin(self: RunDirectory, *given: Any) -> None:
            late.write_text("mine")
            real(self, *given)

        monkeypatch.setattr(RunDirectory, "begin", begin)
        with pytest.raises(OutputExistsError, match=r"late\.txt"):
            run_tune(config(text, run, overwrite=True))
        assert late.read_text() == "mine" and (run / "adapter/adapter_config.json").exists()

    def test_overwriting_keeps_links_to_other_disks(self, text: Path, run: Path, tmp_path: Path) -> None:
        disk = tmp_path / "disk"
        for name in ("checkpoints", "adapter"):
            (run / name).rename(tmp_path / f"disk-{name}")
            (run / name).symlink_to(tmp_path / f"disk-{name}")
        run_tune(config(text, run, overwrite=True, steps=2))
        assert [path.name for path in (tmp_path / "disk-checkpoints").iterdir()] == ["checkpoint-2"]
        assert (run / "adapter").is_symlink() and (tmp_path / "disk-adapter/adapter_config.json").exists()
        disk.mkdir()
        (disk / "precious.txt").write_text("mine")
        (run / "checkpoints").unlink()
        (run / "checkpoints").symlink_to(disk)
        with pytest.raises(OutputExistsError, match=r"precious\.txt"):
            run_tune(config(text, run, overwrite=True))
        assert (disk / "precious.txt").read_text() == "mine"

    @pytest.mark.parametrize("option", ["overwrite", "resume"])
    def test_a_directory_that_is_no_run(self, text: Path, tmp_path: Path, option: str) -> None:
        model = tmp_path / "model"
        pruned().save_pretrained(model)
        before = bytes_of(model)
        with pytest.raises(OutputExistsError, match="no earlier run"):
            run_tune(config(text, model, **{option: True}))
        assert bytes_of(model) == before

    def test_an_output_that_is_a_file(self, text: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")
        with pytest.raises(OutputExistsError, match="is a file"):
            run_tune(config(text, tmp_path / "file"))

    def test_a_place_that_cannot_be_written(self, text: Path, tmp_path: Path) -> None:
        model = pruned()
        (tmp_path / "file").write_text("mine")
        with pytest.raises(OutputError, match="a part of the path is a file"):
            tune(config(text, tmp_path / "file" / "run"), model=model, tokenizer=tiny_tokenizer())
        assert not is_wrapped(model)

    @pytest.mark.sampled(1)
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("_save_rng_state", None),
            ("_save_optimizer_and_scheduler", "PytorchStreamWriter failed writing file data/0: file write failed"),
            (
                "_save_optimizer_and_scheduler",
                "[enforce fail at inline_container.cc:672] . unexpected pos 29824 vs 29712",
            ),
        ],
    )
    def test_a_full_disk(
        self,
        finished: TuneResult,
        text: Path,
        tmp_path: Path,
        name: str,
        message: str | None,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        real = getattr(SPPTrainer, name)

        def full(self: SPPTrainer, output_dir: str) -> None:
            if self.state.global_step < 4:
                real(self, output_dir)
            elif message is None:
                raise OSError(errno.ENOSPC, "No space left on device")
            else:
                raise RuntimeError(message)

        def no_file(**options: object) -> None:
            assert "checkpoint-4" in str(options["dir"])
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(SPPTrainer, name, full)
            patch.setattr("spp.training.checkpoints.tempfile.TemporaryFile", no_file)
            with pytest.raises(OutputError, match=r"cannot write .*checkpoint-4: the disk is full: free some space"):
                run_tune(config(text, tmp_path / "run", save_every=2))
        with pytest.warns(SPPWarning, match="skipping .*checkpoint-4"):
            result = run_tune(config(text, tmp_path / "run", save_every=2, resume=True))
        assert result.perplexity_after == finished.perplexity_after

    def test_resuming_with_other_options(self, text: Path, run: Path) -> None:
        with pytest.raises(ConfigError, match=r"lr: 0\.02 then, 0\.01 now\n  steps: 6 then, 9 now"):
            run_tune(config(text, run, resume=True, lr=1e-2, steps=9))
        run_tune(config(text, run, resume=True, save_every=5, log_every=2))

    def test_resuming_a_run_from_before_windows_had_bos(self, text: Path, run: Path) -> None:
        path = run / "config.json"
        written = json.loads(path.read_text())
        del written["tune"]["bos"], written["data"]["bos"]
        path.write_text(json.dumps(written))
        assert run_tune(config(text, run, resume=True)).steps == 6
        with pytest.raises(ConfigError, match=r"its training data was another .*earlier version.*bos='never'"):
            run_tune(config(text, run, resume=True, bos="always"))

    def test_resuming_a_run_from_before_an_option_existed(self, text: Path, run: Path) -> None:
        path = run / "config.json"
        written = json.loads(path.read_text())
        del written["tune"]["loss_chunk"], written["tune"]["saved_activations"]
        path.write_text(json.dumps(written))
        assert run_tune(config(text, run, resume=True)).steps == 6
        with pytest.raises(ConfigError, match="loss_chunk: None then, 8 now"):
            run_tune(config(text, run, resume=True, loss_chunk=8))

    def test_resuming_with_other_data(self, text: Path, run: Path, tmp_path: Path) -> None:
        path, other = run / "config.json", tmp_path / "train.txt"
        path.write_text(path.read_text().replace(str(text), str(other)))
        other.write_text(TEXT.replace("fox", "fux"))
        with pytest.raises(ConfigError, match="its training data was another"):
            run_tune(config(other, run, resume=True))

    def test_a_diverging_run_stops_and_leaves_the_model_as_it_was(self, text: Path, tmp_path: Path) -> None:
        model = pruned()
        with torch.no_grad():
            model.lm_head.weight[:] = torch.inf
        before = {name: p.clone() for name, p in model.state_dict().items()}
        with pytest.raises(NonFiniteError, match="loss is nan at step 1"):
            tune(config(text, tmp_path / "run", eval_fraction=0.0), model=model, tokenizer=tiny_tokenizer())
        assert not is_wrapped(model)
        assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
        assert not list((tmp_path / "run/checkpoints").iterdir())

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"data": "nowhere.txt"}, DataError, "there is no file nowhere.txt"),
            ({"block_length": 5000}, DataError, "one block of 5000"),
            ({"eval_window": 5000}, DataError, "5000 held out"),
            ({"eval_text": "nowhere.txt"}, DataError, "nowhere.txt cannot be read"),
            ({"target_modules": ("nothing",)}, TargetError, "nothing"),
            ({"r": 4096}, ConfigError, "4096"),
            ({"model": "somewhere"}, ConfigError, "two models"),
            ({"dtype": "float16"}, ConfigError, "in memory"),
        ],
    )
    def test_before_anything_is_written(
        self, text: Path, tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        model = pruned()
        with pytest.raises(error, match=message):
            tune(config(text, tmp_path / "run", **options), model=model, tokenizer=tiny_tokenizer())
        assert not (tmp_path / "run").exists()
        assert not is_wrapped(model)

    def test_models_that_are_missing_doubled_or_wrapped(self, text: Path, tmp_path: Path) -> None:
        c = config(text, tmp_path / "run")
        with pytest.raises(ConfigError, match="there is no model"):
            tune(c)
        with pytest.raises(ConfigError, match="give the tokenizer too"):
            tune(c, model=pruned())
        with pytest.raises(ConfigError, match="give the model too"):
            tune(c, tokenizer=tiny_tokenizer())
        import spp

        with pytest.raises(WrapError, match="wrapped already"):
            tune(c, model=spp.wrap(pruned(), r=4), tokenizer=tiny_tokenizer())

    def test_a_model_that_cannot_be_loaded(self, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "empty").mkdir()
        with pytest.raises(CheckpointError, match=r"empty has no tokenizer \(tokenizer.json, "):
            tune(config(text, tmp_path / "run", model=tmp_path / "empty"))
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(CheckpointError, match=r"no model directory someone/nothing, and fetching it as a hub"):
            tune(config(text, tmp_path / "run", model="someone/nothing"))
        for missing in (tmp_path / "mistyped", "./mistyped", "some/mistyped/path"):
            with pytest.raises(CheckpointError, match=r"there is no model directory \S+$"):
                tune(config(text, tmp_path / "run", model=missing))

    def test_a_dense_model_is_tuned_with_a_warning(self, text: Path, tmp_path: Path) -> None:
        with pytest.warns(SPPWarning, match="dense"):
            result = tune(config(text, tmp_path / "run"), model=tiny_llama(), tokenizer=tiny_tokenizer())
        assert result.sparsity == 0.0

    def test_a_log_that_is_none(self, tmp_path: Path) -> None:
        (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step"}\n')
        with pytest.raises(DataError, match="line 2: not JSON"):
            read_log(tmp_path / "log.jsonl")
        (tmp_path / "log.jsonl").write_text("[]\n")
        with pytest.raises(DataError, match="line 1: not a line"):
            read_log(tmp_path / "log.jsonl")


def test_the_callbacks_are_trainer_callbacks() -> None:
    assert issubclass(StopOnSignal, TrainerCallback)
