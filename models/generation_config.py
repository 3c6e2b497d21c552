"""The stop tokens of a checkpoint's generation_config.json, which count before those of its config.json."""

from pathlib import Path

from hisa_jax.models.json_object import read_object, shown

_LARGEST_FILE = 2**20


def read_stop_ids(folder: str | Path, vocab_size: int) -> tuple[int, ...] | None:
    """What `eos_token_id` of a folder's generation_config.json says.

    Args:
        folder: where the checkpoint lies.
        vocab_size: how many tokens there are.

    Returns: the tokens; None if there is no such file or it does not say.
    Raises: ValueError: a file that is not a JSON object, anything but a token of the vocabulary or a list of them.
    """
    path = Path(folder) / "generation_config.json"
    if not path.is_file():
        return None
    stop = read_object(path, _LARGEST_FILE).get("eos_token_id")
    if stop is None:
        return None
    ids = stop if isinstance(stop, list) else [stop]
    if not all(type(id) is int and 0 <= id < vocab_size for id in ids):
        raise ValueError(
            f"{path}: eos_token_id is {shown(stop)}, wanted a token from 0 to {vocab_size - 1} or a list of them"
        )
    return tuple(ids)
