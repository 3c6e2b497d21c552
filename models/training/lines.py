"""The lines of the long-range tasks: what is stated, what is asked, in which bytes.

    <<key amber-finch-07 = 48392>>                      <<ask amber-finch-07 = 48392>>
    <<table amber-finch-07 = 48392, ...>>               the same question
    <<add amber-finch-07 = 48392>>  several of a key    <<all amber-finch-07 = 48392 01774>>  all, in order
    <<let k7 = 48392>> <<let b31 = k7>>                 <<value b31 = 48392>>
    <<copy amber-finch-07: some words of it>>           <<paste amber-finch-07: some words of it>>

Each stands between two line ends. The answer is what follows "= " or ": " in a question, its closing ">>" included.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

# Short and common, so that a key is made of bytes that the text around it has, too.
_WORD_LIST = """
acorn agent amber angle ankle apple april apron arrow atlas autumn award badge baker bamboo banjo barn basin basket
beach beacon bench berry birch bird bishop blade blanket bloom board boat bolt bone book boot bottle bowl branch
brass bread breeze brick bridge brook broom brush bubble bucket bugle button cabin cable cactus camel camera candle
canoe canyon carbon card cargo carpet carrot castle cedar chain chair chalk cherry chest chief circle city clay
cliff cloak clock cloud clover coach coast cobalt coffee coin comet copper coral corn cotton cousin crane crater
creek cricket crown crystal cup curtain daisy dance dawn deer desert diamond dinner doctor dollar dolphin donkey
door dragon drawer dream drum dune dust eagle earth echo elbow elm ember emerald engine engraver fable falcon farm
feather fence fern ferry fiddle field finch finger fire flag flame flint flock flour flower flute fog forest fork
fossil fountain fox frost fruit galaxy garden garlic gate ghost giant ginger glacier glass globe glove goat gold
goose grain grape grass gravel guitar hammer harbor harp hazel heart hedge hero heron hill honey hood horn horse
hotel house ice igloo ink inlet iron island ivory ivy jacket jade jaguar jar jelly jewel judge juice jungle kettle
key king kite kitten knight knot ladder lake lamp lantern laurel leaf lemon lentil letter lily lime linen lion
lizard lobster log lotus lunch magnet maple marble market marsh meadow melon metal mill mint mirror mitten moon
moss motor mountain museum mustard nail needle nest nickel night north nut oak oasis oat ocean olive onion opal
orange orchid otter oven owl oyster paddle palace palm panda paper parrot path peach pearl pebble pencil pepper
piano pigeon pillow pilot pine planet plate plum pocket poet pond poppy potato prairie prince pumpkin puzzle quartz
queen quill rabbit radio raft rain raven reed ribbon rice ring river robin rocket root rope rose ruby saddle sail
salmon salt sand satin scarf school seed shadow sheep shell ship silk silver sky smoke snow soap song spark
sparrow spice spider spoon spring spruce star stone storm straw sugar summer sun swan table tailor tea temple
thorn thunder tiger timber toast tomato torch tower trail train tulip tunnel turtle valley vapor velvet vessel
village vine violet wagon walnut water wave wax well whale wheat wheel willow wind window winter wolf wool yarn
zebra
"""
WORDS = tuple(_WORD_LIST.split())
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclasses.dataclass(frozen=True, eq=False)
class Line:
    """A line to place in a text.

    Attributes:
        text: its bytes, line ends included.
        kind: of the task, if this is a question, else "".
        answer_at: where its answer starts; it ends before the last line end.
        needs: the statements that hold the answer.
        hops: how many statements have to be followed, one after the other.
    """

    text: bytes
    kind: str = ""
    answer_at: int = 0
    needs: tuple["Line", ...] = ()
    hops: int = 1


def statement(verb: str, name: str, content: str) -> Line:
    """Binds a value, or with the verb "copy" words, to a name."""
    return Line(f"\n<<{verb} {name}{_mark(verb)} {content}>>\n".encode())


def table_row(pairs: Sequence[tuple[str, str]]) -> Line:
    """Binds values to several keys in one line."""
    return Line(f"\n<<table {', '.join(f'{key} = {value}' for key, value in pairs)}>>\n".encode())


def question(verb: str, name: str, content: str, kind: str, needs: Sequence[Line], hops: int = 1) -> Line:
    """Asks for what the statements in `needs` bind to a name; the answer stands in it."""
    head = f"\n<<{verb} {name}{_mark(verb)} "
    return Line(f"{head}{content}>>\n".encode(), kind, len(head), tuple(needs), hops)


def _mark(verb: str) -> str:
    return ":" if verb in ("copy", "paste") else " ="


def draw_keys(rng: np.random.Generator, n: int) -> list[str]:
    """n different keys of few words and numbers: most share parts, so that only the whole key tells them apart."""
    n_parts = 2 + int(np.ceil(2 * np.cbrt(n)))  # a key has three: eight times as many combinations as keys
    words = [WORDS[at] for at in rng.choice(len(WORDS), min(n_parts, len(WORDS)), replace=False)]
    numbers = rng.choice(100, min(n_parts, 100), replace=False)
    picked = rng.choice(len(words) ** 2 * len(numbers), n, replace=False)
    first, second, number = np.unravel_index(picked, (len(words), len(words), len(numbers)))
    return [
        f"{words[a]}-{words[b]}-{numbers[c]:02d}"
        for a, b, c in zip(first.tolist(), second.tolist(), number.tolist(), strict=True)
    ]


def draw_values(rng: np.random.Generator, n: int) -> list[str]:
    """n different values of five digits: to guess one is hopeless."""
    return [f"{value:05d}" for value in rng.choice(100_000, n, replace=False).tolist()]


def draw_variables(rng: np.random.Generator, n: int) -> list[str]:
    """n different variable names, such as k7 or b31."""
    return [f"{_LETTERS[at % 26]}{at // 26}" for at in rng.choice(max(2600, 4 * n), n, replace=False).tolist()]


def draw_passage(rng: np.random.Generator, n_words: int) -> str:
    """Words in no order that could be guessed."""
    return " ".join(WORDS[at] for at in rng.integers(len(WORDS), size=n_words).tolist())
