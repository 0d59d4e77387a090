"""Anisotropy of features (Sec. 1.3): how much a network's output depends on the direction of a perturbation.

    python ablations/anisotropy.py                                        resnet32x4, trained first
    python ablations/anisotropy.py --run runs/cifar100-resnet32x4-alone-240ep-seed1-fp16
    python ablations/anisotropy.py --network resnet32x4 --ckpt FILE

The feature F^k of a test image is perturbed along random directions, by --length times its own L2 norm. The directions
are uniform on the unit sphere of the whole feature map and the same for all images. The later part of the network, in
evaluation mode and float32, maps each perturbed feature to an output p'; KL(p || p'), at temperature 1 and in nats,
measures how far that is from the clean output p. An L2 loss cannot distinguish the perturbations. An image's mildest
direction is the one with the smallest KL, its worst direction the one with the largest.

Writes table.md, histogram.png and numbers.json (the numbers of every image) to --out. Features that numbers.json
already has for the same network, images, --directions and --length are not measured again.
"""

import hashlib
import json
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from tqdm import tqdm

import cifar100
from ablations.agreement import load_config
from ablations.cells import Cell, markdown, mean_and_deviation, run_cells, with_dependencies
from ablations.figures import COLORS, load_pyplot, save_figure
from ablations.tables import data_name
from ablations.toy import kl_nats
from common.data.batches import Data, ImageSet, eval_batches
from common.data.sources import balanced_subset, load_data
from common.models import NETWORKS, StagedNet, build
from common.randomness import generator
from common.run.checkpoint import load_network, write_atomically
from common.run.device import default_amp, default_device, open_device
from common.run.errors import UserError, exit_code, user_errors
from common.run.folder import locked
from common.run.options import Parser, option
from common.run.types import count, count_or_zero, name_in, positive

DATA = ("dataset", "data_dir", "subset", "test_subset")  # settings of cifar100.py
TRAINING = ("smoke", "epochs", "seeds", "runs")  # options that do not apply to an existing network
SMOKE = ["--network", "resnet8", "--dataset", "synthetic", "--subset", "80", "--test-subset", "40", "--epochs", "1"]
SMOKE += ["--directions", "8", "--out", "results/anisotropy/smoke", "--runs", "results/runs/smoke"]
FLOOR = 1e-12  # nats: the effect of float32 rounding on an output; a smaller KL counts as this
DECADES, BINS = 4, 80  # the histogram covers log10(KL / the image's median) from -DECADES to DECADES
COLUMNS = {"smallest": 5, "median": 4, "largest": 4, "ratio": 1, "clean": 2, "mean": 2, "mildest": 2, "worst": 2}
HEADER = ["network", "feature", "smallest KL", "median KL", "largest KL", "largest / smallest"]
HEADER += [f"accuracy, {which} (%)" for which in ("clean", "mean", "mildest", "worst")]
PerImage = dict[str, list[float]]  # as returned by `per_image`


def unit_directions(shape: torch.Size, first: int, last: int) -> Tensor:
    """Directions first..last-1, [last - first, *shape]: uniform on the unit sphere, each with its own seed."""
    samples = [torch.randn(shape, generator=generator(0, i, "directions")) for i in range(first, last)]
    return torch.stack([direction / direction.norm() for direction in samples])


def perturbed(features: Tensor, directions: Tensor, length: float) -> Tensor:
    """Move each feature [n, *shape] along each direction [D, *shape] by length times its L2 norm: [n, D, *shape]."""
    norms = features.flatten(1).norm(dim=1).view(-1, *[1] * directions.dim())
    return features[:, None] + length * norms * directions


def measure(
    later: Callable[[Tensor], Tensor], features: Tensor, labels: Tensor, count: int, length: float, batch_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Feed `count` perturbations of each of the features [n, *shape] to `later`, [B, *shape] -> logits [B, K].

    A perturbation has `length` times the feature's L2 norm. Batches have at most `batch_size` features, but at least n.
    Returns the KL in nats, float64 [n, count]; whether each prediction matches `labels` [n], as [n, count]; and whether
    the clean prediction does, [n].
    """
    clean, labels = later(features).cpu().double(), labels.cpu()
    chunk = max(1, batch_size // len(features))
    kl, hits = [], []
    for first in tqdm(range(0, count, chunk), leave=False, disable=None):
        directions = unit_directions(features.shape[1:], first, min(count, first + chunk)).to(features.device)
        moved = perturbed(features, directions, length)
        # float64 preserves small differences between outputs; on the CPU, since not every device supports it.
        logits = later(moved.flatten(0, 1)).cpu().double().unflatten(0, moved.shape[:2])
        kl.append(kl_nats(clean[:, None], logits).clamp(min=FLOOR))
        hits.append(logits.argmax(2) == labels[:, None])
    return torch.cat(kl, 1), torch.cat(hits, 1), clean.argmax(1) == labels


def per_image(kl: Tensor, hits: Tensor, clean: Tensor) -> PerImage:
    """Reduce the output of `measure` to one value per image, and a histogram.

    smallest, median (the lower of two), largest: KL in nats over the directions. clean, mildest, worst: 100 if the
    prediction is correct without a perturbation and along these directions, else 0. mean: percentage of directions
    with a correct prediction. histogram: number of (image, direction) pairs in each bin of log10(KL / the image's
    median).
    """
    median, hits = kl.median(1).values, 100 * hits.double()
    columns = {
        "smallest": kl.amin(1),
        "median": median,
        "largest": kl.amax(1),
        "clean": 100 * clean.double(),
        "mean": hits.mean(1),
        "mildest": hits.gather(1, kl.argmin(1, keepdim=True))[:, 0],
        "worst": hits.gather(1, kl.argmax(1, keepdim=True))[:, 0],
        "histogram": torch.histc((kl / median[:, None]).log10().clamp(-DECADES, DECADES), BINS, -DECADES, DECADES),
    }
    return {key: [float(f"{value:.6g}") for value in values.tolist()] for key, values in columns.items()}


@torch.no_grad()
def measure_feature(net: StagedNet, k: int, test: ImageSet, c: Namespace) -> PerImage:
    """Apply `measure` to F^k of all test images; `net` is in evaluation mode."""

    def later(x: Tensor) -> Tensor:
        for l in range(k + 1, net.num_stages + 1):
            x = net.stage(l, x)
        return net.classify(x)

    options, batches = (c.directions, c.length, c.batch_size), eval_batches(test, c.batch_size)
    parts = [measure(later, net.features(images)[k - 1], labels, *options) for images, labels in batches]
    return per_image(*map(torch.cat, zip(*parts, strict=True)))


def measure_network(name: str, file: Path, data: Data, c: Namespace) -> dict[int, PerImage]:
    """Results by position k for the weights in `file`: from numbers.json if it has them, else `measure_feature`."""
    net = build(c.network, len(data.classes))
    load_network(net, file, c.network)
    content = b"".join(t.numpy().tobytes() for t in (*net.state_dict().values(), data.test.images, data.test.labels))
    settings = {"network": c.network, "directions": c.directions, "length": c.length, "images": c.images}
    settings["sha256"] = hashlib.sha256(content).hexdigest()
    numbers = read_numbers(path := c.out / "numbers.json")
    if numbers.get(name, {}).get("settings") != settings:
        numbers[name] = {"settings": settings, "features": {}}
    found = numbers[name]["features"]
    net, test = net.to(c.device).eval(), data.test.to(torch.device(c.device))
    for k in c.positions:
        if str(k) not in found:
            found[str(k)] = measure_feature(net, k, test, c)
            write_atomically(path, lambda file: file.write(json.dumps(numbers).encode()))
        print("{}, F^{}: KL from {smallest:.3g} to {largest:.3g} nats".format(name, k, **summary(found[str(k)])))
    return {k: found[str(k)] for k in c.positions}


def read_numbers(path: Path) -> dict[str, dict]:
    """The contents of numbers.json, by network; {} if it does not exist. Raises a UserError if it is damaged."""
    try:
        numbers = json.loads(path.read_text()) if path.exists() else {}
        if not all(isinstance(found["settings"], dict) and found["features"].keys() for found in numbers.values()):
            raise ValueError("unexpected content")
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}): remove it, or choose another --out") from error
    return numbers


def summary(images: PerImage) -> dict[str, float]:
    """COLUMNS: KL in nats, averaged over images; ratio of its largest to its smallest; accuracies in percent."""
    means = {key: fmean(images[key]) for key in COLUMNS if key != "ratio"}
    return means | {"ratio": means["largest"] / means["smallest"]}


def table(measured: dict[str, dict[int, PerImage]], c: Namespace) -> str:
    """The Markdown table: one group of rows per network and one row per k, then the means over networks."""
    groups = {name: {k: [summary(images)] for k, images in of_k.items()} for name, of_k in measured.items()}
    if len(groups) > 1:
        groups[f"mean of {len(groups)}"] = {k: [group[k][0] for group in groups.values()] for k in c.positions}
    rows = [
        [name, f"F^{k}", *(mean_and_deviation([one[key] for one in found], digits) for key, digits in COLUMNS.items())]
        for name, group in groups.items()
        for k, found in group.items()
    ]
    return markdown(HEADER, rows) + (
        f"\nFeatures of {c.images} test images, perturbed by {c.length:g} times their L2 norm along {c.directions} "
        "random directions.\nKL(p || p') in nats: each image's smallest, median and largest, averaged over images.\n"
        "Mildest and worst accuracy: along each image's own direction of smallest and of largest KL.\n"
    )


def draw(measured: dict[str, dict[int, PerImage]], c: Namespace, out: Path) -> None:
    """Plot the distribution of KL around the image's median, one panel per k, over all networks; save to `out`."""
    edges = torch.logspace(-DECADES, DECADES, BINS + 1).tolist()
    grid = {"sharex": True, "sharey": True, "squeeze": False, "layout": "constrained"}
    figure, panels = load_pyplot().subplots(1, len(c.positions), figsize=(max(7, 2.3 * len(c.positions)), 3.3), **grid)
    ends = []  # of the visible range
    for panel, k in zip(panels[0], c.positions, strict=True):
        found = [of_k[k] for of_k in measured.values()]
        counts = torch.tensor([one["histogram"] for one in found]).sum(0)
        panel.stairs(100 * counts / counts.sum(), edges, fill=True, color="lightgrey", label="all directions")
        for key, color in (("smallest", COLORS[0]), ("largest", COLORS[3])):
            relative = [value / m for one in found for value, m in zip(one[key], one["median"], strict=True)]
            style = {"histtype": "stepfilled", "facecolor": f"{color}33", "edgecolor": color, "linewidth": 1.5}
            style |= {"weights": [100 / len(relative)] * len(relative), "label": f"each image's {key}"}
            panel.hist(relative, edges, **style)
            ends += min(relative), max(relative)
        ratio = fmean(summary(one)["ratio"] for one in found)
        panel.set_title(f"$F^{k}$: largest / smallest {ratio:.1f}", fontsize=10)
        panel.set(xscale="log", xlabel="KL / the image's median KL")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set(ylabel="share of directions, images (%)", xlim=(min(ends) / 1.5, max(ends) * 1.5))
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper center", frameon=False, ncols=3)
    save_figure(figure, out)


def parse_args(argv: list[str] | None) -> Namespace:
    """The options; args.data holds those of the data by name."""
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--network", type=name_in(NETWORKS), metavar="NAME", default="resnet32x4", help=", ".join(NETWORKS))
    add("--ckpt", metavar="FILE", type=Path, help="its weights (default: train it first)")
    add("--run", metavar="DIR", type=Path, help="a run of cifar100.py: use its network, weights and data")
    parser.add_data_options()
    add("--epochs", type=count, metavar="N", default=cifar100.SETTINGS["epochs"], help="training epochs")
    add("--seeds", nargs="+", type=count_or_zero, metavar="SEED", default=[1], help="of training, one network each")
    add(
        "--runs",
        metavar="DIR",
        type=Path,
        help="where to train (default: results/runs/<dataset>-<epochs>ep-<precision>)",
    )
    add("--positions", nargs="+", type=int, metavar="K", help="features F^k to perturb (default: 2..N)")
    add("--directions", type=count, metavar="N", default=512, help="random directions")
    add("--length", type=positive, metavar="R", default=0.5, help="of perturbations, relative to a feature's L2 norm")
    add("--images", type=count, metavar="N", help="test images, spread evenly over the classes (default: 500, or all)")
    add("--batch-size", type=count, metavar="N", default=500, help="perturbed features per forward pass")
    add("--device", default=default_device(), help="cpu, cuda, cuda:N or mps")
    add("--out", metavar="DIR", type=Path, help="default: a folder in results/anisotropy/ named after network and data")
    add("--smoke", action="store_true", help="end-to-end check with a small network, in seconds")
    args = parser.parse([*SMOKE, *argv] if "--smoke" in argv else argv)
    for name, excluded in (("run", (*TRAINING, *DATA, "network", "ckpt")), ("ckpt", TRAINING)):
        if name in args.given and (conflicts := [key for key in excluded if key in args.given and key != "data_dir"]):
            parser.error(f"{option(conflicts[0])} does not apply with --{name}: omit one of them")
    args.data = {key: getattr(args, key) for key in DATA if getattr(args, key) is not None}
    return args


def find_data(c: Namespace) -> Data:
    """Load the data with the selected test images; sets c.network, c.images and c.positions.

    Raises:
        UserError: the network is unknown; the data cannot be loaded, or is not the run's; a setting is out of range.
    """
    if c.run:
        config = load_config(c.run)
        c.network, moved = config["student"], {"data_dir": c.data_dir} if "data_dir" in c.given else {}
        c.data = {key: config.get(key) for key in DATA} | moved
    with user_errors():
        last = build(c.network, num_classes=10).num_stages
    data = load_data(*(c.data.get(key) for key in DATA))
    if c.run and data.fingerprint != config["fingerprint"]:
        raise UserError(f"{c.run} was trained on other images than those in {c.data['data_dir']}: pass its --data-dir")
    c.images = min(500, len(data.test)) if c.images is None else c.images
    kept = balanced_subset(data.test.labels.numpy(), c.images, len(data.classes), "images")
    data.test = ImageSet(data.test.images[kept], data.test.labels[kept])
    c.positions = sorted(set(c.positions or range(2, last + 1)))
    if not 1 <= c.positions[0] <= c.positions[-1] <= last:
        raise UserError(f"--positions {' '.join(map(str, c.positions))}: {c.network} has features 1..{last}")
    return data


def find_weights(c: Namespace) -> tuple[dict[str, Path], list[Cell]]:
    """Checkpoint files by row name, and the runs that will train them; sets c.out."""
    if c.run or c.ckpt:
        name = c.run.resolve().name if c.run else f"{c.network}-{c.ckpt.stem}"
        files, cells = {name: c.ckpt or c.run / "student.pth"}, []
    else:
        amp = default_amp(c.device)[0]
        data = data_name(c.data | {"epochs": c.epochs, "amp": amp})
        name, folder = f"{data}-{c.network}", c.runs or Path("results/runs") / data
        given = c.data | {"student": c.network, "epochs": c.epochs, "device": c.device, "amp": amp}
        cells = [Cell(folder / f"{c.network}-alone-seed{n}", given | {"seed": n}) for n in sorted({*c.seeds})]
        files = {f"{c.network}, seed {cell.given['seed']}": cell.network for cell in with_dependencies(cells)}
    c.out = c.out or Path("results/anisotropy") / name
    return files, cells


def main(argv: list[str] | None = None) -> int:
    """Train missing networks, measure, and write table and figure. Returns the exit code (see `exit_code`)."""

    def script() -> None:
        c = parse_args(argv)
        load_pyplot()
        open_device(c.device)
        data = find_data(c)
        files, cells = find_weights(c)
        c.out.mkdir(parents=True, exist_ok=True)
        with locked(c.out):
            if cells:
                run_cells(cells, networks_of=cells)
            measured = {name: measure_network(name, file, data, c) for name, file in files.items()}
            text = table(measured, c)
            write_atomically(c.out / "table.md", lambda file: file.write(text.encode()))
            draw(measured, c, c.out / "histogram.png")
        print(f"\n{text}\nwritten to {c.out}/table.md, histogram.png and numbers.json")

    return exit_code(script, "finished features are kept; rerun the command to continue")


if __name__ == "__main__":
    sys.exit(main())
