"""Runs the promises on a function, and makes the first broken one small."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

from hisa_jax import checks
from hisa_jax.methods import Method
from hisa_jax.testing.draw import Draw
from hisa_jax.testing.form import Case, Form, Raised, WrongForm
from hisa_jax.testing.promises import PROMISES, Promise
from hisa_jax.testing.shrink import shrink
from hisa_jax.testing.trial import Trial

_FORM = Form()
_SECONDS = 60.0


class Verdict(NamedTuple):
    """What became of one promise.

    Attributes:
        promise: its name in `PROMISES`.
        outcome: "kept", "broken", "left out" by the caller, or "not asked" of functions of this form.
        why: of "broken" and "not asked".
        case: of "broken", the inputs that break it.
    """

    promise: str
    outcome: Literal["kept", "broken", "left out", "not asked"]
    why: str = ""
    case: Case | None = None


class ContractError(AssertionError):
    """A promise is broken.

    Attributes:
        promise: its name in `PROMISES`.
        case: the smallest inputs that were found to break it.
    """

    def __init__(self, verdict: Verdict, method: Method, tried: int) -> None:
        self.promise, self.case = verdict.promise, verdict.case
        why = verdict.why.replace("\n", "\n  ")
        super().__init__(
            f"the promise {verdict.promise!r} is broken: {PROMISES[verdict.promise].sentence}\n  {why}\n"
            f"  by {method}, smallest inputs found, {tried} tried:\n{verdict.case}"
        )


def check_contract(
    function: Callable[..., Any],
    method: Method,
    *,
    form: Form = _FORM,
    promises: Iterable[str] | None = None,
    leave_out: Iterable[str] = (),
    seed: int = 0,
    seconds: float = _SECONDS,
) -> None:
    """Raises at the first promise of the contract that a function breaks, with the smallest inputs that show it.

    Args:
        function: of q [B, T, H, D], k [B, S, D], w [B, T, H], in NumPy, and the keywords that `form.takes` names. It
            returns indices [B, T, topk], a pair (indices, count [B, T]), or a `Selection`.
        method: what it selects by, with few tokens, as `Dsa(topk=4)`: the inputs are as small as it lets them be.
        form: its inputs, order and padding, where they differ from those of `select`.
        promises: names of those to check, in `PROMISES`. Default: all that a function of this form can keep.
        leave_out: names of those that it does not make.
        seed: of the inputs.
        seconds: at most so long is spent on making inputs small.

    Raises: ContractError, an AssertionError: a broken promise. ValueError: an unknown name, a method with functions of
        one's own, a seed below 0. TypeError: what cannot be called, an argument of another type.
    Source: docs/contract.md.
    Example:
        >>> from hisa_jax import testing
        >>> method = hj.Dsa(topk=4)
        >>> def select(q, k, w, **keywords):
        ...     return hj.select(q, k, w, method, **keywords)
        >>> testing.check_contract(select, method, promises=["ties"])
    """
    checks.instance("check_contract", "seconds", seconds, int | float, "a number")
    trial, names, left_out = _prepared("check_contract", function, method, form, promises, leave_out, seed)
    for name in names:
        if name in left_out:
            continue
        verdict = _verdict(trial, name, seed)
        if verdict.outcome == "broken":
            smaller, calls = _made_small(trial, verdict, seconds)
            raise ContractError(smaller, method, calls)


def check_promises(
    function: Callable[..., Any],
    method: Method,
    *,
    form: Form = _FORM,
    promises: Iterable[str] | None = None,
    leave_out: Iterable[str] = (),
    seed: int = 0,
) -> Iterator[Verdict]:
    """The verdict on each promise of the contract, broken or not, as soon as there is one.

    Args: those of `check_contract`.
    Returns: a `Verdict` each, in the order of `PROMISES`; its case is not made small.
    Raises: as `check_contract`, but for ContractError.
    """
    trial, names, left_out = _prepared("check_promises", function, method, form, promises, leave_out, seed)
    for name in names:
        yield Verdict(name, "left out") if name in left_out else _verdict(trial, name, seed)


def _prepared(
    call: str,
    function: Callable[..., Any],
    method: Method,
    form: Form,
    promises: Iterable[str] | None,
    leave_out: Iterable[str],
    seed: int,
) -> tuple[Trial, list[str], set[str]]:
    checks.integer(call, "seed", seed, 0, most=None)
    if not callable(function):
        raise TypeError(f"{call}: function is {type(function).__name__}, wanted what can be called")
    if not isinstance(method, Method):
        raise TypeError(f"{call}: method is {type(method).__name__}, wanted Dsa, Hisa, BlockSparse or Scan")
    if method.entry_size > 1 or method.per_head:
        raise ValueError(f"{call}: method is {method}, wanted one whose keys are tokens, for all heads together")
    if method.given():
        raise ValueError(
            f"{call}: method is {method}, wanted one without functions of its own: no reference knows them"
        )
    if not isinstance(form, Form):
        raise TypeError(f"{call}: form is {type(form).__name__}, wanted a Form")
    for argument, names in (("promises", promises), ("leave_out", leave_out)):
        if isinstance(names, str) or not isinstance(names, Iterable | None):
            raise TypeError(f"{call}: {argument} is {names!r}, wanted a list of names of promises")
    wanted, left_out = list(PROMISES) if promises is None else list(promises), set(leave_out)
    unknown = sorted((set(wanted) | left_out) - set(PROMISES))
    if unknown:
        raise ValueError(f"{call}: no promise is called {unknown[0]!r}, there are {', '.join(PROMISES)}")
    return Trial(function, form, method), wanted, left_out


def _verdict(trial: Trial, name: str, seed: int) -> Verdict:
    promise = PROMISES[name]
    if why := promise.why_not(trial.form, trial.method):
        return Verdict(name, "not asked", why)
    cases = list(promise.cases(Draw(trial.form, trial.method, seed)))
    if not cases:
        return Verdict(name, "not asked", "the form's keywords and sizes leave no case for it")
    for case in cases:
        why, _ = _judgement(promise, trial, case)
        if why:
            return Verdict(name, "broken", why, case)
    return Verdict(name, "kept")


def _judgement(promise: Promise, trial: Trial, case: Case) -> tuple[str | None, type | None]:
    """None or how a case breaks a promise, and the type of what was raised, if something was."""
    try:
        return promise.broken(trial, case), None
    except WrongForm as error:
        return str(error), WrongForm
    except Raised as error:
        return str(error), type(error.__cause__)


def _made_small(trial: Trial, verdict: Verdict, seconds: float) -> tuple[Verdict, int]:
    """The same broken promise with smaller inputs, and how many were tried."""
    promise, calls = PROMISES[verdict.promise], 0
    assert verdict.case is not None
    _, wanted = _judgement(promise, trial, verdict.case)

    def broken(case: Case) -> str | None:
        nonlocal calls
        calls += 1
        # Sizes that the function does not take at all would else pass for the smallest inputs.
        why, raised = _judgement(promise, trial, case)
        return why if raised == wanted else None

    case, why = shrink(verdict.case, verdict.why, broken, trial.form, seconds)
    return verdict._replace(case=case, why=why), calls
