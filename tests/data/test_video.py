"""Videos written without loss come back as they were, and what cannot be read says why."""

import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from video_files import LOSSLESS, noise, write_video

from ulx.data import video
from ulx.data.cache import UnreadableError
from ulx.data.image import read_image
from ulx.data.video import Clip, ShortError, find_videos, frames, read_clip, video_size


def decoded(path: Path) -> np.ndarray:
    return np.stack(list(frames(path)))


@pytest.fixture
def counted(tmp_path):
    """24 frames whose grey levels are ten times their index."""
    path = tmp_path / "counted.mkv"
    write_video(path, np.arange(24, dtype=np.uint8)[:, None, None, None] * np.full((16, 16, 3), 10, np.uint8))
    return path


@pytest.mark.parametrize("suffix", LOSSLESS)
def test_every_frame_comes_back(tmp_path, suffix):
    path, expected = tmp_path / f"a{suffix}", noise(5, 30, 46)
    write_video(path, expected)
    np.testing.assert_array_equal(decoded(path), expected)
    assert video_size(path) == (46, 30)


@pytest.mark.parametrize("name", ["a.webp", "a.GIF"])
def test_animations(tmp_path, name):
    """Of few colours, which a GIF keeps."""
    expected = noise(4, 16, 16) // 128 * 255
    first, *others = map(Image.fromarray, expected)
    first.save(tmp_path / name, save_all=True, append_images=others, lossless=True)
    np.testing.assert_array_equal(decoded(tmp_path / name), expected)
    np.testing.assert_array_equal(read_clip(tmp_path / name, Clip(2, 3), 16)[0], expected[[0, 3]])
    assert video_size(tmp_path / name) == (16, 16)


@pytest.mark.parametrize(("clip", "levels"), [(Clip(3, 1), [0, 10, 20]), (Clip(4, 7), [0, 70, 140, 210])])
def test_which_frames_a_clip_has(counted, clip, levels):
    found, smaller = read_clip(counted, clip, 16)
    assert (found.shape, found.dtype, smaller) == ((len(levels), 16, 16, 3), np.uint8, False)
    assert (found == np.array(levels)[:, None, None, None]).all()


def test_default_clip(counted):
    assert len(read_clip(counted, Clip(), 16)[0]) == 16
    assert Clip(16, 4).span == 61
    with pytest.raises(ValueError, match="stride must be at least 1, got 0"):
        Clip(16, 0)


def test_a_short_video_says_what_it_has(counted):
    assert len(read_clip(counted, Clip(24, 1), 16)[0]) == 24
    with pytest.raises(ShortError, match="has 24 frames, and 25 with a stride of 1 need 25"):
        read_clip(counted, Clip(25, 1), 16)
    assert len(read_clip(counted, Clip(2, 23), 16)[0]) == 2
    with pytest.raises(ShortError, match="has 24 frames, and 2 with a stride of 24 need 25"):
        read_clip(counted, Clip(2, 24), 16)


def test_nothing_is_read_after_the_last_frame(tmp_path):
    """Damage there does no harm, nor do the frames that it would take to find out."""
    path = tmp_path / "a.avi"
    write_video(path, noise(20, 64, 64))
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 2000] = bytes(2000)
    path.write_bytes(content)
    np.testing.assert_array_equal(read_clip(path, Clip(8, 1), 64)[0], noise(20, 64, 64)[:8])
    with pytest.raises(UnreadableError) as error:
        read_clip(path, Clip(20, 1), 64)
    assert type(error.value) is UnreadableError


@pytest.mark.parametrize(("height", "width"), [(75, 130), (130, 75), (20, 26), (32, 32)])
def test_frames_are_prepared_as_images(tmp_path, height, width):
    original = noise(3, height, width)
    write_video(tmp_path / "a.mkv", original)
    found, smaller = read_clip(tmp_path / "a.mkv", Clip(3), 32)
    assert smaller == (height < 32)
    for frame, image in zip(found, original, strict=True):
        Image.fromarray(image).save(tmp_path / "a.png")
        np.testing.assert_array_equal(frame, read_image(tmp_path / "a.png", 32)[0])


@pytest.mark.parametrize(
    ("rotation", "turn"),
    [
        ((90, False, False), np.rot90),
        ((180, False, False), lambda image: image[::-1, ::-1]),
        ((-90, False, False), lambda image: np.rot90(image, -1)),
        ((0, True, False), lambda image: image[:, ::-1]),
        ((0, False, True), lambda image: image[::-1]),
        ((90, True, False), lambda image: np.rot90(image)[:, ::-1]),
    ],
)
def test_a_display_matrix_turns_frames(tmp_path, rotation, turn):
    original = noise(2, 30, 46)
    write_video(tmp_path / "a.mp4", original, rotation)
    for found, frame in zip(frames(tmp_path / "a.mp4"), original, strict=True):
        np.testing.assert_array_equal(found, turn(frame))


def test_other_display_matrices_are_refused(tmp_path):
    write_video(tmp_path / "a.mp4", noise(2, 30, 46), (45, False, False))
    with pytest.raises(UnreadableError, match="only quarter turns"):
        decoded(tmp_path / "a.mp4")
    for matrix in ((1, 1, 0, 0, 1, 0), (2, 0, 0, 0, 2, 0), (0, 0, 0, 0, 0, 0)):  # a shear, a scale, nothing at all
        with pytest.raises(UnreadableError, match="only quarter turns"):
            video._turned(np.zeros((2, 2, 3), np.uint8), np.array([*matrix, 0, 0, 1 << 14], np.int64) << 16)


def test_transparency_is_on_white(tmp_path):
    original = np.concatenate([noise(2, 16, 16), np.zeros((2, 16, 16, 1), np.uint8)], axis=-1)
    original[:, :8, :, 3] = 255
    write_video(tmp_path / "a.mov", original, codec="png", pixels="rgba")
    found = decoded(tmp_path / "a.mov")
    np.testing.assert_array_equal(found[:, :8], original[:, :8, :, :3])
    assert (found[:, 8:] == 255).all()


@pytest.mark.parametrize("sampling", ["yuv420p", "yuv444p"])
@pytest.mark.parametrize(("matrix", "red", "blue"), [(5, 0.299, 0.114), (1, 0.2126, 0.0722), (2, 0.299, 0.114)])
@pytest.mark.parametrize("full", [False, True])
def test_colours_by_matrix_and_range(tmp_path, sampling, matrix, red, blue, full):
    """Flat colours against BT.601's and BT.709's formulas; 2 is a matrix that is not stated."""
    colours = np.random.default_rng(0).integers((60, 100, 100), (190, 156, 156), (40, 3))
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 46, 30, sampling
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 2 if full else 1
        for colour in colours:
            frame = av.VideoFrame(46, 30, sampling)
            frame.colorspace, frame.color_range = matrix, 2 if full else 1
            for plane, level in zip(frame.planes, colour, strict=True):
                plane.update(bytes([level]) * plane.buffer_size)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    low, luma, chroma = (0, 255, 255) if full else (16, 219, 224)
    y, u, v = (colours - [low, 128, 128]).T / np.array([[luma], [chroma], [chroma]])
    r, b = y + 2 * (1 - red) * v, y + 2 * (1 - blue) * u
    g = (y - red * r - blue * b) / (1 - red - blue)
    expected = np.clip(255 * np.stack([r, g, b], axis=-1), 0, 255)
    error = decoded(path) - expected[:, None, None]
    # Rounding to a level, and 1 % of one by the fixed-point coefficients; libswscale's default is up to 2.7 off.
    assert np.abs(error).max() < 0.52
    assert abs(error.mean()) < 0.1


def text(path):
    path.write_text("this is a text file")


def empty(path):
    path.write_bytes(b"")


def no_index(path):
    write_video(path, noise(3, 16, 16))
    path.write_bytes(path.read_bytes()[:-200])


def corrupt(path):
    """Damage inside a frame, which the decoder hides and notes."""
    write_video(path, noise(20, 64, 64))
    content = bytearray(path.read_bytes())
    half = len(content) // 2
    content[half : half + 2000] = bytes(byte ^ 0x5A for byte in content[half : half + 2000])
    path.write_bytes(content)


def sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def two_sizes(path):
    """Two streams of H.264, one after the other."""
    parts = []
    for side in (32, 48):
        write_video(path, noise(3, side, side), format="h264")
        parts.append(path.read_bytes())
    path.write_bytes(b"".join(parts))


DAMAGES = {
    text: "Invalid data",
    empty: "is empty",
    no_index: "End of file|Invalid data",
    corrupt: r"its frame \d+ is damaged",
    sound: "has no video stream",
    two_sizes: "change from 32×32 to 48×48 pixels",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_cannot_be_read_says_why(tmp_path, damage):
    path = tmp_path / "a.mp4"
    damage(path)
    with pytest.raises(UnreadableError, match=DAMAGES[damage]) as error:
        decoded(path)
    assert "a.mp4" not in str(error.value)
    with pytest.raises(UnreadableError):
        read_clip(path, Clip(40), 16)


@pytest.mark.parametrize("name", ["a.webp", "a.png"])
def test_an_animation_that_is_cut_off(tmp_path, name):
    first, *others = map(Image.fromarray, noise(4, 64, 64))
    first.save(tmp_path / name, save_all=True, append_images=others, lossless=True)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:20_000])
    with pytest.raises(UnreadableError):
        decoded(tmp_path / name)


@pytest.mark.parametrize("count", [1, 3])
def test_a_picture_for_those_who_know_no_animation_is_no_frame(tmp_path, count):
    expected = noise(count, 16, 16)
    options = {"default_image": True, "append_images": list(map(Image.fromarray, expected))}
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png", save_all=True, **options)
    np.testing.assert_array_equal(decoded(tmp_path / "a.png"), expected)
    assert find_videos(tmp_path) == (["a.png"] if count > 1 else [])


def test_a_playlist_under_a_video_s_name_is_not_followed_to_another_machine(tmp_path):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        address = f"http://127.0.0.1:{server.getsockname()[1]}/a.ts"
        lines = ("#EXTM3U", "#EXT-X-TARGETDURATION:5", "#EXTINF:5,", address, "#EXT-X-ENDLIST", "")
        (tmp_path / "a.mp4").write_text("\n".join(lines))
        with pytest.raises(UnreadableError):
            decoded(tmp_path / "a.mp4")
        with pytest.raises(BlockingIOError):
            server.accept()


def test_find_videos(tmp_path):
    still, moving = Image.new("RGB", (8, 8)), [Image.new("RGB", (8, 8), "red")]
    for name in ("a.MP4", "d/b.mkv", "notes.txt", ".hidden.mp4", "c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    for name in ("still.gif", "still.webp"):
        still.save(tmp_path / name)
    for name in ("moving.gif", "d/moving.webp", "moving.png"):
        still.save(tmp_path / name, save_all=True, append_images=moving)
    still.save(tmp_path / "still.png")
    # An empty PNG is what the other PNGs are.
    assert find_videos(tmp_path) == ["a.MP4", "c.png", "d/b.mkv", "d/moving.webp", "moving.gif", "moving.png"]
    (tmp_path / "moving.png").unlink()
    assert find_videos(tmp_path) == ["a.MP4", "d/b.mkv", "d/moving.webp", "moving.gif"]
    (tmp_path / "d" / "e.gif").write_bytes(b"GIF")
    with pytest.raises(ValueError, match=r"d/e\.gif cannot be read \(is no image that Pillow knows\): repair"):
        find_videos(tmp_path)


def test_without_pyav_the_extra_is_named(counted, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    for function in (decoded, video_size, lambda path: read_clip(path, Clip(), 16)):
        with pytest.raises(ModuleNotFoundError, match=r'av is not installed: pip install "ulx\[video\]"'):
            function(counted)
