"""Exceptions that end a script with a one-line message and an exit code."""

import contextlib
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import torch.distributed as dist

TOO_MANY_FILES = "error: too many open files: try fewer --workers or a higher ulimit -n"
AFTER_INTERRUPT = "finished epochs are kept; continue with --resume (without it if none finished)"


class UserError(ValueError):
    """Invalid input. The message is one line with the problem and how to fix it; exit code 2."""


class OtherNetworkError(UserError):
    """A checkpoint is of another network or number of classes."""


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
    """Training cannot continue; earlier checkpoints are good. Exit code 1."""


class Terminated(KeyboardInterrupt):
    """SIGINT, SIGTERM or SIGHUP was received; the argument is the signal number."""


received_signals: list[int] = []


def raise_if_signaled() -> None:
    """Raise Terminated if a signal's exception was lost: Python ignores those raised in a fork hook."""
    if received_signals:
        raise Terminated(received_signals[0])


def exit_code(
    script: Callable[[], None],
    interrupted: str = AFTER_INTERRUPT,
    rank: int = 0,
    smaller: str = "fewer mixed paths (--num-paths)",
) -> int:
    """Run a script and return its exit code, after printing one line if it failed.

    0: finished, or stopped by --max-minutes; 1: non-finite loss, or another process of the job died; 2: invalid input,
    unreadable or unwritable file, or out of memory; 129: SIGHUP; 130: Ctrl-C; 141: closed output pipe; 143: SIGTERM.

    Args:
        interrupted: the message after an interrupt.
        rank: the rank of this process (common/run/distributed.py).
        smaller: what saves memory besides a smaller batch, for the out-of-memory message.
    """

    def report(text: str) -> None:
        text = text.replace("\n", "\\n")  # in file names, for example
        if rank:
            # An error on all ranks is reported by rank 0; torchrun then kills this process while it sleeps. An error
            # on this rank only is printed after the wait.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(10)
        print(f"(rank {rank}) {text}" if rank else text, file=sys.stderr, flush=True)

    def terminate(number, _):
        ignore_worker_exits()
        received_signals.append(number)
        raise Terminated(number)

    def ignore_worker_exits() -> None:
        # When a DataLoader worker dies, PyTorch's handler raises wherever this process is; from now on they may die.
        if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, lambda *_: None)

    previous_handlers = {}
    if threading.current_thread() is threading.main_thread():  # only the main thread can set handlers
        for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                previous_handlers[number] = signal.signal(number, terminate)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  the caller closed it
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in filter(None, (sys.stdout, sys.stderr)):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # do not fail on characters the terminal cannot encode
    try:
        try:
            script()
        except BaseException:
            ignore_worker_exits()
            raise
    except UserError as error:
        report(f"error: {error}")
        return 2
    except LossNotFiniteError as error:
        report(f"error: non-finite loss {error}; earlier checkpoints are kept")
        return 1
    except KeyboardInterrupt as interrupt:
        if rank == 0:
            ended = "terminated with the other processes of the job" if dist.is_initialized() else "interrupted"
            report(f"{ended}: {interrupted}")
        return 128 + (interrupt.args[0] if isinstance(interrupt, Terminated) else signal.SIGINT)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again at exit
        return 141
    except OSError as error:
        if error.errno == errno.EMFILE:
            report(TOO_MANY_FILES)
            return 2
        report(f"error: {error}: check the path, its permissions and the free space")
        return 2
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        if isinstance(error, MemoryError) or any(w in text.lower() for w in ("out of memory", "allocate memory")):
            report(f"error: out of memory: try a smaller --batch-size, or {smaller}")
            return 2
        if "Too many open files" in text:
            report(TOO_MANY_FILES)
            return 2
        if "DataLoader worker (pid" in text:
            report("error: a data loader worker died, perhaps from lack of (shared) memory: try fewer --workers")
            return 2
        if dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in text):
            report(f"error: another process of this job died: see its message; {interrupted}")
            return 1
        raise
    finally:
        received_signals.clear()
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
    return 0
