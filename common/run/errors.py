"""What ends a script in one line and an exit code."""

import contextlib
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import torch.distributed as dist

TOO_MANY_FILES = "error: too many files are open: try fewer --workers, or a higher ulimit -n"
AFTER_INTERRUPT = "epochs that were finished are kept, go on with --resume (without it if none was)"


class UserError(ValueError):
    """The input was wrong. The message is one line that names the fault and the remedy; exit code 2."""


class OtherNetworkError(UserError):
    """A checkpoint holds another network, or one of another number of classes."""


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn a ValueError raised inside, such as by building networks that do not fit, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


class LossNotFiniteError(ArithmeticError):
    """Training cannot go on; what was saved before is good. Exit code 1."""


class Terminated(KeyboardInterrupt):
    """A signal, the number it holds, came: Ctrl-C, or SIGTERM or SIGHUP, as from a cluster whose time is up."""


received: list[int] = []  # the signals that came


def heed_signals() -> None:
    """Raise Terminated if a signal came whose exception was lost, ignored by Python in a hook while a worker forks."""
    if received:
        raise Terminated(received[0])


def exit_code(
    script: Callable[[], None],
    interrupted: str = AFTER_INTERRUPT,
    rank: int = 0,
    smaller: str = "fewer mixed paths (--num-paths)",
) -> int:
    """Run a script and return its exit code, having printed a line on what went wrong.

    0: done, or stopped by --max-minutes; 1: the loss stopped being finite, or another process of the job is gone; 2:
    wrong input, a file that cannot be read or written, or too little memory; 130: Ctrl-C; 143: SIGTERM; 129: SIGHUP;
    141: whatever read the output went away.

    Args:
        interrupted: what to say of an interrupt.
        rank: the number of this process among several (common/run/distributed.py).
        smaller: what takes less memory, beside a smaller batch.
    """

    def say(text: str) -> None:
        text = text.replace("\n", "\\n")  # as in a file's name
        if rank:
            # What all ranks find is said by rank 0, with which torchrun ends this one, silently, while it sleeps. What
            # this one found alone it says afterwards.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(10)
        print(f"(rank {rank}) {text}" if rank else text, file=sys.stderr, flush=True)

    def terminate(number, _):
        forget_workers()
        received.append(number)
        raise Terminated(number)

    def forget_workers() -> None:
        # If a DataLoader's worker dies PyTorch raises an error wherever this process is. From here on they may all die.
        if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, lambda *_: None)

    before = {}
    if threading.current_thread() is threading.main_thread():  # the only one that may set handlers
        for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                before[number] = signal.signal(number, terminate)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  closed by whoever started the script
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in filter(None, (sys.stdout, sys.stderr)):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a letter is no reason to stop
    try:
        try:
            script()
        except BaseException:
            forget_workers()
            raise
    except UserError as error:
        say(f"error: {error}")
        return 2
    except LossNotFiniteError as error:
        say(f"error: the loss stopped being finite {error}; what was saved before that is kept")
        return 1
    except KeyboardInterrupt as interrupt:
        if rank == 0:
            ended = "ended with the other processes of the job" if dist.is_initialized() else "interrupted"
            say(f"{ended}: {interrupted}")
        return 128 + (interrupt.args[0] if isinstance(interrupt, Terminated) else signal.SIGINT)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again at exit
        return 141
    except OSError as error:
        if error.errno == errno.EMFILE:
            say(TOO_MANY_FILES)
            return 2
        say(f"error: {error}: check the path, its permissions and the space that is left")
        return 2
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        if isinstance(error, MemoryError) or any(w in text.lower() for w in ("out of memory", "allocate memory")):
            say(f"error: out of memory: try a smaller --batch-size, or {smaller}")
            return 2
        if "Too many open files" in text:
            say(TOO_MANY_FILES)
            return 2
        if "DataLoader worker (pid" in text:
            say("error: a process that reads images died, perhaps for want of (shared) memory: try fewer --workers")
            return 2
        if dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in text):
            say(f"error: another process of this job is gone: look for its message, then {interrupted}")
            return 1
        raise
    finally:
        received.clear()
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0
