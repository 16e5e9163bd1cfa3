"""Labels that are one text to the model, and labels that do not fit."""

import logging

import pytest

from xclip_fast.text.labels import refuse_same_texts
from xclip_fast.text.tokenizer import tokenize


def test_labels_that_are_one_text() -> None:
    long = "word " * 80
    with pytest.raises(ValueError, match=r"case: 'Swim' and 'swim'; 'word word .* and 'word word [^;]*$"):
        refuse_same_texts(["Swim", "run", "swim", f"{long}a", f"{long}b", "sw im"], 77)
    with pytest.raises(ValueError, match="same text for the model, which reads 77 tokens without case: 'Swim' and"):
        refuse_same_texts(["Swim", "swim"], 77)
    with pytest.raises(ValueError, match="'swim' and 'swim'"):
        refuse_same_texts(["swim"] * 2, 77)
    refuse_same_texts(["swim", "swimming"], 77)


def test_a_text_that_is_cut_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "xclip_fast"):
        tokenize(["short", "word " * 75])
        assert not caplog.records
        tokenize(["short", "word " * 76, "word " * 90])
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("2 of 3 texts have more than 77 tokens and are cut; the first is 'word word")
    assert said.endswith("(78 tokens)")
