"""What the jobs of a merge share: the adapters' sum, what has been found, and the merge in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spp.base_values import BaseComparison, BaseVerdict
from spp.checkpoint.adapters import Part, sum_of
from spp.checkpoint.places import Place, Places
from spp.checkpoint.rewriting import Rewriting, ValueHashes
from spp.checkpoint.scanning import Bytes
from spp.errors import MaskError, some_of
from spp.files import CheckpointReader, dtype_name, mask_sha256, values_sha256
from spp.files.hashes import joined_sha256, piece_sha256
from spp.inject_guards import layer_generator
from spp.kernels.native import elementwise
from spp.kernels.native.elementwise import Found, Matrix, terms_of
from spp.merge_report import LayerMerge, sum_layers
from spp.merge_weight import layer_merge, merge_experts, merge_tensor
from spp.packed import FLOATS


class Merging(Rewriting):
    """A checkpoint into which adapters are merged.

    Args:
        reader: of the base; places: of the layers in it.
        parts: the adapters.
        dtype, rounding, seed: as for `merge_checkpoint`.

    Attributes:
        merges: {module path: what was done}.
        base_masks: {key: mask_sha256} of the base's tensors.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        places: Places,
        parts: list[Part],
        dtype: torch.dtype | None,
        rounding: str,
        seed: int,
    ) -> None:
        self.place_of = {key: place for place in places.places for key in place.keys}
        super().__init__(reader, dtype, self.place_of, self.place_of)
        self.places, self.parts = places, parts
        self.rounding, self.seed = rounding, seed
        self.layers = sum_of(parts)
        self.merges: dict[str, LayerMerge] = {}
        self.base_masks: dict[str, str] = {}
        self._comparisons = [
            BaseComparison(f.base_values, f.base_forms, f.source, f.base_name) for f in (part.files for part in parts)
        ]
        self._ready: dict[str, Tensor] = {}  # merged tensors on disk of a group whose other tensors were asked for

    def matrices(self, key: str) -> list[Matrix] | None:
        """Return what the compiled pass needs to merge or convert a weight; None where torch has to do it."""
        place = self.place_of.get(key)
        if place is None:
            return super().matrices(key)
        before, after, shape = self.reader.dtype(key), self.stored(key), self.reader.shape(key)
        by_chance = self.rounding == "stochastic" and after in (torch.bfloat16, torch.float16)
        library = elementwise.compiled(before, after)
        if library is None or by_chance or place.group is not None or 0 in shape:
            return None
        rows, cols = shape[-2:]
        if len(shape) == 3 and rows * cols % 8:
            return None  # packed bits of an expert would begin inside a byte
        layer = self.layers[place.path]
        outputs = cols if place.transposed else rows
        of_experts = zip(*(p.unbind(0) for p in layer.params), strict=True) if len(shape) == 3 else [layer.params]
        matrices = []
        for params in of_experts:
            terms = terms_of(layer.rule, layer.rule.prepare(list(params), layer.scaling, outputs, torch.float32))
            if terms is None:
                return None
            matrices.append(Matrix(library, rows, cols, before, after, terms, transposed=place.transposed))
        return matrices

    def keep(self, key: str, dtype: torch.dtype, bits: Bytes, found: Found) -> str:
        """Record a weight that was made; its mask is the base's too."""
        mask = self.base_masks[key] = super().keep(key, dtype, bits, found)
        return mask

    def changed_by(self, key: str, mask: str, found: list[Found]) -> None:
        """Check and record what the compiled pass merged."""
        place = self.place_of[key]
        self.require_masks(place.path, mask)
        done = [layer_merge(of_one) for of_one in found]
        self.merges[place.path] = sum_layers(done) if len(place.shape) == 3 else done[0]

    def value_hashes(self, key: str, pieces: int) -> ValueHashes | None:
        """Return what hashes a weight of the base in every form that an adapter recorded."""
        place = self.place_of.get(key)
        dtypes = [] if place is None else self._recorded(place.path)
        if place is None or not dtypes:
            return None
        return PieceHashes(self, place, self.reader.dtype(key), dtypes, pieces)

    def _recorded(self, path: str) -> list[torch.dtype]:
        """Return the dtypes that adapters recorded the values of a layer in."""
        forms = {comparison.form(path) for comparison in self._comparisons}
        return [FLOATS[form] for form in sorted(form for form in forms if form in FLOATS)]

    def compare_values(self, path: str, dtype: torch.dtype, hashes: dict[str, str | None]) -> None:
        """Compare a layer of the base with what the adapters recorded.

        Args:
            dtype: that the base has it in.
            hashes: of its values, {recorded dtype: hash}.
        """
        for part, comparison in zip(self.parts, self._comparisons, strict=True):
            if path in part.layers:
                comparison.add(path, dtype_name(dtype), hashes.get(comparison.form(path) or ""))

    def verdicts(self) -> list[BaseVerdict]:
        """Return what has been found of the base's values for each adapter."""
        for part, comparison in zip(self.parts, self._comparisons, strict=True):
            for place in self.places.places:
                if place.path in part.layers and comparison.form(place.path) not in FLOATS:
                    comparison.add(place.path, dtype_name(self.reader.dtype(place.keys[0])), None)
        return [comparison.verdict() for comparison in self._comparisons]

    def require_masks(self, path: str, mask: str) -> None:
        """Raise unless a layer of the base has the zeros that the adapters were trained on."""
        for part in self.parts:
            if path in part.layers and (part.files.base_masks or {}).get(path, mask) != mask:
                self._raise_masks(part)

    def make(self, key: str, tensor: Tensor) -> Tensor:
        """Return one tensor on disk of a merged weight; the others of its group wait to be asked for."""
        place = self.place_of[key]
        if key not in self._ready:
            if place.group is None:
                self._ready[key] = self._merge(place, tensor)
            else:
                disk = self.places.disk
                assert disk is not None
                joined = disk.join(place.group, self.reader.tensor)
                for part in place.keys:
                    self.reader.release(part)
                for other in self.places.places:
                    if other.group is place.group:
                        name = next(name for name in joined if name in (other.path, f"{other.path}.weight"))
                        joined[name] = self._merge(other, joined[name])
                self._ready |= disk.split(joined)
        return self._ready.pop(key).contiguous()

    def _merge(self, place: Place, weight: Tensor) -> Tensor:
        """Return the merged weight of a layer, in the layout of `weight`."""
        path = place.path
        self.require_masks(path, mask_sha256(weight))
        hashes = {dtype_name(dtype): values_sha256(weight, dtype) for dtype in self._recorded(path)}
        self.compare_values(path, weight.dtype, hashes)
        options: dict[str, Any] = {
            "dtype": self.dtype,
            "rounding": self.rounding,
            "generator": layer_generator(self.seed, path),
            "where": path,
        }
        layer = self.layers[path]
        matrices = place.matrices(weight)
        if len(place.shape) == 3:
            of_experts = list(zip(*(p.unbind(0) for p in layer.params), strict=True))
            merged, self.merges[path] = merge_experts(
                layer.rule, matrices, of_experts, layer.scaling, transposed=place.transposed, **options
            )
        else:
            merged, self.merges[path] = merge_tensor(layer.rule, matrices[0], layer.params, layer.scaling, **options)
            merged = merged.T if place.transposed else merged
        return merged

    def _raise_masks(self, part: Part) -> None:
        masks, differing = part.files.base_masks or {}, []
        for place in self.places.places:
            if place.path not in part.layers or place.path not in masks:
                continue
            if place.group is None:
                weight = self.reader.tensor(place.keys[0])
            else:
                assert self.places.disk is not None
                joined = self.places.disk.join(place.group, self.reader.tensor)
                weight = joined.get(place.path, joined.get(f"{place.path}.weight", torch.empty(0)))
            if mask_sha256(weight) != masks[place.path]:
                differing.append(place.path)
        raise MaskError(
            f"the zeros of {self.reader.directory} are not those that the adapter in {part.files.source} was trained "
            f"on in {len(differing)} layers: {some_of(differing)}. It belongs to "
            f"{part.files.base_name or 'another base'}: pass that one"
        )


class PieceHashes(ValueHashes):
    """Hashes a weight of the base in some dtypes, for the comparison with what adapters recorded.

    Args:
        place: of the weight. dtype: that it has there.
        recorded: dtypes to hash it in.
    """

    def __init__(
        self, merging: Merging, place: Place, dtype: torch.dtype, recorded: list[torch.dtype], pieces: int
    ) -> None:
        self._merging, self._place, self._dtype = merging, place, dtype
        self._pieces = {one: [b""] * pieces for one in recorded}

    def add(self, piece: int, data: Bytes) -> None:
        """Hash a piece."""
        values = torch.frombuffer(data, dtype=self._dtype)
        for dtype, pieces in self._pieces.items():
            pieces[piece] = piece_sha256(values, dtype)

    def finish(self) -> None:
        """Hand the hashes to the comparison."""
        joined = {dtype_name(d): joined_sha256(self._place.shape, d, parts) for d, parts in self._pieces.items()}
        self._merging.compare_values(self._place.path, self._dtype, {**joined})
