"""Writes dsv4/inputs.npz: what DeepSeek-V4's layers 1 and 3 give their indexers, worked out from golden hidden states.

    python -m tests.golden.make_dsv4_inputs FOLDER        with the case's golden.npz and weights.npz, whole

The streams of a layer's input are weighted to one, normed, and projected to the latents of the queries.
"""

import pathlib
import sys

import numpy as np

EPS = 1e-6


def rms_norm(x, weight=1.0):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPS) * weight


def inputs(golden, weights, layer):
    """Hidden states and latents of the queries, [B, T, E] and [B, T, Q]."""
    of = {name.removeprefix(f"layers.{layer}."): weights[name].astype(np.float64) for name in weights.files
          if name.startswith(f"layers.{layer}.")}  # fmt: skip
    streams = golden[f"L{layer - 1}.hidden"].astype(np.float64)  # [B, T, n, E]
    n = streams.shape[2]
    mixed = rms_norm(streams.reshape(*streams.shape[:2], -1)) @ of["hc_attn_fn"].T
    share = 1 / (1 + np.exp(-(mixed[..., :n] * of["hc_attn_scale"][0] + of["hc_attn_base"][:n]))) + EPS
    hidden = rms_norm((share[..., None] * streams).sum(axis=2), of["attn_norm.weight"])
    latents = rms_norm(hidden @ of["attn.wq_a.weight"].T, of["attn.q_norm.weight"])
    indexer = {name: x for name, x in of.items() if ".indexer." in name}
    return hidden, latents, indexer


def main(folder):
    golden, weights = (np.load(pathlib.Path(folder) / name) for name in ("golden.npz", "weights.npz"))
    angles = np.arange(golden["input_ids"].shape[1])[:, None] * golden["rope.compress_inv_freq"]
    arrays = {"cos": np.cos(angles)[None], "sin": np.sin(angles)[None]}
    for layer in (1, 3):
        hidden, latents, indexer = inputs(golden, weights, layer)
        arrays |= {f"L{layer}.hidden": hidden, f"L{layer}.q_resid": latents}
        arrays |= {f"L{layer}.weights.{name}": x for name, x in indexer.items()}
    target = pathlib.Path(__file__).parent / "dsv4" / "inputs.npz"
    np.savez_compressed(target, **{name: x.astype(np.float32) for name, x in arrays.items()})


if __name__ == "__main__":
    main(sys.argv[1])
