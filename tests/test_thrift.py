"""Thrift's compact protocol: bytes worked out by hand from its specification, and real footers there and back."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common import thrift
from common.parquet_footer import read_footer_bytes

# Zigzag turns 0, -1, 1, -2, 2 into 0, 1, 2, 3, 4; a varint holds seven bits to a byte, the lowest first.
BY_HAND = {
    "nothing": (bytes([0]), {}),
    "150 is 300, or 44 + 2 * 128": (bytes([0x15, 0xAC, 0x02, 0]), {1: (thrift.I32, 150)}),
    "-1": (bytes([0x26, 1, 0]), {2: (thrift.I64, -1)}),
    "true and, one further on, false": (bytes([0x11, 0x12, 0]), {1: (thrift.TRUE, True), 2: (thrift.FALSE, False)}),
    "a number 20 further on stands in full": (bytes([0x05, 40, 2, 0]), {20: (thrift.I32, 1)}),
    "text": (bytes([0x38, 2, 104, 105, 0]), {3: (thrift.BINARY, b"hi")}),
    "a list": (bytes([0x19, 0x25, 2, 4, 0]), {1: (thrift.LIST, (thrift.I32, [1, 2]))}),
    "a long list": (bytes([0x19, 0xF3, 16, *range(16), 0]), {1: (thrift.LIST, (thrift.BYTE, list(range(16))))}),
    "a struct in a struct": (bytes([0x1C, 0x15, 2, 0, 0]), {1: (thrift.STRUCT, {1: (thrift.I32, 1)})}),
    "a list of truths": (bytes([0x19, 0x21, 1, 2, 0]), {1: (thrift.LIST, (thrift.TRUE, [1, 2]))}),
    "a double": (bytes([0x17, *range(8), 0]), {1: (thrift.DOUBLE, bytes(range(8)))}),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_bytes_by_hand_are_read_and_written(name):
    content, struct = BY_HAND[name]
    assert thrift.read_struct(content) == (struct, len(content))
    assert thrift.write_struct(struct) == content


def test_reading_begins_and_ends_where_the_struct_does():
    assert thrift.read_struct(b"xx" + bytes([0x15, 2, 0]) + b"yy", 2) == ({1: (thrift.I32, 1)}, 5)


@pytest.mark.parametrize("content", [b"", bytes([0x15]), bytes([0x15, 0x80]), bytes([0x18, 9, 65]), bytes([0x1A])])
def test_what_ends_in_the_middle_or_is_unknown_is_refused(content):
    with pytest.raises(ValueError):
        thrift.read_struct(content)


def test_footers_of_real_files_come_back_byte_for_byte():
    n_groups = 40  # more than the fifteen whose number fits beside the type
    table = pa.table({f"column {number}": [number * 0.5, None] * n_groups for number in range(20)})
    content = io.BytesIO()
    pq.write_table(table, content, row_group_size=2, write_page_index=True)
    footer = read_footer_bytes(content)
    struct, end = thrift.read_struct(footer)
    assert end == len(footer) > 10_000
    assert thrift.write_struct(struct) == footer
