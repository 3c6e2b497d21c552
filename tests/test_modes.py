"""Every public call in every mode of JAX: it is traced in all of them, and has the bits of the plain call.

Run as a whole they take about two minutes. In the gate each call is traced in every sixth mode, and most run in one.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from hisa_jax import dispatch
from tests import calls

pytestmark = pytest.mark.unoptimised  # compiling takes longer than running
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
ONLY_A_BATCH = (NotImplementedError, "jax.vmap of a function over a mesh")
OUTSIDE = (ValueError, "called inside jax.shard_map over .*data.*, wanted a call outside")
OTHER_MESH = (ValueError, r"jax.set_mesh has set a mesh of .*, wanted a mesh of 'data': 1 \(Auto\)")


def one_device(kind: AxisType, axis: str = "data") -> jax.sharding.Mesh:
    return jax.make_mesh((1,), (axis,), axis_types=(kind,))


def mapped_over_devices(function: Callable[..., Any]) -> Callable[..., Any]:
    """Every argument varies over the mesh's axis, the rest of the types follow."""

    def call(*arrays):
        specs = (P("data"),) * len(arrays)
        return jax.shard_map(function, mesh=one_device(AUTO), in_specs=specs, out_specs=P("data"))(*arrays)

    return call


def each_varies(function: Callable[..., Any]) -> Callable[..., Any]:
    """One argument after the other varies over the mesh's axis, the others do not."""

    def call(*arrays):
        for i in range(len(arrays)):
            specs = tuple(P("data") if i == j else P() for j in range(len(arrays)))
            out = jax.shard_map(function, mesh=one_device(AUTO), in_specs=specs, out_specs=P("data"))(*arrays)
        return out

    return call


def twice(function: Callable[..., Any], over: Callable[..., Any]) -> Callable[..., Any]:
    """The second of two equal results."""

    def call(*arrays):
        both = jax.tree.map(lambda x: jnp.stack([x, x]), arrays)
        return jax.tree.map(lambda x: x[1], over(function, both))

    return call


def scanned(function: Callable[..., Any], both: Any) -> Any:
    return jax.lax.scan(lambda carry, arrays: (carry, function(*arrays)), None, both)[1]


def exported(function: Callable[..., Any]) -> Callable[..., Any]:
    """What is left of it after a way through a file."""

    def call(*arrays):
        leaves, structure = jax.tree.flatten(arrays)
        flat = jax.jit(lambda *leaves: jax.tree.leaves(function(*jax.tree.unflatten(structure, leaves))))
        program = jax.export.deserialize(jax.export.export(flat)(*leaves).serialize())
        return jax.tree.unflatten(jax.tree.structure(jax.eval_shape(function, *arrays)), program.call(*leaves))

    return call


class Mode(NamedTuple):
    """How a call is made.

    Attributes:
        function: the call -> what is traced.
        context: in which.
        refused: the error of what runs on a mesh, and what it says.
    """

    function: Callable[..., Any] = lambda function: function
    context: Callable[[], Any] = contextlib.nullcontext
    refused: tuple[type[Exception], str] | None = None


# Dtypes are promoted strictly and ranks not at all, by conftest.py, but where a mode says otherwise.
MODES = {
    "x64": Mode(context=lambda: jax.enable_x64(True)),
    "x64_promoting": Mode(context=lambda: _both(jax.enable_x64(True), jax.numpy_dtype_promotion("standard"))),
    "auto_mesh": Mode(context=lambda: jax.set_mesh(one_device(AUTO))),
    "explicit_mesh": Mode(context=lambda: jax.set_mesh(one_device(EXPLICIT)), refused=OTHER_MESH),
    "another_mesh": Mode(context=lambda: jax.set_mesh(one_device(EXPLICIT, "model")), refused=OTHER_MESH),
    "shard_map": Mode(mapped_over_devices, refused=OUTSIDE),
    "shard_map_of_one_argument": Mode(each_varies, refused=OUTSIDE),
    "vmap": Mode(lambda function: twice(function, lambda f, both: jax.vmap(f)(*both)), refused=ONLY_A_BATCH),
    "scan": Mode(lambda function: twice(function, scanned)),
    "checkpoint": Mode(jax.checkpoint),
    "export": Mode(exported),
}
NAMES = (*calls.ON_ONE_DEVICE, *calls.ON_A_MESH)
# Of these the gate runs others that are alike in the same mode.
REPEATS = (
    "select_block_sparse", "select_packed_block_sparse", "select_paged_block_sparse", "select_scan",
    "select_packed_scan", "select_without_scores", "sparse_attention_paged",
)  # fmt: skip


def cases(is_in_gate: Callable[[int, str], bool]) -> list[Any]:
    """(mode, call) of all; whether one is in the gate goes by the sum of both numbers, and the call."""
    return [
        pytest.param(mode, call, marks=[] if is_in_gate(i + j, call) else pytest.mark.exhaustive)
        for i, mode in enumerate(MODES)
        for j, call in enumerate(NAMES)
        # `init_cache` has no arrays to map over.
        if call != "init_cache" or MODES[mode].function is MODES["x64"].function
    ]


@contextlib.contextmanager
def _both(*contexts):
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


@functools.cache
def plain(name: str) -> tuple[Callable[..., Any], Any]:
    """The call jitted, and its result without any mode."""
    function = jax.jit(calls.every()[name].function)
    return function, function(*calls.every()[name].arrays)


def is_refused(mode: str, name: str) -> bool:
    # A batch of what has no rule of its own is what JAX makes of it.
    return (
        MODES[mode].refused is not None and name in calls.ON_A_MESH and (mode, name) != ("vmap", "sparse_mla_on_a_mesh")
    )


def assert_same(got: Any, want: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert [x.dtype for x in jax.tree.leaves(got)] == [x.dtype for x in jax.tree.leaves(want)]


@pytest.mark.parametrize(("mode", "name"), cases(lambda n, _: n % 11 == 1))
def test_every_call_is_traced_or_refused_by_name(mode, name):
    function, arrays = calls.every()[name]
    want = jax.eval_shape(function, *arrays)
    with MODES[mode].context():
        if is_refused(mode, name):
            kind, message = MODES[mode].refused
            with pytest.raises(kind, match=message):
                jax.eval_shape(MODES[mode].function(function), *arrays)
            return
        got = jax.eval_shape(MODES[mode].function(function), *arrays)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(got)] == [(x.shape, x.dtype) for x in jax.tree.leaves(want)]


@pytest.mark.parametrize(("mode", "name"), cases(lambda n, call: n % (2 * len(MODES)) == 0 and call not in REPEATS))
def test_every_call_has_the_bits_of_the_plain_one(mode, name):
    function, arrays = calls.every()[name]
    _, want = plain(name)
    if is_refused(mode, name):
        pytest.skip("is refused")
    with MODES[mode].context():
        got = jax.jit(MODES[mode].function(lambda *arrays: function(*arrays)))(*arrays)
    assert_same(got, want)


@pytest.mark.oldest(*calls.ON_A_MESH)  # of the others the examples run there
@pytest.mark.parametrize("name", NAMES)
def test_no_call_makes_a_nan_or_moves_an_array(name):
    """Padding, empty lists and sequences without keys are among the arrays."""
    function, want = plain(name)
    arrays = calls.every()[name].arrays
    with jax.debug_nans(True), jax.transfer_guard("disallow"):
        got = function(*arrays)
    assert_same(got, want)


def test_kernels_are_refused_where_shard_map_checks_types():
    def chosen(x, implementation):
        dispatch.choose("select", implementation, {"triton": None, "xla": None})
        return x

    def trace(implementation, **options):
        run = jax.shard_map(
            lambda x: chosen(x, implementation), mesh=one_device(AUTO), in_specs=P(), out_specs=P(), **options
        )
        return jax.eval_shape(run, jnp.ones(2))

    for implementation in ("auto", "triton"):
        with pytest.raises(
            ValueError, match='select: implementation="triton" inside jax.shard_map .* wanted check_vma=F'
        ):
            trace(implementation)
        trace(implementation, check_vma=False)
    trace("xla")


@pytest.mark.parametrize("name", calls.ON_ONE_DEVICE)
def test_arrays_that_explicit_axes_split_are_refused_by_name(name):
    function, arrays = calls.every()[name]
    mesh = one_device(EXPLICIT)
    with jax.set_mesh(mesh):
        arrays = jax.tree.map(lambda x: jax.device_put(x, jax.NamedSharding(mesh, P("data"))), arrays)
        if name in ("init_cache", "quantize_keys", "quantize_queries"):  # JAX knows where these results lie
            jax.eval_shape(function, *arrays)
        else:
            families = ("select_packed", "select_paged", "select", "indexer_kl")
            call = next((family for family in families if name.startswith(family)), name)
            with pytest.raises(
                ValueError, match=rf"{call}: \w+ is split over the Explicit mesh axes \['data'\], wanted"
            ):
                jax.eval_shape(function, *arrays)
