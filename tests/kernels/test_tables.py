"""Tables in the user's cache: a damaged one makes nothing fail."""

import itertools
import json
import logging

import pytest
from xclip_fast.kernels.dispatch import choices, tables
from xclip_fast.kernels.triton import ONE_TILE

GOOD = {"arch": 90, "where": {"M": [1, 64]}, "milliseconds": {"triton": 0.1, "library": 0.2}}


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "[" * 100_000,
        '{"op": 3}',
        '{"op": [3]}',
        '{"op": [{"where": {}}]}',
        json.dumps({"op": [GOOD, {**GOOD, "where": {"M": 3}}]}),
        json.dumps({"op": [{**GOOD, "milliseconds": {"triton": "fast"}}]}),
        "\udcff",
    ],
)
def test_a_damaged_table_is_named_once_and_not_used(tmp_path, monkeypatch, caplog, text):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tables.user_table(choices.TABLE.name)
    path.parent.mkdir()
    path.write_text(text, errors="surrogateescape")
    tables.forget()
    try:
        with caplog.at_level(logging.WARNING, "xclip_fast"):
            for name in ("op", "another"):
                assert choices.order(name, 90, {"M": 8}) == ()
        assert [str(path) in record.getMessage() for record in caplog.records] == [True]
        path.write_text(json.dumps({"op": [GOOD]}))
        tables.forget()
        assert choices.order("op", 90, {"M": 8}) == ("triton", "library")
    finally:
        tables.forget()


TILES = choices.TABLE.parent / "triton" / "tiles.json"


@pytest.mark.parametrize("table", [choices.TABLE, TILES])
def test_no_shipped_row_lies_inside_an_earlier_one(table):
    for name, rows in json.loads(table.read_text()).items():
        for row, other in ((row, other) for index, row in enumerate(rows) for other in rows[:index]):
            bounds, around = row.get("where", {}), other.get("where", {}).items()
            inside = [
                size in bounds and low <= bounds[size][0] and bounds[size][1] <= high for size, (low, high) in around
            ]
            assert other["arch"] != row["arch"] or not all(inside), (name, row)


@pytest.mark.parametrize("name", ["attention_dq", "attention_dk_dv"])
def test_every_row_of_attentions_backward_is_taken(name, monkeypatch, tmp_path):
    """Short sequences take another kernel, in one tile."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tables.forget()
    taken = []
    for arch, (size, shortest), longer in itertools.product((80, 90), ONE_TILE.items(), range(1, 600)):
        taken.append(tables.first(TILES, name, range(arch + 1), (("length", shortest + longer), ("bytes", size))))
    assert all(row in taken for row in tables.rows(TILES, name))
    tables.forget()
