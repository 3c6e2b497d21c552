"""A GPU backend's stages on one device's share of the keys of sequences: each result comes with its sort keys.

In all of them a call has the keys, or the pages, that the device has, and what its queries see of those.
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from hisa_jax.kernels_pallas import indexer, scan
from hisa_jax.kernels_pallas.communicator import Communicator
from hisa_jax.kernels_pallas.flat_call import FlatCall, flatten
from hisa_jax.kernels_pallas.indexer import ByScore, Indexer
from hisa_jax.kernels_pallas.sort_key import INVISIBLE
from hisa_jax.kernels_pallas.types import Interpret
from hisa_jax.layout import Call
from hisa_jax.methods import Scan

# [T, k] int32 each, a row a query: sort keys, `INVISIBLE` where there is none; ids or positions, ascending, then -1.
# A query without a candidate gets anything.
Found = tuple[Array, Array]

_MAX_WIDTH = 32768  # candidates that a row is merged from at a time


class Stages(indexer.Stages, Protocol):
    """What a backend brings beside the stages of the indexer."""

    def best_in_blocks(
        self, call: FlatCall, block_ids: Array, k: int, block_size: int, interpret: Interpret = False
    ) -> Found:
        """The best visible tokens of the kept blocks, [T, m] ids in the sequence."""
        ...

    def best_tokens(self, call: FlatCall, k: int, interpret: Interpret = False) -> Found:
        """The best of all visible tokens."""
        ...


@dataclasses.dataclass(frozen=True)
class SelectShard:
    """One device's part of a selection, by one backend; see ../README.md. Tracing is that of `Indexer`."""

    indexer: Indexer
    # Between two H200 an exchange takes some 70 us however little it sends, in which 16 MiB are sent, too.
    most_to_all: int = 16 * 2**20

    @property
    def stages(self) -> Stages:
        stages: Any = self.indexer.stages
        return stages

    def best_blocks(self, call: Call, eligible: Array, k: int, block_size: int, interpret: Interpret = False) -> Found:
        """The best blocks by score alone, none forced, of the first `eligible` [T]."""
        with jax.enable_x64(False):  # see bits.py
            flat, blocks = flatten(call, block_size), ByScore(block_size, k)
            means = indexer.block_means(self.stages, call, flat, block_size, interpret)

            def some(flat: FlatCall, eligible: Array) -> Found:
                sort_keys = self.stages.block_sort_keys(flat, means, eligible, blocks, interpret)
                return self.stages.best_columns(sort_keys, eligible, k, interpret)

            return _of(*flat.map_queries(some, indexer.QUERIES, eligible))

    def best_in_blocks(
        self, call: Call, block_ids: Array, k: int, block_size: int, interpret: Interpret = False
    ) -> Found:
        """The best visible tokens of some blocks, `block_ids` [T, m] ascending, then -1."""
        with jax.enable_x64(False):

            def some(flat: FlatCall, block_ids: Array) -> Found:
                return self.stages.best_in_blocks(flat, block_ids, k, block_size, interpret)

            return _of(*flatten(call, block_size).map_queries(some, indexer.QUERIES, block_ids))

    def best_tokens(self, call: Call, k: int, interpret: Interpret = False) -> Found:
        """The best of all visible tokens."""
        with jax.enable_x64(False):

            def some(flat: FlatCall) -> Found:
                return self.stages.best_tokens(flat, k, interpret)

            return _of(*indexer.of_tokens(call).map_queries(some, indexer.QUERIES))

    def best_scanned(
        self, call: Call, seen: Array, method: Scan, k: int, devices: Communicator, interpret: Interpret = False
    ) -> Found:
        """The best of this device's candidates by a scan; the number of all devices' is as a scan promises.

        Few queries, and queries of few keys, have all their tokens scored, whatever sketch there is: where lists of few
        queries are short, exchanges would take longest.

        Args:
            seen: [T] int32, tokens that each query sees on all devices.
        """
        with jax.enable_x64(False):
            flat = indexer.of_tokens(call)
            if self.indexer.way(flat, method) != "samples":
                return self.best_tokens(call, min(k, call.max_keys), interpret)
            if method.sketch is not None:
                flat = dataclasses.replace(flat, sketch=call.sketch)

            def some(flat: FlatCall, seen: Array) -> Found:
                return scan.best_of_share(self.stages, flat, seen, method, k, devices, interpret)

            n = scan.queries_at_a_time(method, flat.sequences.max_keys, devices.n)
            return _of(*flat.map_queries(some, n, seen))

    def merge(self, sort_keys: Array, positions: Array, k: int, *, interpret: Interpret = False) -> tuple[Array, Array]:
        """[T, W] int32 each, `INVISIBLE` where there is no candidate -> positions, sort keys, [T, k] int32 each.

        The first columns win ties. More than 32,768 columns are merged so many at a time.
        """
        with jax.enable_x64(False):
            while True:
                head, rest = sort_keys[:, :_MAX_WIDTH], sort_keys[:, _MAX_WIDTH:]
                # The searches of kernels want a candidate to begin with.
                limit = jnp.where(jnp.any(head > INVISIBLE, axis=1), head.shape[1], 0).astype(jnp.int32)
                best, columns = self.stages.best_columns(head, limit, k, interpret)
                best, columns = _of(best, columns)
                chosen = jnp.take_along_axis(positions, jnp.maximum(columns, 0), axis=1)
                chosen = jnp.where(columns >= 0, chosen, -1)
                if not rest.shape[1]:
                    return chosen, best
                sort_keys = jnp.concatenate([best, rest], axis=1)
                positions = jnp.concatenate([chosen, positions[:, _MAX_WIDTH:]], axis=1)


def _of(sort_keys: Array, ids: Array) -> Found:
    return jnp.where(ids >= 0, sort_keys, INVISIBLE), ids
