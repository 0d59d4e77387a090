"""The bookkeeping of a training loop: resuming, metrics, the log, checkpoints, the time limit. It never calls back.

with Run(args) as run:                              # locks --out; with --resume, reads last.pt
    run.track(student=student, optimizer=optimizer) # what last.pt holds; with --resume, restores it
    for epoch in run.epochs():                      # continues after a resume; stops at --max-minutes
        meter = Meter(device)
        for ...:
            meter.add(len(labels), loss=loss, correct=...)
        run.finish_steps(meter)                     # synchronizes; stops the run if it diverged
        run.end_epoch(meter, lr, student=evaluate(student, ...))
"""

import contextlib
import math
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..multipath_bn import plain_state_dict
from .checkpoint import save
from .distributed import all_reduce, broadcast, broadcast_buffers, rank, world_size
from .errors import LossNotFiniteError, UserError
from .folder import PREFIX, made_with, open_folder, publish, read_state, result_of
from .options import settings_of


class Meter:
    """Sums over the steps of an epoch. They accumulate on the device; `.item()` would synchronize in every step.

    Attributes:
        means: after `read`, the mean per step of every value.
        images, seconds: after `read`, how many images all ranks saw, and the duration of the steps.
    """

    def __init__(self, device: torch.device):
        self.began, self.steps, self.images, self.sums = time.monotonic(), 0, 0, {}
        self.first_bad = torch.full((), math.inf, device=device)

    @torch.no_grad()
    def add(self, images: int, loss: Tensor, **values: Tensor) -> None:
        """Add a step's scalars; `images` is the number of images in it."""
        for name, value in {"loss": loss, **values}.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.first_bad = torch.where(loss.isfinite(), self.first_bad, self.first_bad.clamp(max=self.steps))
        self.steps += 1
        self.images += images

    def read(self, waited: float | None = None) -> None:
        """Sum over all ranks, and copy to the host.

        Args:
            waited: seconds that this rank waited for data, if known. Ranks wait for the slowest one.
        """
        device = self.first_bad.device
        totals = all_reduce(torch.stack([value.float() for value in self.sums.values()])).tolist()
        self.sums = dict(zip(self.sums, totals, strict=True))
        self.images = int(all_reduce(torch.tensor(self.images, device=device)).item())
        self.first_bad = all_reduce(self.first_bad, dist.ReduceOp.MIN).item()
        known = waited is not None
        self.waited = all_reduce(torch.tensor(waited, device=device), dist.ReduceOp.MAX).item() if known else None
        self.means = {name: total / self.steps for name, total in self.sums.items()}
        self.seconds = time.monotonic() - self.began


class Run:
    """One run in args.out, which is locked while this is used as a context manager.

    Args:
        args: the resolved options; whatever is changed in them before the first `end_epoch` is saved with them.
        script: the name under which last.pt remembers which script may resume it.
        columns: loss terms that have a column in the log even if they are not used.
        unit: what progress is counted in.

    Attributes:
        state: the content of last.pt. Under torchrun every rank has it; only rank 0 reads and writes files.
        resumed: whether an earlier process began this run.
        finished: whether the last epoch is done.
    """

    def __init__(self, args: Namespace, script: str = "cifar100", columns: Iterable[str] = (), unit: str = "epoch"):
        self.args, self.script, self.columns, self.unit = args, script, tuple(columns), unit
        self.out, self.resumed, self.finished = Path(args.out), args.resume, False
        self.parts: dict[str, Any] = {}
        self.fingerprint: str | None = None

    def __enter__(self) -> "Run":
        with contextlib.ExitStack() as stack:
            state = None
            if rank() == 0:
                stack.enter_context(open_folder(self.out, self.resumed))
                state = read_state(self.out, self.script, self.unit) if self.resumed else None
            self.state = broadcast(state) or {self.unit: 0, "log": [], "best": {}, "teacher_accuracy": None}
            self.context = stack.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self.context.__exit__(*error)

    def check_data(self, fingerprint: str, images: int) -> None:
        """Remember the hash of the data.

        Args:
            images: the number of training images.

        Raises:
            UserError: the run that is resumed, or rank 0, has other data; there are fewer images than in a batch.
        """
        stored = self.state["config"].get("fingerprint") if self.resumed else fingerprint
        if stored != fingerprint:
            raise UserError(
                f"cannot resume with other settings: the data's fingerprint is {fingerprint} and was {stored}; use the "
                "data the run began with, or choose another --out"
            )
        if broadcast(fingerprint) != fingerprint:
            raise UserError(f"{self.args.data_dir} differs from that of rank 0: copy the same images to every machine")
        if self.args.batch_size > images:
            raise UserError(f"--batch-size {self.args.batch_size}: there are only {images} training images")
        self.fingerprint = fingerprint

    def track(self, **parts: nn.Module | torch.optim.Optimizer | torch.amp.GradScaler | None) -> None:
        """Name what last.pt holds besides the log; None is left out. When resuming, restore it.

        Raises:
            UserError: last.pt does not fit these parts.
        """
        self.parts = {name: part for name, part in parts.items() if part is not None}
        self.networks = {name: part for name, part in self.parts.items() if isinstance(part, nn.Module)}
        self.device = next(self.networks["student"].parameters()).device
        if self.resumed:
            try:
                for name, part in self.parts.items():
                    _check_like(self.state[name], part.state_dict())
                    part.load_state_dict(self.state[name])
                _check_scores(self.state)
            except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
                raise UserError(f"{self.out / 'last.pt'} does not fit this run: choose another --out") from error
            for group in self.parts["optimizer"].param_groups:
                group["fused"] = self.device.type == "cuda"  # the run may have begun on another device
        self.state["config"] = self.config()
        if self.resumed and self.unit == "epoch":
            self.publish()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def config(self) -> dict[str, Any]:
        """What config.yaml and last.pt say of the settings."""
        script = {} if self.script == "cifar100" else {"script": self.script}
        return script | settings_of(self.args) | {"fingerprint": self.fingerprint}

    def epochs(self) -> Iterator[int]:
        """The epochs that are left, from 0; ends early once --max-minutes have passed."""
        total = self.args.epochs
        for epoch in range(self.state["epoch"], total):
            yield epoch
            if epoch + 1 < total and broadcast(time.monotonic() > self.args.deadline):
                print(f"stopped after {epoch + 1} of {total} epochs (--max-minutes): repeat the command with --resume")
                return
        self.finished = True
        self.report()

    def finish_steps(self, meter: Meter, waited: float | None = None) -> None:
        """Read the meter, and give all ranks the same BatchNorm statistics.

        Raises:
            LossNotFiniteError: a loss or a weight is not finite. What was saved before is kept.
        """
        broadcast_buffers(self.networks.values())
        meter.read(waited)
        epoch = self.state["epoch"] + 1
        if meter.first_bad < math.inf:
            raise LossNotFiniteError(f"in epoch {epoch}, step {meter.first_bad + 1:.0f}")
        self.check_weights(f"in the last step of epoch {epoch}")

    def check_weights(self, when: str) -> None:
        """Raise LossNotFiniteError if a parameter or a buffer is not finite."""
        if not all(value.isfinite().all() for net in self.networks.values() for value in net.state_dict().values()):
            raise LossNotFiniteError(when)

    def end_epoch(self, meter: Meter, lr: float, **tested: dict[str, float]) -> None:
        """Add a row to the log, save everything, print a line.

        Args:
            tested: accuracy on the test set, as from `evaluate`, of each network that is trained.
        """
        epoch = self.state["epoch"] + 1
        terms = [name for name in meter.means if name != "loss" and not name.endswith("correct")]
        row = {"epoch": epoch, "lr": lr, "loss": meter.means["loss"]}
        row |= {name: meter.means.get(name, "") for name in dict.fromkeys((*self.columns, *terms))}
        for role, accuracy in tested.items():
            prefix = PREFIX[role]
            row[f"{prefix}train_top1"] = 100 * meter.sums[f"{prefix}correct"] / meter.images
            row |= {f"{prefix}test_{top}": accuracy[top] for top in ("top1", "top5")}
            if accuracy["top1"] > self.state.get(f"{prefix}best", {}).get("top1", -1.0):
                self.state[f"{prefix}best"] = {"epoch": epoch, **accuracy}
        row |= {"seconds": time.monotonic() - meter.began, "images_per_s": meter.images / meter.seconds}
        if meter.waited is not None:
            row["waiting_percent"] = 100 * meter.waited / meter.seconds
        row["peak_memory_mb"] = peak_memory(self.device)
        self.state["log"].append({name: row.get(name, "") for name in self.state["log"][0]} if epoch > 1 else row)
        self.state["epoch"] = epoch
        self.save()
        if rank() == 0:
            self.publish()
            print_epoch(self.state)

    def save(self) -> None:
        """Replace last.pt."""
        if rank() == 0:
            self.state |= {name: part.state_dict() for name, part in self.parts.items()}
            made = made_with(self.device) | {"ranks": world_size()}
            self.state |= {"config": self.config(), "made_with": made}
            save(self.state, self.out / "last.pt")

    def publish(self) -> None:
        """Write every file but last.pt."""
        if rank() == 0:
            trained = [role for role, prefix in PREFIX.items() if f"{prefix}best" in self.state]
            publish(self.out, self.state, {role: plain_state_dict(self.networks[role]) for role in trained})

    def report(self) -> None:
        """Print the closing lines of a finished run."""
        if rank() > 0:
            return
        result, config = result_of(self.state), self.state["config"]
        for name in ("best", "last", "teacher", "teacher_best", "teacher_last"):
            if accuracy := result.get(name):
                when = f"epoch {accuracy['epoch']}" if name != "teacher" else "before distillation"
                title = name.replace("_", " ")
                print(
                    f"{title:8} {accuracy['top1']:.2f} % top-1, {accuracy['top5']:.2f} % top-5 on the test set, {when}"
                )
        print(f"time     {result['seconds'] / 60:.1f} minutes on {result['device']}")
        for role, prefix in PREFIX.items():
            if f"{prefix}best" in result:
                print(f"{config[role]} saved to {config['out']}/{role}.pth (last) and {role}_best.pth", flush=True)


def stored_options(args: Namespace, script: str = "cifar100", unit: str = "epoch") -> dict[str, Any]:
    """The settings of the run in args.out, which --resume continues; read by rank 0.

    Raises:
        UserError: as `read_state`.
    """
    stored = broadcast(read_state(Path(args.out), script, unit)["config"] if rank() == 0 else None)
    return stored | {"out": args.out}


def print_epoch(state: dict[str, Any]) -> None:
    """One line about the epoch that was just finished."""
    row, epochs = state["log"][-1], state["config"]["epochs"]
    teacher = f"teacher {row['teacher_test_top1']:.2f} %  " if "teacher_test_top1" in row else ""
    waiting = f", {row['waiting_percent']:.0f} % of it waiting for data" if "waiting_percent" in row else ""
    print(
        f"epoch {row['epoch']:3}/{epochs}  loss {row['loss']:.4f}  train {row['train_top1']:.2f} %  "
        f"test {row['test_top1']:.2f} %  best {state['best']['top1']:.2f} %  {teacher}"
        f"{row['seconds']:.1f} s, {row['images_per_s']:.0f} images/s{waiting}",
        flush=True,
    )


def peak_memory(device: torch.device) -> float | str:
    """MiB that PyTorch allocated on a GPU at most, "" elsewhere."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else ""


def _check_like(stored: Any, own: Any) -> None:
    """Raise a ValueError unless `stored` has the structure of `own`, with tensors of the same shapes and types."""
    if isinstance(own, dict):
        # Other versions of PyTorch may lack a flag that is off by default.
        if not isinstance(stored, dict) or any(own[key] for key in own.keys() - stored.keys()):
            raise ValueError
        for key in own.keys() & stored.keys():
            _check_like(stored[key], own[key])
    elif isinstance(own, list):
        if not isinstance(stored, list) or len(stored) != len(own):
            raise ValueError
        for ours, theirs in zip(own, stored, strict=True):
            _check_like(theirs, ours)
    elif torch.is_tensor(own):
        if not torch.is_tensor(stored) or (stored.shape, stored.dtype) != (own.shape, own.dtype):
            raise ValueError
    elif isinstance(own, int | float) and not isinstance(stored, int | float | None):
        raise ValueError


def _check_scores(state: dict[str, Any]) -> None:
    """Raise an error unless what the reports are made from consists of numbers."""
    scores = [state[key] for key in ("best", "teacher_best", "teacher_accuracy") if state.get(key) is not None]
    numbers = [value for each in (*scores, *state["log"]) for value in each.values() if value not in ("", None)]
    if not all(isinstance(value, int | float) for value in numbers):
        raise ValueError
