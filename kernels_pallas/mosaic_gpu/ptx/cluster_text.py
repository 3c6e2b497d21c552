"""PTX for the CTAs of a cluster that share a row: what each knows reaches the others through their shared memory.

Texts have registers `cta` (its rank), `warp`, `lane`, `at`, `far`, `t`, `u`, `p` and an operand $SMEM, an address
that is the same in all CTAs.
"""

CLUSTER_SYNC = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;\n"


def to_all(n_ctas: int, offset: int, words: list[str]) -> str:
    """Stores words of a warp at `at` + offset in each CTA; a barrier must follow."""
    kind, value = ("v2.b32", f"{{{', '.join(words)}}}") if len(words) == 2 else ("b32", words[0])
    return f"""and.b32 u, lane, {n_ctas - 1}; mapa.shared::cluster.u32 far, at, u; setp.lt.u32 p, lane, {n_ctas};
@p st.shared::cluster.{kind} [far+{offset}], {value};"""


def own_entry(n_warps: int, n_bytes: int) -> str:
    """`at`, the place of this warp in a table of all warps of all CTAs."""
    return f"mad.lo.u32 at, cta, {n_warps}, warp; mad.lo.u32 at, at, {n_bytes}, $SMEM;\n"


def load_table(n: int, offset: int, registers: list[str]) -> str:
    """Each lane loads the same number of neighbouring words of a table of n."""
    each = n // 32
    lines = [f"mad.lo.u32 at, lane, {4 * each}, $SMEM;"]
    for first in range(0, each, 4):
        own = registers[first : first + min(each, 4)]
        kind = {1: "b32", 2: "v2.b32", 4: "v4.b32"}[len(own)]
        value = own[0] if len(own) == 1 else f"{{{', '.join(own)}}}"
        lines.append(f"ld.shared.{kind} {value}, [at+{offset + 4 * first}];")
    return "\n".join(lines)
