"""The command `hisa-jax check-dump`: arguments, the judgement, what it prints."""

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from hisa_jax.command_line import UsageError, demand_at_least, method_fields
from hisa_jax.methods import NAMES, Method
from hisa_jax.testing.dump import CONTRACT, Dump, Query, guessed, judged, malformed, read_dump, sampled

_FIELDS = ("block_size", "block_topk", "block_ratio", "candidates", "exact_heads", "unit", "slopes", "sketch")
_GUESSED_FROM = 16  # queries
_EXPLAINED = 0.9  # less of the selected tokens is no explanation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `check-dump` takes."""
    parser.set_defaults(run=run)
    parser.add_argument(
        "file", type=Path, metavar="FILE",
        help=".npz with q, k, w and indices; k_scale, positions and lengths if there are any",
    )  # fmt: skip
    parser.add_argument("--indexer", default="dsa", choices=NAMES, help="what it should have selected by")
    parser.add_argument("--topk", type=int, help="tokens that a query selects (default: the columns of indices)")
    for name in _FIELDS:
        kind = str if name in ("slopes", "sketch") else int
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=f"the indexer's {name}")
    parser.add_argument("--queries", type=int, default=64, help="judged by scores, at random (default: %(default)s)")
    parser.add_argument(
        "--tolerance", type=float, default=1e-3,
        help="of scores, relative to the largest of a query (default: %(default)s)",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Judges a dump; 1 if it breaks the contract."""
    demand_at_least(options, queries=1, topk=1)
    if not options.tolerance >= 0:
        raise UsageError(f"--tolerance {options.tolerance}: wanted at least 0")
    try:
        dump = read_dump(options.file)
    except (ValueError, OSError) as error:  # not a verdict, which 1 is
        raise UsageError(str(error)) from error
    method = _method(options, dump)
    at = sampled(dump, method.topk, options.queries)
    if not at:
        raise UsageError(f"{options.file}: no query sees a token")
    queries = []
    for query in judged(dump, at, method, options.tolerance):
        queries.append(query)
        if sys.stderr.isatty():
            print(f"\r{len(queries)} of {len(at)} queries", end="\r", file=sys.stderr)
    wrong = malformed(dump, method)
    for line in report(dump, queries, wrong, method, options.tolerance):
        print(line)
    return int(bool(wrong) or any(query.why for query in queries))


def _method(options: argparse.Namespace, dump: Dump) -> Method:
    given = {"topk": dump.indices.shape[2]} | method_fields(options, options.indexer, f"--indexer {options.indexer}")
    try:
        return NAMES[options.indexer](**given)
    except ValueError as error:
        raise UsageError(f"--indexer {options.indexer}: {error}") from error


def report(
    dump: Dump, queries: list[Query], wrong: Mapping[str, np.ndarray], method: Method, tolerance: float
) -> Iterator[str]:
    """What is printed, line by line."""
    (B, T, H, D), S = dump.q.shape, dump.k.shape[1]
    yield f"{B} x {T} queries, {S} keys, {H} heads of {D}; held against {method}, tolerance {tolerance:g}"
    yield f"lists: {_form(dump)}"
    for what, at in wrong.items():
        b, t = at[0]
        yield f"{what}: {len(at)} of all lists, the first at b={b}, t={t}, position {dump.positions[b, t]}"
    n = int((dump.positions >= 0).sum())
    if len(queries) < n:
        yield f"by scores {len(queries)} of {n} queries are judged, at random; --queries says how many"
    for name, chooses in (("no more than", False), ("more than", True)):
        mine = [query for query in queries if (query.visible > method.topk) == chooses]
        if mine:
            kept, recall = sum(query.why is None for query in mine), np.mean([query.recall for query in mine])
            what = f"{name} {method.topk} visible tokens"
            yield f"{what}: {kept} of {len(mine)} queries right, mean recall {recall:.4f}"
    broken = [query for query in queries if query.why]
    if not broken and not wrong:
        yield "The selections follow from q, k and w. What is wrong is in these, or in the attention after them."
    if not broken:
        return
    first = broken[0]
    yield f"first wrong: b={first.b}, t={first.t}, position {first.position}, {first.visible} visible: {first.why}"
    yield from _reasons(dump, broken, method)


def _reasons(dump: Dump, broken: list[Query], method: Method) -> Iterator[str]:
    needs = np.array([query.needs for query in broken])
    if np.all(needs < 0.05):
        yield f"All are near ties: right at a tolerance of {needs.max():.3g}, half of them at {np.median(needs):.3g}."
    chosen = [query for query in broken if query.visible > method.topk][:_GUESSED_FROM] or broken[:_GUESSED_FROM]
    guesses = guessed(dump, chosen, method.topk)
    contract = next(share for share, name in guesses if name == CONTRACT)
    better = [(share, name) for share, name in guesses if share > max(contract + 0.005, _EXPLAINED)][:3]
    if better:
        yield f"What fits better, by the share of the selected tokens that it explains ({CONTRACT}: {contract:.4f}):"
        yield from (f"  {share:.4f}  {name}" for share, name in better)
    else:
        yield f"Nothing that was tried fits better than {CONTRACT}, which explains {contract:.4f} of what was selected."


def _form(dump: Dump) -> str:
    """Order and padding as they are, which the judgement leaves aside."""
    ids, S = dump.indices, dump.k.shape[1]
    is_real = (ids >= 0) & (ids < S)
    said = ["ascending" if np.all(np.where(is_real[..., 1:] & is_real[..., :-1], np.diff(ids), 1) > 0) else "unordered"]
    fillers = np.unique(ids[~is_real])
    if len(fillers):
        some = ", ".join(map(str, fillers[:4])) + (", ..." if len(fillers) > 4 else "")
        said.append(f"filled up by {some}")
        if np.any(is_real[..., 1:] & ~is_real[..., :-1]):
            said.append("not only at the end")
    return ", ".join(said)
