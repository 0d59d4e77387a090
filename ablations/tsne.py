"""t-SNE of student and teacher features inside the exit branches (Fig. 4, App. B).

    python ablations/tsne.py                 resnet32x4-ShuffleV2; after exit_branches.py, nothing is trained again
    python ablations/tsne.py --pairs resnet20-resnet8 --branch-depth 20 --branch-widths 16 16 32 64

Plots the input of each exit branch's classifier (ablations/branches.py) for the test images of the first ten classes:
from the teacher's own features, and from the bridged features of students trained by app (KD with L_app) and fcfd,
with the branch's BatchNorm statistics recalibrated. The figure shows the students of the first seed: their points are
light blue, the teacher's light red, and overlaps dark brown. The points of a row, the teacher's and all its students',
are embedded jointly, so the teacher's have the same coordinates in each panel. t-SNE does not preserve distances, so
the table is computed in the branch's feature space, over all seeds.

Options are those of exit_branches.py, whose runs and branches are reused; missing ones are trained.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from ablations import tables
from ablations.branches import Features, write_json
from ablations.cells import markdown, mean_and_deviation
from ablations.exit_branches import ROWS, by_teacher, check_files, open_branches, parse_args
from ablations.figures import load_pyplot, save_figure
from ablations.rows import grid
from common.data.batches import ImageSet, eval_batches
from common.run.checkpoint import write_atomically
from common.run.errors import UserError, exit_code

PAIRS = ["resnet32x4-ShuffleV2"]
CLASSES = 10
COLORS = {"teacher": "#FF9F9F", "student": "#9FCFFF", "both": "#5C2E0B"}
DIGITS = {"distance": 3, "relative": 3, "same_image": 1, "same_class": 1}  # decimals in the table
HEADER = ["pair", "after", "method", "n", "distance", "relative", "nearest: same image (%)", "same class (%)"]
NOTE = """
A point is the input of the branch's classifier for one of {images} test images of {classes} classes. distance: mean
Euclidean distance between the student's and the teacher's point of an image; relative: in units of the mean distance
between two teacher points; nearest: how often the teacher point nearest to a student's is of the same image, or of the
same class. Mean ± sample standard deviation over n seeds.
"""


def load_tsne() -> Any:
    """scikit-learn's TSNE class.

    Raises:
        UserError: scikit-learn is missing.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise UserError("t-SNE needs scikit-learn: pip install -r requirements-extra.txt") from error
    return TSNE


def first_classes(test: ImageSet) -> ImageSet:
    """The images of the first ten classes.

    Raises:
        UserError: there are fewer than two.
    """
    kept = test.labels < CLASSES
    if kept.sum() < 2:
        raise UserError(
            f"t-SNE needs at least two test images of the first {CLASSES} classes: use a larger --test-subset"
        )
    return ImageSet(test.images[kept], test.labels[kept])


@torch.no_grad()
def points_of(branches: nn.ModuleDict, features: Features, images: ImageSet) -> dict[str, Tensor]:
    """str(k) -> inputs of the branch's classifier for n images: float64 [n, C], on the CPU."""
    batches = [features(batch) for batch, _ in eval_batches(images)]
    found = {k: torch.cat([branch.penultimate(each[k]) for each in batches]) for k, branch in branches.items()}
    return {k: points.double().cpu() for k, points in found.items()}


def measure(student: Tensor, teacher: Tensor, labels: Tensor) -> dict[str, float]:
    """Compare a student's points [n, C] with its teacher's [n, C] for the same images; labels are [n].

    Returns:
        "distance": mean Euclidean distance between the two points of an image; "relative": the same in units of the
        mean distance between two teacher points; "same_image", "same_class": percentage of student points whose
        nearest teacher point is of the same image, or of the same class.
    """
    n, exact = len(labels), {"compute_mode": "donot_use_mm_for_euclid_dist"}
    across, within = torch.cdist(student, teacher, **exact), torch.cdist(teacher, teacher, **exact)
    distance, nearest = across.diagonal().mean(), across.argmin(1)
    return {
        "distance": distance.item(),
        "relative": (distance / (within.sum() / (n * (n - 1)))).item(),
        "same_image": 100 * (nearest == torch.arange(n)).double().mean().item(),
        "same_class": 100 * (labels[nearest] == labels).double().mean().item(),
    }


def embed(clouds: list[Tensor], tsne: Any) -> list[Tensor]:
    """Embed several point clouds [n_i, C] jointly in the plane: [n_i, 2] each."""
    points = torch.cat(clouds)
    plane = tsne(perplexity=min(30, (len(points) - 1) / 3), init="pca", random_state=0).fit_transform(points.numpy())
    return list(torch.from_numpy(plane).split([len(cloud) for cloud in clouds]))


def draw(teacher: dict[str, Tensor], students: dict[str, dict[str, Tensor]], labels: Tensor, tsne: Any) -> Any:
    """A matplotlib figure with one row of panels per branch and one column per method.

    Args:
        teacher: from `points_of`.
        students: from `points_of`, by method.
        labels: [n], of the images.
    """
    pyplot = load_pyplot()
    from matplotlib.patches import Patch, PathPatch
    from matplotlib.path import Path as Outline

    shape = (len(teacher), len(students))
    options = {"squeeze": False, "sharex": "row", "sharey": "row", "layout": "constrained"}
    figure, panels = pyplot.subplots(*shape, figsize=(4.0 * shape[1], 4.0 * shape[0] + 0.5), **options)
    for row, k in zip(panels, teacher, strict=True):
        clouds = embed([teacher[k], *(points[k] for points in students.values())], tsne)
        low, high = torch.cat(clouds).aminmax(dim=0)
        radius = (high - low).max().item() / 160
        own, *others = (  # discs in data units, so that the teacher's can clip a student's
            Outline.make_compound_path(*(Outline.circle(point, radius) for point in cloud.tolist())) for cloud in clouds
        )
        for panel, (method, points), plane in zip(row, students.items(), others, strict=True):
            for outline, name in ((own, "teacher"), (plane, "student"), (plane, "both")):
                discs = panel.add_patch(PathPatch(outline, color=COLORS[name], linewidth=0))
            discs.set_clip_path(own, panel.transData)
            found = measure(points[k], teacher[k], labels)
            summary = f"relative distance {found['relative']:.2f}, same image {found['same_image']:.0f} %"
            panel.set_title(f"{method}, after $F^{k}$\n{summary}", fontsize=10)
            panel.set(xticks=[], yticks=[], aspect="equal")
            panel.autoscale_view()
    marks = [Patch(color=color, label=name) for name, color in COLORS.items()]
    figure.legend(handles=marks, loc="outside lower center", frameon=False, ncols=3, fontsize=10)
    return figure


def table(rows: list[dict[str, Any]]) -> str:
    """The Markdown table: one row per pair, branch and method."""
    lines = []
    for pair, k, method in dict.fromkeys((row["pair"], row["after"], row["method"]) for row in rows):
        own = [row for row in rows if (row["pair"], row["after"], row["method"]) == (pair, k, method)]
        texts = [mean_and_deviation([row[key] for row in own], digits) for key, digits in DIGITS.items()]
        lines.append([pair, f"F^{k}", method, len(own), *texts])
    return markdown(HEADER, lines)


def main(argv: list[str] | None = None) -> int:
    """Complete the runs and branches, then plot and measure. Returns the exit code (see `exit_code`)."""

    def script() -> None:
        args, given, c = parse_args(argv, __doc__, "tsne", PAIRS)
        load_pyplot()
        tsne = load_tsne()
        cells, rows, note, written = grid(args, given, ROWS), [], "", []
        done = [cell for cell in cells.values() if cell.result()]
        check_files(done, teacher_pending=len(done) < len(cells))  # before anything is trained
        tables.run(args, cells, lambda found: None)
        for folder, runs in by_teacher(args, cells):
            with open_branches(c, folder, runs.values()) as trained:
                images = first_classes(trained.data.test)
                teacher = points_of(trained.branches, trained.teacher_features, images)
                students = {key: points_of(*trained.for_student(cell), images) for key, cell in runs.items()}
            labels = images.labels.cpu()
            note = NOTE.format(images=len(labels), classes=len(set(labels.tolist())))
            for pair in dict.fromkeys(pair for pair, _, _ in runs):
                own = {key[1:]: points for key, points in students.items() if key[0] == pair}
                for k in teacher:
                    for (method, seed), points in own.items():
                        row = {"pair": pair, "after": k, "method": method, "seed": seed}
                        rows.append(row | measure(points[k], teacher[k], labels))
                seeds = {row.name: [seed for method, seed in own if method == row.name] for row in ROWS}
                first = {name: own[name, finished[0]] for name, finished in seeds.items() if finished}
                written.append(args.out / ("tsne.png" if len(args.pairs) == 1 else f"tsne-{pair}.png"))
                save_figure(draw(teacher, first, labels, tsne), written[-1])
        if rows:
            text = table(rows) + note
            write_json(args.out / "numbers.json", {"rows": rows})
            write_atomically(args.out / "table.md", lambda file: file.write(text.encode()))
            print(f"\n{text}\nwritten to {args.out}/table.md, numbers.json and {', '.join(p.name for p in written)}")

    return exit_code(script, tables.AFTER_INTERRUPT)


if __name__ == "__main__":
    sys.exit(main())
