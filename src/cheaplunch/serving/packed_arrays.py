"""Arrays as nnInteractive's clients and servers send them.

"NNIA", then a byte each for the version, the codec, the number of axes and the length of the type's name; the name; the
axes' lengths (int64), the number of parts (uint32), and of each part how long it is unpacked and packed (uint64 each)
and its bytes, a chunk of Blosc2. Numbers are little-endian.
"""

import math
import struct
from importlib import import_module
from typing import Any

import numpy as np

from cheaplunch.errors import UserError
from cheaplunch.serving.opened import TooLarge

_MAGIC, _VERSION, _ZSTD = b"NNIA", 1, 1
_TYPES = {np.dtype(kind).name for kind in "?bBhHiIqQefd"}
_PART_BYTES = 2**30  # unpacked; Blosc2 counts in int32
_CHUNK_HEADER = struct.Struct("<3BxIII6B9xB")
"""Of a chunk of Blosc2: two versions, flags; bytes unpacked, of a block and packed; filters; more flags."""
_CODECS, _FILTERS = {1, 4}, {0, 1}  # LZ4 and ZSTD, in the upper three bits of the flags; none and SHUFFLE


def pack(mask: np.ndarray) -> bytes:
    """Of (X, Y, Z) uint8."""
    blosc2: Any = import_module("blosc2")  # not everybody has it

    raw, name = mask.tobytes(), mask.dtype.name.encode()
    parts = [raw[start : start + _PART_BYTES] for start in range(0, len(raw), _PART_BYTES)]
    packed = struct.pack("<4s4B", _MAGIC, _VERSION, _ZSTD, mask.ndim, len(name)) + name
    packed += struct.pack(f"<{mask.ndim}qI", *mask.shape, len(parts))
    for part in parts:
        chunk = blosc2.compress2(part, typesize=1, codec=blosc2.Codec.ZSTD, filters=[blosc2.Filter.NOFILTER])
        packed += struct.pack("<QQ", len(part), len(chunk)) + chunk
    return packed


def unpack(packed: bytes, axes: int, limit_bytes: int) -> np.ndarray:
    """UserError where it is no array of so many axes; TooLarge, before anything is unpacked, where it says that it is
    longer than `limit_bytes`. Never more is unpacked than it says.
    """
    blosc2: Any = import_module("blosc2")

    try:
        magic, version, _, ndim, name_length = struct.unpack_from("<4s4B", packed)
        name = packed[8 : 8 + name_length].decode("ascii")
        if (magic, version, ndim) != (_MAGIC, _VERSION, axes) or name not in _TYPES:
            raise ValueError("its first bytes say otherwise")
        *shape, count = struct.unpack_from(f"<{ndim}qI", packed, 8 + name_length)
        if min(shape) < 1:
            raise ValueError("an axis is empty")
        needed = math.prod(shape) * np.dtype(name).itemsize
        if needed > limit_bytes:
            raise TooLarge(f"the array takes {needed / 2**20:.0f} MiB; at most {limit_bytes / 2**20:.0f} are taken")
        raw, end, place = np.zeros(needed, np.uint8), 0, 8 + name_length + 8 * ndim + 4
        for _ in range(count):
            length, packed_length = struct.unpack_from("<QQ", packed, place)
            chunk = memoryview(packed)[place + 16 : place + 16 + packed_length]
            _check(chunk, min(length, needed - end), packed_length)
            blosc2.decompress2(chunk, dst=raw[end : end + length])
            place, end = place + 16 + packed_length, end + length
        if end != needed:
            raise ValueError("its parts are shorter than it says")
    except (ValueError, RuntimeError, struct.error) as error:
        raise UserError(f"what was sent is no packed array of {axes} axes ({error})") from None
    return raw.view(name).reshape(shape)


def _check(chunk: memoryview, length: int, packed_length: int) -> None:
    """ValueError for what clients do not send: Blosc2 has many codecs and filters, and looks for plugins of some."""
    _, _, flags, unpacked, _, whole, *filters, more = _CHUNK_HEADER.unpack_from(chunk)
    if not (length == unpacked and whole == packed_length == len(chunk)):
        raise ValueError("a part is not as long as it says")
    if flags >> 5 not in _CODECS or not _FILTERS.issuperset(filters) or more & 0b1111:
        raise ValueError("a part is packed in a way that is not taken")
