"""Embeddings in files: read exactly, made once, and every way in which a file or a caption can be wrong named."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from ulx.text.encoders import TextEncoder
from ulx.text.precomputed import Precomputed, cached, embed, write

ODD = ["", " ", "red heart", "赤い心", "😀 a/b", "dog " * 50_000, "\ud83d half", "x\n\0y"]


class Letters:
    """A token a letter: (code, place), cut to `length`."""

    channels = 2

    def __init__(self, length: int = 6, definition: str = "letters"):
        self.length, self.definition, self.seen = length, definition, []

    def __call__(self, captions):
        self.seen.append(list(captions))
        tokens = np.zeros((len(captions), self.length, 2), np.float32)
        mask = np.zeros(tokens.shape[:2], bool)
        for row, caption in enumerate(captions):
            for at, letter in enumerate(f"^{caption}"[: self.length]):
                tokens[row, at], mask[row, at] = (ord(letter), at), True
        return tokens, mask


@pytest.fixture
def t5(tmp_path) -> Path:
    """As somebody else would write it."""
    path = tmp_path / "t5.safetensors"
    rng = np.random.default_rng(0)
    save_file(
        {
            "a cat": rng.normal(size=(3, 4)).astype(np.float32),
            "ein Hund, 犬": rng.normal(size=(5, 4)).astype(np.float64),
            "": rng.normal(size=(1, 4)).astype(np.float16),
            "half": rng.normal(size=(2, 4)).astype(ml_dtypes.bfloat16),
        },
        path,
    )
    return path


def test_a_file_of_any_encoder(t5):
    encoder = Precomputed(t5)
    assert isinstance(encoder, TextEncoder)
    assert (encoder.length, encoder.channels, len(encoder.captions)) == (5, 4, 4)
    tokens, mask = encoder(["a cat", "", "ein Hund, 犬", "a cat", "half"])
    assert tokens.dtype == np.float32
    assert mask.sum(axis=1).tolist() == [3, 1, 5, 3, 2]
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(tokens[0, :3], rng.normal(size=(3, 4)).astype(np.float32))
    np.testing.assert_array_equal(tokens[2], rng.normal(size=(5, 4)).astype(np.float32))
    np.testing.assert_array_equal(tokens[1, 0], rng.normal(size=4).astype(np.float16))
    np.testing.assert_array_equal(tokens[4, :2], rng.normal(size=(2, 4)).astype(ml_dtypes.bfloat16))
    assert not tokens[~mask].any()
    assert encoder([])[0].shape == (0, 5, 4)


@pytest.mark.parametrize("length", [2, 9])
def test_length_cuts_or_pads(t5, length):
    whole, _ = Precomputed(t5)(["ein Hund, 犬"])
    tokens, mask = Precomputed(t5, length)(["ein Hund, 犬"])
    assert tokens.shape == (1, length, 4)
    assert mask.sum() == min(length, 5)
    np.testing.assert_array_equal(tokens[mask], whole[0, :length])


def test_the_definition_is_of_the_content(t5, tmp_path):
    other = tmp_path / "other.safetensors"
    other.write_bytes(t5.read_bytes())
    assert Precomputed(other).definition == Precomputed(t5).definition
    data = bytearray(t5.read_bytes())
    data[-1] ^= 1
    other.write_bytes(data)
    assert Precomputed(other).definition != Precomputed(t5).definition


def test_missing_captions_are_named(t5):
    with pytest.raises(ValueError, match=r"t5\.safetensors has no embedding of the caption 'a dog'$"):
        Precomputed(t5)(["a cat", "a dog"])
    with pytest.raises(ValueError, match=r"of the caption 'b' and of 2 more$"):
        Precomputed(t5)(["b", "b", "c", "a cat", "d"])
    with pytest.raises(ValueError, match=r"no embedding of the caption 'xxx.{50,60} \.\.\.'$"):
        Precomputed(t5)(["x" * 10_000])


@pytest.mark.parametrize(
    ("array", "error"),
    [
        (np.zeros((3, 5), np.float32), r"bad\.safetensors: the embedding of '(bad|good)' is \d wide, others are \d"),
        (np.zeros(4, np.float32), r"bad\.safetensors: the embedding of 'bad' has shape \[4\], not tokens × channels"),
        (np.zeros((1, 3, 4), np.float32), r"the embedding of 'bad' has shape \[1, 3, 4\]"),
        (np.zeros((0, 4), np.float32), r"the embedding of 'bad' has shape \[0, 4\]"),
        (np.zeros((3, 4), np.int32), r"bad\.safetensors: the embedding of 'bad' is int32, not of real numbers"),
        (np.full((3, 4), np.nan, np.float32), r"bad\.safetensors: the embedding of 'bad' is not finite"),
        (np.full((3, 4), -np.inf, np.float16), r"the embedding of 'bad' is not finite"),
        (np.full((3, 4), 1e300), r"the embedding of 'bad' is not finite"),
    ],
)
def test_arrays_that_are_no_embeddings_are_named(tmp_path, array, error):
    path = tmp_path / "bad.safetensors"
    save_file({"good": np.ones((2, 4), np.float32), "bad": array}, path)
    with pytest.raises(ValueError, match=error):
        Precomputed(path)(["good", "bad"])


def test_files_that_are_none(t5, tmp_path):
    with pytest.raises(FileNotFoundError, match="absent is not there"):
        Precomputed(tmp_path / "absent")
    whole, broken = t5.read_bytes(), tmp_path / "broken.safetensors"
    for content in (b"", b"text" * 10, whole[:-1], whole[:100]):
        broken.write_bytes(content)
        with pytest.raises(ValueError, match=r"broken\.safetensors is no safetensors file, or is damaged"):
            Precomputed(broken)
    save_file({}, broken)
    with pytest.raises(ValueError, match=r"broken\.safetensors has no embeddings"):
        Precomputed(broken)


def test_each_distinct_caption_is_embedded_once_in_batches_of_one_shape():
    encoder = Letters()
    captions = ["b", "a", "long caption", "b", "", "a", "ccc"]
    found = embed(encoder, captions, batch_size=3)
    assert [len(batch) for batch in encoder.seen] == [3, 3]
    assert sorted({caption for batch in encoder.seen for caption in batch}) == sorted(set(captions)) == sorted(found)
    for caption, tokens in found.items():
        np.testing.assert_array_equal(tokens, [(ord(c), at) for at, c in enumerate(f"^{caption}"[:6])])


def test_odd_captions_survive(tmp_path):
    found = cached(Letters(), ODD, tmp_path, batch_size=4)
    tokens, mask = found(ODD)
    expected, expected_mask = Letters()([caption.replace("\ud83d", "?") for caption in ODD])
    np.testing.assert_array_equal(tokens, expected)
    np.testing.assert_array_equal(mask, expected_mask)
    assert found.definition == "letters"
    assert found.length == 6


def test_the_cache_is_made_once(tmp_path):
    first, again = Letters(), Letters()
    cached(first, ["a", "b", "a"], tmp_path)
    found = cached(again, ["b", "a"], tmp_path)  # the same captions
    assert (len(first.seen), len(again.seen)) == (1, 0)
    np.testing.assert_array_equal(found(["b"])[0], Letters()(["b"])[0])
    # Other captions, another encoder, or another length are another file.
    for encoder, captions in [
        (Letters(), ["a", "b", "c"]),
        (Letters(definition="other"), ["a", "b"]),
        (Letters(length=5), ["a", "b"]),
    ]:
        assert cached(encoder, captions, tmp_path).length == encoder.length
        assert len(encoder.seen) == 1
    assert len(list(tmp_path.iterdir())) == 4


def damaged_by_a_byte(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
    "damage", [damaged_by_a_byte, lambda data: data[:-1], lambda _: b"", lambda data: data[:8] + b"x" * 100]
)
def test_a_damaged_cache_is_named_and_made_anew(tmp_path, damage):
    captions = ["a", "b"]
    path = cached(Letters(), captions, tmp_path).path
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    encoder = Letters()
    with pytest.warns(UserWarning, match=rf"{path.name} is .*damaged.*: making it anew"):
        found = cached(encoder, captions, tmp_path)
    assert len(encoder.seen) == 1
    assert path.read_bytes() == whole
    np.testing.assert_array_equal(found(captions)[0], Letters()(captions)[0])
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_in_the_cache_that_another_wrote_is_not_trusted(tmp_path):
    path = cached(Letters(), ["a"], tmp_path).path
    save_file({"a": np.ones((2, 2), np.float32)}, path)
    with pytest.warns(UserWarning, match="it does not hold what was written: making it anew"):
        found = cached(Letters(), ["a"], tmp_path)
    np.testing.assert_array_equal(found(["a"])[0], Letters()(["a"])[0])


def test_nothing_is_left_where_making_it_fails(tmp_path, monkeypatch):
    class Fails(Letters):
        def __call__(self, captions):
            if self.seen:
                raise RuntimeError("out of memory")
            return super().__call__(captions)

    with pytest.raises(RuntimeError, match="out of memory"):
        cached(Fails(), ["a", "b"], tmp_path, batch_size=1)
    assert not list(tmp_path.iterdir())

    def no_room(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", no_room)
    with pytest.raises(OSError, match="no space left"):
        cached(Letters(), ["a"], tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_encoder_that_gives_nonsense_is_named(tmp_path):
    class Diverged(Letters):
        def __call__(self, captions):
            tokens, mask = super().__call__(captions)
            return tokens * np.where(np.array(captions) == "b", np.nan, 1.0)[:, None, None].astype(np.float32), mask

    with pytest.raises(ValueError, match="the embedding of 'b' is not finite"):
        cached(Diverged(), ["a", "b"], tmp_path)


def test_what_was_written_is_read(tmp_path):
    path = tmp_path / "new" / "mine.safetensors"
    write(path, {"a": np.ones((2, 3), np.float32)}, "mine v1")
    found = Precomputed(path)
    found.check()
    assert found.definition == "mine v1"
    np.testing.assert_array_equal(found["a"], np.ones((2, 3)))
