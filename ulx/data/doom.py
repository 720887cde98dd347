"""Embedded video of a richer world: walks through Doom's deathmatch arena, in the first person, by ViZDoom.

A clip is rendered when it is asked for, from (split, index) alone: the same on every machine with this version of
ViZDoom, none of them stored. Whoever walks goes forward and turns by a smoothed random amount; other fighters are
about. The held-out clips begin elsewhere and turn otherwise, in the same arena.

A game runs in a process of its own, one for each process that reads; threads take turns.
"""

import dataclasses
import functools
import hashlib
import json
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np

from ulx.data.extras import optional
from ulx.data.image import center_crop
from ulx.data.source import Dataset, Example, Split, check_resolution
from ulx.data.split import clip_counts

__all__ = ["Walks", "open_doom"]

VERSION = 1  # of what a clip looks like: a change is another data set
SCENARIO = "deathmatch"
TICS = 2
"""Steps of the game, of 1/35 s, from one frame to the next."""
STEADINESS, TURN = 0.8, 2.5
"""Of a turn, in degrees: what is kept of the last one, and the standard deviation of what is added."""

_turns = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Walks:
    """Clips `{"image": uint8 t h w 3, "label": 0}`; a `Source`."""

    frames: int
    resolution: int
    length: int
    seed: int
    """With the index of a clip, all that it follows from."""

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.length:
            raise IndexError(f"clip {index} of {self.length}")
        rng = np.random.default_rng((self.seed, index))
        image_module = optional("PIL.Image")
        with _turns:
            views = _walk(_game(), rng, self.frames)
        clip = np.stack([center_crop(image_module.fromarray(view), self.resolution) for view in views])
        return {"image": clip, "label": np.zeros((), np.int32)}


def open_doom(resolution: int = 32, *, frames: int = 16, limit: int | None = None) -> Dataset:
    """The data set; `limit` clips in all, in the splits' own proportion.

    Raises `ValueError` (a size out of range), `ImportError` without the package.
    """
    check_resolution(resolution)
    if frames < 1:
        raise ValueError(f"a clip has at least one frame, got frames={frames}")
    version = optional("vizdoom", extra="doom").__version__
    splits = [
        Split(
            Walks(frames, resolution, length, seed),
            tuple(f"{seed}-{index:05d}" for index in range(length)),
            np.zeros(length, np.int32),
        )
        for seed, length in enumerate(clip_counts(limit))
    ]
    facts = [VERSION, version, SCENARIO, TICS, STEADINESS, TURN, resolution, frames, [len(split) for split in splits]]
    return Dataset(
        name="vizdoom",
        resolution=resolution,
        class_names=("clips",),
        train=splits[0],
        validation=splits[1],
        fingerprint=hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16],
    )


def _walk(game: Any, rng: np.random.Generator, frames: int) -> list[np.ndarray]:
    """The views of a new episode, `120 160 3` each, after some way."""
    game.set_seed(int(rng.integers(2**31)))
    game.new_episode()
    turn = rng.normal(0, 2 * TURN)
    for _ in range(int(rng.integers(10, 60))):
        game.make_action([1, turn])
    views = []
    for _ in range(frames):
        if game.is_episode_finished():  # shot: what is seen last stays
            views.append(views[-1] if views else np.zeros((120, 160, 3), np.uint8))
            continue
        views.append(game.get_state().screen_buffer.copy())
        turn = STEADINESS * turn + rng.normal(0, TURN)
        game.make_action([1, turn], TICS)
    return views


@functools.cache
def _game() -> Any:
    vizdoom = optional("vizdoom", extra="doom")
    game = vizdoom.DoomGame()
    game.load_config(str(Path(vizdoom.scenarios_path) / f"{SCENARIO}.cfg"))
    game.set_doom_config_path(str(Path(tempfile.mkdtemp(prefix="vizdoom-")) / "vizdoom.ini"))  # not where we are
    game.set_window_visible(False)
    game.set_sound_enabled(False)
    game.set_screen_resolution(vizdoom.ScreenResolution.RES_160X120)
    game.set_screen_format(vizdoom.ScreenFormat.RGB24)
    game.set_available_buttons([vizdoom.Button.MOVE_FORWARD, vizdoom.Button.TURN_LEFT_RIGHT_DELTA])
    game.set_episode_timeout(1_000_000)
    for shown in (game.set_render_hud, game.set_render_weapon, game.set_render_crosshair):
        shown(False)
    left = Path("_vizdoom")  # the engine makes this folder where we are, and has no use for it
    was_there = left.exists()
    game.init()
    if not was_there and left.is_dir() and not any(left.iterdir()):
        left.rmdir()
    return game
