"""Makes family_other: indexers of ten models of other sizes, with whole configs and padded rows, by public code.

Of each model a file: `config`, as config.json has it; hidden states, latents, cos and sin, `positions`, -1 where there
is padding; `weights.*` by the module's own names; `q`, `k` and `w` as they enter the score; and `chosen`, which tokens,
entries or blocks of its sequence each query got, ascending, -1 after them.
Run: python make_family.py (needs torch, transformers 5.24.0).
"""

import importlib
import json
from pathlib import Path

import numpy as np
import torch

B, T, LENGTHS = 2, 37, (37, 30)
E, Q, H, D, R = 28, 20, 6, 24, 8  # hidden, latents, heads, their size, dims of RoPE
LIGHTNING = dict(
    hidden_size=E, q_lora_rank=Q, index_n_heads=H, index_head_dim=D, qk_rope_head_dim=R, index_topk=7, rms_norm_eps=1e-4
)
COMPRESSED = {"rope_type": "default", "rope_theta": 16e4, "partial_rotary_factor": 0.5}
# Model -> its config's class, and what differs from LIGHTNING.
CASES = {
    "deepseek_v32": ("DeepseekV32Config", {}),
    "glm_moe_dsa": ("GlmMoeDsaConfig", {}),
    "axk2": ("AXK2Config", {}),
    "dots3_note": ("Dots3NoteTextConfig", {}),
    "hy_v4": ("HYV4Config", {}),
    "mistral_large4": ("MistralLarge4TextConfig", {"no_rope_layers": [1]}),
    "glm5_next": ("Glm5NextTextConfig", {"index_kpool": 3, "index_topk": 6, "qk_rope_head_dim": 0}),
    "deepseek_v4": ("DeepseekV4Config", {
        "head_dim": 2 * R, "index_topk": 3, "rope_parameters": {"main": COMPRESSED, "compress": COMPRESSED},
        "compress_rates": {"compressed_sparse_attention": 5, "heavily_compressed_attention": 128},
    }),
    "qwen4_exp": ("Qwen4ExpTextConfig", {
        "indexer_n_heads": H, "indexer_kv_heads": 1, "indexer_head_dim": D, "indexer_budget": 9,
        "indexer_compress_ratio": 3, "head_dim": 2 * R,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    }),
    "minimax_m3_vl": ("MiniMaxM3VLTextConfig", {
        "index_block_size": 5, "index_topk_blocks": 3, "index_local_blocks": 2, "head_dim": 2 * R,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    }),
}  # fmt: skip
OF_SLOTS = ("deepseek_v4", "minimax_m3_vl")  # anchor what they pool at slots, so that only the right may be padded
LEAST_MARGIN = 1e-4


def inputs(name, config):
    """Arguments of a call, [B, T, ...] each; the second row is padded, on the left where the model allows it."""
    positions = torch.full((B, T), -1)
    for b, n in enumerate(LENGTHS):
        start = 0 if name in OF_SLOTS else T - n
        positions[b, start : start + n] = torch.arange(n)
    at = torch.arange(T).expand(B, T) if name in OF_SLOTS else positions.clamp(min=0)
    angles = at[..., None].float() * 50.0 ** (-torch.arange(0, R, 2).float() / R)
    cos, sin = (torch.cat([f(angles)] * 2, dim=-1) for f in (torch.cos, torch.sin))
    return dict(hidden=torch.randn(B, T, E), q_resid=torch.randn(B, T, Q), cos=cos, sin=sin, positions=positions), at


def called(name, module, x, at):
    """What the module gives, and what it multiplied."""
    products, heads, product = [], [], torch.matmul

    def watched(a, b):
        products.append((a, b))
        return product(a, b)

    projection = module.scorer if name == "deepseek_v4" else module
    hook = None
    if hasattr(projection, "weights_proj"):
        hook = projection.weights_proj.register_forward_hook(lambda _, __, out: heads.append(out))
    table, is_real = (x["cos"], x["sin"]), x["positions"] >= 0
    visible = torch.ones(T, T).tril().bool() & is_real[:, None, :]
    arguments = {
        "glm5_next": (x["hidden"], x["q_resid"], is_real, None),
        "deepseek_v4": (x["hidden"], x["q_resid"], at, None, 0),
        "qwen4_exp": (x["hidden"], table, visible[:, None], None),
        "minimax_m3_vl": (x["hidden"], table, None, at),
        "mistral_large4": (x["hidden"], table, visible, at),
    }.get(name, (x["hidden"], x["q_resid"], table, visible, at))
    torch.matmul = watched
    with torch.no_grad():
        found = module(*arguments)
    torch.matmul = product
    if hook is not None:
        hook.remove()
    return found, products, heads


def chosen(name, found, positions):
    """[B, T, K], of blocks [B, T, H, K]: numbers within the sequence, ascending, then -1."""
    found = np.moveaxis(found, 1, 2) if name in ("qwen4_exp", "minimax_m3_vl") else found
    rows = np.full((*found.shape[:-1], found.shape[-1]), -1, np.int32)
    for at in np.ndindex(*found.shape[:-1]):
        b, t = at[:2]
        if positions[b, t] < 0:
            continue
        ids = np.nonzero(found[at])[0] if name == "qwen4_exp" else found[at][found[at] >= 0]
        if name not in OF_SLOTS:
            ids = positions[b, ids]
            ids = ids[(ids >= 0) & (ids <= positions[b, t])]
        rows[at][: len(ids)] = np.sort(ids)
    return rows[:, :, 0] if name == "qwen4_exp" else rows


def make(name, config_class, settings):
    folder = f"transformers.models.{name}"
    config = getattr(importlib.import_module(f"{folder}.configuration_{name}"), config_class)()
    for key, value in (LIGHTNING | settings).items():
        setattr(config, key, value)
    modeling = importlib.import_module(f"{folder}.modeling_{name}")
    kind = next(x for key, x in vars(modeling).items() if key.endswith("Indexer"))
    for seed in range(1000):
        torch.manual_seed(seed)
        module = kind(config) if name == "deepseek_v4" else kind(config, 0)
        with torch.no_grad():
            for key, tensor in module.named_parameters():
                around_one = "norm.weight" in key and name not in ("qwen4_exp", "minimax_m3_vl")
                tensor.copy_(torch.randn_like(tensor) * 0.4 + around_one)
        x, at = inputs(name, config)
        least, topk = [np.inf], torch.Tensor.topk

        def watched(values, k, least=least, topk=topk, **options):
            if k < values.shape[-1]:
                best = topk(values, k + 1, dim=-1).values[..., -2:].reshape(-1, 2)
                gaps = (best[:, 0] - best[:, 1])[(best[:, 1] > -1e30) & (best[:, 0] < np.inf)]
                least[0] = min([least[0], *gaps.tolist()])
            return topk(values, k, **options)

        torch.Tensor.topk = watched
        found, products, heads = called(name, module, x, at)
        torch.Tensor.topk = topk
        if least[0] > LEAST_MARGIN:
            break
    if name == "deepseek_v4":
        x["cos"], x["sin"] = module.rotary_emb(x["hidden"], position_ids=at, layer_type="compress")
    arrays = x | {f"weights.{key}": tensor.detach() for key, tensor in module.named_parameters()}
    if name != "qwen4_exp":  # which scores a query at a time
        q, k = products[0]
        arrays |= {"q": q.transpose(1, 2) if name == "minimax_m3_vl" else q, "k": k.transpose(-1, -2)[:, 0]}
    if heads:
        arrays["w"] = heads[0] * H**-0.5 * (D**-0.5 if name == "hy_v4" else 1)
    arrays = {key: tensor.numpy() for key, tensor in arrays.items()}
    arrays["positions"] = arrays["positions"].astype(np.int32)
    arrays["chosen"] = chosen(name, found.numpy(), arrays["positions"])
    settings = json.dumps(config.to_dict(), default=str)
    np.savez_compressed(Path(__file__).parent / "family_other" / f"{name}.npz", config=settings, **arrays)
    print(name, "seed", seed, "margin", least[0])


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case, arguments in CASES.items():
        make(case, *arguments)
