"""What OpenMoji's drawings show, in words: Unicode's names of the emoji, out of the package `emoji` (BSD).

Of the 4,495 drawings 3,953 have a name; the others are OpenMoji's own, or sequences that Unicode does not recommend.
"""

from collections.abc import Mapping
from functools import cache

from ulx.data.extras import optional

__all__ = ["caption"]

PRESENTATION = "\ufe0f"


def caption(stem: str, language: str = "en") -> str | None:
    """The name of the drawing with a file name such as `2764` ("red heart"), or None if it has none.

    `language` is one of the package's. Raises ValueError for another, ModuleNotFoundError without the package.
    """
    return _names(language).get("".join(chr(int(code, 16)) for code in stem.split("-")).replace(PRESENTATION, ""))


@cache
def _names(language: str) -> Mapping[str, str]:
    """Emoji without presentation selectors, which OpenMoji's file names mostly lack -> name."""
    emoji = optional("emoji", extra="text")
    if language not in emoji.LANGUAGES:
        raise ValueError(f"there are no captions in {language!r}: there are {', '.join(emoji.LANGUAGES)}")
    emoji.config.load_language(language)
    return {
        sequence.replace(PRESENTATION, ""): data[language].strip(":").replace("_", " ")
        for sequence, data in emoji.EMOJI_DATA.items()
        if language in data
    }
