"""Tokenising: against a plain greedy one written from the vocabulary, and whatever people write as captions."""

import re

import numpy as np
import pytest

from ulx.packaged import packaged
from ulx.text import wordpiece
from ulx.text.wordpiece import INSTALL, PACKAGE, WordPiece

CLS, SEP, UNK = 101, 102, 100


@pytest.fixture(scope="module")
def vocabulary(minilm_package) -> dict[str, int]:
    file = packaged(PACKAGE, "model/vocab.txt", install=INSTALL)
    return {piece: i for i, piece in enumerate(file.read_text(encoding="utf-8").splitlines())}


@pytest.fixture(scope="module")
def pieces(minilm_package) -> WordPiece:
    return WordPiece(32)


def kept(pieces: WordPiece, caption: str) -> list[int]:
    ids, mask = pieces([caption])
    assert not ids[0][~mask[0]].any()
    return ids[0][mask[0]].tolist()


def greedy(caption: str, vocabulary: dict[str, int]) -> list[int]:
    """The longest known piece first, of the words of an ASCII caption."""
    found = [CLS]
    for word in re.findall(r"[a-z0-9]+|[^a-z0-9\s]", caption.lower()):
        rest, prefix = word, ""
        while rest:
            size = next(n for n in range(len(rest), 0, -1) if prefix + rest[:n] in vocabulary)
            found.append(vocabulary[prefix + rest[:size]])
            rest, prefix = rest[size:], "##"
    return [*found, SEP]


@pytest.mark.parametrize(
    "caption",
    ["a red heart", "Woman Scientist: medium-dark skin tone", "hyperventilating hippogriffs, 1/2 off!", "Q & A"],
)
def test_ascii_captions(pieces, vocabulary, caption):
    assert kept(pieces, caption) == greedy(caption, vocabulary)


def test_names_of_emoji(vocabulary):
    from emoji import EMOJI_DATA

    names = sorted({data["en"].strip(":").replace("_", " ") for data in EMOJI_DATA.values()})
    names = [name for name in names if name.isascii()]
    assert len(names) > 3000
    ids, mask = WordPiece(64)(names)
    assert [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)] == [greedy(n, vocabulary) for n in names]


def test_ids_are_those_of_bert_uncased(pieces):
    # As in the published vocabulary of bert-base-uncased.
    assert kept(pieces, "hello world") == [CLS, 7592, 2088, SEP]
    assert kept(pieces, "HELLO   Wörld\n") == [CLS, 7592, 2088, SEP]


@pytest.mark.parametrize("caption", ["", " ", "\n\t", "\u200d\ufe0f"])
def test_empty_captions_are_two_tokens(pieces, caption):
    assert kept(pieces, caption) == [CLS, SEP]


@pytest.mark.parametrize("caption", ["red heart " * 100_000, "x" * 1_000_000, "心" * 10_000, "😀" * 10_000])
def test_very_long_captions_are_cut_and_closed(pieces, caption):
    ids = kept(pieces, caption)
    assert len(ids) in (3, 32)  # one endless word is one [UNK]
    assert (ids[0], ids[-1]) == (CLS, SEP)
    assert ids == kept(pieces, caption[:5_000])


def test_other_scripts_and_emoji(pieces, vocabulary):
    assert kept(pieces, "水心") == [CLS, vocabulary["水"], vocabulary["心"], SEP]
    assert kept(pieces, "赤い水") == [CLS, UNK, vocabulary["い"], vocabulary["水"], SEP]
    assert kept(pieces, "сердце")[1:-1] != [UNK]
    assert kept(pieces, "a 😀 b") == [CLS, vocabulary["a"], UNK, vocabulary["b"], SEP]
    assert kept(pieces, "👩‍🔬") == [CLS, UNK, SEP]
    assert kept(pieces, "\ud83d a") == kept(pieces, "? a")  # half of a surrogate pair


def test_one_caption_does_not_depend_on_the_others(pieces):
    captions = ["", "a red heart", "dog " * 100, "😀"]
    ids, mask = pieces(captions)
    assert ids.shape == mask.shape == (4, 32)
    for row, caption in enumerate(captions):
        np.testing.assert_array_equal(ids[row][mask[row]], kept(pieces, caption))
    ids, mask = pieces([])
    assert ids.shape == mask.shape == (0, 32)


def test_lengths(minilm_package):
    assert WordPiece(3)(["a red heart"])[0].tolist() == [[CLS, 1037, SEP]]
    with pytest.raises(ValueError, match="a caption of 2 tokens has no room"):
        WordPiece(2)


def test_a_damaged_file_is_refused(monkeypatch, tmp_path):
    damaged = tmp_path / "tokenizer.json"
    damaged.write_text("{}")
    monkeypatch.setattr(wordpiece, "packaged", lambda *_, **__: damaged)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not the file this code was written for"):
        WordPiece(8)


@pytest.mark.parity
def test_ids_against_transformers(minilm_package):
    """Its tokeniser in Python where it has one, else the one that it builds of the vocabulary alone."""
    transformers = pytest.importorskip("transformers")
    file = packaged(PACKAGE, "model/vocab.txt", install=INSTALL)
    theirs = transformers.BertTokenizer(str(file))
    captions = ["", "a red heart", "Wörld, 赤い心 сердце", "a 😀 b", "x" * 200, "dog " * 100]
    ids, _ = WordPiece(32)(captions)
    expected = theirs(captions, max_length=32, truncation=True, padding="max_length")["input_ids"]
    np.testing.assert_array_equal(ids, expected)
