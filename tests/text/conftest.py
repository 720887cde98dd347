from importlib.util import find_spec

import pytest

from ulx.text.wordpiece import INSTALL, PACKAGE


@pytest.fixture(scope="session")
def minilm_package() -> None:
    """Skips without MiniLM's files, which no extra brings."""
    if find_spec(PACKAGE) is None:
        pytest.skip(f"pip install {INSTALL}")
