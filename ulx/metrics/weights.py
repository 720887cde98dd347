"""Network weights out of files that other people made, read without running them.

A `.pth` file is a pickle, as are the dumps of arrays that JAX projects leave, and a pickle is a program. Two guards
stand before it: the file's sha256 must be the one written in our code (a file that the user names has the second guard
alone), and the unpickler resolves only the few names listed here, each to something of ours that builds an array. torch
is not needed.
"""

import contextlib
import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

__all__ = [
    "RestrictedUnpickler",
    "is_torch",
    "read_pickled_arrays",
    "read_torch",
    "read_torch_legacy",
    "read_torch_zip",
]


class Refused(ValueError):
    """A file is not what it should be, and the message names it."""


@contextlib.contextmanager
def _readable(source: str, kind: str) -> Iterator[None]:
    """A damaged file can make the standard library's readers raise anything; it becomes one error that names it."""
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        raise Refused(f"{source}: not {kind}, or a damaged one ({error})") from error


class RestrictedUnpickler(pickle.Unpickler):
    """An unpickler for which only the globals in `allowed`, `(module, name) -> object of ours`, exist.

    Any other raises a ValueError that names it. Persistent ids are refused too unless a subclass allows them.
    """

    def __init__(self, file: io.BufferedIOBase, allowed: Mapping[tuple[str, str], Any], source: str):
        super().__init__(file)
        self.allowed, self.source = allowed, source

    def find_class(self, module: str, name: str, /) -> Any:
        try:
            return self.allowed[module, name]
        except KeyError:
            raise Refused(
                f"{self.source}: refused to load {module}.{name}: a weight file may hold arrays, "
                "and this name is not among those that build them"
            ) from None

    def persistent_load(self, pid: Any, /) -> Any:
        raise Refused(f"{self.source}: refused an external reference, {pid!r}")


# --- The format that torch.save wrote before version 1.6 -------------------------------------------------
# Five pickles (magic number, protocol, system facts, the object, the storages' keys), then for each key its
# element count as int64 and its raw elements. Tensors are views (offset, shape, strides) into storages.

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_DTYPES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype
    count: int


@dataclass(frozen=True)
class _View:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild(storage: Any, offset: int, shape: Any, strides: Any, *_: Any) -> _View:
    """Stands in for torch's tensor constructor; the storages come later in the file, so it only takes notes."""
    if not isinstance(storage, _Storage):
        raise ValueError(f"a tensor over {storage!r}, which is no storage")
    return _View(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


_TORCH: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    **{("torch", name): np.dtype(code) for name, code in _DTYPES.items()},
}


class _TorchUnpickler(RestrictedUnpickler):
    def persistent_load(self, pid: Any, /) -> _Storage:
        match pid:
            # The older format ends with None, or with a view of the storage, which nobody wrote for a state dict.
            case ("storage", np.dtype() as dtype, str(key), _, int(count), *rest) if rest in ([], [None]):
                return _Storage(key, dtype, count)
        raise Refused(f"{self.source}: refused an external reference, {pid!r}")


def read_torch_legacy(data: bytes, source: str = "weights") -> dict[str, np.ndarray]:
    """A state dict written by `torch.save` before torch 1.6, as name -> array (a copy, contiguous).

    `source` names the file in errors. Raises ValueError for anything that is not such a file, is cut short,
    holds something other than named tensors, or asks for a name outside the allow-list.
    """

    def bad(why: str) -> NoReturn:
        raise Refused(f"{source}: {why}")

    file = io.BytesIO(data)

    def load() -> Any:
        return _TorchUnpickler(file, _TORCH, source).load()

    with _readable(source, "a legacy torch file"):
        if load() != _MAGIC or load() != _PROTOCOL:
            bad("not a legacy torch file")
        if load().get("little_endian") is not True:
            bad("written on a big-endian machine, which is not supported")
        state, keys = load(), load()

    if not isinstance(keys, list):
        bad("holds no state dict")
    declared = _storages(state, source)
    raw: dict[str, np.ndarray] = {}
    for key in keys:
        if key not in declared:
            bad(f"storage {key!r} belongs to no tensor")
        storage, header = declared[key], file.read(8)
        size = storage.count * storage.dtype.itemsize
        body = file.read(size) if len(header) == 8 and storage.count >= 0 else b""
        if len(header) < 8 or struct.unpack("<q", header)[0] != storage.count or len(body) < size:
            bad(f"storage {key!r} is cut short or of another length than declared")
        raw[key] = np.frombuffer(body, storage.dtype)
    if missing := declared.keys() - raw.keys():
        bad(f"storage {min(missing)!r} is missing")
    return {name: _materialise(view, raw[view.storage.key], f"{source}: {name}") for name, view in state.items()}


def _storages(state: Any, source: str) -> dict[str, _Storage]:
    """The storages of a state dict by key, once it is known to be one."""
    if not isinstance(state, dict):
        raise Refused(f"{source}: holds no state dict")
    for name, view in state.items():
        if not isinstance(name, str) or not isinstance(view, _View):
            raise Refused(f"{source}: {name!r} is not a named tensor")
    return {view.storage.key: view.storage for view in state.values()}


def _materialise(view: _View, storage: np.ndarray, what: str) -> np.ndarray:
    """The view as an array of its own. as_strided reads wherever it is told to, so the bounds are ours to check."""
    if len(view.shape) != len(view.strides) or min((view.offset, *view.shape, *view.strides)) < 0:
        raise Refused(f"{what}: shape {view.shape} with strides {view.strides} makes no tensor")
    last = view.offset + sum((n - 1) * stride for n, stride in zip(view.shape, view.strides, strict=True))
    if 0 not in view.shape and last >= storage.size:
        raise Refused(f"{what}: reaches element {last} of a storage of {storage.size}")
    if math.prod(view.shape) > storage.size:
        raise Refused(f"{what}: shape {view.shape} repeats the elements of a storage of {storage.size}")
    strides = [stride * storage.itemsize for stride in view.strides]
    return np.lib.stride_tricks.as_strided(storage[view.offset :], view.shape, strides).copy()


# --- The format that torch.save writes since version 1.6 -------------------------------------------------
# A zip archive without compression, in one folder of any name: the object's pickle data.pkl, each storage's raw
# elements as data/KEY, and since torch 2.1 the byte order.


def read_torch_zip(data: bytes, source: str = "weights") -> dict[str, np.ndarray]:
    """A state dict written by `torch.save` since torch 1.6; arguments, result and errors as `read_torch_legacy`."""

    def bad(why: str) -> NoReturn:
        raise Refused(f"{source}: {why}")

    with _readable(source, "a torch file"):
        archive = zipfile.ZipFile(io.BytesIO(data))
        files = {file.filename: file for file in archive.infolist()}
        if any(file.compress_type != zipfile.ZIP_STORED for file in files.values()):
            bad("a compressed archive, which torch does not write")
        roots = [name.removesuffix("data.pkl") for name in files if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(roots) != 1:
            bad("a zip archive, but not a torch file: it holds no data.pkl, or several")
        root = roots[0]
        if (order := f"{root}byteorder") in files and archive.read(order).strip() != b"little":
            bad("written on a big-endian machine, which is not supported")
        state = _TorchUnpickler(io.BytesIO(archive.read(f"{root}data.pkl")), _TORCH, source).load()
        raw: dict[str, np.ndarray] = {}
        for key, storage in _storages(state, source).items():
            if (file := files.get(f"{root}data/{key}")) is None:
                bad(f"storage {key!r} is missing")
            if file.file_size != storage.count * storage.dtype.itemsize:
                bad(f"storage {key!r} is of another length than declared")
            raw[key] = np.frombuffer(archive.read(file), storage.dtype)
    return {name: _materialise(view, raw[view.storage.key], f"{source}: {name}") for name, view in state.items()}


def is_torch(data: bytes) -> bool:
    """Whether data begins as `torch.save`'s files do: as a zip archive, or as the pickle of a magic number."""
    return data.startswith(b"PK") or _MAGIC.to_bytes(10, "little") in data[:32]


def read_torch(data: bytes, source: str = "weights") -> dict[str, np.ndarray]:
    """A state dict written by `torch.save` of any version; see `read_torch_legacy`."""
    return (read_torch_zip if data.startswith(b"PK") else read_torch_legacy)(data, source)


# --- Trees of NumPy arrays --------------------------------------------------------------------------------
# Dictionaries within dictionaries whose leaves are arrays: what `pickle.dump` makes of a JAX project's parameters.
# NumPy asks for an empty array and a dtype by name, and then sets the state of either; ours only take notes.

_NUMBERS = frozenset(("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"))


class _PickledDtype:
    def __init__(self, code: Any, *_: Any):
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]


class _PickledArray:
    def __init__(self, *_: Any):
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self, what: str) -> np.ndarray:
        """The array itself, a copy in the machine's byte order."""
        match self.state:
            case (int(), tuple(shape), _PickledDtype(code=str(code), order=str(order)), bool(fortran), bytes(raw)):
                pass
            case _:
                raise ValueError(f"{what} is not an array of numbers")
        if code not in _NUMBERS or order not in ("<", ">", "|", "="):
            raise ValueError(f"{what} has elements {order}{code}, which are not numbers")
        dtype = np.dtype(order + code)
        if not all(isinstance(n, int) and n >= 0 for n in shape) or len(raw) != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{what} has {len(raw)} bytes, which make no array of shape {shape}")
        array = np.frombuffer(raw, dtype).reshape(shape, order="F" if fortran else "C")
        return np.array(array, dtype.newbyteorder("="), order="C")


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> _PickledArray:
    """How protocol 5 writes an array, all of it at once."""
    array = _PickledArray()
    array.state = (1, shape, dtype, order == "F", bytes(data) if isinstance(data, bytes | bytearray) else None)
    return array


_NUMPY: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): None,  # only handed to the one below
    ("numpy", "dtype"): _PickledDtype,
    # The module's name before NumPy 2, and since.
    ("numpy.core.multiarray", "_reconstruct"): _PickledArray,
    ("numpy._core.multiarray", "_reconstruct"): _PickledArray,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
}


def read_pickled_arrays(data: bytes, source: str = "weights") -> dict[str, np.ndarray]:
    """A pickled tree of dictionaries and NumPy arrays, as name -> array (a copy): the keys on the way, joined by "/".

    `source` names the file in errors. Raises ValueError for anything that is not such a file, is cut short, holds
    something other than arrays of numbers under names, or asks for a name outside the allow-list.
    """
    with _readable(source, "a pickle of arrays"):
        tree = RestrictedUnpickler(io.BytesIO(data), _NUMPY, source).load()
    arrays: dict[str, np.ndarray] = {}

    def walk(node: Any, path: tuple[str, ...]) -> None:
        name = "/".join(path)
        if isinstance(node, _PickledArray) and path:
            if name in arrays:
                raise ValueError(f"{source}: two arrays are named {name!r}")
            arrays[name] = node.array(f"{source}: {name}")
        elif isinstance(node, dict):
            for key, child in node.items():
                if not isinstance(key, str):
                    raise ValueError(f"{source}: {key!r} in {name!r} is not a name")
                walk(child, (*path, key))
        else:
            raise ValueError(f"{source}: {name!r} is neither a dictionary nor an array")

    walk(tree, ())
    return arrays
