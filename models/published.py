"""The published sizes, by name.

Sources: the config.json of DeepSeek-V3.2, GLM-5 and GLM-5.2 and DeepSeek's config_671B_v3.2.json, as listed in public
repositories; the parameter counts they give without multi-token prediction are 671.9 and 743.9 billion.
"""

import dataclasses

from hisa_jax.models.config import Config, IndexerKind, LayerKind, Yarn, indexer_kinds


def dsv32() -> Config:
    """DeepSeek-V3.2: 61 layers, an indexer of 64 heads in each, half-split index RoPE, YaRN."""
    layers = 61
    return Config(
        model_type="deepseek_v32",
        vocab_size=129280,
        hidden_size=7168,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        index_n_heads=64,
        index_head_dim=128,
        index_topk=2048,
        n_routed_experts=256,
        n_shared_experts=1,
        num_experts_per_tok=8,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        yarn=Yarn(factor=40, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0),
        max_position_embeddings=163840,
        layer_kinds=_dense_then_sparse(3, layers),
        indexer_kinds=_full(layers),
        index_key_scale="ue8m0",
        num_nextn_predict_layers=1,
    )


def glm5() -> Config:
    """GLM-5: 78 layers, an indexer of 32 heads in each, interleaved index RoPE."""
    layers = 78
    return Config(
        model_type="glm_moe_dsa",
        vocab_size=154880,
        hidden_size=6144,
        intermediate_size=12288,
        moe_intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=64,
        q_lora_rank=2048,
        kv_lora_rank=512,
        qk_nope_head_dim=192,
        qk_rope_head_dim=64,
        v_head_dim=256,
        index_n_heads=32,
        index_head_dim=128,
        index_topk=2048,
        n_routed_experts=256,
        n_shared_experts=1,
        num_experts_per_tok=8,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=2.5,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        max_position_embeddings=202752,
        layer_kinds=_dense_then_sparse(3, layers),
        indexer_kinds=_full(layers),
        indexer_rope_interleave=True,
        num_nextn_predict_layers=1,
    )


def glm52() -> Config:
    """GLM-5.2: GLM-5 with a longer context and an indexer in 21 of its 78 layers."""
    return dataclasses.replace(
        glm5(), rope_theta=8e6, max_position_embeddings=1048576, indexer_kinds=indexer_kinds(78, frequency=4, offset=3)
    )


def _dense_then_sparse(dense: int, layers: int) -> tuple[LayerKind, ...]:
    return tuple("dense" if i < dense else "sparse" for i in range(layers))


def _full(layers: int) -> tuple[IndexerKind, ...]:
    return indexer_kinds(layers, frequency=1, offset=0)
