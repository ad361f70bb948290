"""TRL: SFT through PEFT and on a wrapped model, DPO with the disabled adapter as its reference."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'spp[test]'")

from datasets import Dataset  # noqa: E402
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback  # noqa: E402

import spp  # noqa: E402
from spp.errors import ConfigError, WrapError  # noqa: E402
from spp.integrations.peft import SPPPeftConfig  # noqa: E402
from spp.integrations.trl import SPPSFTTrainer  # noqa: E402
from spp.training.checkpoints import MARKER_NAME  # noqa: E402
from tests.helpers.models import projections, tiny_tokenizer  # noqa: E402
from tests.helpers.tolerances import assert_same_bits  # noqa: E402
from tests.integrations.helpers import logits, pruned, scatter  # noqa: E402

TEXTS = [f"number {i} is followed by {i + 1}." for i in range(12)]
PAIRS = [{"prompt": f"after {i}: ", "chosen": f"{i + 1}.", "rejected": f"{i + 2}!"} for i in range(6)]


def options(directory: Path, **others: Any) -> dict[str, Any]:
    return {
        "output_dir": str(directory),
        "per_device_train_batch_size": 2,
        "learning_rate": 5e-2,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "seed": 3,
        "max_length": 48,
        **others,
    }


def sft(model: Any, directory: Path, make: Any = None, callbacks: Any = None, config: Any = None, **others: Any) -> Any:
    """A trainer over TEXTS; `others` go to its config."""
    keywords = {} if config is None else {"peft_config": config}
    made = (make or trl.SFTTrainer)(
        model=model,
        args=trl.SFTConfig(**options(directory, **others)),
        train_dataset=Dataset.from_list([{"text": text} for text in TEXTS]),
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
        **keywords,
    )
    made.remove_callback(PrinterCallback)
    return made


def losses(made: Any) -> list[float]:
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def adapters(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "spp_" in name}


def test_sft_with_a_peft_config(tmp_path: Path) -> None:
    config = SPPPeftConfig(r=4, seed=0, task_type="CAUSAL_LM")
    made = sft(pruned(), tmp_path, config=config, save_strategy="steps", save_steps=2)
    made.train()
    assert isinstance(made.model, PeftModel) and losses(made)[-1] < losses(made)[0]
    checkpoint = tmp_path / "checkpoint-4"
    assert (checkpoint / "adapter_model.safetensors").is_file() and not (checkpoint / "model.safetensors").exists()
    loaded = spp.load_adapter(pruned(), checkpoint)
    for name, tensor in spp.adapter_state_dict(loaded).items():
        assert_same_bits(tensor, made.model.get_parameter(f"base_model.model.{name}.default").detach(), name)
    merged = made.model.merge_and_unload(safe_merge=True)
    base = pruned()
    for path, module in projections(base).items():
        assert torch.equal(merged.get_submodule(path).weight == 0, module.weight == 0), path  # type: ignore[union-attr]


@pytest.mark.slow
def test_sft_of_a_wrapped_model_is_that_through_peft(tmp_path: Path) -> None:
    ours = sft(spp.wrap(pruned(), 4, seed=0), tmp_path / "ours", SPPSFTTrainer)
    ours.train()
    theirs = sft(pruned(), tmp_path / "theirs", config=SPPPeftConfig(r=4, seed=0, task_type="CAUSAL_LM"), data_seed=3)
    theirs.train()
    assert losses(ours) == losses(theirs)
    for name, tensor in spp.adapter_state_dict(ours.model).items():
        assert_same_bits(tensor, theirs.model.get_parameter(f"base_model.model.{name}.default").detach(), name)


class StopAt(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> Any:
        if state.global_step == 2:
            control.should_save = control.should_training_stop = True
        return control


@pytest.mark.slow
def test_a_wrapped_model_has_whole_checkpoints_and_resumes(tmp_path: Path) -> None:
    def make(directory: Path, callbacks: Any = None) -> Any:
        return sft(spp.wrap(pruned(), 4, seed=0, dropout=0.1), directory, SPPSFTTrainer, callbacks)

    whole = make(tmp_path / "whole")
    whole.train()
    make(tmp_path / "cut", [StopAt()]).train()
    assert (tmp_path / "cut/checkpoint-2" / MARKER_NAME).is_file()
    resumed = make(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed)[2:] == losses(whole)[2:]
    expected = adapters(whole.model)
    for name, tensor in adapters(resumed.model).items():
        assert_same_bits(tensor, expected[name], name)
    assert all("sparsity" in entry for entry in whole.state.log_history if "loss" in entry)


@pytest.mark.slow
def test_trls_own_trainer_refuses_to_save_a_wrapped_model(tmp_path: Path) -> None:
    made = sft(spp.wrap(pruned(), 4, seed=0), tmp_path, save_strategy="steps", save_steps=1)
    with pytest.raises(WrapError, match=r"spp\.integrations\.trl\.SPPSFTTrainer"):
        made.train()


def test_arguments_that_belong_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(WrapError, match=r"call spp\.wrap"):
        sft(pruned(), tmp_path, SPPSFTTrainer)
    with pytest.raises(ConfigError, match=r"goes to trl\.SFTTrainer"):
        sft(spp.wrap(pruned(), 4), tmp_path, SPPSFTTrainer, config=SPPPeftConfig(r=4))
    model = pruned()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 0.0  # type: ignore[index, union-attr]
    with pytest.raises(ConfigError, match="output head is wrapped"):
        sft(spp.wrap(model, 4, target_modules=["q_proj", "lm_head"]), tmp_path, SPPSFTTrainer)
    with pytest.raises(ConfigError, match="loss_chunk is SPPTrainer's"):
        SPPSFTTrainer(spp.wrap(pruned(), 4), loss_chunk=8)
    with pytest.raises(ConfigError, match="teacher: a teacher is SPPTrainer's"):
        SPPSFTTrainer(spp.wrap(pruned(), 4), teacher="dense")


# A template that says what the assistant wrote, which TRL asks for.
ASSISTANT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>{% generation %}{{ m['content'] }}</s>"
    "{% endgeneration %}{% else %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endif %}{% endfor %}"
)
CHATS = [
    {"messages": [{"role": "user", "content": f"after {i}?"}, {"role": "assistant", "content": f"{i + 1}. " * i}]}
    for i in range(1, 9)
]
WAYS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "packing": ([{"text": text} for text in TEXTS], {"packing": True}),
    "padding_free": ([{"text": text} for text in TEXTS], {"padding_free": True, "max_length": None}),
    "assistant_only": (CHATS, {"assistant_only_loss": True, "max_length": 96}),
    "assistant_only, packed": (CHATS, {"assistant_only_loss": True, "packing": True, "max_length": 96}),
    "checkpointing": (
        CHATS,
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", WAYS)
def test_ways_of_batching_and_masking(way: str, tmp_path: Path) -> None:
    """huggingface/trl#3910, #2834, #3279: a packed or masked batch has another loss, or none, with an adapter.

    The first loss, with β = 0, is the pruned model's own on that batch; later ones are those through PEFT.
    """
    rows, others = WAYS[way]

    def run(model: Any, make: Any, directory: Path, config: Any = None) -> Any:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = ASSISTANT
        keywords = {} if config is None else {"peft_config": config}
        args = trl.SFTConfig(**options(directory, data_seed=3, **others))
        data = Dataset.from_list(rows)
        made = make(model=model, args=args, train_dataset=data, processing_class=tokenizer, **keywords)
        made.remove_callback(PrinterCallback)
        batch = next(iter(made.get_train_dataloader()))
        assert (batch["labels"] != -100).any()
        made.train()
        return losses(made), batch

    ours, batch = run(spp.wrap(pruned(), 4, seed=0), SPPSFTTrainer, tmp_path / "ours")
    theirs, same = run(pruned(), trl.SFTTrainer, tmp_path / "theirs", SPPPeftConfig(r=4, seed=0, task_type="CAUSAL_LM"))
    assert ours == theirs and ours[-1] < ours[0]
    assert torch.equal(batch["labels"], same["labels"])
    if "assistant" in way:
        answers = batch["labels"][batch["labels"] != -100].tolist()
        assert 0 < len(answers) < batch["labels"].numel()
        said = tiny_tokenizer().decode(answers)
        assert "after" not in said and "." in said
    if "pack" in way or way == "padding_free":
        assert (batch["position_ids"] == 0).sum() > 1  # each row counts its own places


def dpo(model: Any, directory: Path, config: Any = None, **others: Any) -> Any:
    made = trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(**options(directory, beta=0.5, **others)),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tiny_tokenizer(),
        peft_config=config,
    )
    made.remove_callback(PrinterCallback)
    return made


def reference_losses(made: Any) -> list[float]:
    made.train()
    return [entry["rewards/margins"] for entry in made.state.log_history if "rewards/margins" in entry]


@pytest.mark.slow
def test_dpo_loads_no_second_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pruned().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")

    def refuse(*arguments: Any, **keywords: Any) -> Any:
        raise AssertionError("a second model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr(type(model), "from_pretrained", refuse)
    made = dpo(
        model, tmp_path / "run", SPPPeftConfig(r=4, seed=0, task_type="CAUSAL_LM"), save_strategy="steps", save_steps=4
    )
    assert made.ref_model is None and list(made.model.peft_config) == ["default"]
    margins = reference_losses(made)
    assert margins[0] == 0.0 and margins[-1] > 0.0  # β = 0: the model is its own reference; then it moves away
    with made.model.disable_adapter():
        assert_same_bits(logits(made.model), logits(pruned()))
    loaded = spp.load_adapter(pruned(), tmp_path / "run/checkpoint-4")
    assert_same_bits(logits(loaded), logits(made.model))


@pytest.mark.slow
def test_dpo_of_a_tuned_peft_model_compares_with_what_it_was(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = scatter(get_peft_model(pruned(), SPPPeftConfig(r=4, seed=0, task_type="CAUSAL_LM")))
    start = logits(model)
    assert not torch.equal(start, logits(pruned()))
    with caplog.at_level(logging.WARNING):
        made = dpo(model, tmp_path)
    assert list(made.model.peft_config) == ["default", "ref"] and made.ref_model is None
    assert reference_losses(made)[0] == 0.0
    assert not torch.equal(logits(made.model), start)
    made.model.set_adapter("ref")
    assert_same_bits(logits(made.model), start)
