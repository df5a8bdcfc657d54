"""The synthetic data, and the promise that the demo teaches something new."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from sam3_lora.base.vocabulary import bpe_path
from sam3_lora.data.check import check_dataset
from sam3_lora.data.coco import ANNOTATION_FILE
from sam3_lora.data.phrases import negative_phrases
from sam3_lora.data.shapes import (
    DEMO_CONCEPTS,
    PLAIN,
    PRETRAINING_CONCEPTS,
    SHAPES,
    VARIED,
    Concept,
    render_scene,
    write_coco,
)

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture(scope="module")
def pretrain_tiny():
    sys.path.insert(0, str(SCRIPTS))
    try:
        return importlib.import_module("pretrain_tiny")
    finally:
        sys.path.remove(str(SCRIPTS))


def words_of(concepts):
    return {word for concept in concepts for word in concept.prompt.split()}


def test_no_colour_shape_or_word_of_the_demo_occurs_among_the_pretraining_concepts():
    assert not {c.colour for c in DEMO_CONCEPTS} & {c.colour for c in PRETRAINING_CONCEPTS}
    assert not {c.shape for c in DEMO_CONCEPTS} & {c.shape for c in PRETRAINING_CONCEPTS}
    assert not words_of(DEMO_CONCEPTS) & words_of(PRETRAINING_CONCEPTS)


def test_no_word_of_the_demo_is_taught_as_absent_in_pretraining(pretrain_tiny):
    assert not words_of(DEMO_CONCEPTS) & set(pretrain_tiny.negative_words())


def test_the_words_for_the_false_fire_check_are_not_seen_in_pretraining(pretrain_tiny):
    held_out = set(pretrain_tiny.held_out_words())
    assert len(held_out) == 200
    assert not held_out & set(pretrain_tiny.negative_words())
    assert not held_out & words_of(PRETRAINING_CONCEPTS)


def test_the_words_for_the_false_fire_check_are_not_asked_in_training_either(pretrain_tiny):
    asked = {word for phrase in negative_phrases() for word in phrase.split()}
    assert not asked & set(pretrain_tiny.held_out_words())


def test_pretraining_draws_only_its_own_concepts_and_words(pretrain_tiny):
    recipe, words = pretrain_tiny.Recipe(), pretrain_tiny.negative_words()
    allowed = set(words) | words_of(PRETRAINING_CONCEPTS)
    for step in range(0, recipe.steps, recipe.steps // 20):
        batch = pretrain_tiny.make_batch(np.random.RandomState([0, step]), step, recipe, words)
        assert {word for prompt in batch.find_text_batch for word in prompt.split()} <= allowed


def test_the_batch_of_a_step_follows_from_seed_and_step(pretrain_tiny):
    recipe, words = pretrain_tiny.Recipe(), pretrain_tiny.negative_words()
    first, again, other = (
        pretrain_tiny.make_batch(np.random.RandomState([0, step]), step, recipe, words) for step in (7, 7, 8)
    )
    assert first.find_text_batch == again.find_text_batch
    assert (first.img_batch == again.img_batch).all()
    assert first.img_batch.shape != other.img_batch.shape or (first.img_batch != other.img_batch).any()


@pytest.mark.parametrize("style", [PLAIN, VARIED], ids=["plain", "varied"])
def test_masks_and_boxes_agree_and_objects_do_not_share_pixels(style):
    rng = np.random.RandomState(0)
    for _ in range(30):
        scene = render_scene(rng, PRETRAINING_CONCEPTS, style, 112)
        assert scene.image.shape == (112, 112, 3)
        assert scene.image.dtype == np.uint8
        for item in scene.objects:
            x0, y0, x1, y1 = (int(edge) for edge in item.box_xyxy)
            inside = np.zeros_like(item.mask)
            inside[y0:y1, x0:x1] = True
            assert (item.mask <= inside).all()
            assert item.mask[y0].any() and item.mask[y1 - 1].any()
            assert item.mask[:, x0].any() and item.mask[:, x1 - 1].any()
        covered = sum((item.mask.astype(int) for item in scene.objects), np.zeros((112, 112), int))
        assert covered.max(initial=0) <= 1


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_fits_its_circle(shape):
    assert max(np.hypot(x, y) for x, y in SHAPES[shape]()) <= 1.2


def test_a_written_dataset_passes_the_check_and_is_the_same_for_the_same_seed(tmp_path):
    for name in ("a", "b"):
        for split, seed in (("train", 1), ("valid", 2)):
            write_coco(tmp_path / name / split, [Concept("pink", "arrow")], count=4, seed=seed)
    assert check_dataset(tmp_path / "a").splits["train"].prompts == ("pink arrow",)
    first, second = (json.loads((tmp_path / n / "train" / ANNOTATION_FILE).read_text()) for n in ("a", "b"))
    assert first == second


def test_the_vocabulary_comes_from_an_installed_package():
    assert bpe_path().stat().st_size > 1_000_000
