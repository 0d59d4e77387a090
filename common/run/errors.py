"""Exceptions that end a script with a one-line message and an exit code."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import torch.distributed as dist

# In messages of PyTorch, the operating system, cuBLAS and cuDNN.
OUT_OF_MEMORY = ("out of memory", "allocate memory", "alloc_failed", "allocation_failed")
AFTER_INTERRUPT = "finished epochs are kept; continue with --resume (without it if none finished)"


class UserError(ValueError):
    """Invalid input. The message is one line with the problem and how to fix it; exit code 2."""


class NetworkMismatchError(UserError):
    """A checkpoint is for another network or number of classes."""


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn a ValueError raised inside, such as for networks that do not match, into a UserError."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


class NonFiniteLossError(ArithmeticError):
    """Training cannot continue; earlier checkpoints are valid. Exit code 1."""


class Terminated(KeyboardInterrupt):
    """SIGINT, SIGTERM or SIGHUP was received; the argument is the signal number."""


received_signals: list[int] = []


def raise_if_signaled() -> None:
    """Raise Terminated if a signal's exception was lost: Python ignores exceptions raised in a fork hook."""
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
        rank: the rank of this process (common/run/distributed.py); only rank 0 prints to stdout.
        smaller: another way to save memory than a smaller batch, for the out-of-memory message.
    """
    sys.stdout = open(os.devnull, "w") if rank or not sys.stdout else sys.stdout  # noqa: SIM115  it may be closed
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # do not fail on characters the terminal cannot encode
    with _signal_handlers():
        try:
            script()
            return 0
        except BaseException as error:
            _ignore_worker_exits()
            code, message = _diagnose(error, interrupted, smaller)
            if code is None:
                raise
            if isinstance(error, BrokenPipeError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again at exit
            elif rank == 0 or not isinstance(error, KeyboardInterrupt):
                _report(message, rank)
            return code


def _diagnose(error: BaseException, interrupted: str, smaller: str) -> tuple[int | None, str]:
    """Exit code and message for an exception; code None for a bug, whose traceback must be shown."""
    text = str(error)
    lowered = text.lower()
    out_of_memory = isinstance(error, MemoryError) or any(sign in lowered for sign in OUT_OF_MEMORY)
    match error:
        case UserError():
            return 2, f"error: {text}"
        case NonFiniteLossError():
            return 1, f"error: non-finite loss {text}; earlier checkpoints are kept"
        case KeyboardInterrupt():
            number = error.args[0] if isinstance(error, Terminated) else signal.SIGINT
            ended = "terminated with the other processes of the job" if dist.is_initialized() else "interrupted"
            return 128 + number, f"{ended}: {interrupted}"
        case BrokenPipeError():
            return 141, ""
        case OSError() | RuntimeError() if "Too many open files" in text:
            return 2, "error: too many open files: try fewer --workers or a higher ulimit -n"
        case OSError():
            return 2, f"error: {text}: check the path, its permissions and the free space"
        case RuntimeError() | MemoryError() if out_of_memory:
            return 2, f"error: out of memory: try a smaller --batch-size, or {smaller}"
        case RuntimeError() if "DataLoader worker (pid" in text:
            return 2, "error: a DataLoader worker died, possibly out of (shared) memory: try fewer --workers"
        case RuntimeError() if dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in text):
            return 1, f"error: another process of this job died: see its message; {interrupted}"
    return None, ""


def _report(message: str, rank: int) -> None:
    message = message.replace("\n", "\\n")  # in file names, for example
    if rank:
        # Rank 0 reports an error that occurs on all ranks; torchrun then kills this process while it sleeps. An error
        # on this rank only is printed after the sleep.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)
    print(f"(rank {rank}) {message}" if rank else message, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _signal_handlers() -> Iterator[None]:
    """Raise Terminated on SIGINT, SIGTERM and SIGHUP, except for ignored signals, such as SIGHUP under nohup."""

    def terminate(number, _):
        _ignore_worker_exits()
        received_signals.append(number)
        raise Terminated(number)

    previous = {}
    if threading.current_thread() is threading.main_thread():  # only the main thread can set handlers
        for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
            if signal.getsignal(number) != signal.SIG_IGN:
                previous[number] = signal.signal(number, terminate)
    try:
        yield
    finally:
        received_signals.clear()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _ignore_worker_exits() -> None:
    # PyTorch's handler raises in this process when a DataLoader worker dies, which is expected from now on.
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, lambda *_: None)
