"""Checks whether an H.264 stream may code the two fields of an interlaced frame as separate pictures."""

from __future__ import annotations

from collections.abc import Iterator

_HIGH_PROFILES = {44, 83, 86, 100, 110, 118, 122, 128, 134, 135, 138, 139, 244}


def may_hold_fields(extradata: bytes | None) -> bool:
    """False if every sequence parameter set in the stream's header has `frame_mbs_only_flag` (H.264, 7.4.2.1.1).

    Without that flag a packet may hold one field, and two packets make a frame. True if the header is unclear.
    """
    try:
        flags = [_frames_only(unit) for unit in _parameter_sets(extradata or b"")]
    except (IndexError, ValueError):  # cut off
        return True
    return not flags or not all(flags)


def _parameter_sets(data: bytes) -> Iterator[bytes]:
    """The sequence parameter sets of extradata in MP4's form or with start codes."""
    if data[:1] == b"\1":
        at = 6
        for _ in range(data[5] & 31):
            size = int.from_bytes(data[at : at + 2], "big")
            yield data[at + 2 : at + 2 + size]
            at += 2 + size
    else:
        yield from (unit for unit in data.split(b"\0\0\1")[1:] if unit and unit[0] & 31 == 7)


def _frames_only(unit: bytes) -> bool:
    bits = _Bits(unit.replace(b"\0\0\3", b"\0\0"))
    bits.read(8)
    profile = bits.read(8)
    bits.read(16)
    bits.golomb()  # id
    if profile in _HIGH_PROFILES:
        if bits.golomb() == 3:  # chroma_format_idc
            bits.read(1)
        bits.golomb()
        bits.golomb()  # bit depths
        bits.read(1)
        if bits.read(1):  # scaling matrices, whose length varies
            return False
    bits.golomb()  # log2_max_frame_num_minus4
    order = bits.golomb()  # pic_order_cnt_type
    if order == 0:
        bits.golomb()
    elif order == 1:
        bits.read(1)
        bits.golomb()
        bits.golomb()
        for _ in range(min(bits.golomb(), 255)):
            bits.golomb()
    bits.golomb()  # max_num_ref_frames
    bits.read(1)
    bits.golomb()
    bits.golomb()  # size
    return bits.read(1) == 1


class _Bits:
    def __init__(self, data: bytes) -> None:
        self._bits = "".join(f"{byte:08b}" for byte in data)

    def read(self, count: int) -> int:
        """The next bits as a number. Raises ValueError at the end."""
        bits, self._bits = self._bits[:count], self._bits[count:]
        if len(bits) < count:
            raise ValueError
        return int(bits, 2)

    def golomb(self) -> int:
        """An unsigned Exp-Golomb code. Raises ValueError at the end."""
        return self.read(2 * self._bits.index("1") + 1) - 1
