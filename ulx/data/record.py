"""One example as bytes: a header that names its fields, then their raw buffers.

Self-describing, so that images, clips (`t h w c`), latents and captions share one container. Compression is left to
ArrayRecord, which compresses each record and checks its hash when it is read.
"""

import json
import struct
from collections.abc import Mapping
from functools import lru_cache

import numpy as np

__all__ = ["pack", "unpack"]


def pack(example: Mapping[str, np.ndarray]) -> bytes:
    """Example -> bytes. Raises `TypeError` for a field that is not made of plain numbers."""
    arrays = {name: np.asarray(value) for name, value in example.items()}
    for name, array in arrays.items():
        if array.dtype.kind not in "biuf":
            raise TypeError(f"field {name!r} has dtype {array.dtype}: a record holds booleans, integers and floats")
    header = json.dumps([[name, array.dtype.str, array.shape] for name, array in arrays.items()]).encode()
    return b"".join([struct.pack("<I", len(header)), header, *(array.tobytes() for array in arrays.values())])


def unpack(record: bytes) -> dict[str, np.ndarray]:
    """Bytes -> example, as read-only views of `record`."""
    (length,) = struct.unpack_from("<I", record)
    offset = 4 + length
    example = {}
    for name, dtype, shape, count in _fields(record[4:offset]):
        example[name] = np.frombuffer(record, dtype, count, offset).reshape(shape)
        offset += count * dtype.itemsize
    return example


@lru_cache(maxsize=1024)
def _fields(header: bytes) -> list[tuple[str, np.dtype, tuple[int, ...], int]]:
    """Parsed once for all the records alike: parsing JSON per record would cost more than reading it."""
    fields = [(name, np.dtype(dtype), tuple(shape)) for name, dtype, shape in json.loads(header)]
    return [(name, dtype, shape, int(np.prod(shape, dtype=np.int64))) for name, dtype, shape in fields]
