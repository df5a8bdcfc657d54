"""What training images are asked: prompts of classes, and negatives."""

import random
from collections import Counter
from dataclasses import fields

import pytest
from omegaconf import OmegaConf

from sam3_lora.data.phrases import held_out_phrases, negative_phrases, words_of
from sam3_lora.data.prompt_settings import PromptSettings, prompt_problems, prompt_settings
from sam3_lora.data.prompts import Asked, PromptSampler
from sam3_lora.errors import ConfigError
from sam3_lora.training.composition import shipped_config

CLASSES = {1: "crack", 2: "rust", 5: "moss"}
MANY = {number: f"kind{number}" for number in range(20)}


def sampler(categories=CLASSES, **settings):
    return PromptSampler(categories, PromptSettings(**{"negatives": "list", **settings}))


def draws(of, present, absent, times=200, scores=None):
    random.seed(0)
    return [of.draw(present, absent, scores) for _ in range(times)]


def test_the_shipped_config_is_the_default_of_the_settings():
    shipped = OmegaConf.to_container(shipped_config().prompts)
    defaults = PromptSettings()
    assert {**shipped, "templates": tuple(shipped["templates"])} == {
        item.name: getattr(defaults, item.name) for item in fields(PromptSettings)
    }


def test_what_is_in_the_image_is_always_asked_also_beyond_the_cap():
    for asked in draws(sampler(MANY, max_prompts_per_image=3), range(8), range(8, 20), times=20):
        assert [item.category for item in asked] == list(range(8))


def test_negatives_fill_the_cap_and_change_from_draw_to_draw():
    asked = draws(sampler(MANY, negatives="classes", max_prompts_per_image=5), [3], set(MANY) - {3})
    assert {len(items) for items in asked} == {5}
    assert {item.category for items in asked for item in items} == set(MANY)
    assert len({tuple(items) for items in asked}) > 100


def test_a_quarter_of_the_negatives_are_phrases_where_classes_would_fill_the_cap():
    asked = draws(sampler(MANY, max_prompts_per_image=6), [3], set(MANY) - {3})
    assert {sum(item.category is None for item in items) for items in asked} == {2}
    assert {len(items) for items in asked} == {6}


def test_a_dataset_of_one_class_gets_negatives_too():
    asked = draws(sampler({1: "crack"}, max_prompts_per_image=4), [1], [])
    assert {len(items) for items in asked} == {4}
    phrases = {item.prompt for items in asked for item in items[1:]}
    assert len(phrases) > 80
    assert phrases <= set(negative_phrases())
    assert not phrases & set(held_out_phrases())


def test_an_image_without_objects_is_asked_classes_and_phrases_but_no_placeholder():
    asked = draws(sampler(), [], CLASSES)
    assert all(items[:3] == [Asked(key, name) for key, name in CLASSES.items()] for items in asked)
    assert "object" not in {item.prompt for items in asked for item in items}


@pytest.mark.parametrize(
    ("settings", "categories", "phrases"),
    [
        pytest.param({"negatives": "none"}, [2], 0, id="none"),
        pytest.param({"negatives": "classes"}, [1, 2, 5], 0, id="classes"),
        pytest.param({"negatives": "classes", "max_prompts_per_image": None}, [1, 2, 5], 0, id="no cap"),
        pytest.param({"negatives": "list"}, [1, 2, 5], 1, id="list"),
    ],
)
def test_negatives_is_what_is_asked_beyond_the_objects(settings, categories, phrases):
    (asked,) = draws(sampler(**settings), [2], [1, 5], times=1)
    assert [item.category for item in asked] == categories + [None] * phrases


def test_a_class_is_asked_by_its_names_in_templates():
    of = sampler(
        negatives="none",
        names={"crack": "thin crack"},
        synonyms={"crack": ["fissure"]},
        templates=["{}", "photo of {}"],
    )
    asked = Counter(items[0].prompt for items in draws(of, [1], [2, 5]))
    assert set(asked) == {"thin crack", "photo of thin crack", "fissure", "photo of fissure"}
    assert min(asked.values()) > 25
    assert of.fixed() == [Asked(1, "thin crack"), Asked(2, "rust"), Asked(5, "moss")]


def test_a_phrase_that_shares_a_word_with_a_prompt_is_never_asked(tmp_path):
    file = tmp_path / "phrases.txt"
    file.write_text("deep cracks\nold fissure\nzebra\n")
    of = sampler({1: "crack"}, phrases=str(file), synonyms={"crack": ["fissure"]})
    assert of.phrases == ("zebra",)


def test_verified_takes_no_phrase_that_the_base_sees_or_was_not_asked_about():
    of = sampler({1: "crack"}, negatives="verified", absent_below=0.3)
    seen, unseen, edge = (Asked(None, phrase) for phrase in of.phrases[:3])
    scores = {seen: 0.9, unseen: 0.0, edge: 0.3}
    asked = draws(of, [1], [], scores=scores)
    assert {item.prompt for items in asked for item in items} == {"crack", unseen.prompt}


def test_confusable_negatives_come_first_where_the_cap_forces_a_choice():
    of = sampler(MANY, negatives="verified", max_prompts_per_image=4, absent_below=0.3)
    scores = {Asked(key, name): 0.001 for key, name in MANY.items()}
    scores |= {Asked(7, "kind7"): 0.8, Asked(4, "kind4"): 0.2}
    scores |= {Asked(None, phrase): 0.001 for phrase in of.phrases[:20]}
    scores[Asked(None, of.phrases[3])] = 0.25
    asked = draws(of, [0], set(MANY) - {0}, scores=scores)
    # Of two classes the first is the one that the base takes for present: the annotations say that it is not.
    assert all(7 in [item.category for item in items] for items in asked)
    assert all(items[-1].prompt == of.phrases[3] for items in asked)
    assert len({tuple(items) for items in asked}) > 10  # the rest still changes


def test_candidates_depend_on_the_seed_alone():
    of = sampler(MANY, candidates=5)
    random.seed(1)
    first = of.candidates([1, 2], seed=3)
    assert first == of.candidates([2, 1], seed=3) != of.candidates([1, 2], seed=4)
    assert [item.category for item in first[:2]] in ([1, 2], [2, 1])
    assert len(first) == 7
    assert random.random() == random.Random(1).random()


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({"negatives": "none"}, 2),
        ({"negatives": "classes"}, 3),
        ({"negatives": "classes", "max_prompts_per_image": None}, 3),
        ({"negatives": "list"}, 4),
        ({"negatives": "verified", "max_prompts_per_image": 1}, 2),
    ],
)
def test_the_most_prompts_are_those_of_the_cap_or_of_the_fullest_image(settings, most):
    assert PromptSettings(**settings).most_prompts(classes=3, most_present=2) == most
    of = sampler(**settings)
    assert max(len(items) for items in draws(of, [1, 2], [5], times=5)) == most


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        pytest.param({"negatives": "verify"}, "did you mean 'verified'?", id="negatives"),
        pytest.param({"negative": "none"}, "unknown key 'negative'; did you mean 'negatives'?", id="key"),
        pytest.param({"max_prompts_per_image": 0}, "1 or more, got 0", id="cap"),
        pytest.param({"max_prompts_per_image": None}, "verified needs a number", id="no cap with a list"),
        pytest.param({"names": {"crack": ""}}, "no prompt for 'crack'", id="empty name"),
        pytest.param({"names": ["crack"]}, "needs a prompt for each class", id="names as a list"),
        pytest.param({"synonyms": {"crack": "fissure"}}, "no list of prompts for 'crack'", id="synonym"),
        pytest.param({"templates": ["a photo"]}, "must have {} once", id="template"),
        pytest.param({"templates": []}, "needs a list", id="no template"),
        pytest.param({"absent_below": 0}, "above 0", id="threshold"),
        pytest.param({"candidates": 2.5}, "whole number", id="candidates"),
        pytest.param({"negatives": "none", "phrases": "x.txt"}, "asks no phrases", id="phrases in vain"),
    ],
)
def test_bad_values_are_told_with_what_to_do(config, problem):
    with pytest.raises(ConfigError) as caught:
        prompt_settings(config)
    assert problem in str(caught.value)


def test_all_problems_come_at_once():
    config = {"prompts.negatives": "some", "prompts.candidates": 0, "prompts.name": {}, "training.lr": "x"}
    assert len(prompt_problems(config)) == 3


def test_prompts_must_go_with_the_classes_of_the_dataset():
    with pytest.raises(ConfigError) as caught:
        sampler(names={"crak": "x", "rust": "moss"}, synonyms={"lichen": ["y"]})
    for problem in (
        "no class 'crak'; did you mean 'crack'?",
        "no class 'lichen'",
        "stand for 'rust' and for 'moss'",
    ):
        assert problem in str(caught.value)


def test_two_classes_may_share_a_word():
    of = sampler({1: "red car", 2: "car"})
    assert of.prompts == {1: "red car", 2: "car"}
    assert all("car" not in words_of(phrase) for phrase in of.phrases)
