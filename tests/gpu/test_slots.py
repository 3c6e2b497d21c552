"""No warp hands back a slot of shared memory before what it loaded from there is in registers.

An arrival at a barrier is not ordered after the thread's own loads: one that is still on its way reads what the copy
engine writes next. That was a wrong result once (docs/gpu.md). Here the machine code of whole kernels is read.
"""

import re

import jax.numpy as jnp
import pytest

import hisa_jax as hj
from hisa_jax.kernels_pallas import mosaic_gpu
from hisa_jax.kernels_pallas.mosaic_gpu.sparse_mla import sparse_mla
from tests import kernel_calls
from tests.gpu import whole_kernels
from tests.gpu.test_lowering import BF16, E4M3, quantized_latents

needs_tools = pytest.mark.skipif(bool(whole_kernels.why_not()), reason=str(whole_kernels.why_not()))


def late_loads(program):
    """(load, arrival, read) where a register is read after an arrival that its load may come after."""
    loops = _loops(program)
    return [
        tuple(" ".join(program.instructions[i]) for i in (load, *found))
        for load, x in enumerate(program.instructions)
        if x.opcode.startswith("LDS") and (found := _late(program, loops, load))
    ]


def _late(program, loops, load):
    """Follows all paths from a load until its registers are read or overwritten."""
    written = _written(program.instructions[load])
    seen, todo = set(), [(i, None, "") for i in program.following[load]]
    while todo and written:
        i, arrival, condition = todo.pop()
        if (i, arrival is None, condition) in seen:
            continue
        seen.add((i, arrival is None, condition))
        x = program.instructions[i]
        # What is overwritten on a condition is not there to be read on the same.
        if _read(x) & written and not (condition and x.predicate == condition):
            if arrival is not None:
                return arrival, i
            continue
        if _written(x) & written:
            if not x.predicate:
                continue
            condition = x.predicate
        # A slot goes back in the loop that took it; what was loaded outside is of a slot that is kept for longer.
        if arrival is None and _is_arrival(x) and loops[i] == loops[load]:
            arrival = i
        todo += [(following, arrival, condition) for following in program.following[i]]
    return None


def _is_arrival(x):
    """Not one that announces bytes to come, which has an operand."""
    return x.opcode.startswith("SYNCS.ARRIVE") and x.operands.endswith("RZ")


def _loops(program):
    """The innermost loop around each instruction: its first and its last one."""
    backward = [(to, i) for i, following in enumerate(program.following) for to in following if to < i]
    around = lambda i: [(last - first, first) for first, last in backward if first <= i <= last]  # noqa: E731
    return [min(around(i), default=None) for i in range(len(program.instructions))]


def _operands(x):
    """First the one that is written; predicates left out."""
    return [part for part in x.operands.split(",") if not re.fullmatch(r"\s*!?U?PT?\d*\s*", part)]


def _written(x):
    first = re.match(r"\s*R(\d+)", (_operands(x) or [""])[0])
    if first is None or x.opcode.startswith(("ST", "SYNCS", "RED", "UTMA", "BAR")):
        return set()
    n = 4 if ".128" in x.opcode or "M88.4" in x.opcode else 2 if ".64" in x.opcode or ".WIDE" in x.opcode else 1
    return {int(first[1]) + i for i in range(n)}


def _read(x):
    of_all = lambda text: {int(n) for n in re.findall(r"\bR(\d+)\b", text)}  # noqa: E731
    return of_all(x.operands) if not _written(x) else of_all(",".join(_operands(x)[1:]))


_LOOP = """
.L_x_1:
 /*0000*/ LDS.64 R2, [R9] ;
 /*0010*/ LDS R4, [R9+0x8] ;
 {before}
 /*0030*/ SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR4], RZ ;
 /*0040*/ FADD R5, R3, R4 ;
 /*0050*/ @P0 BRA `(.L_x_1) ;
 /*0060*/ EXIT ;
"""


@pytest.mark.parametrize(
    ("before", "late"),
    [("", ["R2", "R4"]), ("/*0020*/ STS [R8], R4 ;", ["R2"]), ("/*0020*/ FADD R3, R3, R4 ;", [])],
    ids=["both_late", "one_stored", "both_read"],
)
def test_a_load_that_may_come_after_the_arrival_is_seen(before, late):
    found = late_loads(whole_kernels.parsed("loop", _LOOP.format(before=before)))
    assert [load.split()[1].rstrip(",") for load, _, _ in found] == late


def _indexers(T, S, H, dtype):
    """HISA, the flat indexer and a scan over keys in one piece."""

    def call(q, k, k_scale, w, visible):
        k_scale = k_scale if dtype == E4M3 else None
        hisa = kernel_calls.select_hisa(mosaic_gpu, q, k, k_scale, w, visible, topk=2048, block_size=128, block_topk=64)
        scan = mosaic_gpu.select_scan(kernel_calls.call_of(q, k, k_scale, w, visible), hj.Scan(topk=300))
        return hisa, kernel_calls.select_flat(mosaic_gpu, q, k, k_scale, w, visible, topk=2048), scan

    f32 = jnp.float32
    keys = ((1, S, 128), dtype), ((1, S), f32)
    return call, ((1, T, H, 128), dtype), *keys, ((1, T, H), f32), ((1, T), jnp.int32)


def _decode(R, page_size, **options):
    """HISA and the flat indexer, a query of each of R requests from pages."""

    def both(call):
        return whole_kernels.hisa(call), whole_kernels.flat(call)

    return whole_kernels.decode(both, R, page_size, **options)


def _scan_of_sketches(R, **options):
    def scan(call):
        return mosaic_gpu.select_scan(call, hj.Scan(sketch="int4"))

    return whole_kernels.decode(scan, R, 64, sketch="int4", **options)


def _by_best_token(T, S):
    """Blocks by their best token, of fewer heads than a product has rows."""

    def blocks(q, k, k_scale, w, visible):
        call = kernel_calls.call_of(q, k, k_scale, w, visible)
        return mosaic_gpu.select_blocks(call, hj.BlockSparse(topk=2048, scored_by="max"))

    f32 = jnp.float32
    keys = ((1, S, 128), E4M3), ((1, S), f32)
    return blocks, ((1, T, 16, 128), E4M3), *keys, ((1, T, 16), f32), ((1, T), jnp.int32)


def _attention(T, heads):
    def call(q, kv, indices):
        return sparse_mla(q, kv, indices, value_dim=512, scale=0.1)

    return call, ((1, T, heads, 576), BF16), ((1, 65536, 576), BF16), ((1, T, 2048), jnp.int32)


def _attention_8_bits():
    def call(q, indices, *latents):
        return sparse_mla(q, hj.QuantizedLatents(*latents), indices, value_dim=512, scale=0.1)

    return call, ((128, 1, 128, 576), BF16), ((128, 1, 2048), jnp.int32), *quantized_latents(128, 8192)


KERNELS = {
    "prefill": lambda: _indexers(4096, 65536, 64, E4M3),
    "prefill_bf16": lambda: _indexers(4096, 65536, 32, BF16),
    "decode_32": lambda: _decode(32, 64),
    "decode_128": lambda: _decode(128, 128),
    # A call of one query has numbers that ptxas knows, and does without what hangs on them.
    "decode_1": lambda: _decode(1, 64, context=262144),
    "decode_1_of_16_heads": lambda: _decode(1, 64, context=262144, H=16),
    "drafts": lambda: _decode(4, 64, each=3, H=32),
    "one_query": lambda: _indexers(1, 1 << 20, 64, E4M3),
    "one_query_bf16": lambda: _indexers(1, 1 << 18, 64, BF16),
    "sketches": lambda: _scan_of_sketches(32),
    "sketches_drafts": lambda: _scan_of_sketches(16, each=4),
    "best_tokens": lambda: _by_best_token(4096, 65536),
    "best_tokens_of_one": lambda: _by_best_token(1, 262144),
    "sparse_mla": lambda: _attention(4096, 128),
    "latents_8_bits": _attention_8_bits,
    "sparse_mla_split": lambda: _attention(1, 64),
}


@pytest.mark.exhaustive  # 5 s a case, where all tools are there
@needs_tools
@pytest.mark.parametrize("kernels", KERNELS)
def test_a_slot_is_handed_back_after_what_was_loaded_from_it_is_there(kernels, tmp_path):
    programs = whole_kernels.compiled(tmp_path, *KERNELS[kernels]())
    assert programs, "no kernel was lowered"
    for program in programs:
        assert not (late := late_loads(program)), f"{program.name}: {late}"


@pytest.mark.exhaustive  # 5 s, where all tools are there
@needs_tools
@pytest.mark.parametrize("kernels", ["sparse_mla", "latents_8_bits"])
def test_addresses_of_copies_with_a_hint_are_a_lanes_own(kernels, tmp_path):
    """ptxas up to 13.0 takes other uniform registers than those that it has filled: an illegal instruction."""
    for program in whole_kernels.compiled(tmp_path, *KERNELS[kernels]()):
        copies = [x.operands for x in program.instructions if x.opcode.startswith("LDGSTS")]
        assert copies and not [x for x in copies if re.search(r"\[R\d+\+UR", x)], copies
