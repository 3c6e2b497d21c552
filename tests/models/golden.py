"""The golden cases: numbers of the public model code, and our model on the same weights."""

import atexit
import dataclasses
import functools
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from hisa_jax import models

FOLDER = Path(__file__).parent.parent / "golden"
CASES = ("dsv32", "glm5", "glm52")
# Other group counts, two shared experts, other eps, another mscale, a pattern string: see make_variants.py there.
VARIANTS = ("variant_dsv32", "variant_glm")
LOGITS, HIDDEN, SCORES = 5e-4, 5e-5, 1e-4


@functools.cache
def numbers(case):
    """What golden.npz holds."""
    with np.load(FOLDER / case / "golden.npz") as arrays:
        return dict(arrays)


@functools.cache
def index_inputs(case):
    """What indexer.npz holds: q, k, w of each layer that selects."""
    with np.load(FOLDER / case / "indexer.npz") as arrays:
        return dict(arrays)


@functools.cache
def model(case):
    return models.from_pretrained(FOLDER / case)


def with_config(folder, **changes):
    """The weights of a case, or of a folder, under a changed config."""
    config = dataclasses.replace(models.read_config(FOLDER / folder), **changes)
    return models.from_pretrained(FOLDER / folder, config=config)


@functools.cache
def folder_of(case, layers):
    """A checkpoint of some of a case's layers, for what is compared with no golden number: each layer is compiled."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return write_checkpoint(Path(folder.name), case, layers=layers)


@functools.cache
def some_layers(case, layers):
    return models.from_pretrained(folder_of(case, layers))


@functools.cache
def output(case, form="auto"):
    return model(case).run(ids(case), trace=True, form=form)


@functools.partial(jax.jit, static_argnames="phase")
def run(model, tokens, cache=None, *, phase="prefill"):
    """`model.run` as one program: for shapes that no other test has, whose operations would each be compiled."""
    return model.run(tokens, cache=cache, phase=phase)


def ids(case):
    return jnp.asarray(numbers(case)["input_ids"])


def selects(case, layer):
    return f"L{layer}.index_selected" in numbers(case)


def token_scores(inputs):
    """[B, T, H, D], [B, S, D], [B, T, H] -> [B, T, S] float64, of tokens before and after the query alike."""
    q, k, w = (np.asarray(x, np.float64) for x in inputs)
    return np.einsum("bth,bths->bts", w, np.maximum(np.einsum("bthd,bsd->bths", q, k), 0))


def deinterleaved(x, config):
    """Index queries or keys with the rotated dims as the public code has them: even ones, then odd ones."""
    if not config.indexer_rope_interleave:
        return np.asarray(x)
    R = config.qk_rope_head_dim
    return np.concatenate([x[..., 0:R:2], x[..., 1:R:2], x[..., R:]], axis=-1)


def as_mask(selection, size):
    """A selection's indices [B, T, K] as a mask [B, T, size]."""
    indices = np.asarray(selection.indices)
    mask = np.zeros((*indices.shape[:2], size + 1), bool)
    np.put_along_axis(mask, np.where(indices < 0, size, indices), True, axis=-1)
    return mask[..., :size]


def assert_close(got, want, limit, name=""):
    """Absolute, as the limits are stated."""
    difference = np.abs(np.asarray(got, np.float64) - np.asarray(want, np.float64))
    where = tuple(int(i) for i in np.unravel_index(difference.argmax(), difference.shape))
    assert difference.max() <= limit, f"{name}: off by {difference.max():.3g} at {where}, allowed is {limit}"


def write_checkpoint(folder, case, change=lambda tensors: None, *, layers=None, **config):
    """A copy of a case, or of some of its layers, whose tensors and config.json keys were changed; the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = safetensors.numpy.load_file(FOLDER / case / "model.safetensors")
    keys = json.loads((FOLDER / case / "config.json").read_text())
    if layers is not None:
        tensors, keys = _of_layers(tensors, keys, layers)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(keys | config))
    return folder


def _of_layers(tensors, keys, layers):
    """Tensors and config.json keys of some layers, which are numbered anew."""
    kept = {}
    for name, x in tensors.items():
        start, *rest = name.split("model.layers.")
        if not rest:
            kept[name] = x
            continue
        number, own = rest[0].split(".", 1)
        if int(number) in layers:
            kept[f"{start}model.layers.{layers.index(int(number))}.{own}"] = x
    by_layer = {key: x for key, x in keys.items() if isinstance(x, list) and len(x) == keys["num_hidden_layers"]}
    changed = {key: [x[i] for i in layers] for key, x in by_layer.items()}
    n_dense = sum(layer < keys["first_k_dense_replace"] for layer in layers)
    return kept, keys | changed | dict(num_hidden_layers=len(layers), first_k_dense_replace=n_dense)
