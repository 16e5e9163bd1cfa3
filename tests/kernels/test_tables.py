"""Tables in the user's cache: a damaged one makes nothing fail."""

import json
import logging

import pytest
from xclip_fast.kernels.dispatch import choices, tables

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
