"""Reads safetensors folders, block-scaled F8_E4M3 included, which the safetensors package cannot.

Format: 8 bytes, little-endian, the size of a JSON header; the header, {name: {dtype, shape, data_offsets}}; the bytes
of all tensors, each one where its offsets say. Files are mapped, so only what is used is read.
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

_DTYPES = {
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
}
_INDEX = "model.safetensors.index.json"
SCALE_SUFFIX = "_scale_inv"


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded as it is; the message names tensor and file."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """Where a tensor lies.

    Attributes:
        file: the shard.
        dtype: its name in the header.
        shape: as stored.
        start, stop: bytes from the start of the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(file: Path) -> dict[str, Entry]:
    """Finds the tensors of one file, and checks that the header describes the file to the last byte.

    Args:
        file: a .safetensors file.

    Returns: an `Entry` a tensor.
    Raises: CheckpointError: a file that is cut short or too long, a header that is not one, tensors that overlap or
        whose size does not fit their shape.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        header_size = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or 8 + header_size > size:
            raise CheckpointError(f"{file}: has {size} bytes, too few for its header: truncated, or not safetensors")
        try:
            header = json.loads(stream.read(header_size))
            header.pop("__metadata__", None)
            entries = {name: _entry(name, item, file, 8 + header_size) for name, item in header.items()}
        except CheckpointError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file}: corrupt header: {error!r}") from error
    expected = 8 + header_size
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != expected:
            raise CheckpointError(f"{name} in {file}: starts at byte {entry.start}, wanted {expected}: corrupt header")
        if entry.stop > size:
            raise CheckpointError(f"{name} in {file}: ends at byte {entry.stop} of {size}: the file is truncated")
        expected = entry.stop
    if expected != size:
        raise CheckpointError(f"{file}: has {size} bytes, its tensors end at {expected}: corrupt")
    return entries


def _entry(name: str, item: dict, file: Path, base: int) -> Entry:
    dtype, shape, (start, stop) = item["dtype"], tuple(item["shape"]), item["data_offsets"]
    if dtype not in _DTYPES:
        raise CheckpointError(f"{name} in {file}: has dtype {dtype}, wanted one of {', '.join(_DTYPES)}")
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, start, stop)):
        raise CheckpointError(f"{name} in {file}: has shape {list(shape)} and offsets {start}, {stop}: corrupt header")
    wanted = math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize
    if stop - start != wanted:
        raise CheckpointError(
            f"{name} in {file}: takes {stop - start} bytes, but {dtype} {list(shape)} takes {wanted}: corrupt header"
        )
    return Entry(file=file, dtype=dtype, shape=shape, start=base + start, stop=base + stop)


class Reader:
    """The tensors of a checkpoint folder: one .safetensors file, or shards with an index.

    Args:
        folder: where they lie.
        block_size: rows and columns of the blocks of F8_E4M3 weights that share a scale.

    Raises: FileNotFoundError: no safetensors there, or a shard missing. CheckpointError: see `read_header`; shards that
        do not hold what the index says.
    """

    def __init__(self, folder: str | Path, block_size: tuple[int, int] = (128, 128)):
        self.folder, self.block_size = Path(folder), block_size
        self._maps: dict[Path, np.ndarray] = {}
        self._dequantized = ("", np.empty(0))
        index = self.folder / _INDEX
        self.entries = self._from_index(index) if index.is_file() else self._from_one_file()

    def _from_one_file(self) -> dict[str, Entry]:
        files = sorted(self.folder.glob("*.safetensors"))
        if len(files) != 1:
            raise FileNotFoundError(
                f"{self.folder}: holds {len(files)} .safetensors files and no {_INDEX}, wanted one file or an index"
            )
        return read_header(files[0])

    def _from_index(self, index: Path) -> dict[str, Entry]:
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
            shards = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: corrupt index: {error!r}") from error
        entries: dict[str, Entry] = {}
        for shard in shards:
            file = self.folder / shard
            if not file.is_file():
                first = min(name for name, at in weight_map.items() if at == shard)
                raise FileNotFoundError(f"{first} in {file}: the index names this file, but it is missing")
            for name, entry in read_header(file).items():
                if weight_map.get(name) != shard:
                    raise CheckpointError(f"{name} in {file}: {index.name} has it in {weight_map.get(name)}")
                entries[name] = entry
        for name, shard in weight_map.items():
            if name not in entries:
                raise CheckpointError(f"{name} in {self.folder / shard}: the index has it there, but the file does not")
        return entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def where(self, name: str) -> str:
        """Tensor and file, for messages."""
        return f"{name} in {self.entries[name].file}"

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
        if self.entries[name].dtype != "F8_E4M3":
            return self.raw(name)
        # Each device's part is asked for in turn, and two parameters are made of kv_b_proj.
        if self._dequantized[0] != name:
            self._dequantized = (name, self._dequantize(name))
        return self._dequantized[1]

    def _dequantize(self, name: str) -> np.ndarray:
        scale_name = name + SCALE_SUFFIX
        if scale_name not in self:
            raise CheckpointError(f"{self.where(name)}: is F8_E4M3, but {scale_name} is missing")
        values, scales = self.raw(name).astype(np.float32), self.raw(scale_name).astype(np.float32)
        blocks = tuple(-(-size // block) for size, block in zip(values.shape, self.block_size, strict=True))
        if scales.shape != blocks:
            raise CheckpointError(
                f"{self.where(scale_name)}: is {list(scales.shape)}, wanted {list(blocks)}: one scale for each "
                f"{' x '.join(map(str, self.block_size))} block of {list(values.shape)}"
            )
        if not (np.isfinite(scales) & (scales > 0)).all():
            raise CheckpointError(f"{self.where(scale_name)}: holds {scales.min()}, wanted positive numbers: corrupt")
        for axis, block in enumerate(self.block_size):
            scales = scales.repeat(block, axis=axis)
        values *= scales[: values.shape[0], : values.shape[1]]
        values.flags.writeable = False
        return values
