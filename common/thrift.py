"""Thrift's compact protocol, as far as parquet's footers use it: bytes to values and back, whatever the fields mean.

A struct is a dict from field number to (type, value) in the order of the bytes, so that a field which nobody here knows
is written back as it was read. Source: the "Thrift Compact Protocol" specification of Apache Thrift.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

Struct = dict[int, tuple[int, Any]]
ListOf = tuple[int, list[Any]]  # the type of the elements, and they

TRUE: Final = 1
FALSE: Final = 2
BYTE: Final = 3
I16: Final = 4
I32: Final = 5
I64: Final = 6
DOUBLE: Final = 7
BINARY: Final = 8
LIST: Final = 9
STRUCT: Final = 12

_INTEGERS = (I16, I32, I64)


def read_struct(content: bytes | memoryview, start: int = 0) -> tuple[Struct, int]:
    """The struct that begins at `start`, and where it ends; raises ValueError where there is none, or one with maps."""
    reader = _Reader(content, start)
    try:
        return reader.struct(), reader.at
    except IndexError:
        raise ValueError("it ends in the middle of a value") from None


def write_struct(struct: Struct) -> bytes:
    """The bytes of a struct: what `read_struct` read is written as it was."""
    out = bytearray()
    _write_struct(out, struct)
    return bytes(out)


# --- Reading ---------------------------------------------------------------------------------------------------------


class _Reader:
    def __init__(self, content: bytes | memoryview, start: int) -> None:
        self._content = content
        self.at = start
        self._read: dict[int, Callable[[], Any]] = {
            **dict.fromkeys(_INTEGERS, self._integer),
            BYTE: self._byte,
            DOUBLE: lambda: self._bytes(8),
            BINARY: lambda: self._bytes(self._varint()),
            LIST: self._list,
            STRUCT: self.struct,
        }

    def struct(self) -> Struct:
        fields: Struct = {}
        number = 0
        while header := self._byte():
            # The upper half is how far this field's number is from the last one's; zero: the number follows.
            number = number + (header >> 4) if header >> 4 else self._integer()
            kind = header & 15
            fields[number] = (kind, kind == TRUE if kind in (TRUE, FALSE) else self._value(kind))
        return fields

    def _value(self, kind: int) -> Any:
        if kind not in self._read:
            raise ValueError(f"a value of type {kind} is not known here")
        return self._read[kind]()

    def _list(self) -> ListOf:
        header = self._byte()
        length = header >> 4 if header >> 4 < 15 else self._varint()
        kind = header & 15
        # In a list, true and false are a byte each.
        read = self._byte if kind in (TRUE, FALSE) else lambda: self._value(kind)
        return kind, [read() for _ in range(length)]

    def _integer(self) -> int:
        zigzag = self._varint()
        return (zigzag >> 1) ^ -(zigzag & 1)

    def _varint(self) -> int:
        value = shift = 0
        while (byte := self._byte()) & 128:
            value |= (byte & 127) << shift
            shift += 7
        return value | byte << shift

    def _byte(self) -> int:
        byte = self._content[self.at]
        self.at += 1
        return byte

    def _bytes(self, length: int) -> bytes:
        self.at += length
        if self.at > len(self._content):
            raise IndexError
        return bytes(self._content[self.at - length : self.at])


# --- Writing ---------------------------------------------------------------------------------------------------------


def _write_struct(out: bytearray, struct: Struct) -> None:
    before = 0
    for number, (kind, value) in struct.items():
        step = number - before
        if 0 < step < 16:
            out.append(step << 4 | kind)
        else:
            out.append(kind)
            _write_integer(out, number)
        if kind not in (TRUE, FALSE):
            _write_value(out, kind, value)
        before = number
    out.append(0)


def _write_value(out: bytearray, kind: int, value: Any) -> None:
    if kind in _INTEGERS:
        _write_integer(out, value)
    elif kind == STRUCT:
        _write_struct(out, value)
    elif kind == LIST:
        _write_list(out, *value)
    elif kind == BINARY:
        _write_varint(out, len(value))
        out += value
    elif kind == DOUBLE:
        out += value
    else:
        out.append(value)


def _write_list(out: bytearray, kind: int, values: list[Any]) -> None:
    out.append(min(len(values), 15) << 4 | kind)
    if len(values) >= 15:
        _write_varint(out, len(values))
    for value in values:
        _write_value(out, kind, value)


def _write_integer(out: bytearray, value: int) -> None:
    _write_varint(out, value * 2 if value >= 0 else -value * 2 - 1)


def _write_varint(out: bytearray, value: int) -> None:
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
