"""The CLIP score: 100 times the cosine between CLIP's vectors of an image and of its caption, per pair.

It is not clipped: a pair may score below 0. What papers report as a CLIP score, Unified Latents among them (27.1, for
example, in its Tab. 1), is the mean of this number. CLIPScore, as Hessel et al. (2021) define it, is another one,
2.5 · max(cos, 0): 0.68 where this one is 27.1.

Weights: no package carries them, so the user names a folder, `load(folder)`, in Hugging Face's layout: `config.json`,
`model.safetensors` and `tokenizer.json`. The number depends on which network it is, of what size and by whose weights,
and numbers of two are not to be compared: `Clip.definition` tells which one it was.

Where implementations go apart:

* Images are resized as PIL does it to uint8, bicubic with antialiasing, the shorter side to the network's size (224),
  and cropped in the middle, where one pixel is too many the last one: transformers' CLIPImageProcessor on PIL. A resize
  of floats, or by torchvision, gives other pixels.
* Captions are tokenised as they are, by `tokenizer.json`, and cut to the network's 77 tokens with the end token kept.
  There is no prompt before them (Hessel et al. have "A photo depicts"), and ftfy mends nothing.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int32, Num, UInt8

from ulx.data.extras import optional
from ulx.metrics.clip import CLIP, LEGACY_EOS, MEAN, STD, from_arrays, settings
from ulx.progress import Progress
from ulx.sharding import BATCH, WHOLE, make_mesh, on_host, place, place_rows
from ulx.text.wordpiece import readable

__all__ = ["DEFINITION", "FILES", "METRIC", "Clip", "definitions", "load", "prepare", "score"]

METRIC = "clip_score"
DEFINITION = """\
100 times the cosine between CLIP's vectors of an image and of its caption, not clipped, mean over pairs; the image \
resized by PIL's bicubic on uint8, antialiased, and cropped in the middle. Not CLIPScore (Hessel et al. 2021), which \
is 2.5·max(cos, 0)"""
FILES = ("config.json", "model.safetensors", "tokenizer.json")
"""What is read of a folder; and preprocessor_config.json is looked at, where there is one."""

_LETTERS = {(768, 12): "B", (1024, 24): "L"}


@dataclass(frozen=True, eq=False)
class Clip:
    """A CLIP with its tokeniser. Made by `load`."""

    network: CLIP
    tokenizer: Any
    """Of the library `tokenizers`; it cuts captions and does not fill them up."""
    sha256: str
    """Of model.safetensors."""
    config_sha256: str
    """Of what is taken of config.json: the rest of it may change, and the score stays."""
    tokenizer_sha256: str

    @property
    def metric(self) -> str:
        """The score's name."""
        return METRIC

    @property
    def size(self) -> int:
        """Pixels each way of what the network sees."""
        return self.network.image.size

    @property
    def definition(self) -> str:
        """Which network, weights, configuration, tokeniser and preprocessing."""
        image = self.network.image
        shape = image.positions.shape[1], len(image.layers)
        name = f"ViT-{_LETTERS.get(shape, '{}x{}'.format(*shape))}/{len(image.patches)}"
        return (
            f"clip {name} {self.sha256[:16]} {image.layers[0].activation} config {self.config_sha256[:16]} "
            f"tokenizer {self.tokenizer_sha256[:16]} pil-bicubic-uint8-{self.size} centre-crop v1"
        )

    def tokens(self, captions: Sequence[str]) -> Int32[np.ndarray, "b n"]:
        """Ids, each row filled up to the longest one's by its own end token, behind which nothing counts."""
        rows = [each.ids for each in self.tokenizer.encode_batch([readable(caption) for caption in captions])]
        longest = max(map(len, rows), default=0)
        return np.array([row + row[-1:] * (longest - len(row)) for row in rows], np.int32).reshape(len(rows), longest)


def definitions(network: Clip) -> dict[str, dict[str, Any]]:
    """What the score is, by its name, and by which weights."""
    weights = {"definition": network.definition, "sha256": network.sha256}
    return {METRIC: {"definition": DEFINITION, "network": weights}}


def score(
    network: Clip,
    images: Num[Array, "..."] | Num[np.ndarray, "..."],
    captions: Sequence[str],
    batch_size: int = 64,
) -> Float[np.ndarray, " n"]:
    """100 · cos of each image, `n h w 3` in uint8 of any size, and its caption; showing progress.

    Each device takes an equal part of every batch; neither their number nor `batch_size` changes anything beyond
    rounding. Raises ValueError for other images, none, or not a caption for each, ModuleNotFoundError without Pillow.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images must be uint8 `n h w 3`, got {images.dtype} of shape {images.shape}")
    if isinstance(captions, str) or len(captions) != len(images) or not len(images):
        given = "one text" if isinstance(captions, str) else f"{len(captions)} captions"
        raise ValueError(f"the CLIP score is of pairs, one or more: got {given} for {len(images)} images")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    ids, mesh = network.tokens(captions), make_mesh()
    placed = place(network.network, mesh)
    size = min(batch_size, len(images))
    padded = -(-size // mesh.size) * mesh.size
    found = []
    with Progress(METRIC, len(images), unit="pairs") as progress:
        for start in range(0, len(images), size):
            rows = slice(start, min(start + size, len(images)))
            count = rows.stop - start
            # The last pair again and again, up to the one shape that is compiled.
            batch = _filled(prepare(images[rows], network.size), padded), _filled(ids[rows], padded)
            cosines = _cosines(placed, place_rows(batch, mesh), mesh)
            found.append(on_host(cosines)[:count])  # when the devices are done, so progress counts finished pairs
            progress.advance(count)
    return 100.0 * np.concatenate(found)


def _filled(rows: np.ndarray, count: int) -> np.ndarray:
    return np.pad(rows, [(0, count - len(rows))] + [(0, 0)] * (rows.ndim - 1), mode="edge")


@eqx.filter_jit
def _cosines(network: CLIP, batch: Any, mesh: Mesh) -> Float[Array, " b"]:
    """The network on each device by itself, with its rows of a batch of images and ids."""
    arrays, static = eqx.partition(network, eqx.is_array)

    def each(arrays: Any, batch: tuple[UInt8[Array, "b s s 3"], Int32[Array, "b n"]]) -> Float[Array, " b"]:
        return eqx.combine(arrays, static)(*batch)

    return jax.shard_map(each, mesh=mesh, in_specs=(WHOLE, BATCH), out_specs=BATCH)(arrays, batch)


def prepare(images: UInt8[np.ndarray, "b h w 3"], size: int) -> UInt8[np.ndarray, "b s s 3"]:
    """The shorter side resized to `size` by PIL's bicubic, the middle cut out: what the network sees.

    Raises ModuleNotFoundError without Pillow (extra `data`).
    """
    pillow = optional("PIL.Image")
    height, width = images.shape[1:3]
    # Rounded down, as torchvision and transformers have it.
    height, width = (int(size * side / min(height, width)) for side in (height, width))
    top, left = (height - size) // 2, (width - size) // 2
    whole = (pillow.fromarray(image).resize((width, height), pillow.Resampling.BICUBIC) for image in images)
    return np.stack([np.asarray(image)[top : top + size, left : left + size] for image in whole])


# --- The folder ------------------------------------------------------------------------------------------


def load(folder: str | Path) -> Clip:
    """The CLIP of a folder that holds `FILES`.

    Raises FileNotFoundError, ModuleNotFoundError without safetensors or tokenizers (extra `text`), and ValueError,
    naming file and culprit, for files that are damaged, not a CLIP's, or not all of the same one.
    """
    folder = Path(folder)
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} holds no {' and no '.join(missing)}: name the folder of a CLIP in Hugging Face's layout. "
            "transformers' CLIPModel and AutoTokenizer make them of other files, by "
            "from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    config, weights, tokens = ((folder / name).read_bytes() for name in FILES)
    asked = settings(_json(config, folder / FILES[0]), str(folder / FILES[0]))
    network = from_arrays(_arrays(weights, folder / FILES[1]), asked, str(folder / FILES[1]))
    if (path := folder / "preprocessor_config.json").is_file():
        _check_preparation(_json(path.read_bytes(), path), network.image.size, path)
    tokenizer = _tokenizer(tokens, folder / FILES[2], network)
    taken = json.dumps(asked, sort_keys=True).encode()
    return Clip(network, tokenizer, *(hashlib.sha256(data).hexdigest() for data in (weights, taken, tokens)))


def _json(data: bytes, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{path} is no JSON, or a damaged one ({error}): get it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__}, expected settings by their names: get it again")
    return found


def _arrays(data: bytes, path: Path) -> dict[str, np.ndarray]:
    try:
        return optional("safetensors.numpy", extra="text").load(data)
    except optional("safetensors", extra="text").SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or is damaged ({error}): get it again") from error
    except KeyError as error:  # a type that NumPy has not
        raise ValueError(f"{path} holds numbers of type {error.args[0]}: save it as float32") from error


def _tokenizer(data: bytes, path: Path, network: CLIP) -> Any:
    """Cutting to the network's positions, and checked against its words and its end token."""
    try:
        tokenizer = optional("tokenizers", extra="text").Tokenizer.from_buffer(data)
    except ValueError as error:
        raise ValueError(f"{path} is no tokeniser, or a damaged one ({error}): get it again") from error
    tokenizer.no_padding()
    tokenizer.enable_truncation(len(network.text.positions))
    words, largest = len(network.text.tokens), max(tokenizer.get_vocab().values(), default=0)
    if largest >= words:
        raise ValueError(
            f"{path} knows ids up to {largest}, config.json's vocab_size is {words}: they are of two models"
        )
    ids = tokenizer.encode("").ids
    if len(ids) < 2 or int(network.text.ends(jnp.array([ids]))[0]) != len(ids) - 1:
        wanted = "the largest" if network.text.eos == LEGACY_EOS else network.text.eos
        raise ValueError(
            f"{path} makes {ids} of an empty caption, which must end in its only end token, id {wanted} by "
            "config.json's text_config.eos_token_id: they are of two models"
        )
    return tokenizer


def _check_preparation(config: dict[str, Any], size: int, path: Path) -> None:
    """Raises ValueError where a preprocessor_config.json asks for another preparation than `prepare`'s."""
    allowed: dict[str, list[Any]] = {f"do_{what}": [True] for what in ("resize", "center_crop", "rescale", "normalize")}
    allowed |= {"image_mean": [list(MEAN)], "image_std": [list(STD)], "resample": [3]}
    allowed |= {"size": [size, {"shortest_edge": size}], "crop_size": [size, {"height": size, "width": size}]}
    for name, values in allowed.items():
        if name in config and config[name] not in values:
            raise ValueError(
                f"{path}: {name} is {config[name]!r}, and CLIP's is {values[-1]!r}: its scores would not be comparable"
            )
