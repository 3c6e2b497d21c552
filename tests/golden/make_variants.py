"""Makes the cases variant_dsv32 and variant_glm: settings that the other golden cases leave at one value.

Two shared experts, other group counts, other eps, an mscale that differs from mscale_all_dim, a pattern string for
shared indexers, by the public transformers code on random weights.
Run: python make_variants.py (needs torch, transformers 5.23.0).
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "moe_intermediate_size": 12, "num_attention_heads": 3,
    "num_key_value_heads": 3, "q_lora_rank": 20, "kv_lora_rank": 12, "qk_nope_head_dim": 10, "qk_rope_head_dim": 8,
    "v_head_dim": 14, "index_n_heads": 7, "index_head_dim": 12, "index_topk": 6, "n_routed_experts": 6,
    "n_shared_experts": 2, "num_experts_per_tok": 2, "n_group": 3, "topk_group": 2, "routed_scaling_factor": 1.7,
    "first_k_dense_replace": 1, "max_position_embeddings": 64,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 24,
    "beta_slow": 2, "mscale": 0.707, "mscale_all_dim": 0.9,
}  # fmt: skip
CASES = {
    "variant_dsv32": (
        transformers.DeepseekV32Config, transformers.DeepseekV32ForCausalLM,
        {"num_hidden_layers": 3, "rms_norm_eps": 1e-4, "rope_parameters": YARN},
    ),
    "variant_glm": (
        transformers.GlmMoeDsaConfig, transformers.GlmMoeDsaForCausalLM,
        {
            "num_hidden_layers": 5, "rms_norm_eps": 1e-3, "index_topk_pattern": "FSSFS", "norm_topk_prob": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        },
    ),
}  # fmt: skip
LEAST_MARGIN = 2e-5
MASKED = -1e30  # the code adds the least float32 where nothing may be chosen


class Margins:
    """Watches every top-k for how far the last chosen value is from the first one left out, relative to the largest."""

    def __init__(self):
        self.least, self.topk = np.inf, torch.topk

    def __call__(self, values, k, dim=-1, **options):
        if k < values.shape[dim]:
            best = self.topk(values.detach().float(), k + 1, dim=dim)[0].movedim(dim, -1)
            rows = best[best[..., -1] > MASKED]
            if len(rows):
                gap = (rows[:, -2] - rows[:, -1]) / rows.abs().max(-1)[0]
                self.least = min(self.least, gap.min().item())
        return self.topk(values, k, dim=dim, **options)


def random_model(config, model_class, seed):
    torch.manual_seed(seed)
    model = model_class(config).float().eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("norm.weight"):
                tensor.copy_(1 + 0.3 * torch.randn_like(tensor))
            elif name.endswith("bias"):
                tensor.copy_(0.3 * torch.randn_like(tensor))
            else:
                tensor.copy_(1.3 * torch.randn_like(tensor) * tensor.shape[-1] ** -0.5)
            tensor.copy_(tensor.bfloat16().float())
    return model


def make(name, config_class, model_class, settings):
    for seed in range(1000):
        config = config_class(**SIZES | settings)
        config._attn_implementation = "eager"
        model = random_model(config, model_class, seed)
        tokens = torch.randint(0, SIZES["vocab_size"], (2, 32))
        mask = torch.ones_like(tokens)
        mask[1, :5] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        margins = Margins()
        torch.topk = margins
        torch.Tensor.topk = lambda self, *args, watch=margins, **options: watch(self, *args, **options)
        with torch.no_grad():
            logits = model(tokens).logits.numpy()
            padded = model(tokens, attention_mask=mask, position_ids=positions).logits.numpy()
        torch.topk, torch.Tensor.topk = margins.topk, lambda self, *args, top=margins.topk, **o: top(self, *args, **o)
        if LEAST_MARGIN < margins.least < np.inf:
            break
    folder = Path(__file__).parent / name
    model.bfloat16().save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    np.savez_compressed(
        folder / "golden.npz", input_ids=tokens.numpy().astype(np.int32), logits=logits,
        **{"padded.attention_mask": mask.numpy().astype(np.int32), "padded.logits": padded},
        **{"padded.position_ids": positions.numpy().astype(np.int32)},
    )  # fmt: skip
    made = {
        "seed": seed,
        "least_margin": margins.least,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    (folder / "meta.json").write_text(json.dumps(made, indent=1))
    print(name, made)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case, arguments in CASES.items():
        make(case, *arguments)
