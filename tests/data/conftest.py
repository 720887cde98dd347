import pytest
from captioned_pictures import COUNT, name_of, save

from ulx.data.openmoji import open_openmoji


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("ULX_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def openmoji(tmp_path_factory):
    """All of OpenMoji at 32 pixels, drawn once for all tests (seconds)."""
    return open_openmoji(32, cache_dir=str(tmp_path_factory.mktemp("openmoji")))


@pytest.fixture
def photos(tmp_path):
    """A folder of `captioned_pictures`, without their captions."""
    root = tmp_path / "photos"
    for number in range(COUNT):
        save(root / name_of(number), number)
    return root
