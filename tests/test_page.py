"""The page's building blocks."""

import numpy as np

from ulx.report import page


def test_tiles_enlarge_by_whole_numbers():
    style = page.tiles(np.zeros((1, 40, 40, 3), np.uint8), alt=["a"])
    assert "--width: 40; --large: 3; --small: 2" in style
    assert "--large: 1; --small: 1" in page.tiles(np.zeros((1, 200, 200, 3), np.uint8), alt=["a"])
    assert "image-rendering: pixelated" in page.STYLE
