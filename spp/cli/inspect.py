"""spp inspect: what is in a checkpoint or an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spp.cli import console
from spp.cli.options import command
from spp.configs.checkpoints import InspectConfig
from spp.errors import ConfigError, arg

if TYPE_CHECKING:
    from torch import Tensor

    from spp.pst.files import PSTState
    from spp.report import Table
    from spp.wrapping.adapter_files import AdapterFiles

NAME = "inspect"


@command(InspectConfig)
def run(config: InspectConfig) -> None:
    """Show the sparsity of a model's projections, or an adapter's options and sizes.

    Example: spp inspect pruned --plot pruned.png
    """
    from spp.certifying.verify import sparsity
    from spp.files.hub import local_directory
    from spp.files.recognised import PICTURE
    from spp.report import sparsity_table
    from spp.report.plot import check_plot, plot_sparsity

    directory = local_directory(config.path, "model or adapter", weights_only=True)
    if config.plot is not None:
        check_plot(config.plot)
        console.check_file(config.plot, config.overwrite, PICTURE)
    if (directory / "adapter_config.json").exists():
        if config.plot is not None:
            raise ConfigError(f"{arg('plot')} draws the zeros of a model; {config.path} is an adapter")
        adapter = _read(directory)
        console.answer(adapter_dict(adapter))
        for table in adapter_tables(adapter, directory, every=config.every):
            console.show(table)
        return
    with console.step(f"reading {config.path}"):
        report = sparsity(directory)
    console.answer({"kind": "model", **report.to_dict()})
    console.show(sparsity_table(report, every=config.every))
    if config.plot is not None:
        plot_sparsity(report, config.path, config.plot, overwrite=config.overwrite)
        console.wrote(config.plot)


def _held(forms: Mapping[str, str]) -> str:
    """Return of how many layers an adapter knows the base's values, and what they were held in."""
    return f"{len(forms)} ({', '.join(sorted(set(forms.values())))})" if forms else "unknown"


def _read(directory: Path) -> AdapterFiles | PSTState:
    from spp.pst.files import read
    from spp.wrapping.adapter_files import PST_TYPE, method_of, read_adapter

    return read(directory) if method_of(directory) == PST_TYPE else read_adapter(directory)


def _tensors(adapter: AdapterFiles | PSTState) -> dict[str, Tensor]:
    """Return the tensors of an adapter, and after them what trained beside it."""
    return {**adapter.tensors, **getattr(adapter, "also", {})}


def adapter_dict(adapter: AdapterFiles | PSTState) -> dict[str, Any]:
    """Return what is in an adapter, but its values, as JSON-ready values."""
    from spp.files import dtype_name
    from spp.wrapping.adapter_files import PEFT_TYPE, PST_TYPE, AdapterFiles

    held = _tensors(adapter)
    tensors = {name: {"shape": list(tensor.shape), "dtype": dtype_name(tensor.dtype)} for name, tensor in held.items()}
    values: dict[str, Any] = {"kind": "adapter", "config": adapter.config.to_dict(), "base": adapter.base_name}
    if isinstance(adapter, AdapterFiles):
        values |= {"method": PEFT_TYPE, "base_masks": adapter.base_masks, "base_forms": adapter.base_forms}
        values["also_trained"] = sorted(adapter.also)
    else:
        values |= {"method": PST_TYPE, "sparsity": adapter.sparsity}
    values["parameters"] = sum(tensor.numel() for tensor in held.values())
    values["bytes"] = sum(tensor.numel() * tensor.element_size() for tensor in held.values())
    return values | {"tensors": tensors}


def adapter_tables(adapter: AdapterFiles | PSTState, directory: Path, *, every: bool) -> list[Table]:
    """Return the options of an adapter, and its tensors by kind of module or, with `every`, one by one."""
    from spp.report import Table, byte_text, kind_of
    from spp.wrapping.adapter_files import PEFT_TYPE, PST_TYPE, AdapterFiles

    options = [("method", PEFT_TYPE if isinstance(adapter, AdapterFiles) else PST_TYPE)]
    options += [(name, str(value)) for name, value in adapter.config.to_dict().items() if value is not None]
    held = _tensors(adapter)
    tensors = held.values()
    options.append(("base", adapter.base_name or "unknown"))
    if isinstance(adapter, AdapterFiles):
        options.append(("base masks", str(len(adapter.base_masks or {}))))
        options.append(("base values", _held(adapter.base_forms or {})))
        if adapter.also:
            options.append(("also trained", f"{len(adapter.also)} parameters of the base"))
    else:
        options.append(("sparsity", ", ".join(sorted({f"{value:.4g}" for value in adapter.sparsity.values()}))))
    options += [
        ("parameters", str(sum(t.numel() for t in tensors))),
        ("size", byte_text(sum(t.numel() * t.element_size() for t in tensors))),
    ]
    groups: dict[str, list[str]] = {}
    for name in held:
        groups.setdefault(name if every else kind_of(name), []).append(name)
    rows = []
    for group, names in groups.items():
        shapes = dict.fromkeys("×".join(map(str, held[name].shape)) for name in names)
        count = sum(held[name].numel() for name in names)
        rows.append((group, str(len(names)), ", ".join(shapes), str(count)))
    return [
        Table(f"adapter {directory}", ("option", "value"), tuple(options)),
        Table("tensors", ("name", "tensors", "shape", "parameters"), tuple(rows)),
    ]
