"""Anisotropy of features (Sec. 1.3): how much a network's output depends on the direction of a perturbation.

    python ablations/anisotropy.py                                        resnet32x4, trained first
    python ablations/anisotropy.py --run runs/cifar100-resnet32x4-alone-240ep-seed1-fp16
    python ablations/anisotropy.py --network resnet32x4 --ckpt FILE --images 500

The feature F^k of a test image is perturbed along random directions, all by the same length. The directions are uniform
on the unit sphere of the whole feature map. The later part of the network, in evaluation mode and float32, maps each
perturbed feature to an output p'. KL(p || p'), at temperature 1 and in nats, measures how far p' is from the clean
output p. An L2 loss cannot distinguish the perturbations. The direction with the smallest KL is the mildest, the one
with the largest KL the worst.

For resnet32x4 on CIFAR-100 and 512 directions, the paper reports a smallest KL of 0.59, a largest of 1.29, and drops in
accuracy of 10.69 and 24.42 points. It does not state the feature or the length, so the length is found in two steps.
First --lengths are measured on a few images, and the length that gives --smallest-kl is interpolated. Then that length
is measured on all --images. The paper leaves three more choices open:

    mildest, worst for all images   The KL of each direction is averaged over images. The mildest direction is the one
                                    with the smallest mean.
    mildest, worst for each image   Each image has a mildest and a worst direction. Its smallest and largest KL are
                                    averaged over images. The table has both.
    --directions-per dataset        All images are perturbed along the same random directions.
    --directions-per image          Random directions are drawn for each image, so that none is common to all.
    --length-unit relative          The length is in units of the L2 norm of the image's own feature.
    --length-unit absolute          The length is in units of the mean of that norm over the images.

Writes table.md, curves.png and numbers.json to --out. What numbers.json already has for the same network, images and
settings is not measured again. On a CPU, 512 directions take about a second per image, feature and length: use --images
unless the test set is small, or --autocast.
"""

import hashlib
import json
import math
import sys
from argparse import Namespace
from dataclasses import dataclass
from itertools import pairwise
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
from common.run.options import Parser, option, set_defaults
from common.run.types import count, count_or_zero, name_in, positive

DATA = ("dataset", "data_dir", "subset", "test_subset")  # settings of cifar100.py
TRAINING = ("smoke", "epochs", "seeds", "runs")  # options that do not apply to an existing network
SMOKE = ["--network", "resnet8", "--dataset", "synthetic", "--subset", "80", "--test-subset", "40", "--epochs", "1"]
SMOKE += ["--directions", "8", "--lengths", "1", "4", "16", "--sweep-images", "20", "--smallest-kl", "0.01"]
SMOKE += ["--out", "results/anisotropy/smoke", "--runs", "results/anisotropy/smoke"]
LENGTHS = [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0]
FLOOR = 1e-12  # nats: the effect of float32 rounding on an output; a smaller KL counts as this
PAPER = (0.59, 1.29)  # nats
LABELS = {"mean": "all images", "image": "each image"}  # what the mildest and worst directions are chosen for
KEYS = {"smallest", "largest", "clean", "mildest", "worst"}  # see `summarize`
COLUMNS = {"length": 3, "smallest": 4, "largest": 4, "ratio": 2, "clean": 2, "mildest": 2, "worst": 2}
COLUMNS |= {"mildest fall": 2, "worst fall": 2}  # decimals in the table
HEADER = ["network", "feature", "mildest, worst for", "length", "smallest KL", "largest KL", "largest / smallest"]
HEADER += [f"accuracy, {which} (%)" for which in ("clean", "mildest", "worst")]
HEADER += [f"drop, {which} (points)" for which in ("mildest", "worst")]
Numbers = dict[str, dict[str, float]]  # by key of LABELS, from `summarize`


@dataclass
class Found:
    """Results for one feature of one network.

    Attributes:
        curve: by length in ascending order, on the sweep images.
        at: by key of LABELS, the length at which the smallest KL is --smallest-kl, and the numbers there on all images.
            A key is missing if its curve does not reach that KL.
    """

    curve: dict[float, Numbers]
    at: dict[str, tuple[float, Numbers]]

    def columns(self, key: str) -> dict[str, float]:
        """COLUMNS of the table."""
        length, numbers = self.at[key]
        found = numbers[key]
        falls = {f"{which} fall": found["clean"] - found[which] for which in ("mildest", "worst")}
        return found | falls | {"length": length, "ratio": found["largest"] / found["smallest"]}


def unit_directions(count: int, shape: torch.Size, seed: int) -> Tensor:
    """Directions [count, C, H, W] in channels_last format, uniform on the unit sphere; shape is (C, H, W)."""
    channels, height, width = shape
    samples = torch.randn(count, height, width, channels, generator=generator(seed, 0, "directions"))
    return (samples / samples.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).permute(0, 3, 1, 2)


@torch.no_grad()
def measure(net: StagedNet, k: int, images: ImageSet, length: float, c: Namespace) -> tuple[Tensor, Tensor, float]:
    """Perturb F^k of each of n images along D = c.directions directions; `net` is in evaluation mode.

    Returns the KL in nats, float64 [n, D]; whether each prediction is correct, float64 [n, D] of 0 and 1; and the
    fraction of correct predictions without perturbations.
    """

    def earlier(x: Tensor) -> Tensor:
        for l in range(1, k + 1):
            x = net.stage(l, x)
        return x

    def later(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=c.autocast):
            for l in range(k + 1, net.num_stages + 1):
                x = net.stage(l, x)
        return net.classify(x.float())

    norms = torch.cat([earlier(batch).flatten(1).norm(dim=1) for batch, _ in eval_batches(images)]).tolist()
    units = norms if c.length_unit == "relative" else [fmean(norms)] * len(norms)
    # Tensors kept for each image would fragment the memory between those of its perturbed features.
    kl = torch.empty(len(images), c.directions, dtype=torch.float64)
    hits, parts, i, clean_hits = torch.empty_like(kl), None, 0, 0
    with tqdm(total=len(images), leave=False, disable=None) as progress:
        for batch, labels in eval_batches(images):
            features = earlier(batch)
            # float64 preserves small differences between outputs; on the CPU, since not every device supports it.
            cleans, labels = later(features).cpu().double(), labels.cpu()
            clean_hits += (cleans.argmax(1) == labels).sum().item()
            for feature, clean, label in zip(features, cleans, labels, strict=True):
                if parts is None or c.directions_per == "image":
                    directions = unit_directions(c.directions, feature.shape, seed=i)
                    parts = directions.to(feature.device).split(c.batch_size)
                step = length * units[i]
                logits = torch.cat([later(torch.add(feature, part, alpha=step)) for part in parts]).cpu()
                kl[i] = kl_nats(clean, logits.double()).clamp(min=FLOOR)
                hits[i] = logits.argmax(1) == label
                i += 1
                progress.update()
    return kl, hits, clean_hits / len(images)


def summarize(kl: Tensor, hits: Tensor, clean: float, directions_per: str) -> Numbers:
    """Reduce the output of `measure`, by key of LABELS.

    smallest, largest: KL in nats over the directions. clean, mildest, worst: accuracy in percent without a perturbation
    and along these directions.
    """
    groups = {"image": (kl, hits)}
    if directions_per == "dataset":
        groups["mean"] = (kl.mean(0, keepdim=True), hits.mean(0, keepdim=True))
    found = {}
    for key, (kl, hits) in groups.items():
        values = {"smallest": kl.amin(1).mean(), "largest": kl.amax(1).mean(), "clean": 100 * clean}
        values["mildest"] = 100 * hits.gather(1, kl.argmin(1, keepdim=True)).mean()
        values["worst"] = 100 * hits.gather(1, kl.argmax(1, keepdim=True)).mean()
        found[key] = {name: float(f"{value:.6g}") for name, value in values.items()}
    return found


def length_at(curve: dict[float, Numbers], key: str, target: float) -> float | None:
    """The length at which the smallest KL of `key` rises to `target`; None if it does not.

    Interpolated on logarithmic scales, and rounded to 4 digits.
    """
    points = [(math.log(length), math.log(curve[length][key]["smallest"] / target)) for length in sorted(curve)]
    for (x0, y0), (x1, y1) in pairwise(points):
        if y0 <= 0 <= y1 and y0 < y1:
            return float(f"{math.exp(x0 - y0 * (x1 - x0) / (y1 - y0)):.4g}")
    return None


def measure_network(name: str, file: Path, data: Data, c: Namespace) -> dict[int, Found]:
    """Results by position k for the weights in `file`; numbers.json is read, and completed after each measurement."""
    net = build(c.network, len(data.classes))
    load_network(net, file, c.network)
    content = b"".join(t.numpy().tobytes() for t in (*net.state_dict().values(), data.test.images, data.test.labels))
    settings = {"network": c.network, "directions": c.directions, "sha256": hashlib.sha256(content).hexdigest()}
    stored = read_numbers(path := c.out / "numbers.json")
    if stored.get(name, {}).get("settings") != settings:
        stored[name] = {"settings": settings, "measured": {}}
    measured = stored[name]["measured"]
    net, sets = net.to(c.device).eval(), {}
    for n in {c.sweep_images, c.images}:
        kept = balanced_subset(data.test.labels.numpy(), n, len(data.classes), "images")
        sets[n] = ImageSet(data.test.images[kept], data.test.labels[kept]).to(torch.device(c.device))

    def numbers(k: int, n: int, length: float) -> Numbers:
        key = f"F^{k}, {n} images, directions per {c.directions_per}, {c.length_unit} length {length:g}"
        key += ", bfloat16" * c.autocast
        if key not in measured:
            measured[key] = summarize(*measure(net, k, sets[n], length, c), c.directions_per)
            write_atomically(path, lambda file: file.write(json.dumps(stored).encode()))
            one = measured[key].get("mean", measured[key]["image"])
            print(f"{name}, {key}: KL from {one['smallest']:.3g} to {one['largest']:.3g} nats", flush=True)
        return measured[key]

    results = {}
    for k in c.positions:
        curve, at = {length: numbers(k, c.sweep_images, length) for length in c.lengths}, {}
        for key in curve[c.lengths[0]]:
            if estimate := length_at(curve, key, c.smallest_kl):
                curve[estimate] = numbers(k, c.sweep_images, estimate)
                length = length_at(curve, key, c.smallest_kl)
                at[key] = length, numbers(k, c.images, length)
        results[k] = Found(dict(sorted(curve.items())), at)
    return results


def read_numbers(path: Path) -> dict[str, dict]:
    """The contents of numbers.json, by network; {} if it does not exist. Raises a UserError if it is damaged."""
    try:
        stored = json.loads(path.read_text()) if path.exists() else {}
        for found in stored.values():
            summaries = [one for numbers in found["measured"].values() for one in (numbers["image"], *numbers.values())]
            if not (isinstance(found["settings"], dict) and all(one.keys() >= KEYS for one in summaries)):
                raise ValueError("unexpected content")
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}): remove it, or choose another --out") from error
    return stored


def table(results: dict[str, dict[int, Found]], c: Namespace) -> str:
    """The Markdown table: one group of rows per network, then the means over networks if all reach --smallest-kl."""
    names = [*results, *([f"mean of {len(results)}"] if len(results) > 1 else [])]
    rows = []
    for name in names:
        for k in c.positions:
            found = [results[name][k]] if name in results else [of_k[k] for of_k in results.values()]
            for key in c.readings:
                columns = [one.columns(key) for one in found if key in one.at]
                texts = ["not reached", *[""] * (len(COLUMNS) - 1)]
                if len(columns) == len(found):
                    texts = [mean_and_deviation([one[x] for one in columns], digits) for x, digits in COLUMNS.items()]
                rows.append([name, f"F^{k}", LABELS[key], *texts])
    own, norm = c.directions_per == "image", "L2 norm" if c.length_unit == "relative" else "mean L2 norm"
    directions = f"{c.directions} random directions, {'drawn for each image' if own else 'the same for all images'}"
    return markdown(HEADER, rows) + (
        f"\nFeatures of {c.images} test images, perturbed along {directions}{', in bfloat16' * c.autocast}.\n"
        f"The length, in units of their {norm}, gives a smallest KL of {c.smallest_kl:g} on {c.sweep_images} images.\n"
        "KL(p || p') in nats. All images: the KL of each direction is averaged over images, before the extremes.\n"
        "Each image: its own smallest and largest KL, averaged over images.\n"
        "The paper's resnet32x4 on CIFAR-100: KL of 0.59 and 1.29, ratio 2.2, drops of 10.69 and 24.42 points.\n"
    )


def draw(results: dict[str, dict[int, Found]], c: Namespace, out: Path) -> None:
    """Plot the KL and the accuracies over the length, one column per k, one line per network; save to `out`."""
    count = len(c.positions)
    grid = {"sharex": True, "sharey": "row", "squeeze": False, "layout": "constrained"}
    figure, panels = load_pyplot().subplots(2, count, figsize=(max(7, 3.2 * count), 6), **grid)
    for (upper, lower), k in zip(panels.T, c.positions, strict=True):
        for found in (of_k[k] for of_k in results.values()):
            lengths = list(found.curve)
            for key, color in zip(c.readings, (COLORS[0], COLORS[3]), strict=False):
                for panel, pair in ((upper, ("smallest", "largest")), (lower, ("mildest", "worst"))):
                    for name, which, style in zip(pair, ("mildest", "worst"), ("--", "-"), strict=True):
                        values = [numbers[key][name] for numbers in found.curve.values()]
                        label = f"{which} direction for {LABELS[key]}"
                        panel.plot(lengths, values, style, color=color, marker=".", markersize=4, label=label)
            lower.plot(lengths, [numbers["image"]["clean"] for numbers in found.curve.values()], ":", color="black")
        for kl in PAPER:
            upper.axhline(kl, linestyle=":", color="black", label="KL in the paper; accuracy without perturbation")
        upper.set_title(f"$F^{k}$", fontsize=11)
        upper.set(xscale="log", yscale="log")
        lower.set(xlabel=f"length ({c.length_unit})")
        for panel in (upper, lower):
            panel.grid(alpha=0.3)
            panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set(ylabel="KL (nats)")
    panels[1][0].set(ylabel="accuracy (%)")
    legend = dict(zip(*panels[0][0].get_legend_handles_labels()[::-1], strict=True))
    figure.legend(legend.values(), legend.keys(), loc="outside upper center", frameon=False, ncols=2)
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
    add("--directions-per", choices=("dataset", "image"), default="dataset", help="drawn once, or for each image")
    add("--lengths", type=positive, nargs="+", metavar="R", default=LENGTHS, help="of the perturbations in the sweep")
    add("--length-unit", choices=("relative", "absolute"), default="relative", help="feature norm, or its mean")
    add("--smallest-kl", type=positive, metavar="KL", default=PAPER[0], help="in nats; chooses the length")
    add("--sweep-images", type=count, metavar="N", help="test images of the sweep (default: 500, or all)")
    add("--images", type=count, metavar="N", help="test images at the chosen length (default: all)")
    add("--autocast", action="store_true", help="run the later stages in bfloat16, which is faster on some CPUs")
    add("--batch-size", type=count, metavar="N", default=500, help="perturbed features per forward pass")
    add("--device", default=default_device(), help="cpu, cuda, cuda:N or mps")
    add("--out", metavar="DIR", type=Path, help="default: a folder in results/anisotropy/ named after network and data")
    add("--smoke", action="store_true", help="end-to-end check with a small network, in seconds")
    args = parser.parse([*SMOKE, *argv] if "--smoke" in argv else argv)
    for name, excluded in (("run", (*TRAINING, *DATA, "network", "ckpt")), ("ckpt", TRAINING)):
        if name in args.given and (conflicts := [key for key in excluded if key in args.given and key != "data_dir"]):
            parser.error(f"{option(conflicts[0])} does not apply with --{name}: omit one of them")
    args.readings = ("mean", "image") if args.directions_per == "dataset" else ("image",)
    args.data = {key: getattr(args, key) for key in DATA if getattr(args, key) is not None}
    return args


def find_data(c: Namespace) -> Data:
    """Load the data; sets c.network, c.sweep_images, c.images and c.positions.

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
        raise UserError(f"{c.run} was not trained on the images in {c.data['data_dir']}: pass its --data-dir")
    set_defaults(c, images=len(data.test), sweep_images=min(500, len(data.test)))
    for name in ("images", "sweep_images"):
        balanced_subset(data.test.labels.numpy(), getattr(c, name), len(data.classes), option(name)[2:])
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
            results = {name: measure_network(name, file, data, c) for name, file in files.items()}
            text = table(results, c)
            write_atomically(c.out / "table.md", lambda file: file.write(text.encode()))
            draw(results, c, c.out / "curves.png")
        print(f"\n{text}\nwritten to {c.out}/table.md, curves.png and numbers.json")

    return exit_code(script, "finished measurements are kept; rerun the command to continue")


if __name__ == "__main__":
    sys.exit(main())
