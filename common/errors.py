"""The one exception that means: the input was wrong, and this is what to do about it."""


class UserError(ValueError):
    """One line that names the fault and the remedy; a script prints it and ends with exit code 2."""
