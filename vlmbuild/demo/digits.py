"""Handwritten digits on canvases of varying size and shape: the data of the zoo checkpoints and of the demo.

The glyphs are scikit-learn's copy of the UCI optical digits set (see `digits.LICENSE`). A sample is a white canvas with
one to four digits in reading order, and the digits. Glyphs are split into a training part and a held-out part, so that no
held-out canvas shows a glyph of the training part.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from vlmbuild.util.validation import one_of
from vlmbuild.zoo import DIGITS

SPLIT_SEED = 0
HELD_OUT_FRACTION = 0.15
CELL = 28
"""Pixels between neighbouring digits."""

LAYOUTS = ((1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (2, 2), (1, 4), (4, 1), (2, 3), (3, 2))
"""(rows, columns) of cells; digits fill them row by row."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One canvas (RGB), the digits on it in reading order, and their centres as fractions (x, y) of width and height."""

    image: Image.Image
    digits: tuple[int, ...]
    centres: tuple[tuple[float, float], ...]


class Digits:
    """A reproducible stream of samples.

    Args:
        split: "train" or "held_out".
        seed: Two streams with the same split and seed yield the same samples.
        augment: Rotate, scale and shade the glyphs (training only; held-out glyphs are drawn as they are).

    Raises:
        UsageError: There is no such split.
    """

    def __init__(self, split: str, seed: int, *, augment: bool = False) -> None:
        one_of("split", split, ("train", "held_out"))
        with np.load(DIGITS, allow_pickle=False) as data:
            images, labels = data["images"], data["labels"]
        order = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
        held_out = int(len(labels) * HELD_OUT_FRACTION)
        chosen = {"train": order[held_out:], "held_out": order[:held_out]}[split]
        self.images, self.labels = images[chosen], labels[chosen]
        self.random = np.random.default_rng(seed)
        self.augment = augment

    def take(self, count: int) -> list[Sample]:
        """Return the next `count` samples."""
        return [self._sample() for _ in range(count)]

    def _sample(self) -> Sample:
        random = self.random
        count = int(random.integers(1, 5))
        fitting = [shape for shape in LAYOUTS if shape[0] * shape[1] >= count > (shape[0] - 1) * shape[1]]
        rows, columns = fitting[random.integers(len(fitting))]
        height, top = self._side(rows)
        width, left = self._side(columns)
        canvas = np.full((height, width), 255, np.uint8)
        chosen = random.integers(len(self.labels), size=count)
        centres = []
        for index, glyph in enumerate(chosen):
            ink = self._ink(self.images[glyph])
            row, column = divmod(index, columns)
            y = top + row * CELL + int(random.integers(CELL - ink.shape[0] + 1))
            x = left + column * CELL + int(random.integers(CELL - ink.shape[1] + 1))
            region = canvas[y : y + ink.shape[0], x : x + ink.shape[1]]
            np.minimum(region, 255 - ink, out=region)
            centres.append(((x + ink.shape[1] / 2) / canvas.shape[1], (y + ink.shape[0] / 2) / canvas.shape[0]))
        digits = tuple(int(self.labels[glyph]) for glyph in chosen)
        return Sample(Image.fromarray(canvas).convert("RGB"), digits, tuple(centres))

    def _side(self, cells: int) -> tuple[int, int]:
        """Return the pixels of a side with room for `cells`, and the start of the first cell."""
        room = max(cells + int(self.random.integers(2)), 2)
        slack = int(self.random.integers(9))
        start = CELL * int(self.random.integers(room - cells + 1)) + int(self.random.integers(slack + 1))
        return CELL * room + slack, start

    def _ink(self, glyph: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Scale an 8 x 8 glyph (0..16) to a 22..27 pixel image of ink (0..255)."""
        side = int(self.random.integers(22, 28))
        ink = Image.fromarray((glyph * 15.9375).astype(np.uint8))
        if not self.augment:
            return np.asarray(ink.resize((side, side), Image.Resampling.BILINEAR))
        random = self.random
        angle, shear, shift = random.uniform(-0.15, 0.15), random.uniform(-0.1, 0.1), random.uniform(-0.4, 0.4, 2)
        stretch = random.uniform(0.9, 1.12, 2) * 8 / side  # glyph pixels per drawn pixel
        rotation = np.array([[np.cos(angle), shear - np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        matrix = rotation * stretch[:, None]
        offset = 4 + shift - matrix.sum(axis=1) * side / 2  # the glyph's middle stays in the middle
        affine = (*matrix[0], offset[0], *matrix[1], offset[1])
        drawn = ink.transform((side, side), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
        return (np.asarray(drawn) * random.uniform(0.75, 1.0)).astype(np.uint8)
