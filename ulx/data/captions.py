"""What OpenMoji's drawings show, in words: Unicode's names of the emoji, out of the package `emoji` (BSD).

Of the 4,495 drawings 3,953 have a name; the others are OpenMoji's own, or sequences that Unicode does not recommend.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

from ulx.data.extras import optional

__all__ = ["caption"]


def caption(stem: str, language: str = "en") -> str | None:
    """The name of the drawing with a file name such as `2764` ("red heart"), or None if it has none.

    `language` is one of the package's. Raises ValueError for another, ModuleNotFoundError without the package.
    """
    # The package has every emoji with its presentation selectors and without them.
    emoji = "".join(chr(int(code, 16)) for code in stem.split("-"))
    name = _emoji(language).get(emoji, {}).get(language)
    return None if name is None else name.strip(":").replace("_", " ")


@cache
def _emoji(language: str) -> Mapping[str, Mapping[str, Any]]:
    package = optional("emoji", extra="text")
    if language not in package.LANGUAGES:
        raise ValueError(f"there are no captions in {language!r}: there are {', '.join(package.LANGUAGES)}")
    package.config.load_language(language)
    return package.EMOJI_DATA
