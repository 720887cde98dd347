import numpy as np
import pytest

from ulx.data.record import pack, unpack

EXAMPLES = {
    "image": {"image": np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3), "label": np.asarray(7, np.int32)},
    "clip": {"video": np.arange(4 * 2 * 2 * 3, dtype=np.uint8).reshape(4, 2, 2, 3), "fps": np.asarray(12.5)},
    "latent": {"z": np.linspace(-1, 1, 24, dtype=np.float16).reshape(2, 3, 4), "flipped": np.asarray(True)},
    # An odd number of bytes first, so that the floats start at an unaligned address.
    "unaligned": {"a": np.arange(3, dtype=np.uint8), "b": np.arange(5, dtype=np.float32)},
    "several": {"a": np.arange(3, dtype=np.float64), "b": np.arange(4, dtype=np.int16), "c": np.asarray(-5)},
    "nothing": {"tokens": np.zeros((0, 8), np.int64), "label": np.asarray(0, np.int32)},
    "not contiguous": {"image": np.arange(12, dtype=np.int16).reshape(3, 4)[:, ::-1]},
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_survives_exactly(name):
    example, again = EXAMPLES[name], unpack(pack(EXAMPLES[name]))
    assert list(again) == list(example)
    for field, array in example.items():
        assert (again[field].dtype, again[field].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(again[field], array)
        assert not again[field].flags.writeable  # views of the record: nobody may change the cache's bytes


@pytest.mark.parametrize("value", ["a caption", np.array([{}]), np.array(["a", "b"])])
def test_what_is_no_array_of_numbers_is_refused_by_name(value):
    with pytest.raises(TypeError, match="'text' has dtype"):
        pack({"label": np.asarray(1), "text": value})
