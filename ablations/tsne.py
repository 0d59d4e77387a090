"""Fig. 4 (App. B): where exit branches put the features of students and of their teacher.

    python ablations/tsne.py                                        after exit_branches.py: nothing is trained again
    python ablations/tsne.py --pairs resnet20-resnet8 --branch-depth 20 --branch-widths 16 16 32 64

What the classifier of a branch reads (ablations/branches.py), for the test images of the first ten classes: from the
teacher's own features, and from the bridged ones of its students by app (KD with L_app) and fcfd, with the branch's
statistics taken anew. The picture is of the first seed's students; the points of a row, the teacher's and all its
students', are laid out together, so that the teacher's stand in the same places in each of its panels. The plane of a
t-SNE keeps no distances, so the table is of the branch's own space and of all seeds.

Options are those of exit_branches.py, whose runs and branches are used; what is missing of them is made.
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
from ablations.exit_branches import ROWS, by_teacher, check_files, open_judges, parse_args
from ablations.figures import load_pyplot, save_figure
from common.data.batches import ImageSet, eval_batches
from common.run.checkpoint import write_atomically
from common.run.errors import UserError, exit_code

CLASSES = 10
# Told apart by the colour-blind too (Paul Tol's "muted", and black).
COLOURS = ["#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77", "#CC6677", "#882255", "#AA4499", "#000000"]
DIGITS = {"distance": 3, "relative": 3, "same_image": 1, "same_class": 1}  # after the point, in the table
HEADER = ["pair", "after", "students by", "n", "distance", "relative", "nearest: same image (%)", "same class (%)"]
NOTE = """
Of the features that the branch's classifier reads, for {images} test images of {classes} classes: the mean Euclidean
distance of a student's point from its teacher's of the same image, also in units of the mean distance between two of
the teacher's points, and how often the teacher's point nearest to a student's is of the same image, or class. Mean ±
sample standard deviation over n seeds.
"""


def load_tsne() -> Any:
    """scikit-learn's TSNE.

    Raises:
        UserError: it is missing.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise UserError("t-SNE needs scikit-learn: pip install -r requirements-extra.txt") from error
    return TSNE


def first_classes(test: ImageSet) -> ImageSet:
    """The images of the first ten classes.

    Raises:
        UserError: there are not even two.
    """
    kept = test.labels < CLASSES
    if kept.sum() < 2:
        raise UserError(
            f"{kept.sum()} test image of the first {CLASSES} classes is too few: give a larger --test-subset"
        )
    return ImageSet(test.images[kept], test.labels[kept])


@torch.no_grad()
def points_of(branches: nn.ModuleDict, features: Features, images: ImageSet) -> dict[str, Tensor]:
    """str(k) -> what the classifier of the branch reads of such features of n images: float64 [n, C], on the CPU."""
    batches = [features(batch) for batch, _ in eval_batches(images)]
    found = {k: torch.cat([branch.penultimate(each[k]) for each in batches]) for k, branch in branches.items()}
    return {k: points.double().cpu() for k, points in found.items()}


def measure(student: Tensor, teacher: Tensor, labels: Tensor) -> dict[str, float]:
    """How near a student's points [n, C] are to its teacher's [n, C] of the same images, whose labels are [n].

    Returns:
        "distance": the mean Euclidean one between the two points of an image; "relative": in units of the mean distance
        between the teacher's points of two images; "same_image", "same_class": how often in percent the teacher's
        point nearest to a student's is of the same image, or the same class.
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


def lay_out(clouds: list[Tensor], tsne: Any) -> list[Tensor]:
    """Points [n_i, C] of several clouds in one plane: [n_i, 2] each."""
    points = torch.cat(clouds)
    places = tsne(perplexity=min(30, (len(points) - 1) / 3), init="pca", random_state=0).fit_transform(points.numpy())
    return list(torch.from_numpy(places).split([len(cloud) for cloud in clouds]))


def draw(
    teacher: dict[str, Tensor], students: dict[str, dict[str, Tensor]], labels: Tensor, classes: list[str], tsne: Any
) -> Any:
    """A matplotlib figure: a row of panels for each branch, a column for each method.

    Args:
        teacher: from `points_of`.
        students: such ones by method.
        labels: of the images.
        classes: names by label.
    """
    pyplot = load_pyplot()
    size = (4.0 * len(students), 4.0 * len(teacher) + 1.0)
    figure, panels = pyplot.subplots(len(teacher), len(students), figsize=size, squeeze=False, layout="constrained")
    colours = [COLOURS[label] for label in labels]
    for row, k in zip(panels, teacher, strict=True):
        own, *others = lay_out([teacher[k], *(points[k] for points in students.values())], tsne)
        for panel, (method, points), places in zip(row, students.items(), others, strict=True):
            panel.scatter(*own.T, s=9, c=colours, linewidths=0)
            panel.scatter(*places.T, s=14, c=colours, marker="x", linewidths=0.7)
            found = measure(points[k], teacher[k], labels)
            said = f"relative distance {found['relative']:.2f}, same image {found['same_image']:.0f} %"
            panel.set_title(f"{method}, after $F^{k}$\n{said}", fontsize=10)
            panel.set(xticks=[], yticks=[])
    blank = panels[0][0]
    marks = [
        blank.scatter([], [], s=30, c="#555555", marker=m, label=w) for m, w in (("o", "teacher"), ("x", "student"))
    ]
    shown = sorted(set(labels.tolist()))
    marks += [blank.scatter([], [], s=30, c=COLOURS[label], label=classes[label]) for label in shown]
    figure.legend(handles=marks, loc="outside lower center", frameon=False, ncols=4, fontsize=10)
    return figure


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each pair, branch and method."""
    lines = []
    for pair, k, method in dict.fromkeys((row["pair"], row["after"], row["method"]) for row in rows):
        own = [row for row in rows if (row["pair"], row["after"], row["method"]) == (pair, k, method)]
        texts = [mean_and_deviation([row[key] for row in own], digits) for key, digits in DIGITS.items()]
        lines.append([pair, f"F^{k}", method, len(own), *texts])
    return markdown(HEADER, lines)


def main(argv: list[str] | None = None) -> int:
    """Do what is left of the runs and branches, draw and measure; the exit code is that of `exit_code`."""

    def script() -> None:
        args, given, c = parse_args(argv, __doc__, "tsne")
        load_pyplot()
        tsne = load_tsne()
        cells, rows, note, written = tables.grid(args, given, ROWS), [], "", []
        done = [cell for cell in cells.values() if cell.result()]
        check_files(done, teacher_follows=len(done) < len(cells))  # before anything is trained
        tables.run(args, cells, lambda found: None)
        for folder, runs in by_teacher(args, cells):
            with open_judges(c, folder, runs.values()) as judges:
                images = first_classes(judges.data.test)
                teacher = points_of(judges.branches, judges.on_teacher, images)
                students = {key: points_of(*judges.on_student(cell), images) for key, cell in runs.items()}
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
                save_figure(draw(teacher, first, labels, judges.data.classes, tsne), written[-1])
        if rows:
            text = table(rows) + note
            write_json(args.out / "numbers.json", {"rows": rows})
            write_atomically(args.out / "table.md", lambda file: file.write(text.encode()))
            print(f"\n{text}\nwritten to {args.out}/table.md, numbers.json and {', '.join(p.name for p in written)}")

    return exit_code(script, "what is finished is kept, repeat the command to go on")


if __name__ == "__main__":
    sys.exit(main())
