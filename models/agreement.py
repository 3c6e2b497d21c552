"""Whether the processes of a mesh are about to run the same pass of an engine.

Each process has an engine and a scheduler of its own, and decides for itself. A pass in which they differ would wait
for what never comes, or mix up requests, and nothing inside of a compiled program can tell. So before each pass every
process says by a few hashes what it is about to run, and reads what the others say. They talk by the service of
`jax.distributed`, on the hosts alone: no device is asked, and no wait is without end.
"""

import hashlib
import itertools
import json
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

_ENGINES = itertools.count()
_MOST_SHOWN = 60


class Agreement:
    """What the processes of a mesh say to each other.

    Args:
        mesh: of the model; None, or that of one process, has nothing to agree on.
        timeout_s: how long to wait for the others.

    Raises: RuntimeError: several processes without `jax.distributed`.
    """

    def __init__(self, mesh: Mesh | None, timeout_s: float):
        self._processes = [] if mesh is None else sorted({device.process_index for device in mesh.devices.flat})
        self._timeout_s, self._n_rounds = timeout_s, 0
        if len(self._processes) > 1:
            # Engines over the same processes are made in the same order, so they have the same number on each.
            self._name = f"hisa_jax/{'-'.join(map(str, self._processes))}/{next(_ENGINES)}"
            self._client = _client()

    def check(self, call: str, **said: Any) -> None:
        """Returns once all processes have said the same.

        Args:
            call: what error messages call it.
            said: by name, arrays or trees of them, or what has a `repr`.

        Raises: RuntimeError: on all processes, which of them said what; or that one has not come in time, or is gone.
        """
        if len(self._processes) < 2:
            return
        own, place = jax.process_index(), f"{self._name}/{self._n_rounds}"
        self._n_rounds += 1
        self._client.key_value_set(f"{place}/{own}", json.dumps({name: _text(value) for name, value in said.items()}))
        try:
            self._client.wait_at_barrier(place, int(self._timeout_s * 1000), self._processes)
        except Exception as error:
            missing = self._missing(place)
            what = f"processes {missing}" if missing else "this process"
            raise RuntimeError(
                f"{call}: {what} did not come within {self._timeout_s:g} s, wanted all of {self._processes}: each must "
                "be told the same requests and make the same steps"
            ) from error
        everyone = self._read(place)
        if own == self._processes[0] and self._n_rounds > 1:  # all have read what was said before
            self._client.key_value_delete(f"{self._name}/{self._n_rounds - 2}/")
        first = everyone[self._processes[0]]
        for name in sorted({*itertools.chain(*everyone.values())}):
            texts = {process: words.get(name, "nothing") for process, words in everyone.items()}
            if len(set(texts.values())) > 1:
                other = next(process for process, text in texts.items() if text != first.get(name, "nothing"))
                raise RuntimeError(
                    f"{call}: {name} is {texts[self._processes[0]]} on process {self._processes[0]}, {texts[other]} on "
                    f"process {other}, wanted the same on all"
                )

    def _read(self, place: str) -> dict[int, dict[str, str]]:
        found = self._client.key_value_dir_get(f"{place}/")
        return {int(key.rpartition("/")[2]): json.loads(words) for key, words in sorted(found)}

    def _missing(self, place: str) -> list[int]:
        try:
            return sorted({*self._processes} - self._read(place).keys())
        except Exception:  # the service is gone, too
            return self._processes


def _client() -> Any:
    # JAX has no public name for the service that it was initialised with (0.11 and 0.12).
    from jax._src.distributed import global_state

    if global_state.client is None:
        raise RuntimeError("Engine: the mesh is of several processes, wanted jax.distributed.initialize() first")
    return global_state.client


def _text(value: Any) -> str:
    """A few words: of what is short itself, else a hash."""
    leaves = jax.tree.leaves(value)
    if leaves and all(isinstance(leaf, np.ndarray | np.generic) for leaf in leaves):
        said = hashlib.sha256()
        for leaf in leaves:
            said.update(f"{leaf.dtype}{leaf.shape}".encode() + leaf.tobytes())
        return said.hexdigest()[:16]
    text = re.sub(r" at 0x[0-9a-f]+", "", repr(value))  # functions lie elsewhere in each process
    if len(text) <= _MOST_SHOWN:
        return text
    return f"{text[:_MOST_SHOWN]}... ({hashlib.sha256(text.encode()).hexdigest()[:16]})"
