"""Pictures for tests, whole and damaged."""

import struct

import numpy as np
from PIL import Image

RED, GREEN, BLUE = (200, 30, 20), (20, 160, 40), (30, 40, 220)


def photo(width, height, seed=0):
    """A smooth random RGB image: JPEG and resizing change it little."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def plain(color, size=(40, 40)):
    return Image.new("RGB", size, color)


def text(path):
    path.write_text("this is a text file")


def empty(path):
    path.write_bytes(b"")


def truncated(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])


def bad_checksum(path):
    plain(RED).save(path)
    content = bytearray(path.read_bytes())
    content[content.index(b"IHDR") + 6] ^= 1
    path.write_bytes(content)


def too_large(path):
    """A header that promises 40,000 × 40,000 pixels: a decompression bomb."""
    plain(RED, (8, 8)).save(path, "BMP")
    content = bytearray(path.read_bytes())
    content[18:26] = struct.pack("<ii", 40_000, 40_000)
    path.write_bytes(content)


def floats(path):
    Image.fromarray(np.zeros((8, 8), np.float32)).save(path, "TIFF")


DAMAGES = {
    text: "is no image that Pillow knows",
    empty: "is empty",
    truncated: "truncated",
    bad_checksum: "is no image that Pillow knows",
    too_large: "decompression bomb",
    floats: "floating-point pixels, of no known range",
}
