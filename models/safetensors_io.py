"""Reads safetensors folders, block-scaled F8_E4M3 included, which the safetensors package cannot.

Format: 8 bytes, little-endian, the size of a JSON header; the header, {name: {dtype, shape, data_offsets}}; the bytes
of all tensors, each one where its offsets say. Files are mapped, so only what is used is read. Nothing in them is run,
and no name in them leads out of the folder.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from hisa_jax.models.json_object import parse_object, read_object, short, shown
from hisa_jax.models.packed_experts import unpacked

# Dtypes that a parameter may have, then those of block scales.
_VALUES = {
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
}
_SCALES = {"BF16": ml_dtypes.bfloat16, "F32": np.float32, "F8_E8M0": ml_dtypes.float8_e8m0fnu}
_DTYPES = _VALUES | _SCALES
_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"\w[\w.-]{0,200}\.safetensors", re.ASCII)
# Of a header or an index; those of the largest published models have 15 MB.
_LARGEST_HEADER = 32 * 2**20
_MOST_TENSORS = 2**19
_LARGEST_RANK, _LARGEST_NUMBER = 8, 2**63 - 1
SCALE_SUFFIX = "_scale_inv"


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded as it is; the message names tensor and file."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """Where a tensor lies.

    Attributes:
        file: the shard.
        name: of the tensor in the file.
        dtype: its name in the header.
        shape: as stored.
        start, stop: bytes from the start of the file.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{short(self.name)} in {self.file}"


def read_header(file: Path, is_skipped: Callable[[str], bool] = lambda name: False) -> dict[str, Entry]:
    """Finds the tensors of one file, and checks that the header describes the file to the last byte.

    Args:
        file: a .safetensors file.
        is_skipped: whether the tensor of a name will not be read: it may have any dtype.

    Returns: an `Entry` a tensor that is not skipped.
    Raises: CheckpointError: no file, one that is cut short or too long, a header that is not one, tensors that overlap,
        whose size does not fit their shape or whose dtype no parameter has.
    """
    if not file.is_file():
        raise CheckpointError(f"{file}: is no file")
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        header_size = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or 8 + header_size > size:
            raise CheckpointError(f"{file}: has {size} bytes, too few for its header: truncated, or not safetensors")
        if header_size > _LARGEST_HEADER:
            raise CheckpointError(f"{file}: has a header of {header_size} bytes, wanted at most {_LARGEST_HEADER}")
        try:
            header = parse_object(stream.read(header_size))
        except ValueError as error:
            raise CheckpointError(f"{file}: corrupt header: {error}") from error
    header.pop("__metadata__", None)
    base = 8 + header_size
    entries = [_entry(name, item, file, base) for name, item in header.items()]
    # Every byte belongs to one tensor: neither gaps nor overlaps.
    expected = base
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.stop)):
        if entry.start != expected:
            raise CheckpointError(f"{entry}: starts at byte {entry.start}, wanted {expected}: corrupt header")
        if entry.stop > size:
            raise CheckpointError(f"{entry}: ends at byte {entry.stop} of {size}: the file is truncated")
        expected = entry.stop
    if expected != size:
        raise CheckpointError(f"{file}: has {size} bytes, its tensors end at {expected}: corrupt")
    kept = [entry for entry in entries if not is_skipped(entry.name)]
    for entry in kept:
        _check_dtype(entry)
    return {entry.name: entry for entry in kept}


def _entry(name: str, item: Any, file: Path, base: int) -> Entry:
    what = f"{short(name)} in {file}"
    if not isinstance(item, dict) or not {"dtype", "shape", "data_offsets"} <= set(item):
        raise CheckpointError(f"{what}: is {shown(item)}, wanted dtype, shape and data_offsets: corrupt header")
    dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(dtype, str):
        raise CheckpointError(f"{what}: has dtype {shown(dtype)}, wanted a name: corrupt header")
    for key, numbers, is_size in (
        ("shape", shape, lambda x: len(x) <= _LARGEST_RANK),
        ("data_offsets", offsets, lambda x: len(x) == 2),
    ):
        is_list = isinstance(numbers, list) and is_size(numbers)
        if not is_list or not all(type(x) is int and 0 <= x <= _LARGEST_NUMBER for x in numbers):
            raise CheckpointError(f"{what}: has {key} {shown(numbers)}: corrupt header")
    start, stop = offsets
    if start > stop:
        raise CheckpointError(f"{what}: has data_offsets {offsets}, the end before the start: corrupt header")
    if dtype in _DTYPES and stop - start != (wanted := math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize):
        raise CheckpointError(f"{what}: takes {stop - start} bytes, but {dtype} {shape} takes {wanted}: corrupt header")
    return Entry(file=file, name=name, dtype=dtype, shape=tuple(shape), start=base + start, stop=base + stop)


def _check_dtype(entry: Entry) -> None:
    wanted = _SCALES if entry.name.endswith(SCALE_SUFFIX) else _VALUES
    if entry.dtype not in wanted:
        raise CheckpointError(f"{entry}: has dtype {short(entry.dtype)}, wanted one of {', '.join(wanted)}")


class Reader:
    """The tensors of a checkpoint folder: one .safetensors file, or shards with an index.

    Args:
        folder: where they lie.
        block_size: rows and columns of the blocks of F8_E4M3 weights that share a scale.
        is_skipped: whether the tensor of a name will not be read. Then neither its dtype nor the file that the index
            has it in matters.

    Raises: FileNotFoundError: no safetensors there, or a shard missing. CheckpointError: see `read_header`; shards that
        do not hold what the index says, a shard's name that is not that of a file in the folder.
    """

    def __init__(
        self,
        folder: str | Path,
        block_size: tuple[int, int] = (128, 128),
        is_skipped: Callable[[str], bool] = lambda name: False,
    ):
        self.folder, self.block_size, self.is_skipped = Path(folder), block_size, is_skipped
        self._maps: dict[Path, np.ndarray] = {}
        self._dequantized: tuple[str, np.ndarray] = ("", np.empty(0))
        self._scales: tuple[str, np.ndarray] = ("", np.empty(0))
        index = self.folder / _INDEX
        entries = self._from_index(index) if index.exists() else self._from_one_file()
        self.entries = self._unpacked(entries)

    def _from_one_file(self) -> dict[str, Entry]:
        files = sorted(self.folder.glob("*.safetensors"))
        if len(files) != 1:
            raise FileNotFoundError(
                f"{self.folder}: holds {len(files)} .safetensors files and no {_INDEX}, wanted one file or an index"
            )
        return read_header(files[0], self.is_skipped)

    def _from_index(self, index: Path) -> dict[str, Entry]:
        weight_map = _weight_map(index)
        wanted: dict[str, list[str]] = {}
        for name, shard in weight_map.items():
            if not self.is_skipped(name):
                wanted.setdefault(shard, []).append(name)
        entries: dict[str, Entry] = {}
        for shard, names in sorted(wanted.items()):
            file = self.folder / shard
            if not file.exists():
                raise FileNotFoundError(f"{short(min(names))} in {file}: the index names this file, but it is missing")
            for name, entry in read_header(file, self.is_skipped).items():
                if weight_map.get(name) != shard:
                    raise CheckpointError(f"{entry}: {index.name} has it in {weight_map.get(name)}")
                entries[name] = entry
            for name in names:
                if name not in entries:
                    raise CheckpointError(f"{short(name)} in {file}: the index has it there, but the file does not")
        return entries

    def _unpacked(self, entries: dict[str, Entry]) -> dict[str, Entry]:
        """With the experts of a layer that are packed in one tensor one by one."""
        found: dict[str, Entry] = {}
        for name, entry in entries.items():
            if len(found) > _MOST_TENSORS:
                raise CheckpointError(
                    f"{entry}: more than {_MOST_TENSORS} tensors, those of packed experts counted singly"
                )
            try:
                parts = unpacked(name, entry.shape)
            except ValueError as error:
                raise CheckpointError(f"{entry}: {error}") from error
            size = (entry.stop - entry.start) // max(len(parts), 1)
            for i, (part, shape) in enumerate(parts or [(name, entry.shape)]):
                if part in found or (parts and part in entries):
                    raise CheckpointError(f"{entry}: holds {part}, which is there twice")
                if entry.dtype == "F8_E4M3" and len(parts) > entry.shape[0] and shape[0] % self.block_size[0]:
                    raise CheckpointError(
                        f"{entry}: packs gate and up of {shape[0]} rows, wanted a multiple of the {self.block_size[0]} "
                        "rows that share a scale"
                    )
                start = entry.start + i * size
                found[part] = dataclasses.replace(entry, shape=shape, start=start, stop=start + size)
            if not parts:
                found[name] = entry
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def where(self, name: str) -> str:
        """Tensor and file, for messages."""
        return str(self.entries[name])

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor as stored."""
        return self.entries[name].shape

    def raw(self, name: str) -> np.ndarray:
        """A tensor as stored: a read-only view of the file.

        Args:
            name: one that the reader holds.

        Returns: an array of its shape and dtype.
        """
        entry = self.entries[name]
        if entry.file not in self._maps:
            self._maps[entry.file] = np.memmap(entry.file, np.uint8, mode="r")
        return self._maps[entry.file][entry.start : entry.stop].view(_DTYPES[entry.dtype]).reshape(entry.shape)

    def tensor(self, name: str) -> np.ndarray:
        """A tensor's values: as stored, or float32 weight times scale of each block if it is F8_E4M3.

        Args:
            name: one that the reader holds; its scale is `name` + "_scale_inv", maybe in another file.

        Returns: an array of its shape.
        Raises: CheckpointError: the scale is missing, has another shape than blocks, or is no positive number.
        """
        if not self.is_block_scaled(name):
            return self.raw(name)
        # Each device's part is asked for in turn, and two parameters are made of kv_b_proj.
        if self._dequantized[0] != name:
            values, scales = self.raw(name).astype(np.float32), self.scales(name)
            with np.errstate(over="ignore"):  # what is not finite is refused where the values are used
                values *= scales
            values.flags.writeable = False
            self._dequantized = (name, values)
        return self._dequantized[1]

    def is_block_scaled(self, name: str) -> bool:
        """Whether a tensor is F8_E4M3, which has scales."""
        return self.entries[name].dtype == "F8_E4M3"

    def scales(self, name: str) -> np.ndarray:
        """The scale of every number of an F8_E4M3 tensor, float32 of its shape; raises as `tensor`."""
        if self._scales[0] != name:
            self._scales = (name, self._checked_scales(name))
        return self._scales[1]

    def _checked_scales(self, name: str) -> np.ndarray:
        scale_name = name + SCALE_SUFFIX
        shape = self.shape(name)
        if len(shape) != 2:
            raise CheckpointError(f"{self.where(name)}: is F8_E4M3 {list(shape)}, wanted a matrix, which has blocks")
        if scale_name not in self:
            raise CheckpointError(f"{self.where(name)}: is F8_E4M3, but {scale_name} is missing")
        blocks = tuple(-(-size // block) for size, block in zip(shape, self.block_size, strict=True))
        if self.shape(scale_name) != blocks:
            raise CheckpointError(
                f"{self.where(scale_name)}: is {list(self.shape(scale_name))}, wanted {list(blocks)}: one scale for "
                f"each {' x '.join(map(str, self.block_size))} block of {list(shape)}"
            )
        scales = self.raw(scale_name).astype(np.float32)
        if (bad := scales[~(np.isfinite(scales) & (scales >= 0))]).size:
            raise CheckpointError(f"{self.where(scale_name)}: holds {bad[0]}, wanted positive numbers: corrupt")
        has_zeros = not scales.all()
        for axis, block in enumerate(self.block_size):
            scales = scales.repeat(block, axis=axis)
        scales = scales[: shape[0], : shape[1]]
        if has_zeros and ((scales == 0) & (self.raw(name) != 0)).any():
            raise CheckpointError(
                f"{self.where(scale_name)}: holds 0 for a block of other values, wanted a positive number: corrupt"
            )
        scales.flags.writeable = False
        return scales


def _weight_map(index: Path) -> dict[str, str]:
    if not index.is_file():
        raise CheckpointError(f"{index}: is no file")
    try:
        weight_map = read_object(index, _LARGEST_HEADER).get("weight_map")
    except ValueError as error:
        raise CheckpointError(f"{error}: corrupt index") from error
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: corrupt index: weight_map is {shown(weight_map)}, wanted an object")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            raise CheckpointError(
                f"{index}: corrupt index: {shown(name)} is in {shown(shard)}, wanted the name of a .safetensors file "
                "in this folder"
            )
    return weight_map
