import numpy as np
import pytest
from pictures import BLUE, DAMAGES, GREEN, RED, photo, plain
from PIL import Image

from ulx.data.cache import UnreadableError
from ulx.data.image import center_crop, read_image


def pixels(path, resolution=32):
    return read_image(path, resolution)[0]


def test_large_images_are_averaged_down():
    """Four times too large: each pixel is the mean of 4×4. Both halvings round once along each axis: 4 halves."""
    noise = np.random.default_rng(1).integers(0, 256, (128, 128, 3), np.uint8)
    means = noise.reshape(32, 4, 32, 4, 3).mean((1, 3))
    assert np.abs(center_crop(Image.fromarray(noise), 32) - means).max() <= 2


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (129, 67), (50, 301), (33, 32), (20, 31), (45, 90), (500, 333)])
def test_the_middle_square_is_kept_at_its_proportions(size):
    """On ramps the picture is known: a pixel shows the value at its place in the middle square of the original."""
    width, height = size
    square = min(size)
    x, y = np.meshgrid((np.arange(width) + 0.5 - width / 2) / square, (np.arange(height) + 0.5 - height / 2) / square)
    ramps = np.stack([128 + 200 * np.clip(x, -0.5, 0.5), 128 + 200 * np.clip(y, -0.5, 0.5), 0 * x], -1)
    cropped = center_crop(Image.fromarray(np.round(ramps).astype(np.uint8)), 32)
    assert (cropped.shape, cropped.dtype) == ((32, 32, 3), np.uint8)
    place = 128 + 200 * ((np.arange(32) + 0.5) / 32 - 0.5)
    # One pixel is 6.25 levels: sizes are rounded to whole pixels in each halving, and so is the crop.
    assert np.abs(cropped[..., 0] - place[None, :]).max() < 1.2 * 6.25
    assert np.abs(cropped[..., 1] - place[:, None]).max() < 1.2 * 6.25


def test_the_crop_is_the_middle():
    image = plain(RED, (96, 32))
    image.paste(BLUE, (32, 0, 64, 32))
    assert (center_crop(image, 32) == BLUE).all()


LOSSLESS = {
    "a.png": {},
    "a.bmp": {},
    "a.tiff": {},
    "a.ppm": {},
    "a.webp": {"lossless": True},
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_formats(tmp_path, name):
    photo(32, 32).save(tmp_path / name, **LOSSLESS[name])
    np.testing.assert_array_equal(pixels(tmp_path / name), np.array(photo(32, 32)))


@pytest.mark.parametrize("name", ["a.jpg", "a.JPEG", "a.avif"])
def test_lossy_formats(tmp_path, name):
    photo(32, 32).save(tmp_path / name, quality=95)
    difference = pixels(tmp_path / name).astype(int) - np.array(photo(32, 32))
    assert np.sqrt(np.mean(difference**2)) < 6  # chroma is stored at half the resolution


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [plain(color).quantize() for color in (RED, GREEN, BLUE)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (pixels(tmp_path / "a.gif") == RED).all()


def test_grey_and_black_and_white(tmp_path):
    ramp = np.arange(32, dtype=np.uint8)[None].repeat(32, 0) * 8
    Image.fromarray(ramp).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(pixels(tmp_path / "grey.png"), ramp[..., None].repeat(3, -1))
    Image.fromarray(ramp > 100).save(tmp_path / "two.png")
    np.testing.assert_array_equal(pixels(tmp_path / "two.png")[..., 1], np.where(ramp > 100, 255, 0))


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bits(tmp_path, name):
    """The whole range is used: Pillow's own conversion would make all but the darkest 255 levels white."""
    ramp = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    Image.fromarray(ramp).save(tmp_path / name)
    np.testing.assert_array_equal(pixels(tmp_path / name)[..., 0], np.round(ramp / 257))


def test_transparency_lies_on_white(tmp_path):
    half = np.zeros((32, 32, 4), np.uint8)
    half[..., 0] = 200
    half[:, 16:, 3] = 255
    half[:16, :16, 3] = 128
    Image.fromarray(half).save(tmp_path / "rgba.png")
    expected = np.full((32, 32, 3), 255, np.uint8)
    expected[:, 16:] = (200, 0, 0)
    expected[:16, :16] = np.round(255 + (np.array([200, 0, 0]) - 255) * 128 / 255)
    assert np.abs(pixels(tmp_path / "rgba.png").astype(int) - expected).max() <= 1  # Pillow blends in integers

    grey = Image.fromarray(half).convert("LA")
    grey.save(tmp_path / "la.png")
    assert (pixels(tmp_path / "la.png")[16:, :16] == 255).all()
    assert (pixels(tmp_path / "la.png")[:, 16:] == np.array(grey)[0, 20, 0]).all()

    palette = Image.fromarray(np.array([[0, 1]], np.uint8).repeat(32, 0).repeat(16, 1), "P")
    palette.putpalette([*RED, *GREEN])
    palette.save(tmp_path / "p.png", transparency=0)
    assert (pixels(tmp_path / "p.png")[:, :16] == 255).all()
    assert (pixels(tmp_path / "p.png")[:, 16:] == GREEN).all()

    plain(RED).save(tmp_path / "key.png", transparency=RED)  # one colour declared transparent
    assert (pixels(tmp_path / "key.png") == 255).all()


def test_cmyk(tmp_path):
    Image.new("CMYK", (40, 40), (0, 0, 0, 0)).save(tmp_path / "white.jpg", quality=95)
    Image.new("CMYK", (40, 40), (0, 255, 255, 0)).save(tmp_path / "red.jpg", quality=95)
    assert pixels(tmp_path / "white.jpg").min() >= 253
    assert np.abs(pixels(tmp_path / "red.jpg").astype(int) - (255, 0, 0)).max() <= 3


# EXIF's orientation: what must be done to the stored pixels so that the picture is upright.
UPRIGHT = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_photos_are_turned_upright(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = photo(32, 32)
    stored.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), UPRIGHT[orientation](np.array(stored)))


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_an_unreadable_file_says_why(tmp_path, damage):
    damage(tmp_path / "a.png")
    with pytest.raises(UnreadableError, match=DAMAGES[damage]):
        read_image(tmp_path / "a.png", 32)


def test_a_truncated_jpeg_is_unreadable(tmp_path):
    photo(400, 400).save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(UnreadableError, match="truncated"):
        read_image(tmp_path / "a.jpg", 32)
