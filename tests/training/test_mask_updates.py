"""SPP with mask updates: what is exchanged, what stays, resume, merge, files, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback

import spp
from spp.errors import CheckpointError, ConfigError, MaskError, SPPWarning, WrapError
from spp.masks.patterns import is_nm
from spp.training import MaskUpdates, SPPTrainer
from spp.training.mask_state import LayerMask, MaskState
from spp.wrapping.adapter_files import MASKS_NAME
from spp.wrapping.adapter_files import MASKS_STATE_NAME as STATE_NAME
from spp.wrapping.wrap import adapter_layers, adapter_parameters
from tests.helpers.models import moe_model, projections, prune_nm_, tiny_llama
from tests.helpers.tolerances import assert_same_bits, assert_same_zeros
from tests.masks.test_exchange import plain_exchange
from tests.training.helpers import StopAt, bytes_of, losses, pruned, trainer


def halved() -> Any:
    """The tiny model with the smaller half of each row pruned."""
    model = tiny_llama()
    with torch.no_grad():
        for module in projections(model).values():
            lowest = module.weight.abs().argsort(dim=1)[:, : module.weight.shape[1] // 2]
            module.weight.scatter_(1, lowest, 0.0)
    return model


BASES = {"2:4": pruned, "unstructured": halved}


def updated(directory: Path, base: str = "2:4", dense: Any = None, wrap: Any = None, **options: Any) -> SPPTrainer:
    """A trainer with mask updates; `options` of both kinds."""
    names = ("every", "fraction", "until", "decay", "drop", "grow")
    own = {name: options.pop(name) for name in names if name in options}
    model = spp.wrap(BASES[base](), **{"r": 4, "seed": 0, **(wrap or {})})
    updates = MaskUpdates(
        tiny_llama() if dense is None else dense, **{"every": 2, "fraction": 0.2, "until": 1.0, **own}
    )
    return trainer(directory, model, mask_updates=updates, **options)


@pytest.fixture(scope="module")
def updated_once(tmp_path_factory: pytest.TempPathFactory) -> SPPTrainer:
    """A finished run with mask updates and a checkpoint at its end; for reading only."""
    made = updated(tmp_path_factory.mktemp("updated"), save_strategy="steps", save_steps=6)
    made.train()
    return made


@pytest.mark.parametrize(("steps", "every", "last"), [(2, 2, 1), (4, 3, 2)])  # at step 3 of 4 the fraction is 0
def test_updates_that_never_come_are_warned_of(tmp_path: Path, steps: int, every: int, last: int) -> None:
    made = updated(tmp_path, max_steps=steps, until=0.75, every=every)
    words = rf"first update would be after step {every}.*last may be after step {last} of {steps}"
    with pytest.warns(SPPWarning, match=words):
        made.train()


def weights_of(model: Any) -> dict[str, Tensor]:
    return {path: layer.weight.detach().clone() for path, layer in adapter_layers(model).items()}


class Watch(TrainerCallback):
    """The weights after every step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **options: Any) -> None:
        self.seen.append(weights_of(model))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_every_update_keeps_the_sparsity_and_takes_dense_values(
    tmp_path: Path, base: str, packed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="spp.training.mask_updates")
    made = updated(tmp_path, base, wrap={"packed": packed}, max_steps=8, until=0.75)
    watch = Watch()
    before = weights_of(made.model)
    made.add_callback(watch)  # after the updates
    made.train()
    dense = projections(tiny_llama())
    for step, now in enumerate(watch.seen, start=1):
        fraction = 0.2 * (1 + math.cos(math.pi * step / 6)) / 2 if step % 2 == 0 and step <= 6 else 0.0
        assert fraction == made.mask_updates.fraction_at(step, 8)
        changed = 0
        for path, weight in now.items():
            old = before[path]
            moved = int(((weight != 0) & (old == 0)).sum())
            assert moved == int(((weight == 0) & (old != 0)).sum()) <= int(fraction * int((old != 0).sum())), path
            if base == "2:4":
                assert is_nm(weight, 2, 4), path
            else:
                assert moved == int(fraction * int((old != 0).sum())), path
            kept = weight != 0
            assert torch.equal(weight[kept], dense[path].weight[kept]), path
            changed += moved
        assert (changed > 0) == (fraction > 0.0), step
        assert (f"step {step}: exchanged {changed} weights in 14 layers" in caplog.text) == (fraction > 0.0)
        before = now
    assert {entry["sparsity"] for entry in made.state.log_history if "loss" in entry} == {0.5}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("grow", ["gradient", "saliency"])
@pytest.mark.parametrize("drop", ["activation", "magnitude"])
@pytest.mark.parametrize("base", BASES)
def test_the_choice_is_that_of_plain_torch(tmp_path: Path, base: str, drop: str, grow: str) -> None:
    made = updated(tmp_path, base, drop=drop, grow=grow, every=1, fraction=0.3, max_steps=4, callbacks=[StopAt(1)])
    assert made.mask_updates is not None
    fraction = made.mask_updates.fraction_at(1, 4)
    with torch.no_grad():
        for i, parameter in enumerate(adapter_parameters(made.model)):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    layers = adapter_layers(made.model)
    effective = {path: layer.effective_weight() for path, layer in layers.items()}
    before = weights_of(made.model)
    batches: list[Any] = []
    collate = made.data_collator

    def keep(rows: Any) -> Any:
        batches.append(collate(rows))
        return batches[-1]

    made.data_collator = keep
    made.train()
    plain, inputs = tiny_llama(), {}
    for path, module in projections(plain).items():
        module.weight.data.copy_(effective[path])
        module.register_forward_pre_hook(lambda _, args, path=path: inputs.__setitem__(path, args[0].detach()))
    plain(**batches[0]).loss.backward()
    dense = projections(tiny_llama())
    for path, module in projections(plain).items():
        kept, gradient, values = before[path] != 0, module.weight.grad, dense[path].weight.detach()
        norms = inputs[path].reshape(-1, module.weight.shape[1]).norm(dim=0)
        dropped = effective[path].abs() * (norms if drop == "activation" else 1)
        grown = gradient.abs() if grow == "gradient" else -gradient * values
        if grow == "saliency":
            grown = grown.masked_fill(grown <= 0, -math.inf)
        expected = plain_exchange(kept, dropped, grown, int(fraction * int(kept.sum())), 4 if base == "2:4" else None)
        found = layers[path].weight != 0
        assert int((found != kept).sum()) > 0, path
        # The two sum gradients in different orders: a few choices between near equals may differ.
        assert int((found != expected).sum()) <= 0.01 * int((expected != kept).sum()) + 2, path


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("base", "stop"), [("2:4", 1), ("2:4", 2), ("unstructured", 3), ("unstructured", 6)])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path, base: str, stop: int) -> None:
    options = {"max_steps": 7, "gradient_accumulation_steps": 2, "wrap": {"dropout": 0.3}}
    whole = updated(tmp_path / "whole", base, **options)
    whole.train()
    whole.save_model(str(tmp_path / "whole" / "final"))
    updated(tmp_path / "cut", base, callbacks=[StopAt(stop)], **options).train()
    resumed = updated(tmp_path / "cut", base, **options)
    torch.manual_seed(999)
    resumed.train(resume_from_checkpoint=True)
    resumed.save_model(str(tmp_path / "cut" / "final"))
    assert losses(resumed) == losses(whole)
    assert bytes_of(tmp_path / "cut" / "final") == bytes_of(tmp_path / "whole" / "final")
    for path, weight in weights_of(whole.model).items():
        assert_same_bits(weights_of(resumed.model)[path], weight, path)


def test_a_fraction_of_zero_changes_nothing(finished: SPPTrainer, tmp_path: Path) -> None:
    none = updated(tmp_path, fraction=0.0)
    none.train()
    assert losses(none) == losses(finished)
    for key, tensor in spp.adapter_state_dict(finished.model).items():
        assert_same_bits(spp.adapter_state_dict(none.model)[key], tensor, key)
    for path, weight in weights_of(finished.model).items():
        assert_same_bits(weights_of(none.model)[path], weight, path)


def test_a_layer_that_is_frozen_keeps_its_mask(tmp_path: Path) -> None:
    made = updated(tmp_path, max_steps=3)
    frozen, *others = adapter_layers(made.model).values()
    *_, last = others  # its input needs a gradient, unlike the first one's
    for parameter in (*frozen.adapter_parameters(), *last.adapter_parameters()):
        parameter.requires_grad_(False)
    before = weights_of(made.model)
    made.train()
    now = weights_of(made.model)
    same = [torch.equal(now[path], before[path]) for path in now]
    assert same[0] and same[-1] and not any(same[1:-1])


@pytest.mark.slow
def test_the_seed_of_the_data_decides(tmp_path: Path) -> None:
    runs = [updated(tmp_path / name, seed=seed) for name, seed in (("a", 3), ("b", 3), ("c", 4))]
    for made in runs:
        made.train()
    hashes = [made.mask_updates.state.hashes() for made in runs]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"bf16": True}])
def test_other_ways_to_compute(updated_once: SPPTrainer, tmp_path: Path, options: dict[str, Any]) -> None:
    other = updated(tmp_path, **options)
    other.train()
    same = updated_once.mask_updates.state.hashes() == other.mask_updates.state.hashes()
    assert same == ("bf16" not in options)
    assert all(is_nm(weight, 2, 4) for weight in weights_of(other.model).values())


def test_after_updates_the_layers_compute_with_the_new_masks(updated_once: SPPTrainer) -> None:
    made = updated_once
    fresh = pruned()
    for path, weight in weights_of(made.model).items():
        fresh.get_submodule(path).weight.data.copy_(weight)
    spp.wrap(fresh, r=4)
    with torch.no_grad():
        for one, other in zip(adapter_parameters(fresh), adapter_parameters(made.model), strict=True):
            one.copy_(other)
    ids = torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(2))
    for model in (fresh, made.model.train(False)):
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
    for one, other in zip(adapter_parameters(fresh), adapter_parameters(made.model), strict=True):
        assert one.grad is not None and other.grad is not None
        assert_same_bits(other.grad, one.grad)
    with torch.no_grad():
        assert_same_bits(made.model(input_ids=ids).logits, fresh(input_ids=ids).logits)


def test_merge_and_verify_with_the_final_masks(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "dense")
    spp.save_model(pruned(), tmp_path / "pruned")
    made = updated(tmp_path / "run", dense=tmp_path / "dense")
    made.train()
    made.save_model(str(tmp_path / "adapter"))
    weights = weights_of(made.model)
    effective = {path: layer.effective_weight() for path, layer in adapter_layers(made.model).items()}
    spp.merge_checkpoint(tmp_path / "pruned", tmp_path / "adapter", tmp_path / "merged from the start")
    final = pruned()
    with torch.no_grad():
        for path, module in projections(final).items():
            module.weight.copy_(weights[path])
    spp.load_adapter(final, tmp_path / "adapter", strict_values=True)  # regrown values belong to the base, too
    spp.merge(made.model)
    for path, module in projections(made.model).items():
        assert_same_bits(module.weight.detach(), effective[path], path)
        assert_same_zeros(module.weight.detach(), weights[path], path)
    spp.save_model(made.model, tmp_path / "merged")
    spp.verify(tmp_path / "merged", tmp_path / "merged from the start")
    assert spp.verify(tmp_path / "merged").pattern == "2:4"
    with pytest.raises(spp.errors.MaskError):
        spp.verify(tmp_path / "pruned", tmp_path / "merged")


def test_values_that_pruning_changed_come_back_and_restore_takes_all_back(tmp_path: Path) -> None:
    def compensated() -> Any:
        model = pruned()
        with torch.no_grad():
            for module in projections(model).values():
                module.weight.mul_(1.25)
        return model

    model = spp.wrap(compensated(), r=4, seed=0)
    before = weights_of(model)
    made = trainer(tmp_path, model, mask_updates=MaskUpdates(tiny_llama(), every=1, fraction=0.4, until=1.0))
    made.train()
    dense = projections(tiny_llama())
    for path, weight in weights_of(model).items():
        new = (weight != 0) & (before[path] == 0)
        assert new.any()
        assert torch.equal(weight[new], dense[path].weight[new])
        old = (weight != 0) & ~new
        assert torch.equal(weight[old], before[path][old])
    made.mask_updates.state.restore()
    for path, weight in weights_of(model).items():
        assert_same_bits(weight, before[path], path)


def test_a_write_that_stops_half_way_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = updated(tmp_path, max_steps=2, every=1)
    before, write, written = weights_of(made.model), LayerMask.write, []

    def stops(self: LayerMask, bits: Any) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(self.path)
        write(self, bits)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LayerMask, "write", stops)
        made.train()
    assert not torch.equal(weights_of(made.model)[written[0]], before[written[0]])
    made.mask_updates.restore()
    for path, weight in weights_of(made.model).items():
        assert torch.equal(weight, before[path]), path


def test_conv1d(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    def model() -> Any:
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=256, n_positions=64)).eval()

    base = model()
    spp.prune(base, "magnitude", "2:4")
    made = trainer(
        tmp_path, spp.wrap(base, r=4, seed=0), mask_updates=MaskUpdates(model(), every=2, fraction=0.3, until=1.0)
    )
    start = weights_of(made.model)
    made.train()
    for path, weight in weights_of(made.model).items():
        assert is_nm(weight.T, 2, 4) and not torch.equal(weight != 0, start[path] != 0), path


class TestFiles:
    def test_a_checkpoint_holds_the_masks(self, updated_once: SPPTrainer) -> None:
        directory = Path(updated_once.args.output_dir) / "checkpoint-6"
        assert {MASKS_NAME, STATE_NAME} <= {file.name for file in directory.iterdir()}
        saved = json.loads((directory / "adapter_config.json").read_text())
        assert saved["base_masks"] == updated_once.mask_updates.state.hashes()

    def test_checkpoints_with_and_without_are_not_mixed(self, updated_once: SPPTrainer, checkpoints: Path) -> None:
        with pytest.raises(CheckpointError, match="without mask updates"):
            updated(checkpoints).train(resume_from_checkpoint=True)
        with pytest.raises(CheckpointError, match="with mask updates"):
            trainer(Path(updated_once.args.output_dir)).train(resume_from_checkpoint=True)

    @pytest.mark.filterwarnings("ignore:the adapter changes no weight")  # not trained
    @pytest.mark.sampled(3)
    @pytest.mark.parametrize("damage", ["version", "pruned", "dense", "masks", "cut"])
    def test_what_does_not_belong_is_refused(self, tmp_path: Path, damage: str) -> None:
        updated(tmp_path).save_model(str(tmp_path / "saved"))
        other = updated(tmp_path / "again", "unstructured" if damage == "pruned" else "2:4")
        state: MaskState = other.mask_updates.state
        if damage == "dense":
            dense = tiny_llama()
            dense.model.layers[1].mlp.up_proj.weight.data[(pruned().model.layers[1].mlp.up_proj.weight == 0)] += 1
            state = MaskState(other.model, dense)
        file = tmp_path / "saved" / (STATE_NAME if damage == "version" else MASKS_NAME)
        if damage == "version":
            file.write_text(file.read_text().replace('"format_version": 1', '"format_version": 2'))
        elif damage == "masks":
            from safetensors.torch import load_file, save_file

            save_file({key: ~tensor for key, tensor in list(load_file(file).items())[1:]}, file)
        elif damage == "cut":
            file.write_bytes(file.read_bytes()[:-3])
        weights = weights_of(other.model)
        with pytest.raises(CheckpointError):
            state.load(tmp_path / "saved")
        assert all(torch.equal(weight, weights[path]) for path, weight in weights_of(other.model).items())


class TestRefused:
    def test_options(self) -> None:
        for name, value in (
            ("every", 0),
            ("fraction", 1.5),
            ("until", 0.0),
            ("decay", "no"),
            ("drop", 1),
            ("grow", ""),
        ):
            with pytest.raises(ConfigError, match=f"mask_update_{name} is"):
                MaskUpdates("dense", **{"every": 5, name: value})
        with pytest.raises(WrapError, match="belong to no model"):
            _ = MaskUpdates("dense", every=5).state

    def test_dense_models_that_are_none(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="has no weight for 7 layers"):
            updated(tmp_path, dense=tiny_llama(num_hidden_layers=1))
        with pytest.raises(ConfigError, match="but in"):
            updated(tmp_path, dense=tiny_llama(intermediate_size=128))
        strange = tiny_llama()
        strange.model.layers[0].mlp.up_proj.weight.data.normal_()
        with pytest.warns(SPPWarning, match="hardly resembles"):
            updated(tmp_path, dense=strange)
        strange.model.layers[0].mlp.up_proj.weight.data[0, 0] = math.inf
        with pytest.raises(ConfigError, match="NaN or infinity"):
            updated(tmp_path, dense=strange)

    def test_fused_experts(self) -> None:
        model = moe_model("qwen3_moe")
        with pytest.warns(SPPWarning, match="dense"):
            spp.wrap(prune_nm_(model), r=2)
        with pytest.raises(ConfigError, match="fused experts"):
            MaskState(model, moe_model("qwen3_moe"))


@pytest.mark.filterwarnings("ignore:all 14 target layers are dense")
def test_a_dense_model_that_has_nothing_to_bring_back_is_refused(tmp_path: Path) -> None:
    for model, dense in ((pruned(), pruned()), (tiny_llama(), tiny_llama())):
        with pytest.raises(ConfigError, match=r"no weight could ever come back: .* has the zeros of the model"):
            MaskUpdates(dense, every=2).attach(spp.wrap(model, r=4))


class TestMergingACheckpoint:
    """`spp merge PRUNED RUN/checkpoints/checkpoint-N OUT`: the base that a checkpoint belongs to is nowhere on disk."""

    @pytest.fixture
    def run(self, tmp_path: Path) -> tuple[Path, SPPTrainer]:
        """A checkpoint in a folder that has the pruned and the dense model too, and the run that wrote it."""
        tiny_llama().save_pretrained(tmp_path / "dense")
        BASES["2:4"]().save_pretrained(tmp_path / "pruned")
        made = updated(tmp_path / "run", dense=tmp_path / "dense", save_strategy="steps", save_steps=6)
        made.model.config._name_or_path = str(tmp_path / "pruned")
        made.train()
        return tmp_path / "run" / "checkpoint-6", made

    def test_it_is_the_model_in_memory(self, run: tuple[Path, SPPTrainer], tmp_path: Path) -> None:
        checkpoint, made = run
        report = spp.merge_checkpoint(tmp_path / "pruned", checkpoint, tmp_path / "out", strict_values=True)
        assert report.base.state == "same"
        merged = made.model
        spp.merge(merged)
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        for path, module in projections(found).items():
            assert_same_bits(module.weight, projections(merged)[path].weight)
            assert is_nm(module.weight, 2, 4), path
        spp.verify(tmp_path / "out")  # its certificate, which names no base
        with pytest.raises(MaskError):  # the check can fail: masks moved
            spp.verify(tmp_path / "pruned", tmp_path / "out")

    @pytest.mark.slow
    def test_what_is_not_there_or_another_is_said(self, run: tuple[Path, SPPTrainer], tmp_path: Path) -> None:
        checkpoint, pruned_path, dense, out = run[0], tmp_path / "pruned", tmp_path / "dense", tmp_path / "out"
        with pytest.raises(
            MaskError, match=r"moves its masks, and spp\.merge_checkpoint\(base, checkpoint, out\) makes"
        ):
            spp.load_adapter(BASES["2:4"](), checkpoint)
        moved = dense.rename(tmp_path / "elsewhere")
        with pytest.raises(CheckpointError, match=rf"with values of {dense}: there is no .*pass dense= with the dense"):
            spp.merge_checkpoint(pruned_path, checkpoint, out)
        spp.merge_checkpoint(pruned_path, checkpoint, tmp_path / "by option", dense=moved)
        halved().save_pretrained(tmp_path / "other")
        with pytest.raises(CheckpointError, match="other is another dense model than the run"):
            spp.merge_checkpoint(pruned_path, checkpoint, out, dense=tmp_path / "other")
        with pytest.raises(
            MaskError, match=rf"neither those of the checkpoint .*belongs to {pruned_path}: pass that one"
        ):
            spp.merge_checkpoint(tmp_path / "other", checkpoint, out, dense=moved)
        with pytest.raises(ConfigError, match=r"lies inside|is the dense model|contains"):
            spp.merge_checkpoint(pruned_path, checkpoint, moved / "out", dense=moved)
        (checkpoint / "masks.json").unlink()
        with pytest.raises(ConfigError, match="no adapter is a checkpoint of a run with mask updates"):
            spp.merge_checkpoint(pruned_path, checkpoint, out, dense=moved)
        assert not out.exists()
