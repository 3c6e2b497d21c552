"""Peers that a CPU has: DeepGEMM's functions in plain torch, by their signatures."""

from typing import Any


class FakeDeepGemm:
    """Scores as DeepGEMM gives them; what it does not write is NaN here."""

    def __init__(self, torch: Any):
        self.torch = torch

    def get_num_sms(self) -> int:
        return 2

    def get_paged_mqa_logits_metadata(self, lengths: Any, page: int, n_sms: int) -> Any:
        assert lengths.dtype == self.torch.int32 and lengths.dim() == 2 and page == 64 and n_sms == 2
        return lengths.clone()

    def fp8_mqa_logits(self, q: Any, kv: tuple[Any, Any], w: Any, start: Any, end: Any, *, clean_logits: bool) -> Any:
        torch, (k, scales) = self.torch, kv
        products = torch.einsum("mhd,sd->mhs", q.float(), k.float()).clamp_min(0)
        scores = torch.einsum("mhs,mh->ms", products, w) * scales
        column = torch.arange(k.shape[0])[None, :]
        scores = torch.where((column >= start[:, None]) & (column < end[:, None]), scores, float("nan"))
        return torch.nn.functional.pad(scores, (0, 7), value=float("nan"))

    def fp8_paged_mqa_logits(self, q: Any, cache: Any, w: Any, lengths: Any, tables: Any, plan: Any, width: int) -> Any:
        torch = self.torch
        assert torch.equal(plan, lengths) and cache.dtype == torch.uint8 and tables.dtype == torch.int32
        n, size, _, row = cache.shape
        flat, D = cache.reshape(n, -1), row - 4
        keys = flat[:, : size * D].contiguous().view(torch.float8_e4m3fn).view(n, size, D).float()
        scales = flat[:, size * D :].contiguous().view(torch.float32)
        out = []
        for row_q, row_w, table, length in zip(q[:, 0], w, tables, lengths[:, 0], strict=True):
            k = keys[table.long()].view(-1, D)[:width]
            s = ((row_q.float() @ k.T).clamp_min(0) * row_w[:, None]).sum(0) * scales[table.long()].view(-1)[:width]
            out.append(torch.where(torch.arange(width) < length, s, float("nan")))
        return torch.stack(out)
