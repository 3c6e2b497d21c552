"""The peers' sides of each row, from the operands of ours: a call by name for each way to put their kernels together.

The parts are those of the best compositions that are known for Hopper: DeepGEMM's scores of keys, of block means and of
listed pages, with a top-k; FlashMLA for the attention. What lies between is `glue.py`.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from bench import shapes
from bench.peers.glue import PAGE, Glue, index_pages
from bench.peers.packages import Peers, TopK

Call = Callable[[], Any]


class Theirs:
    """Builds the calls of one row. Each launches its kernels and returns what ours returns first, as a torch tensor."""

    def __init__(self, peers: Peers):
        self.peers, self.torch = peers, peers.torch
        self.glue: Any = Glue(peers.torch)

    def tensor(self, x: Array) -> Any:
        """The same memory for torch, which takes no e4m3 by DLPack."""
        if x.dtype != jnp.float8_e4m3fn:
            return self.torch.from_dlpack(x)
        return self.torch.from_dlpack(jax.lax.bitcast_convert_type(x, jnp.uint8)).view(self.torch.float8_e4m3fn)

    def flat(self, operands: tuple, model: shapes.Model) -> dict[str, Call]:
        """Scores of all keys, then one top-k a query."""
        q, k, scales, w, positions = (self.tensor(x)[0] for x in operands)
        end, S = (positions + 1).to(self.torch.int32), k.shape[0]
        scores = self._scores(q, w, end)
        return self._with_selectors("DeepGEMM", lambda select: select(scores(k, scales)[:, :S], end, model.topk))

    def hisa(self, operands: tuple, model: shapes.Model) -> dict[str, Call]:
        """Pool, scores of means, top-k of blocks, scores of their pages, top-k of tokens."""
        q, k, scales_of_keys, w, positions = (self.tensor(x)[0] for x in operands)
        (M, _, D), S, B, m = q.shape, k.shape[0], model.block_size, model.block_topk
        end = (positions + 1).to(self.torch.int32)
        n_visible = ((end + B - 1) // B).to(self.torch.int32)
        cache = index_pages(self.torch, k.view(-1, PAGE, D), scales_of_keys.view(-1, PAGE))
        table = self.torch.arange(S // PAGE, dtype=self.torch.int32, device=q.device)[None]
        everything = self.torch.arange(m, dtype=self.torch.int32, device=q.device).expand(M, m).contiguous()
        scores, best = self._scores(q, w, n_visible), self._best(q, cache, w, end, model)

        def call(select: TopK) -> Any:
            if m * B >= S:
                return best(everything, table, select)
            of_blocks = scores(*self.glue.pool(k, scales_of_keys, B))[:, : S // B]
            return best(self._blocks(of_blocks, n_visible, m), table, select)

        return self._with_selectors("DeepGEMM, by blocks", call)

    def flat_decode(self, operands: tuple, model: shapes.Model) -> dict[str, Call]:
        """Scores of all pages of each request, then a top-k."""
        q, w, visible, cache, tables = self._decode_operands(operands)
        scores = self._paged_scores(q, cache, w, tables.shape[1] * PAGE, visible)
        return self._with_selectors("DeepGEMM", lambda select: select(scores(tables), visible, model.topk))

    def hisa_decode(self, operands: tuple, model: shapes.Model) -> dict[str, Call]:
        """As `hisa`, with means that are kept in pages of their own."""
        q, w, visible, cache, tables = self._decode_operands(operands)
        (R, _, D), B, m = q.shape, model.block_size, model.block_topk
        n = tables.shape[1] * PAGE // B
        keys, scales = operands[3].keys, operands[3].scales
        keys, scales = (self.tensor(x)[tables.long()] for x in (keys, scales))
        means, mean_scales = self.glue.pool(keys.view(-1, D), scales.view(-1), B)
        # Whole pages of means for each request.
        means = self.torch.nn.functional.pad(means.view(self.torch.uint8).view(R, n, D), (0, 0, 0, -n % PAGE))
        mean_scales = self.torch.nn.functional.pad(mean_scales.view(R, n), (0, -n % PAGE))
        means = means.view(-1, PAGE, D).view(self.torch.float8_e4m3fn)
        mean_cache = index_pages(self.torch, means, mean_scales.view(-1, PAGE))
        mean_tables = self.torch.arange(mean_cache.shape[0], dtype=self.torch.int32, device=q.device).view(R, -1)
        n_visible = ((visible + B - 1) // B).to(self.torch.int32)
        scores, best = self._paged_scores(q, mean_cache, w, n, n_visible), self._best(q, cache, w, visible, model)

        def call(select: TopK) -> Any:
            return best(self._blocks(scores(mean_tables), n_visible, m), tables, select)

        return self._with_selectors("DeepGEMM, by blocks", call)

    def sparse_mla(self, operands: tuple, model: shapes.Model) -> dict[str, Call]:
        """FlashMLA's attention to listed tokens of a bfloat16 cache."""
        q, kv, indices = (self.tensor(x) for x in operands)
        (B, T, N, E), S = q.shape, kv.shape[1]
        first = self.torch.arange(B, dtype=self.torch.int32, device=q.device)[:, None, None] * S
        rows = (indices + first).view(B * T, 1, -1)
        q, kv = q.view(B * T, N, E), kv.view(B * S, 1, E)
        f = self.peers.flash_mla.flash_mla_sparse_fwd
        # sgl-flash-mla keeps the kernels for keys of 576 as its old ones.
        options = _taken(f, use_legacy=True, return_log2_lse=False)
        return {"FlashMLA": lambda: f(q, kv, rows, E**-0.5, **options)[0].view(B, T, N, -1)}

    def sparse_mla_8bit(self, operands: tuple, model: shapes.Model) -> dict[str, Call]:
        """FlashMLA's decoding from a cache in 8 bits, the same bytes in pages of 64."""
        q, indices, cache = self.tensor(operands[0]), self.tensor(operands[2]), self.tensor(operands[1].to_bytes())
        (B, _, _, E), S, module = q.shape, cache.shape[1], self.peers.flash_mla
        cache = cache.view(-1, PAGE, 1, cache.shape[2])
        first = self.torch.arange(B, dtype=self.torch.int32, device=q.device)[:, None, None] * S
        rows, (plan, _) = (indices + first).contiguous(), module.get_mla_metadata()
        f = module.flash_mla_with_kvcache
        options = _taken(f, softmax_scale=E**-0.5, is_fp8_kvcache=True, indices=rows, use_legacy=True)
        return {"FlashMLA, 8 bits": lambda: f(q, cache, None, None, model.mla_value_dim, plan, **options)[0]}

    def _decode_operands(self, operands: tuple) -> tuple:
        q, w, visible, cache, tables, _ = operands
        keys, scales = self.tensor(cache.keys), self.tensor(cache.scales)
        return (*map(self.tensor, (q, w, visible)), index_pages(self.torch, keys, scales), self.tensor(tables))

    def _scores(self, q: Any, w: Any, end: Any) -> Callable[[Any, Any], Any]:
        """Keys and scales -> [M, at least S]; what lies from `end` on is not written."""
        start, f = self.torch.zeros_like(end), self.peers.deep_gemm.fp8_mqa_logits
        return lambda k, scales: f(q, (k, scales), w, start, end, clean_logits=False)

    def _paged_scores(self, q: Any, cache: Any, w: Any, width: int, visible: Any = None) -> Callable[[Any], Any]:
        """Tables -> [M, width]; what is planned of the lengths is planned once, as a server does for all layers."""
        (M, H, D), module = q.shape, self.peers.deep_gemm
        lengths = self.torch.full((M,), width, dtype=self.torch.int32, device=q.device) if visible is None else visible
        q, lengths = q.view(M, 1, H, D), lengths.view(M, 1).contiguous()
        plan = module.get_paged_mqa_logits_metadata(lengths, PAGE, module.get_num_sms())
        return lambda tables: module.fp8_paged_mqa_logits(q, cache, w, lengths, tables, plan, width)

    def _blocks(self, scores: Any, n_visible: Any, m: int) -> Any:
        """The best blocks by the first selector that takes any k."""
        names = [name for name in self.peers.selectors if name.startswith("sglang")]
        select = self.peers.selectors[names[0] if names else "torch.topk"]
        return select(self.glue.force(scores, n_visible), n_visible, m)

    def _best(self, q: Any, cache: Any, w: Any, end: Any, model: shapes.Model) -> Callable[[Any, Any, TopK], Any]:
        """Blocks and tables of pages -> the positions of the best tokens."""
        B, width = model.block_size, model.block_topk * model.block_size
        scores, widths = self._paged_scores(q, cache, w, width), self.torch.full_like(end, width)

        def call(blocks: Any, table: Any, select: TopK) -> Any:
            tokens = self.glue.hide(scores(self.glue.pages_of(blocks, table, B)), blocks, end, B)
            return self.glue.positions_of(select(tokens, widths, model.topk), blocks, end, B)

        return call

    def _with_selectors(self, scores: str, call: Callable[[TopK], Any]) -> dict[str, Call]:
        return {f"{scores}, {name}": _call(call, select) for name, select in self.peers.selectors.items()}


def _call(call: Callable[[TopK], Any], select: TopK) -> Call:
    return lambda: call(select)


def _taken(f: Callable, **options: Any) -> dict[str, Any]:
    """Those that the function has."""
    has = inspect.signature(f).parameters
    return {name: value for name, value in options.items() if name in has}
