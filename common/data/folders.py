"""Image folders: <split>/<class>/*."""

from collections.abc import Collection
from pathlib import Path

from torchvision import datasets

from ..run.errors import UserError


class ImageFolder(datasets.ImageFolder):
    """torchvision's ImageFolder, ignoring hidden files and folders."""

    def __init__(self, root: Path):
        super().__init__(root, is_valid_file=self.is_image)

    @staticmethod
    def is_image(path: str) -> bool:
        return not Path(path).name.startswith(".") and path.lower().endswith(datasets.folder.IMG_EXTENSIONS)

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        classes = sorted(p.name for p in Path(directory).iterdir() if p.is_dir() and not p.name.startswith("."))
        if not classes:
            raise FileNotFoundError(f"no class folder in {directory}")
        return classes, {name: i for i, name in enumerate(classes)}


def image_folders(
    directory: Path, splits: Collection[str], test_names: tuple[str, ...] = ("test", "val")
) -> list[ImageFolder]:
    """List <split>/<class>/* for each split; the test split is the first of `test_names` that exists.

    Raises:
        UserError: a split is missing or empty, or their classes differ.
    """
    folders = []
    for split in splits:
        names = test_names if split == "test" else (split,)
        root = next((directory / name for name in names if (directory / name).is_dir()), directory / names[0])
        try:
            folders.append(ImageFolder(root))
        except OSError as error:
            text = str(error).splitlines()[0]
            needed = " and ".join("test/ or val/" if split == "test" else f"{split}/" for split in splits)
            raise UserError(f"{root} is not an image folder ({text}): --data-dir must contain {needed}") from error
    if odd := set(folders[0].classes) ^ set(folders[-1].classes):
        raise UserError(f"{directory}: train and test must have the same classes, but only one has {min(odd)!r}")
    return folders
