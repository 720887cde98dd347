"""Files as `torch.save` writes them, by the formats' descriptions; torch exists, as an empty shell, only meanwhile."""

import io
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from unittest import mock

import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C
STORAGES = {"f": "FloatStorage", "d": "DoubleStorage", "l": "LongStorage", "e": "HalfStorage", "?": "BoolStorage"}


class Tensor:
    """A stand-in that pickles as torch's tensors do: a view of a storage that is named by key."""

    def __init__(self, key, storage, shape, strides, offset=0):
        self.key, self.storage, self.shape, self.strides, self.offset = key, storage, shape, strides, offset

    def __reduce__(self):
        storage = StorageRef(self.key, self.storage)
        rebuild = sys.modules["torch._utils"]._rebuild_tensor_v2  # pyright: ignore[reportAttributeAccessIssue]
        return rebuild, (storage, self.offset, self.shape, self.strides, False, OrderedDict())


class StorageRef:
    def __init__(self, key, array):
        self.key, self.array = key, array


def tensors(state):
    """Arrays by name, each as a tensor with a storage of its own."""

    def tensor(key, array):
        array = np.ascontiguousarray(array)
        strides = tuple(stride // array.itemsize for stride in array.strides)
        return Tensor(str(key), array.reshape(-1), array.shape, strides)

    return OrderedDict((name, tensor(key, array)) for key, (name, array) in enumerate(state.items()))


def legacy_file(state, keys=None, magic: object = MAGIC, view=None) -> bytes:
    """Before torch 1.6: pickles one after another, then the storages."""
    pickles, arrays = _pickled((magic, 1001, {"little_endian": True}, state), view)
    keys = sorted(arrays) if keys is None else keys
    storages = (struct.pack("<q", arrays[key].size) + arrays[key].tobytes() for key in keys)
    return b"".join([*pickles, pickle.dumps(keys, protocol=2), *storages])


def zip_file(state, root="archive", byte_order: bytes | None = b"little", compression=zipfile.ZIP_STORED) -> bytes:
    """Since torch 1.6: a zip archive."""
    (pickled,), arrays = _pickled((state,))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr(f"{root}/data.pkl", pickled)
        if byte_order is not None:
            archive.writestr(f"{root}/byteorder", byte_order)
        for key, array in arrays.items():
            archive.writestr(f"{root}/data/{key}", array.tobytes())
        archive.writestr(f"{root}/version", b"3\n")
    return file.getvalue()


def _pickled(parts, *rest_of_id):
    """The pickle of each part, and the storages that they name."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in STORAGES.values():
        setattr(torch, name, type(name, (), {"__module__": "torch"}))

    def _rebuild_tensor_v2():
        raise AssertionError("only its name is written")

    _rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    setattr(utils, "_rebuild_tensor_v2", _rebuild_tensor_v2)  # noqa: B010
    arrays = {}

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            if isinstance(obj, StorageRef):
                arrays[obj.key] = obj.array
                kind = getattr(torch, STORAGES[obj.array.dtype.char])
                return ("storage", kind, obj.key, "cpu", obj.array.size, *rest_of_id)
            return None

    pickles = []
    with mock.patch.dict(sys.modules, {"torch": torch, "torch._utils": utils}):
        for part in parts:
            file = io.BytesIO()
            Pickler(file, protocol=2).dump(part)
            pickles.append(file.getvalue())
    return pickles, arrays
