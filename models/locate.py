"""Where a checkpoint lies: a folder, the model that the repository ships, or a name on the Hugging Face Hub."""

import re
from collections.abc import Iterator
from pathlib import Path

from hisa_jax.checkout import is_checkout
from hisa_jax.models.json_object import read_object, short, shown
from hisa_jax.models.settings import SETTINGS

SHIPPED = "bytes"
_HUB_NAME = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)
# The configuration first: a model that is not built is refused before its weights come.
_SMALL = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
_WEIGHTS = ["*.safetensors", "model.safetensors.index.json"]
_LARGEST_CONFIG = 2**22
_FROM = "the repository of hisa_jax; the wheel holds no weights"


def locate(checkpoint: str | Path) -> Path:
    """Finds the folder of a checkpoint.

    Args:
        checkpoint: a folder; else "bytes", the model that the repository ships, from anywhere in or beside a checkout;
            else a name such as "org/name" on the Hugging Face Hub, where huggingface_hub is installed.

    Returns: the folder. What is none of these is returned as it is: whoever reads it says what is missing.
    Raises: FileNotFoundError: "bytes" without a checkout, a name without huggingface_hub, or one that cannot be
        fetched. ValueError: a model on the Hub that is not built here.
    """
    folder, name = Path(checkpoint), str(checkpoint)
    if folder.is_dir():
        return folder
    if name == SHIPPED:
        return _shipped()
    if _HUB_NAME.fullmatch(name) and not folder.exists() and not folder.parent.is_dir():
        return _fetched(name)
    return folder


def _shipped() -> Path:
    for folder in _candidates():
        if (folder / "model.safetensors").is_file() and (folder / "config.json").is_file():
            return folder
    raise FileNotFoundError(
        f"checkpoint {SHIPPED!r}: there is no models/{SHIPPED} here, in a folder above or in one beside: it lies in "
        f"{_FROM}. Clone that and run in it, or give the path of its models/{SHIPPED}"
    )


def _candidates() -> Iterator[Path]:
    """The checkout that this file lies in, those that the working directory lies in, and those beside it."""
    yield Path(__file__).resolve().parent / SHIPPED
    here = Path.cwd()
    for folder in (here, *here.parents):
        if is_checkout(folder, f"models/{SHIPPED}"):
            yield folder / "models" / SHIPPED
    for parent in (here, here.parent):
        for folder in sorted(parent.iterdir()):
            if is_checkout(folder, f"models/{SHIPPED}"):
                yield folder / "models" / SHIPPED


def _fetched(name: str) -> Path:
    kinds = SETTINGS["model_type"].wanted
    what = f"checkpoint {name!r} is no folder here"
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError:
        raise FileNotFoundError(
            f"{what}. To fetch it from the Hugging Face Hub: pip install huggingface_hub. What loads is {kinds} in "
            "config.json's model_type, as safetensors"
        ) from None

    def download(files: list[str]) -> Path:
        try:
            return Path(snapshot_download(name, allow_patterns=files))
        except Exception as error:  # the package raises errors of its own, and those of its network packages
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise FileNotFoundError(f"{what}, and the Hugging Face Hub did not give it: {short(lines[0])}") from error

    folder = download(_SMALL)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{what}, and on the Hugging Face Hub it has no config.json")
    model_type = read_object(folder / "config.json", _LARGEST_CONFIG).get("model_type")
    if not SETTINGS["model_type"].holds(model_type):
        raise ValueError(f"checkpoint {name!r}: model_type is {shown(model_type)}, wanted {kinds}")
    return download(_SMALL + _WEIGHTS)
