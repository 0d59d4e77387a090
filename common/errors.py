"""What ends a script in one line and an exit code."""

import os
import sys
from collections.abc import Callable


class UserError(ValueError):
    """The input was wrong. The message is one line that names the fault and the remedy; exit code 2."""


class LossNotFiniteError(ArithmeticError):
    """Training cannot go on; what was saved before is good. Exit code 1."""


def exit_code(script: Callable[[], None]) -> int:
    """Run a script and return its exit code, having printed a line on what went wrong.

    0: done, or stopped by --max-minutes; 1: the loss stopped being finite; 2: wrong input, or a file that cannot be
    read or written; 130: Ctrl-C; 141: whatever read the output went away.
    """
    try:
        script()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except LossNotFiniteError as error:
        print(f"error: the loss stopped being finite {error}; epochs before that are kept", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; epochs that were finished are kept: repeat the command with --resume", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again at exit
        return 141
    except OSError as error:
        print(f"error: {error}: check the path, its permissions and the space that is left", file=sys.stderr)
        return 2
    return 0
