"""The command `train`: arguments, a progress bar, and what it says at the end."""

import argparse
from pathlib import Path

from hisa_jax.models.params import from_pretrained
from hisa_jax.models.training.arms import ARMS
from hisa_jax.models.training.loop import CURVES, MODEL, Row, Settings, train
from hisa_jax.models.training.recipe import RECIPES
from hisa_jax.models.training.text import load_corpus, read_corpus
from hisa_jax.models.training.weights import weights_of

_RECIPES = RECIPES | ARMS
_PRINTED = 50  # steps between lines where the bar is not seen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `train` takes; needs matplotlib and rich (the extra `bench`) to run."""
    parser.set_defaults(run=run)
    parser.add_argument("--recipe", choices=_RECIPES, default="bytes", help="default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="of the run; a run there is resumed")
    parser.add_argument("--corpus", type=Path, metavar="FILE", help="that `data` wrote (default: this machine's text)")
    parser.add_argument("--start", type=Path, metavar="DIR", help="checkpoint to begin with (default: random weights)")
    parser.add_argument("--stop-after", type=float, metavar="SECONDS", help="save and end by then, to be resumed")
    parser.add_argument("--save-every", type=int, default=200, metavar="STEPS", help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=4, metavar="N", help="threads for data (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (default: %(default)s)")


def run(options: argparse.Namespace) -> None:
    """Trains, or goes on."""
    # Here, since the other commands do without.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from hisa_jax.models.training.curves import draw

    console = Console()
    recipe = _RECIPES[options.recipe](options.seed)
    corpus = read_corpus() if options.corpus is None else load_corpus(options.corpus)
    start = None if options.start is None else weights_of(from_pretrained(options.start))
    settings = Settings(
        folder=options.out, save_every=options.save_every, stop_after=options.stop_after, workers=options.workers
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("compiling", total=recipe.n_steps)

        def show(row: Row) -> None:
            text = (
                f"{row['stage']}: {float(row['text_bits']):.3f} bits a byte, "
                f"{100 * float(row['answers_right']):.1f} % of answer bytes, KL {float(row['kl']):.3f}"
            )
            progress.update(bar, completed=int(row["step"]), description=text)
            if not console.is_terminal and int(row["step"]) % _PRINTED == 0:
                console.print(f"step {row['step']}, {row['seconds']} s, {text}", highlight=False, markup=False)

        done = train(recipe, corpus, settings, start=start, show=show)
    draw(options.out / CURVES, options.out / "curves.png")
    left = recipe.n_steps - done
    console.print(
        f"{done} of {recipe.n_steps} steps done{'; the same command goes on' if left else ''}. "
        f"Model: {options.out / MODEL}, curves: {options.out / 'curves.png'}",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
