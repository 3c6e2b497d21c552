"""Experts of a layer that a checkpoint keeps in one tensor, as some writers of the transformers package leave them.

    model.layers.1.mlp.experts.gate_up_proj   [X, 2 F, E]   gate, then up, of each of X experts
    model.layers.1.mlp.experts.down_proj      [X, E, F]

The matrices of one expert lie in one piece there, so the reader takes each as a tensor of its own. So do their block
scales if gate ends where a block does, which the reader checks.
"""

import re

_PACKED = re.compile(r"(?P<layer>.+\.mlp\.experts)\.(?P<what>gate_up_proj|down_proj)(\.weight)?(?P<suffix>_scale_inv)?")
_MOST_EXPERTS = 2**16
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def unpacked(name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """The tensors that one of packed experts consists of.

    Args:
        name: of a tensor in a checkpoint.
        shape: as stored.

    Returns: names and shapes in the order they lie in, of equal size; none where no experts are packed.
    Raises: ValueError: packed in another way.
    """
    match = _PACKED.fullmatch(name)
    if match is None:
        return []
    parts = _PARTS[match["what"]]
    if len(shape) != 3 or shape[0] > _MOST_EXPERTS or shape[1] % len(parts) or 0 in shape:
        raise ValueError(
            f"holds the packed experts of a layer in shape {list(shape)}, wanted [experts, rows, columns], at most "
            f"{_MOST_EXPERTS} experts{', the rows those of gate, then of up' if len(parts) > 1 else ''}"
        )
    experts, rows, columns = shape
    suffix = match["suffix"] or ""
    return [
        (f"{match['layer']}.{expert}.{part}.weight{suffix}", (rows // len(parts), columns))
        for expert in range(experts)
        for part in parts
    ]
