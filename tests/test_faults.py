"""Runs that are killed, interrupted, started twice, or out of disk space lose at most the current epoch."""

import os
import resource
import signal
import sys
import warnings

import pytest
import torch
from running import PAIR, SMALL, assert_bitwise_equal, background_script, call, read_log

import cifar100
from common.data.image_files import next_batch
from common.run import checkpoint
from common.run.errors import Terminated, UserError, exit_code
from common.run.folder import locked, open_folder, publish, read_state

CODES = {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.fixture(scope="module")
def options(teacher):
    return [*PAIR, "--epochs", 3, "--teacher-ckpt", teacher / "student.pth"]


@pytest.fixture(scope="module")
def uninterrupted(options, tmp_path_factory):
    """Output folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert cifar100.main([str(word) for word in (*options, "--out", folder)]) == 0
    return folder


@pytest.mark.parametrize("signum", CODES)
def test_run_resumed_after_a_signal_is_bitwise_identical(tmp_path, capsys, options, uninterrupted, signum):
    out = tmp_path / "interrupted"
    with background_script(*options, "--out", out) as process:
        process.send_signal(signum)
        message = process.communicate(timeout=60)[1]
        assert process.returncode == CODES[signum]
    assert message.count("\n") == (signum != signal.SIGKILL)
    assert torch.load(out / "last.pt", weights_only=True)["epoch"] < 3
    # Omitted options default to the stored ones.
    assert "epoch   1/3" not in call(capsys, "--student", "resnet8", "--resume", "--out", out)
    assert_bitwise_equal(uninterrupted, out)
    columns = ("epoch", "loss", "func_prime", "train_top1", "test_top1")
    logs = [read_log(run) for run in (uninterrupted, out)]
    assert [[row[c] for c in columns] for row in logs[0]] == [[row[c] for c in columns] for row in logs[1]]


def test_second_process_is_rejected(tmp_path, capsys):
    alone = ["--student", "resnet8", *SMALL, "--epochs", 10**6, "--out", tmp_path / "run"]
    with background_script(*alone):
        for resume in ([], ["--resume"]):
            assert "another process is using" in call(capsys, *alone, *resume, code=2)
    call(capsys, *alone, "--resume", "--max-minutes", 1e-9)  # the lock was released with its process


def test_second_process_for_the_same_teacher_is_rejected(tmp_path, capsys):
    pair = [*PAIR, "--epochs", 10**6]
    with background_script(*pair, "--out", tmp_path / "one"):  # waits for the teacher's first epoch
        message = call(capsys, *pair, "--out", tmp_path / "two", code=2)
    assert "(the teacher in" in message
    assert "another process is using" in message
    assert not (tmp_path / "two").exists()


def test_full_disk_keeps_the_last_checkpoint(tmp_path, capsys, options, uninterrupted):
    out = tmp_path / "run"

    def call_with_small_disk(*more):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        size = (uninterrupted / "last.pt").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))
        try:
            return call(capsys, *options, *more, "--out", out, code=2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    message = call_with_small_disk()
    assert message.startswith(f"error: cannot write {out / 'last.pt'} (")
    assert message.count("\n") == 1
    assert not out.exists()
    call(capsys, *options, "--out", out, "--max-minutes", 1e-9)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    call_with_small_disk("--resume")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    call(capsys, *options, "--out", out, "--resume")
    assert_bitwise_equal(uninterrupted, out)


def state_after(epoch):
    """State of a two-epoch run after `epoch`; each epoch is the best so far."""
    log = [{"epoch": e, "test_top1": 10.0 * e, "test_top5": 50.0, "seconds": 1.0} for e in range(1, epoch + 1)]
    return {
        "config": {"epochs": 2},
        "epoch": epoch,
        "log": log,
        "best": {"epoch": epoch, "top1": 10.0 * epoch, "top5": 50.0},
        "student": {"weight": torch.full((1000,), float(epoch))},
        "teacher_accuracy": None,
        "made_with": {},
    }


def save_epoch(out, epoch):
    """Save an epoch as Run.end_epoch does."""
    state = state_after(epoch)
    checkpoint.save(state, out / "last.pt")
    publish(out, state, {"student": state["student"]})


def test_run_killed_at_any_point_of_saving_can_resume(tmp_path, monkeypatch):
    """A child saves the second epoch and is killed at the n-th sync or rename, for each n."""
    expected = tmp_path / "expected"
    with open_folder(expected, resume=False):
        save_epoch(expected, 2)
    names = sorted(path.name for path in expected.iterdir())

    for point in range(100):
        out = tmp_path / str(point)
        with open_folder(out, resume=False):
            save_epoch(out, 1)
        child = os.fork()
        if child == 0:
            try:
                die_at_call(point, monkeypatch)
                save_epoch(out, 2)
                os._exit(0)
            finally:
                os._exit(1)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert ended in (0, -signal.SIGKILL)
        for path in out.glob("*.pt*"):
            if path.suffix != ".tmp":
                torch.load(path, weights_only=True)  # not truncated
        with open_folder(out, resume=True):
            state = read_state(out, "cifar100", "epoch")
            assert state["epoch"] in (1, 2)
            publish(out, state, {"student": state["student"]})
            if state["epoch"] == 1:
                save_epoch(out, 2)
        for name in names:
            assert (out / name).read_bytes() == (expected / name).read_bytes(), (point, name)
        if ended == 0:
            break
    assert point == 2 * len(names)  # killed once at each sync and rename


def die_at_call(point, monkeypatch):
    calls = iter(range(100))

    def dying(function):
        def wrapper(*args):
            if next(calls) == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args)

        return wrapper

    for name in ("fsync", "replace"):
        monkeypatch.setattr(checkpoint.os, name, dying(getattr(os, name)))


def test_empty_folder_is_removed_only_if_it_was_created(tmp_path):
    (tmp_path / "mine").mkdir()
    for name in ("mine", "new"):
        with pytest.raises(ZeroDivisionError), open_folder(tmp_path / name, resume=False):
            1 / 0  # noqa: B018
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_folder_can_be_opened_only_once_at_a_time(tmp_path):
    for lock in (locked(tmp_path), open_folder(tmp_path, resume=False)):
        with lock, pytest.raises(UserError, match="another process"), open_folder(tmp_path, resume=False):
            pass
    with open_folder(tmp_path, resume=False):
        pass


@pytest.mark.parametrize(
    ("error", "code", "word"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB"), 2, "--batch-size"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasLtMatmul(...)`"), 2, "--batch-size"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), 2, "--batch-size"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 2, "--batch-size"),
        (Terminated(signal.SIGHUP), 129, "interrupted"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (PermissionError(13, "Permission denied", "some/file"), 2, "some/file"),
        (OSError(24, "Too many open files"), 2, "--workers"),
        (RuntimeError("Too many open files. Communication with the workers is no longer possible."), 2, "--workers"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), 2, "--workers"),
        (MemoryError(), 2, "--batch-size"),
    ],
)
def test_exit_codes(capsys, error, code, word):
    def script():
        raise error

    assert exit_code(script) == code
    message = capsys.readouterr().err
    assert word in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_swallowed_signal_ends_the_script_at_the_next_batch(capsys, signum, code):
    class Forking:
        def __del__(self):  # Python ignores exceptions here, as in a fork hook
            signal.raise_signal(signum)

    def script():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Forking()
        next_batch(iter([1]))
        raise AssertionError

    sys.unraisablehook, hook = lambda _: None, sys.unraisablehook
    handler = signal.signal(signum, signal.SIG_DFL)  # SIGINT is ignored if the tests run in the background
    try:
        assert exit_code(script) == code
    finally:
        sys.unraisablehook = hook
        signal.signal(signum, handler)
    assert capsys.readouterr().err.startswith("interrupted: ")
    assert next_batch(iter([1])) == 1  # the pending signal was cleared


def test_line_breaks_in_errors_are_escaped(capsys):
    def script():
        raise UserError("there is no a\nb.jpg")

    assert exit_code(script) == 2
    assert capsys.readouterr().err == "error: there is no a\\nb.jpg\n"


def test_closed_stdout_is_tolerated(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert exit_code(lambda: sys.stdout.write("x")) == 0


def test_unexpected_errors_propagate():
    def script():
        raise RuntimeError("a shape is wrong")

    with pytest.raises(RuntimeError, match="a shape"):
        exit_code(script)


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        assert exit_code(lambda: signal.raise_signal(signal.SIGHUP)) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert exit_code(lambda: signal.raise_signal(signal.SIGTERM)) == 143
