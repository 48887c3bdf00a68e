"""Masking (RFC 6455 §5.3): what a client's frames wear, so that no proxy takes their payload for HTTP.

The C function of `websockets` masks tens of gigabytes a second. It is not documented API: it is checked when this
module is imported, and without it, or with one that is wrong, plain Python masks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeAlias

from wstunnel import limits

Mask: TypeAlias = Callable[[bytes | bytearray | memoryview, bytes], bytes]

_KEY_BYTES: Final = 4
_KEY_BLOCK_BYTES: Final = 4 * limits.KIB


def apply_mask_python(data: bytes | bytearray | memoryview, key: bytes) -> bytes:
    """Mask or unmask `data` (RFC 6455 §5.3: octet i XOR key octet i mod 4), without C: about 100 times slower.

    Args:
        data: any number of contiguous bytes.
        key: 4 bytes.

    Returns:
        As many bytes as `data` has.

    Raises:
        ValueError: `key` is not 4 bytes long.
    """
    if len(key) != _KEY_BYTES:
        raise ValueError("a masking key has 4 bytes")
    length = len(data)
    # One XOR of two large integers: a loop over the bytes costs 30 times as much.
    repeated = (key * (length // _KEY_BYTES + 1))[:length]
    return (int.from_bytes(data, "little") ^ int.from_bytes(repeated, "little")).to_bytes(length, "little")


_KNOWN_KEY: Final = bytes.fromhex("37fa213d")  # §5.7, and so are the first 5 bytes below
_KNOWN_CLEAR: Final = b"Hello, masked world: long enough for SIMD"
_KNOWN_MASKED: Final = bytes.fromhex(
    "7f9f4d5158d6015056894a5853da56524596450717964e5350da4453588f4655179c4e4f17a9687073"
)


def _masks_rightly(candidate: Mask) -> bool:
    """Whether `candidate` masks known vectors of every length from 0 to 41 right: its loops differ by length."""
    try:
        return all(
            candidate(kind(_KNOWN_CLEAR[:length]), _KNOWN_KEY) == _KNOWN_MASKED[:length]
            and candidate(kind(_KNOWN_MASKED[:length]), _KNOWN_KEY) == _KNOWN_CLEAR[:length]
            for kind in (bytes, bytearray, memoryview)
            for length in range(len(_KNOWN_CLEAR) + 1)
        )
    except Exception:
        # Whatever it raises for plain bytes, it is not the function that we know.
        return False


def _choose_apply_mask() -> Mask:
    """The C function of `websockets` if it is there and right, else the Python one. It is not documented API."""
    try:
        from websockets.speedups import apply_mask as in_c
    except ImportError:
        return apply_mask_python
    return in_c if _masks_rightly(in_c) else apply_mask_python


apply_mask: Final = _choose_apply_mask()
"""`apply_mask(data, key) -> bytes`: see `apply_mask_python` for the contract. Tens of GB/s when it is the C one."""


class MaskKeys:
    """Fresh masking keys, for a client: every frame needs its own.

    RFC 6455 §5.3: "The masking key needs to be unpredictable; thus, the masking key MUST be derived from a strong
    source of entropy". It is drawn in blocks: a system call for each frame would cost more than the masking.

    Args:
        random_bytes: a cryptographic source such as `os.urandom`: as many random bytes as it is asked for.
    """

    __slots__ = ("_block", "_position", "_random_bytes")

    def __init__(self, random_bytes: Callable[[int], bytes]) -> None:
        self._random_bytes = random_bytes
        self._block = b""
        self._position = _KEY_BLOCK_BYTES

    def next(self) -> bytes:
        """4 bytes that were not handed out before."""
        position = self._position
        if position == _KEY_BLOCK_BYTES:
            self._block = self._random_bytes(_KEY_BLOCK_BYTES)
            position = 0
        self._position = position + _KEY_BYTES
        return self._block[position : position + _KEY_BYTES]
