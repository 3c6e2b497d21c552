"""Reads the model and its tokeniser out of a GGUF file, by the `gguf` package."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from bench import UserError
from bench.smollm2.model import Config, Layer, Weights, layer_shapes
from hisa_jax.checks import optional_packages

_NAMES = {
    "norm": "attn_norm", "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
    "ffn_norm": "ffn_norm", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip


def _reader(path: Path) -> Any:
    with optional_packages():
        import gguf
    return gguf.GGUFReader(path)


def read_weights(path: Path, config: Config, dtype: Any) -> Weights:
    """Weights in one dtype, dequantised.

    Raises: MissingExtra: the package gguf is missing. UserError: the file holds a model of another shape.
    """
    tensors = _reader(path).tensors
    import gguf

    arrays = {}
    for tensor in tensors:
        whole = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        arrays[tensor.name] = np.asarray(whole, np.float32)  # [out, in]
    layers = {}
    for field, shape in layer_shapes(config).items():
        found = [arrays.get(f"blk.{i}.{_NAMES[field]}.weight") for i in range(config.n_layers)]
        if any(x is None or x.T.shape != shape[1:] for x in found):
            raise UserError(f"{path}: has no {_NAMES[field]}.weight of {list(shape[1:])} in each of {shape[0]} layers")
        layers[field] = jnp.asarray(np.stack([x.T for x in found if x is not None]), dtype)
    embed, norm = arrays["token_embd.weight"], arrays["output_norm.weight"]
    return Weights(jnp.asarray(embed, dtype), Layer(**layers), jnp.asarray(norm, dtype))


def read_tokenizer(path: Path) -> Any:
    """The model's tokeniser (byte-level BPE, digits apart), a `tokenizers.Tokenizer`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    fields = _reader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
