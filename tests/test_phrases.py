"""The lists of phrases for negatives and for measuring."""

import pytest

from sam3_lora.data.phrases import (
    apart_from,
    held_out_phrases,
    negative_phrases,
    normal_form,
    read_phrases,
    words_of,
)
from sam3_lora.data.shapes import SHAPES
from sam3_lora.errors import DataError
from sam3_lora.evaluation.probe import shipped_phrases


def test_no_word_of_the_held_out_phrases_is_asked_in_training():
    asked = {word for phrase in negative_phrases() for word in words_of(phrase)}
    held_out = {word for phrase in held_out_phrases() for word in words_of(phrase)}
    assert not asked & held_out
    assert len(negative_phrases()) >= 100
    assert len(held_out_phrases()) >= 50


def test_no_shape_of_the_synthetic_data_is_taught_as_absent():
    shapes = {word for shape in SHAPES for word in words_of(shape)}
    for phrase in (*negative_phrases(), *held_out_phrases()):
        assert not words_of(phrase) & shapes, phrase
        assert normal_form(phrase) == phrase


def test_a_phrase_that_may_name_what_a_prompt_names_is_left_out():
    phrases = ["sports car", "cars", "carpet", "fire hydrant", "hydrants on the road", "traffic light"]
    assert apart_from(phrases, ["Car", "fire-hydrant"]) == ["carpet", "traffic light"]


def test_a_file_gives_a_phrase_a_line(tmp_path):
    file = tmp_path / "phrases.txt"
    file.write_text("# birds\nRed  Kite\n\nosprey\nred kite\n")
    assert read_phrases(file) == ("red kite", "osprey")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        pytest.param(None, "No such file", id="missing"),
        pytest.param(b"# nothing\n", "has no phrase", id="empty"),
        pytest.param(b"\xff\xfe", "not UTF-8", id="another encoding"),
    ],
)
def test_a_file_without_phrases_is_one_clear_error(content, problem, tmp_path):
    file = tmp_path / "phrases.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=problem):
        read_phrases(file)


def test_no_word_of_the_guard_s_probe_is_asked_in_training():
    asked = {word for phrase in negative_phrases() for word in words_of(phrase)}
    assert not asked & {word for phrase in shipped_phrases() for word in words_of(phrase)}
