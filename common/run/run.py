"""The bookkeeping of a training loop: resuming, metrics, the log, checkpoints and the time limit.

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
from .errors import NonFiniteLossError, UserError
from .folder import PREFIX, check_structure, made_with, open_folder, print_epoch, publish, read_state, report
from .options import settings_of


class Meter:
    """Sums over the steps of an epoch. They accumulate on the device; `.item()` would synchronize in every step."""

    def __init__(self, device: torch.device):
        self.began, self.steps, self.images, self.sums = time.monotonic(), 0, 0, {}
        self.first_bad = torch.full((), math.inf, device=device)

    @torch.no_grad()
    def add(self, images: int, loss: Tensor, **values: Tensor) -> None:
        """Add the scalars of a step with this many images. Names that end in "correct" are counts of images."""
        for name, value in {"loss": loss, **values}.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.first_bad = torch.where(loss.isfinite(), self.first_bad, self.first_bad.clamp(max=self.steps))
        self.steps += 1
        self.images += images

    def read(self, waited: float | None = None) -> None:
        """Sum over all ranks and copy to the host. `waited`: seconds that this rank waited for data, if known."""
        device = self.first_bad.device
        totals = all_reduce(torch.stack([value.float() for value in self.sums.values()])).tolist()
        self.sums = dict(zip(self.sums, totals, strict=True))
        self.images = int(all_reduce(torch.tensor(self.images, device=device)).item())
        self.first_bad = all_reduce(self.first_bad, dist.ReduceOp.MIN).item()
        self.waited = None
        if waited is not None:  # ranks wait for the slowest one
            self.waited = all_reduce(torch.tensor(waited, device=device), dist.ReduceOp.MAX).item()
        self.seconds = time.monotonic() - self.began


class Run:
    """One run in args.out, which is locked while this is used as a context manager.

    Args:
        args: the resolved options. Every save stores them, including values set later.
        script: stored in last.pt; only the same script can resume the run.
        columns: loss terms that have a column in the log even if they are not used.
        unit: of progress, "epoch" or "iteration".

    Attributes:
        state: the content of last.pt, on every rank. Only rank 0 reads and writes files.
        resumed: whether an earlier process began this run.
        finished: whether the last epoch is done.
    """

    def __init__(self, args: Namespace, script: str = "cifar100", columns: Iterable[str] = (), unit: str = "epoch"):
        self.args, self.script, self.columns, self.unit = args, script, tuple(columns), unit
        self.out, self.resumed, self.finished = Path(args.out), args.resume, False

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
        """Store the hash of the data, and check that the data fits the run.

        Raises:
            UserError: the resumed run or rank 0 has different data, or a batch has more than `images` images.
        """
        stored = self.state["config"].get("fingerprint") if self.resumed else fingerprint
        if stored != fingerprint:
            raise UserError(
                f"cannot resume with different data (its fingerprint is {fingerprint} but was {stored}): use the "
                "original data, or choose another --out"
            )
        if broadcast(fingerprint) != fingerprint:
            raise UserError(f"{self.args.data_dir} differs from rank 0's: copy the same images to every machine")
        if self.args.batch_size > images:
            raise UserError(f"--batch-size {self.args.batch_size}: there are only {images} training images")
        self.fingerprint = fingerprint

    def track(self, **parts: nn.Module | torch.optim.Optimizer | torch.amp.GradScaler | None) -> None:
        """Register what last.pt holds besides the log, by name; None is skipped. When resuming, restore it.

        Raises:
            UserError: last.pt does not fit these parts.
        """
        self.parts = {name: part for name, part in parts.items() if part is not None}
        self.networks = {name: part for name, part in self.parts.items() if isinstance(part, nn.Module)}
        self.device = next(self.networks["student"].parameters()).device
        if self.resumed:
            try:
                for name, part in self.parts.items():
                    check_structure(self.state[name], part.state_dict())
                    part.load_state_dict(self.state[name])
            except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
                raise UserError(f"{self.out / 'last.pt'} does not fit this run: choose another --out") from error
        self.state["config"] = self.config()
        if self.resumed and self.unit == "epoch":
            self.publish()  # the run may have been killed between writing last.pt and the other files
        reset_peak_memory(self.device)

    def config(self) -> dict[str, Any]:
        """The content of config.yaml."""
        script = {} if self.script == "cifar100" else {"script": self.script}
        return script | settings_of(self.args) | {"fingerprint": self.fingerprint}

    def epochs(self) -> Iterator[int]:
        """The remaining epochs, counted from 0; stops early once --max-minutes have passed."""
        total = self.args.epochs
        for epoch in range(self.state["epoch"], total):
            yield epoch
            if epoch + 1 < total and broadcast(time.monotonic() > self.args.deadline):
                print(f"stopped after {epoch + 1} of {total} epochs (--max-minutes): repeat the command with --resume")
                return
        self.finished = True
        if rank() == 0:
            report(self.state)

    def finish_steps(self, meter: Meter, waited: float | None = None) -> None:
        """Read the meter, and broadcast rank 0's BatchNorm statistics.

        Raises:
            NonFiniteLossError: a loss or a weight is not finite. Earlier checkpoints are kept.
        """
        broadcast_buffers(self.networks.values())
        meter.read(waited)
        epoch = self.state["epoch"] + 1
        if meter.first_bad < math.inf:
            raise NonFiniteLossError(f"in epoch {epoch}, step {meter.first_bad + 1:.0f}")
        self.check_weights(f"in the last step of epoch {epoch}")

    def check_weights(self, when: str) -> None:
        """Raise NonFiniteLossError if a parameter or a buffer is not finite."""
        if not all(value.isfinite().all() for net in self.networks.values() for value in net.state_dict().values()):
            raise NonFiniteLossError(when)

    def end_epoch(self, meter: Meter, lr: float, **tested: dict[str, float]) -> None:
        """Add a row to the log, save everything and print a line.

        Args:
            tested: the result of `evaluate` for each trained network, "student" or "teacher".
        """
        epoch = self.state["epoch"] + 1
        means = {name: total / meter.steps for name, total in meter.sums.items() if not name.endswith("correct")}
        row = {"epoch": epoch, "lr": lr} | dict.fromkeys(("loss", *self.columns), "") | means
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
        columns = self.state["log"][0] if self.state["log"] else row
        self.state["log"].append({name: row.get(name, "") for name in columns})
        self.state["epoch"] = epoch
        self.save()
        self.publish()
        reset_peak_memory(self.device)  # cuDNN's benchmarking counts in the first epoch only
        if rank() == 0:
            print_epoch(self.state)

    def save(self) -> None:
        """Replace last.pt."""
        if rank() == 0:
            self.state |= {name: part.state_dict() for name, part in self.parts.items()}
            self.state |= {"config": self.config(), "made_with": made_with(self.device) | {"ranks": world_size()}}
            save(self.state, self.out / "last.pt")

    def publish(self) -> None:
        """Write every file but last.pt."""
        if rank() == 0:
            trained = [role for role, prefix in PREFIX.items() if f"{prefix}best" in self.state]
            publish(self.out, self.state, {role: plain_state_dict(self.networks[role]) for role in trained})


def stored_options(args: Namespace, script: str = "cifar100", unit: str = "epoch") -> dict[str, Any]:
    """The settings of the run to resume in args.out, read by rank 0.

    Raises:
        UserError: as `read_state`.
    """
    stored = broadcast(read_state(Path(args.out), script, unit)["config"] if rank() == 0 else None)
    return stored | {"out": args.out}


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> float | str:
    """Peak GPU memory allocated by PyTorch in MiB; "" on other devices."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else ""
