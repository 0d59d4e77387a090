"""Runs that are killed, interrupted, out of disk space, or run twice: at most the current epoch is lost."""

import os
import resource
import signal
import sys
import warnings

import pytest
import torch
from running import PAIR, SMALL, assert_bit_for_bit, call, read_log, started

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
def whole(options, tmp_path_factory):
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert cifar100.main([str(word) for word in (*options, "--out", folder)]) == 0
    return folder


@pytest.mark.parametrize("sent", CODES)
def test_killed_and_resumed_matches_an_uninterrupted_run_bit_for_bit(tmp_path, capsys, options, whole, sent):
    out = tmp_path / "interrupted"
    with started(*options, "--out", out) as process:
        process.send_signal(sent)
        message = process.communicate(timeout=60)[1]
        assert process.returncode == CODES[sent]
    assert message.count("\n") == (sent != signal.SIGKILL)
    assert torch.load(out / "last.pt", weights_only=True)["epoch"] < 3
    # Options that are not given are those of the run.
    assert "epoch   1/3" not in call(capsys, "--student", "resnet8", "--resume", "--out", out)
    assert_bit_for_bit(whole, out)
    columns = ("epoch", "loss", "func_prime", "train_top1", "test_top1")
    logs = [read_log(run) for run in (whole, out)]
    assert [[row[c] for c in columns] for row in logs[0]] == [[row[c] for c in columns] for row in logs[1]]


def test_a_second_process_is_rejected(tmp_path, capsys):
    alone = ["--student", "resnet8", *SMALL, "--epochs", 10**6, "--out", tmp_path / "run"]
    with started(*alone):
        for resume in ([], ["--resume"]):
            assert "another process is using" in call(capsys, *alone, *resume, code=2)
    call(capsys, *alone, "--resume", "--max-minutes", 1e-9)  # the lock ended with its process


def test_a_second_process_that_needs_the_same_teacher_is_rejected(tmp_path, capsys):
    pair = [*PAIR, "--epochs", 10**6]
    with started(*pair, "--out", tmp_path / "one"):  # its teacher's first epoch
        message = call(capsys, *pair, "--out", tmp_path / "two", code=2)
    assert "(the teacher in" in message
    assert "another process is using" in message
    assert not (tmp_path / "two").exists()


def test_a_disk_that_is_full_while_saving(tmp_path, capsys, options, whole):
    out = tmp_path / "run"

    def call_with_small_disk(*more):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        size = (whole / "last.pt").stat().st_size
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
    assert_bit_for_bit(whole, out)


def state_after(epoch):
    """The state of a run of two epochs after `epoch`; each epoch is the best so far."""
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
    """As Run.end_epoch does."""
    state = state_after(epoch)
    checkpoint.save(state, out / "last.pt")
    publish(out, state, {"student": state["student"]})


def test_killed_at_any_point_of_saving(tmp_path, monkeypatch):
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
    assert point == 2 * len(names)  # it was killed at each of them


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


def test_an_empty_folder_is_removed_only_if_it_was_created(tmp_path):
    (tmp_path / "mine").mkdir()
    for name in ("mine", "new"):
        with pytest.raises(ZeroDivisionError), open_folder(tmp_path / name, resume=False):
            1 / 0  # noqa: B018
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_folder_can_be_opened_only_once_at_a_time(tmp_path):
    for lock in (locked(tmp_path), open_folder(tmp_path, resume=False)):
        with lock, pytest.raises(UserError, match="another process"), open_folder(tmp_path, resume=False):
            pass
    with open_folder(tmp_path, resume=False):
        pass


@pytest.mark.parametrize(
    ("error", "code", "word"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB"), 2, "--batch-size"),
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


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_whose_exception_was_ignored_ends_the_script_at_the_next_batch(capsys, sent, code):
    class Forking:
        def __del__(self):  # Python ignores exceptions here, as in a fork hook
            signal.raise_signal(sent)

    def script():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Forking()
        next_batch(iter([1]))
        raise AssertionError

    sys.unraisablehook, hook = lambda _: None, sys.unraisablehook
    handler = signal.signal(sent, signal.SIG_DFL)  # SIGINT is ignored if the tests run in the background
    try:
        assert exit_code(script) == code
    finally:
        sys.unraisablehook = hook
        signal.signal(sent, handler)
    assert capsys.readouterr().err.startswith("interrupted: ")
    assert next_batch(iter([1])) == 1  # and it was cleared


def test_errors_with_a_line_break_are_one_line(capsys):
    def script():
        raise UserError("there is no a\nb.jpg")

    assert exit_code(script) == 2
    assert capsys.readouterr().err == "error: there is no a\\nb.jpg\n"


def test_closed_stdout(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert exit_code(lambda: sys.stdout.write("x")) == 0


def test_bugs_are_not_hidden():
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
