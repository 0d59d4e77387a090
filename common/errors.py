"""What a script turns into one line and an exit code."""


class UserError(ValueError):
    """The input was wrong. The message is one line that names the fault and the remedy; exit code 2."""


class LossNotFiniteError(ArithmeticError):
    """Training cannot go on; what was saved before is good. Exit code 1."""
