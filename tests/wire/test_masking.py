"""wire/masking.py: the C function and the Python one, the choice between them, and the keys."""

from __future__ import annotations

import struct
import sys
from functools import partial
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.speedups import apply_mask as apply_mask_in_c

from wstunnel.wire import masking
from wstunnel.wire.masking import Mask, MaskKeys, apply_mask, apply_mask_python

KEY = bytes.fromhex("37fa213d")


class TestSection53Masking:
    def test_the_c_function_is_in_use(self) -> None:
        assert apply_mask is apply_mask_in_c

    @pytest.mark.parametrize("mask", [apply_mask, apply_mask_python])
    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
    def test_octet_i_is_xored_with_key_octet_i_modulo_4(self, mask: Mask, kind: type) -> None:
        for length in [*range(70), 1000, 65537]:
            data = bytes(index * 7 & 0xFF for index in range(length))
            masked = mask(kind(data), KEY)
            assert type(masked) is bytes
            assert masked == bytes(octet ^ KEY[index % 4] for index, octet in enumerate(data))
            assert mask(masked, KEY) == data

    @given(st.binary(max_size=300), st.binary(min_size=4, max_size=4), st.integers(0, 20))
    @settings(derandomize=True, deadline=None)
    def test_python_and_c_agree(self, data: bytes, key: bytes, start: int) -> None:
        assert apply_mask_python(data, key) == apply_mask_in_c(data, key)
        view = memoryview(data)[start:]
        assert apply_mask_python(view, key) == apply_mask_in_c(view, key)

    @pytest.mark.parametrize("mask", [apply_mask, apply_mask_python])
    @pytest.mark.parametrize("key", [b"", b"abc", b"abcde"])
    def test_a_key_of_another_length_is_refused(self, mask: Mask, key: bytes) -> None:
        with pytest.raises(ValueError, match="4 bytes"):
            mask(b"data", key)

    def test_the_known_vectors_are_right(self) -> None:
        assert masking._KNOWN_MASKED[:5] == bytes.fromhex("7f9f4d5158")  # §5.7
        assert bytes(octet ^ KEY[i % 4] for i, octet in enumerate(masking._KNOWN_CLEAR)) == masking._KNOWN_MASKED
        assert len(masking._KNOWN_CLEAR) > 32

    def test_without_the_c_function_python_masks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "websockets.speedups", None)
        assert masking._choose_apply_mask() is apply_mask_python

    def test_a_c_function_under_another_name_is_not_used(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "websockets.speedups", ModuleType("websockets.speedups"))
        assert masking._choose_apply_mask() is apply_mask_python

    @pytest.mark.parametrize(
        "broken",
        [
            lambda data, key: bytes(data),
            lambda data, key: bytearray(apply_mask_python(data, key))[:40],
            lambda data, key: apply_mask_python(data[:15], key) + bytes(data[15:]),
            lambda data: data,
            lambda data, key: 1 // 0,
            lambda data, key: data.hex() + key,
        ],
    )
    def test_a_wrong_c_function_is_not_used(self, monkeypatch: pytest.MonkeyPatch, broken: object) -> None:
        module = ModuleType("websockets.speedups")
        module.apply_mask = broken  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "websockets.speedups", module)
        assert masking._choose_apply_mask() is apply_mask_python

    def test_a_right_one_is_used(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module = ModuleType("websockets.speedups")
        right = partial(apply_mask_python)
        module.apply_mask = right  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "websockets.speedups", module)
        assert masking._choose_apply_mask() is right

    def test_keys_are_drawn_in_blocks_and_never_repeated(self) -> None:
        drawn: list[bytes] = []

        def random_bytes(size: int) -> bytes:
            start = len(drawn) * 1024
            drawn.append(b"".join(struct.pack("!I", start + index) for index in range(size // 4)))
            return drawn[-1]

        keys = MaskKeys(random_bytes)
        assert drawn == [], "nothing is drawn before it is needed"
        taken = [keys.next() for _ in range(2049)]
        assert [len(block) for block in drawn] == [4096] * 3
        assert taken == [struct.pack("!I", index) for index in range(2049)]
