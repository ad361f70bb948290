"""The tuner: which layers of a model get an adapter, and what is checked before one does."""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from torch import Tensor, nn

from spp.configs.adapter import SPPConfig
from spp.errors import ConfigError, MaskError, SPPWarning, TargetError, WrapError, some_of
from spp.files import mask_sha256
from spp.integrations.peft.config import SPPPeftConfig, combined_config, require_combination
from spp.integrations.peft.layer import FindsAdapters, Place, SPPPeftExperts, SPPPeftLinear
from spp.integrations.peft.terms import PREFIX, TermsLayer, approximate, merged_idle, stack
from spp.layers.checks import check_linear, check_values, warn_dense
from spp.layers.experts import adapt_experts, adapters_of, check_experts, release_experts
from spp.layers.host import PackedLinear
from spp.merging.model import describe_base, report_merge
from spp.merging.weight import require_finite
from spp.models.projection import Projection
from spp.models.targets import name_targets, resolve_projections
from spp.weights.base_values import NOT_COMPARABLE, OTHER, BaseComparison, where_it_belongs
from spp.weights.offload import check_offloading
from spp.wrapping.adapters import name_of_base
from spp.wrapping.state import check_quantizer, dtype_of_model, forget_quantizer
from spp.wrapping.wrap import check_rank_pattern, is_wrapped

logger = logging.getLogger(__name__)
REFERENCE = "ref"  # the name that TRL gives to the adapter it compares with


class SPPPeftModel(BaseTuner):
    """The tuner that `get_peft_model(model, SPPPeftConfig(...))` puts around a model; PEFT makes it.

    Raises:
        TargetError, ConfigError, NonFiniteError: as for `spp.wrap`, before anything is changed.
        MaskError: the config says on which zeros its adapter was trained, and the base has others.
        WrapError: the model is wrapped by `spp.wrap`.
    """

    prefix = PREFIX
    tuner_layer_cls = TermsLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  PEFT's interface; spp.models.targets chooses

    def _prepare_adapter_config(self, peft_config: SPPPeftConfig, model_config: Any) -> SPPPeftConfig:
        """Choose the targets as `spp.wrap` does, check all of them, and write their names into the config."""
        model = self.model
        check_quantizer(model)
        check_offloading(model)
        if is_wrapped(model):
            raise WrapError(
                "the model is wrapped by spp.wrap: keep its adapter with spp.save_adapter(model, path), call "
                "spp.unwrap(model), and load that directory with PEFT"
            )
        config = peft_config.spp_config()
        chosen = _targets(model, peft_config, config)
        check_rank_pattern(config, [target.path for target in chosen])
        fresh = [target for target in chosen if layer_of(target) is None]
        for target in chosen:
            if target.fused:
                check_experts(target, config, config.rank_for(target.path))
                continue
            module = target.module.base_layer if isinstance(target.module, SPPPeftLinear) else target.module
            assert isinstance(module, nn.Module)
            check_linear(module, config, target.path, config.rank_for(target.path))
        _check_masks(chosen, peft_config, name_of_base(model))
        if peft_config.base_masks is not None:
            _check_values(chosen, peft_config, name_of_base(model))
        warn_dense({target.path: check_values(target) for target in fresh}, "pack" if config.packed else "train")
        peft_config.target_modules = set(name_targets(model, [target.path for target in chosen]))
        self._dtype = dtype_of_model(model)
        self._repeated = repeated(model)
        self._fused = {target.path: target for target in chosen if target.fused}
        peft_config.target_parameters = list(self._fused)  # no field, so not stored: it makes PEFT ask for these
        return peft_config

    def _check_target_module_exists(self, peft_config: SPPPeftConfig, key: str) -> Any:
        """Leave the adapters beside fused weights to `_inject_parameters`: they have the paths of parameters."""
        return not {key, f"{key}.weight"} & self._fused.keys() and super()._check_target_module_exists(peft_config, key)

    def _inject_parameters(
        self, peft_config: SPPPeftConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """Give the fused weights of experts their adapters; PEFT's own way would compute with a copy of the weight."""
        from accelerate import init_empty_weights

        config = peft_config.spp_config()
        for target in self._fused.values():
            with init_empty_weights() if low_cpu_mem_usage else contextlib.nullcontext():
                layer = layer_of(target)
                if layer is None:
                    layer = SPPPeftExperts(target, packed=config.packed)
                    adapt_experts({target.name: layer})
                layer.update_layer(adapter_name, config, peft_config.inference_mode)
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
        if self._fused:
            FindsAdapters.install(model)
        known = self.targeted_parameter_names  # PEFT 0.20 looks there for what was found, later ones at the result
        known.extend(path for path in self._fused if path not in known)
        return list(self._fused)

    def _create_and_replace(
        self,
        peft_config: SPPPeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config = peft_config.spp_config()
        if isinstance(target, SPPPeftLinear):
            layer = target
        else:
            layer = SPPPeftLinear(target, current_key, packed=config.packed, dtype=self._dtype)
        layer.update_layer(adapter_name, config, peft_config.inference_mode)
        if layer is target:
            return
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        layer.also_at = self._repeated.get(id(target), ())
        layer.put(layer, parent, target_name)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, SPPPeftLinear):
            child.put(new_module, parent, child_name)  # the base layer has its weight and is where it was
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put an adapter into the model; see PEFT's BaseTuner.

        One that is called "ref" and comes with another's own config object starts as a copy of that other: so does TRL
        ask for the frozen reference of a model that is tuned further.
        """
        config = self.peft_config[adapter_name]
        others = [name for name, other in self.peft_config.items() if other is config and name != adapter_name]
        if others:
            config = self.peft_config[adapter_name] = copy.copy(config)
        with warnings.catch_warnings():  # the targets and rank_pattern are checked here; PEFT does not count parameters
            for message in ("target_modules=.* no module was matched", "The following rank_pattern keys did not match"):
                warnings.filterwarnings("ignore", message, RuntimeWarning)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        config.belongs_to(model, adapter_name)
        if others and adapter_name == REFERENCE:
            for layer in tuner_layers(model).values():
                layer.copy_adapter(others[0], adapter_name)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "stack",
        r: int | None = None,
    ) -> dict[str, float]:
        """Add an adapter that is a weighted sum of others: W_eff = W · (1 + Σ_t w_t·(s_t·β_t) · A_t); zeros stay zeros.

        Args:
            adapters: names.
            weights: one each; they multiply the adapters' scalings.
            adapter_name: of the sum, which is not made active.
            combination_type: "stack" keeps every adapter's terms and is exact: forward and merge have the bits of the
                formula. It can be used, trained and merged, not saved. "svd" makes one adapter of rank r, which can be
                saved: in each of its blocks of rows the best rank-one approximation of what multiplies W.
            r: of "svd"; None takes the largest rank among the adapters of a layer.

        Returns:
            {module path: relative error of the sum, ‖U − U'‖ / ‖U‖}; zeros for "stack".

        Raises:
            ConfigError: an unknown adapter, a name that is taken, or an option that makes no sense.
        """
        require_combination(self.peft_config, adapters, weights, adapter_name, combination_type, r)
        first = self.peft_config[adapters[0]]
        layers = {
            p: layer for p, layer in tuner_layers(self.model).items() if any(a in layer.spp_terms for a in adapters)
        }
        errors, ranks = {}, {}
        for path, layer in layers.items():
            given = (layer, adapters, weights, adapter_name)
            errors[path] = stack(*given) if combination_type == "stack" else approximate(*given, first.scaling, r)
            ranks[path] = sum(term.rank for term in layer.spp_terms[adapter_name])
        config = combined_config(first, ranks, name_targets(self.model, list(layers)))
        self.peft_config[adapter_name] = config
        config.belongs_to(self.model, adapter_name)
        return errors

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge the active adapters, or those named, into the base weights; `unmerge_adapter` puts these back.

        Args:
            adapter_names: merged together, with one rounding.
            safe_merge: compute every layer once before the first is written, so that any error leaves the model as it
                was, not only one about an adapter's values. Each layer is checked in any case.

        Raises:
            NonFiniteError, MaskError: as for `spp.merge`.
        """
        self._check_in_memory()
        self._check_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        layers = tuner_layers(self.model)
        linears = {path: layer for path, layer in layers.items() if isinstance(layer, SPPPeftLinear)}
        if merge:
            self._check_in_memory()
            self._check_merge(adapter_names, safe_merge)
        else:
            for linear in linears.values():
                linear.unpack_base()
            if any(layer.is_offloaded() for layer in layers.values()):
                return self._unload_offloaded(layers)
        model: nn.Module = super()._unload_and_optionally_merge(
            merge=merge, progressbar=progressbar, adapter_names=adapter_names
        )
        for layer in layers.values():
            if isinstance(layer, SPPPeftExperts):
                if merge:
                    layer.merge(adapter_names=adapter_names)
                release_experts(layer.projection.module, SPPPeftExperts)
        for path, linear in linears.items():
            if merge and isinstance(linear.base_layer, PackedLinear):
                linear.unpack_base()  # no adapter to merge was in it
                linear.put(linear.base_layer, *place_of(model, path))
        FindsAdapters.remove(model)
        forget_quantizer(model)
        _report_merged(model, {path: layer for path, layer in layers.items() if layer.merged})
        return model

    def _unload_offloaded(self, layers: dict[str, TermsLayer]) -> nn.Module:
        """Take the adapters out of an offloaded model; PEFT's own way would load all of it at once."""
        for path, layer in layers.items():
            if isinstance(layer, SPPPeftLinear):
                layer.put(layer.base_layer, *place_of(self.model, path))
            elif isinstance(layer, SPPPeftExperts):
                release_experts(layer.projection.module)
        for path, module in list(self.model.named_modules()):
            if hasattr(module, "unload_and_optionally_merge_module"):  # of modules_to_save
                unload: Any = module.unload_and_optionally_merge_module
                self.model.set_submodule(path, unload(merge=False, safe_merge=False, adapter_names=None))
        self.model.__dict__.pop("peft_config", None)
        return self.model

    def _check_in_memory(self) -> None:
        """Raise a ConfigError where accelerate has a weight offloaded, to where merging does not write."""
        away = [path for path, layer in tuner_layers(self.model).items() if layer.is_offloaded()]
        if away:
            raise ConfigError(
                f"{away[0]} is offloaded by accelerate, and the plug-in merges what is in memory. Save the adapter and "
                f"merge on disk: `spp merge BASE ADAPTER OUT` (spp.merge_checkpoint) reads PEFT's directories"
            )

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Raise what speaks against merging any layer: its adapters, or with safe_merge the result as well."""
        for layer in tuner_layers(self.model).values():
            names = layer.active_names() if adapter_names is None else adapter_names
            names = [*layer.merged_adapters, *(n for n in names if n not in layer.merged_adapters)]
            if safe_merge:
                layer.merged_weight(names)
            elif (adapter := layer.combined(names)) is not None:
                require_finite(adapter, layer.spp_name)

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Refuse what PEFT would otherwise leave out without a word."""
        if kwargs.get("adapter_names") is not None:
            raise ConfigError(
                "adapter_names= (a batch in which each sample has its own adapter) is not supported by SPP; call "
                "set_adapter and run one batch per adapter"
            )
        yield

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, config: SPPPeftConfig, *args: Any, **kwargs: Any) -> Any:
        config.require_savable()
        return super()._get_adapter_state_dict(model, config, *args, **kwargs)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Give the tensors of a linear that is registered twice, saved once, under both names: PEFT expects them."""
        return under_all_names(model, super()._remap_adapter_state_dict_for_load(model, *args, **kwargs))


def tuner_layers(model: nn.Module) -> dict[str, TermsLayer]:
    """Return {module path: layer} in module order, fused experts under the path of their parameter."""
    return {path: module for path, module in model.named_modules() if isinstance(module, TermsLayer)}


def _report_merged(model: nn.Module, layers: dict[str, TermsLayer]) -> None:
    """Log what the merge of some layers did, and warn as `spp.merge` does."""
    results = {path: layer.spp_merge for path, layer in layers.items() if layer.spp_merge}
    if results:
        named = {p if isinstance(la, SPPPeftExperts) else f"{p}.weight": la for p, la in layers.items() if p in results}
        idle = merged_idle(layers[path] for path in results)
        logger.info("%r", report_merge(model, results, describe_base(model, named), idle=idle))


def _targets(model: nn.Module, peft_config: SPPPeftConfig, config: SPPConfig) -> list[Projection]:
    """Return the targets, after PEFT's own filters: layers_to_transform and modules_to_save."""
    chosen = resolve_projections(model, config.target_modules, config.exclude_modules)
    filters = SimpleNamespace(
        target_modules={path.rsplit(".", 1)[-1] for path in chosen},
        layers_to_transform=peft_config.layers_to_transform,
        layers_pattern=peft_config.layers_pattern,
        modules_to_save=peft_config.modules_to_save,
        exclude_modules=None,
        target_parameters=None,
    )
    kept = [target for path, target in chosen.items() if check_target_module_exists(filters, path)]
    if not kept:
        raise TargetError(
            f"layers_to_transform={peft_config.layers_to_transform!r}, layers_pattern={peft_config.layers_pattern!r}, "
            f"modules_to_save={peft_config.modules_to_save!r} leave none of the {len(chosen)} targets, such as "
            f"{next(iter(chosen))}"
        )
    return kept


def _check_masks(targets: Sequence[Projection], config: SPPPeftConfig, given: str | None) -> None:
    """Raise where the config says which zeros the adapter was trained on, and the base has others."""
    differing = []
    for target in targets:
        expected = (config.base_masks or {}).get(target.path)
        if expected is None:
            continue
        layer = layer_of(target)
        weight = (target if layer is None else layer).held().dense()
        if not weight.is_meta and mask_sha256(weight) != expected:
            differing.append(target.path)
    if differing:
        raise MaskError(
            f"the zeros of the base differ from those that the adapter was trained on, in {len(differing)} layers: "
            f"{some_of(differing)}; {where_it_belongs(config.base_model_name_or_path, given)}; or take its config with "
            f"PeftConfig.from_pretrained, set base_masks to None and pass it as config="
        )


def _check_values(targets: Sequence[Projection], config: SPPPeftConfig, given: str | None) -> None:
    """Warn where the config says which values the adapter was trained on, and the base has others."""
    comparison = BaseComparison(
        config.base_values, config.base_forms, base_name=config.base_model_name_or_path, given=given
    )
    for target in targets:
        layer = layer_of(target)
        comparison.add_held(target.path, (target if layer is None else layer).held())
    verdict = comparison.verdict()
    if verdict.state == OTHER:
        warnings.warn(verdict.message, SPPWarning, stacklevel=3)
    elif verdict.state == NOT_COMPARABLE:
        logger.info(verdict.message)


# ---- Where tuner layers are in a model. PEFT looks at the first of a module's names only; it may have several.


def repeated(model: nn.Module) -> dict[int, tuple[Place, ...]]:
    """Return {id of a module: its places} of the modules that are registered in more than one."""
    places: dict[int, list[Place]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            places.setdefault(id(child), []).append((parent, name))
    return {key: tuple(found) for key, found in places.items() if len(found) > 1}


def layer_of(target: Projection) -> TermsLayer | None:
    """Return the tuner layer that a target has already."""
    found = adapters_of(target.module).get(target.name) if target.fused else target.module
    return found if isinstance(found, TermsLayer) else None


def place_of(model: nn.Module, path: str) -> Place:
    """Return the place of the module at a path."""
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name


def under_all_names(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return adapter tensors by name, those of layers in several places, saved once, under each of their names."""
    first: dict[int, str] = {}
    found = dict(state)
    for path, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, SPPPeftLinear) and layer.also_at:
            known = first.setdefault(id(layer), path)
            for key in [key for key in state if key.startswith(f"{known}.{PREFIX}")]:
                found[path + key.removeprefix(known)] = state[key]
    return found
