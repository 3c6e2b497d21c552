"""A model of this library for lm-eval: `HisaLM`, registered as "hisa_jax". Needs lm_eval."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hisa_jax.checks import optional_packages
from hisa_jax.models import checks
from hisa_jax.models.chat import load_chat_template
from hisa_jax.models.check.measures import methods_to_check
from hisa_jax.models.config import Config, read_config
from hisa_jax.models.engine import Engine
from hisa_jax.models.evaluate.scoring import Progress, score
from hisa_jax.models.locate import locate
from hisa_jax.models.methods import NAMES, make_method, read_methods
from hisa_jax.models.modeling import Model
from hisa_jax.models.options import DTYPES
from hisa_jax.models.params import from_pretrained
from hisa_jax.models.plan import MethodLike
from hisa_jax.models.prompts import tokenizer_of
from hisa_jax.models.sampling import Sampling
from hisa_jax.models.tokens import Tokenizer, load_tokenizer

with optional_packages():
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

FLAT = "flat"
_LINE_END = 10  # what stands before a text where the vocabulary is bytes and has no token for that
# What a task's generation_kwargs may hold; others are refused, so that none is left out in silence.
_KNOWN = {"until", "max_gen_toks", "max_tokens", "do_sample", "temperature", "top_p", "top_k", "min_p", "seed"}
_MAX_TOKENS = 256  # where a task does not say


def method_of(indexer: str, config: Config) -> MethodLike:
    """The method of a name on the command line.

    Args:
        indexer: "flat" or "dsa", "hisa", "scan", "block-sparse": at the sizes of `check` for the checkpoint's topk,
            so HISA and the scan score four times topk tokens. Else a file, see `models/methods.py`.
        config: of the model.

    Raises: FileNotFoundError: neither a name nor a file. ValueError: as `read_methods`; block-sparse at a topk without
        two blocks.
    """
    topk = config.index_topk
    sized = methods_to_check(topk)
    names = {FLAT: sized[FLAT], "dsa": sized[FLAT], "hisa": sized["HISA"]}
    if indexer in names:
        return names[indexer]
    if indexer == "block-sparse":
        return sized.get(indexer) or make_method(indexer, config, "--indexers")
    return make_method(indexer, config, "--indexers") if indexer in NAMES else read_methods(indexer, config)


@dataclasses.dataclass
class Cost:
    """What was done for the tasks so far: tokens of contexts and continuations read, tokens made, seconds, cuts."""

    read: int = 0
    made: int = 0
    seconds: float = 0.0
    n_cut: int = 0


@register_model("hisa_jax")
class HisaLM(TemplateLM):
    """A model of this library, as lm-eval asks it.

    Args:
        checkpoint: a folder, "bytes", or a name on the Hub; or a model.
        indexer: see `method_of`; of a checkpoint, a model has its own.
        dtype: "bfloat16" or "float32"; of a checkpoint.
        batch_size: contexts that are read at a time, and requests that make tokens at a time.
        chunk: tokens of a context a forward pass.
        max_length: of context and answer together. Default: the model's positions. Longer contexts lose their
            beginning, as in lm-eval's other models; `cost.n_cut` counts them.
        progress: is told what is done, how much of it, and of how much.
        max_batch_size, device: must be None; lm-eval hands them in.

    Raises: ValueError: a size below 1, a model without a tokenizer, arguments that are not for it. Also as
        `from_pretrained`.
    """

    def __init__(
        self,
        checkpoint: str | Path | Model,
        indexer: str = FLAT,
        dtype: str = "bfloat16",
        batch_size: int | str | None = None,
        chunk: int = 512,
        max_length: int | None = None,
        progress: Progress | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if max_batch_size is not None or device is not None:
            given = f"max_batch_size={max_batch_size}, device={device!r}"
            raise ValueError(f"HisaLM: {given}, wanted None: the batch is fixed, and JAX knows its device")
        if isinstance(checkpoint, Model):
            self.model = checkpoint
        else:
            if dtype not in DTYPES:
                raise ValueError(f"HisaLM: dtype={dtype!r}, wanted one of {', '.join(DTYPES)}")
            folder = locate(checkpoint)
            config = read_config(folder)
            load_tokenizer(folder, config.vocab_size)  # refused before the weights are read
            self.model = from_pretrained(folder, method_of(indexer, config), DTYPES[dtype])
        rows = 4 if batch_size is None else batch_size
        # From a command line they come as text.
        self._rows = checks.whole("HisaLM", "batch_size", int(rows) if str(rows).isdigit() else rows)
        self._chunk = checks.whole("HisaLM", "chunk", chunk)
        room = self.model.config.max_position_embeddings
        self.max_length = checks.whole("HisaLM", "max_length", room if max_length is None else max_length)
        if self.max_length > room:
            raise ValueError(f"HisaLM: max_length={max_length}, wanted at most {room}, the model's positions")
        tokenizer = tokenizer_of(self.model)
        if tokenizer is None:
            raise ValueError("HisaLM: the model has no tokenizer, wanted one that was loaded from a folder with one")
        self._tokenizer: Tokenizer = tokenizer
        self._progress, self.cost = progress, Cost()

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text; a line end where the vocabulary is bytes and has none."""
        ends = self.model.config.eos_token_ids
        return ends[0] if ends else _LINE_END

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of requests."""
        return f"hisa_jax:{self.model.folder}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Text -> tokens, with those that begin every prompt unless told, or unless the text has them already."""
        plain = self._tokenizer.encode(string, add_special=False)
        if add_special_tokens is False:
            return plain
        tokens = self._tokenizer.encode(string)
        has_them = add_special_tokens is None and len(tokens) > len(plain) and tokens[:1] == plain[:1]
        return plain if has_them else tokens

    def chat_template(self, chat_template: bool | str = False) -> str:
        """What lm-eval writes down of the template that `apply_chat_template` uses."""
        return f"that of {self.model.folder}" if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages -> prompt, by the checkpoint's template.

        Raises: ValueError: it has none.
        """
        template = None if self.model.folder is None else load_chat_template(self.model.folder)
        if template is None:
            raise ValueError(f"HisaLM: {self.model.folder} has no chat template, wanted one for chat")
        return template.render(chat_history, add_generation_prompt=add_generation_prompt)

    def _loglikelihood_tokens(self, requests: Sequence[tuple], **options: Any) -> list[tuple[float, bool]]:
        pairs = []
        for (context, continuation), before, after in requests:
            if not after or not before:
                raise ValueError(f"HisaLM: {continuation!r} after {context[-40:]!r} has no token to score or to see")
            if len(after) > self.max_length:
                raise ValueError(f"HisaLM: a continuation has {len(after)} tokens, wanted at most {self.max_length}")
            pairs.append((self._cut(before, self.max_length + 1 - len(after)), after))
        with _Timed(self.cost):
            scored = score(self.model, pairs, rows=self._rows, chunk=self._chunk, progress=self._progress)
        self.cost.read += sum(map(len, {tuple(before) for before, _ in pairs})) + sum(len(c) for _, c in pairs)
        for (texts, *_), one in zip(requests, scored, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, tuple(one))
        return [(one.logprob, one.is_likeliest) for one in scored]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log probability of whole texts; of those longer than the model's positions in windows."""
        pairs, owners = [], []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                pairs.append(make_disjoint_window(window))
                owners.append(i)
        with _Timed(self.cost):
            # Text is read as a prompt is, not as an answer is made.
            scored = score(
                self.model, pairs, rows=self._rows, chunk=self._chunk, phase="prefill", progress=self._progress
            )
        self.cost.read += sum(len(before) + len(after) for before, after in pairs)
        totals = [0.0] * len(requests)
        for owner, one in zip(owners, scored, strict=True):
            totals[owner] += one.logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers, by continuous batching; questions that begin alike read what they share once."""
        prompts, samplings = [], []
        for request in requests:
            context, options = request.args
            sampling = _sampling(options)
            if sampling.max_tokens >= self.max_length:
                raise ValueError(f"HisaLM: max_gen_toks={sampling.max_tokens}, wanted below {self.max_length}")
            prompts.append(self._cut(self.tok_encode(context), self.max_length - sampling.max_tokens))
            samplings.append(sampling)
        if not prompts:
            return []
        with _Timed(self.cost):
            texts = self._generate(prompts, samplings)
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _generate(self, prompts: Sequence[list[int]], samplings: Sequence[Sampling]) -> list[str]:
        longest = max(len(p) + s.max_tokens for p, s in zip(prompts, samplings, strict=True))
        rows = min(self._rows, len(prompts))
        n_pages = (rows + 1) * -(-longest // self.model.page_size)
        engine = Engine(
            self.model, n_pages=n_pages, rows=rows, max_length=longest, chunk=min(self._chunk, longest),
            prefill_rows=min(rows, 2), tokenizer=self._tokenizer,
        )  # fmt: skip
        ids = [engine.submit(p, sampling=s) for p, s in zip(prompts, samplings, strict=True)]
        readers = [engine.reader("generate_until", id) for id in ids]
        failed: dict[int, str] = {}
        n_read, n_tokens = 0, sum(map(len, prompts))
        while not engine.is_idle:
            if self._progress is not None:
                self._progress("answering, tokens of questions", n_read, n_tokens)
            report = engine.step()
            failed |= report.failed
            new = sum(sum(step.n_new) for step in report.steps if step.phase != "decode")
            n_read += new + sum(shared for *_, shared in report.forks)
            self.cost.read += new
            self.cost.made += sum(map(len, report.finished.values()))
        if self._progress is not None:
            self._progress("answering, tokens of questions", n_tokens, n_tokens)
        if failed:
            why = next(iter(failed.values()))
            raise FloatingPointError(f"HisaLM: {len(failed)} of {len(ids)} requests failed: {why}")
        return [piece.text if (piece := reader.read()) else "" for reader in readers]

    def _cut(self, tokens: list[int], most: int) -> list[int]:
        self.cost.n_cut += len(tokens) > most
        return tokens[-most:]


class _Timed:
    """Adds the seconds of a block to a cost."""

    def __init__(self, cost: Cost):
        self._cost = cost

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *raised: object) -> None:
        self._cost.seconds += time.perf_counter() - self._start


def _sampling(options: dict[str, Any]) -> Sampling:
    """Of a task's generation_kwargs, where not to sample is the default."""
    if unknown := sorted(set(options) - _KNOWN):
        raise ValueError(f"HisaLM: generation_kwargs has {unknown[0]}, wanted only {', '.join(sorted(_KNOWN))}")
    until = options.get("until") or ()
    drawn: dict[str, Any] = {"temperature": 1.0}
    drawn |= {name: options[name] for name in ("temperature", "top_p", "top_k", "min_p", "seed") if name in options}
    return Sampling(
        max_tokens=options.get("max_gen_toks", options.get("max_tokens", _MAX_TOKENS)),
        stop=tuple([until] if isinstance(until, str) else filter(None, until)),
        **(drawn if options.get("do_sample") else {}),
    )
