"""The benches: `python -m bench COMMAND`, from a checkout."""


class UserError(Exception):
    """What the user can put right; the message says how, and no traceback is shown."""
