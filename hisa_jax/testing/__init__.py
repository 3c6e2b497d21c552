"""The contract's promises, run on a function of anybody's: docs/conformance.md shows how.

`check_contract` raises at the first promise that is broken, `check_promises` returns a verdict on each. `oracle` is the
reference in float64 that both judge by.
"""

from hisa_jax.testing.conformance import ContractError, Verdict, check_contract, check_promises
from hisa_jax.testing.form import Case, Form
from hisa_jax.testing.promises import PROMISES

__all__ = ["PROMISES", "Case", "ContractError", "Form", "Verdict", "check_contract", "check_promises"]
