"""A synthetic dataset that needs no download: 20 classes of textured shapes among clutter, 32x32 RGB.

A class is one of ten outlines filled with one of two textures. Position, size, rotation, stretch, colors, background,
clutter and an occluding bar are random. For quick checks and tests; results on it do not transfer to photos.
"""

from functools import cache

import numpy as np

SIZE = 32
SPLITS = ("train", "test")
BLOCK = 100  # images rendered at once
SHAPES = ("disc", "ellipse", "ring", "crescent", "triangle", "square", "hexagon", "trefoil", "star", "cross")
TEXTURES = ("striped", "checked")
CLASSES = [f"{texture}_{shape}" for texture in TEXTURES for shape in SHAPES]


@cache  # a run that trains its teacher loads the dataset twice
def synthetic_images(n: int, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The first `n` images uint8 [n, 32, 32, 3] of split "train" or "test", and their labels int64 [n].

    Classes alternate, so every prefix is balanced.
    """
    labels = np.arange(n) % len(CLASSES)
    seed = SPLITS.index(split)
    # Each block has its own generator and is rendered in full, so a smaller dataset is a prefix of a larger one.
    blocks = [
        _render(np.arange(i, i + BLOCK) % len(CLASSES), np.random.default_rng([seed, i])) for i in range(0, n, BLOCK)
    ]
    return np.concatenate(blocks)[:n], labels.astype(np.int64)


def _render(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    n = len(labels)
    x, y = np.meshgrid(*2 * [np.arange(SIZE, dtype=np.float32) - (SIZE - 1) / 2])

    # The background: coarse color noise and two small textured shapes as clutter.
    image = _coarse_noise(n, rng)
    for _ in range(2):
        shape, texture = rng.integers(0, len(SHAPES), n), rng.integers(0, len(TEXTURES), n)
        angle = rng.uniform(0, 2 * np.pi, n)
        dx, dy = _column(15 * np.cos(angle)), _column(15 * np.sin(angle))
        paste(image, x - dx, y - dy, shape, texture, rng.uniform(2.5, 5, n), rng)

    # The object and a bar that occludes part of it.
    shape, texture = labels % len(SHAPES), labels // len(SHAPES)
    dx, dy = _column(rng.uniform(-3, 3, n)), _column(rng.uniform(-3, 3, n))
    paste(image, x - dx, y - dy, shape, texture, rng.uniform(9, 13, n), rng)
    angle, offset = _column(rng.uniform(0, np.pi, n)), _column(rng.uniform(-12, 12, n))
    bar = np.clip(1.5 - np.abs(_rotate(x, y, angle)[0] - offset), 0, 1)[..., None]
    image += bar * (_random_color(n, rng) - image)

    image += 0.04 * rng.standard_normal(image.shape, np.float32)
    return (np.clip(image, 0, 1) * 255).astype(np.uint8)


def paste(
    image: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    shape: np.ndarray,
    texture: np.ndarray,
    radius: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Paint one textured shape per image, centered at (x, y) = (0, 0) with random rotation and stretch, in place.

    Args:
        image: float32 [n, H, W, 3] in [0, 1].
        x, y: pixel coordinates, [H, W] or [n, H, W].
        shape, texture: [n], indices into SHAPES and TEXTURES.
        radius: [n], in the units of x and y.

    Returns:
        The shape's coverage of each pixel, float32 [n, H, W, 1] in [0, 1].
    """
    n = len(image)
    angle, stretch = _column(rng.uniform(0, 2 * np.pi, n)), _column(rng.uniform(0.85, 1.18, n))
    u, v = _rotate(x, y, angle)
    coverage = np.clip(_signed_distance(u * stretch, v / stretch, shape, _column(radius)) + 0.5, 0, 1)[..., None]

    angle, phase = _column(rng.uniform(0, 2 * np.pi, n)), _column(rng.uniform(0, 2 * np.pi, n))
    frequency = 2 * np.pi / _column(rng.uniform(4.5, 7, n))
    stripes, cross_stripes = (np.sin(frequency * axis + phase) for axis in _rotate(x, y, angle))
    pattern = np.where(_column(texture) == TEXTURES.index("striped"), stripes, stripes * cross_stripes * 1.5)
    mix = np.clip(0.5 + 1.5 * pattern, 0, 1)[..., None]
    color_a = _random_color(n, rng)
    color_b = np.mod(color_a + 0.35 + 0.3 * _random_color(n, rng), 1)  # never close to color_a
    image += coverage * (color_a + mix * (color_b - color_a) - image)
    return coverage


def _rotate(x: np.ndarray, y: np.ndarray, angle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def _signed_distance(u: np.ndarray, v: np.ndarray, shape: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Approximate signed distance in pixels to the outline of each image's shape, positive inside: [n, H, W]."""
    distances = np.empty(u.shape)  # float64, like `polygon`
    for i in np.unique(shape):
        chosen = shape == i
        distances[chosen] = _distance_to(SHAPES[i], u[chosen], v[chosen], radius[chosen])
    return distances


def _distance_to(name: str, u: np.ndarray, v: np.ndarray, radius: np.ndarray) -> np.ndarray:
    r, theta = np.hypot(u, v), np.arctan2(v, u)

    def polygon(sides):
        sector = np.mod(theta, 2 * np.pi / sides) - np.pi / sides
        return radius * 1.1 * np.cos(np.pi / sides) - r * np.cos(sector)

    distances = {
        "disc": lambda: radius - r,
        "ellipse": lambda: radius - np.hypot(u * 0.8, v * 1.9),
        "ring": lambda: np.minimum(radius - r, r - 0.55 * radius),
        "crescent": lambda: np.minimum(radius - r, np.hypot(u - 0.5 * radius, v) - 0.75 * radius),
        "triangle": lambda: polygon(3),
        "square": lambda: polygon(4),
        "hexagon": lambda: polygon(6),
        "trefoil": lambda: radius * (0.7 + 0.35 * np.cos(3 * theta)) - r,
        "star": lambda: radius * (0.75 + 0.3 * np.cos(5 * theta)) - r,
        "cross": lambda: np.minimum(radius - np.maximum(abs(u), abs(v)), 0.35 * radius - np.minimum(abs(u), abs(v))),
    }
    return distances[name]()


def _random_color(n: int, rng: np.random.Generator) -> np.ndarray:
    return rng.random((n, 1, 1, 3), np.float32)


def _coarse_noise(n: int, rng: np.random.Generator) -> np.ndarray:
    """A 5x5 grid of random colors, bilinearly upsampled: [n, 32, 32, 3]."""
    grid = 0.25 + 0.5 * rng.random((n, 5, 5, 3), np.float32)
    position = np.linspace(0, 4, SIZE, dtype=np.float32)
    low = np.minimum(position.astype(int), 3)
    weight = position - low.astype(np.float32)
    rows = grid[:, low] * (1 - weight)[:, None, None] + grid[:, low + 1] * weight[:, None, None]
    return rows[:, :, low] * (1 - weight)[:, None] + rows[:, :, low + 1] * weight[:, None]


def _column(values: np.ndarray) -> np.ndarray:
    """[n] -> [n, 1, 1], floats as float32."""
    values = np.asarray(values)
    return values.astype(np.float32 if values.dtype.kind == "f" else values.dtype)[:, None, None]
