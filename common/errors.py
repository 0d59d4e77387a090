"""What ends a script in one line and an exit code."""

import os
import signal
import sys
import threading
from collections.abc import Callable


class UserError(ValueError):
    """The input was wrong. The message is one line that names the fault and the remedy; exit code 2."""


class LossNotFiniteError(ArithmeticError):
    """Training cannot go on; what was saved before is good. Exit code 1."""


class Terminated(KeyboardInterrupt):
    """SIGTERM came, as from a cluster whose time is up: to be met like Ctrl-C. Exit code 143."""


def exit_code(script: Callable[[], None]) -> int:
    """Run a script and return its exit code, having printed a line on what went wrong.

    0: done, or stopped by --max-minutes; 1: the loss stopped being finite; 2: wrong input, or a file that cannot be
    read or written; 130: Ctrl-C; 143: SIGTERM; 141: whatever read the output went away.
    """

    def terminate(*_):
        raise Terminated

    in_main_thread = threading.current_thread() is threading.main_thread()  # the only one that may set handlers
    before = signal.signal(signal.SIGTERM, terminate) if in_main_thread else None
    try:
        script()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except LossNotFiniteError as error:
        print(f"error: the loss stopped being finite {error}; epochs before that are kept", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        advice = "repeat the command with --resume, or without it if there were none"
        print(f"interrupted; epochs that were finished are kept: {advice}", file=sys.stderr)
        return 143 if isinstance(interrupt, Terminated) else 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again at exit
        return 141
    except OSError as error:
        print(f"error: {error}: check the path, its permissions and the space that is left", file=sys.stderr)
        return 2
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, before)
    return 0
