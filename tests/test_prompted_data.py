"""Datapoints with prompts of our choice, from the configs' own datasets, and negatives that the base has verified."""

import json

import numpy as np
import pytest
import yaml
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from official_step import register_resolvers
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.data import DataLoader

from sam3_lora.adapter import get_peft_sam3, save_adapter
from sam3_lora.base.loading import load_base
from sam3_lora.data.coco import ANNOTATION_FILE
from sam3_lora.data.phrases import negative_phrases
from sam3_lora.data.shapes import DEMO_CONCEPTS, PLAIN, PRETRAINING_CONCEPTS, render_scene, write_coco
from sam3_lora.errors import ConfigError, DataError, Sam3LoraError
from sam3_lora.evaluation import batches
from sam3_lora.evaluation.batches import open_split
from sam3_lora.evaluation.compare import common_prompts
from sam3_lora.training import presence
from sam3_lora.training.asked import prompts_and_images
from sam3_lora.training.fingerprint import differences, fingerprint_of_run
from sam3_lora.training.launch import train
from sam3_lora.training.presence import Base, verify_negatives
from sam3_lora.training.prompted_data import PromptedCoco
from sam3_lora.training.resumable_data import SeededItems
from sam3_lora.training.settings import TrainSettings, run_yaml

TINY = Base("tiny", "cpu")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Six images: the fourth has no annotation, and the fifth only a crowd."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    for split, seed in (("train", 1), ("valid", 2)):
        write_coco(folder / split, DEMO_CONCEPTS, 6, seed)
        file = folder / split / ANNOTATION_FILE
        document = json.loads(file.read_text())
        document["annotations"] = [entry for entry in document["annotations"] if entry["image_id"] != 4]
        crowd = next(entry for entry in document["annotations"] if entry["image_id"] == 5)
        document["annotations"] = [e for e in document["annotations"] if e["image_id"] != 5 or e is crowd]
        crowd["iscrowd"] = 1
        file.write_text(json.dumps(document))
    return folder


def split_of(dataset, split="train", **prompts):
    """The dataset of a split as the configs make it."""
    register_resolvers()
    with initialize_config_module("sam3.train", version_base="1.2"):
        config = compose("sam3_lora/demo", overrides=[f"paths.dataset_root={dataset}"])
    OmegaConf.set_struct(config, False)
    return instantiate(OmegaConf.merge(config, {"prompts": prompts}).trainer.data[split].dataset)


def asked_of(datapoint):
    return [
        (query.inference_metadata.original_category_id, query.query_text) for query in datapoint.find_queries
    ]


def epoch_of(items, epoch, workers=0):
    items.set_epoch(epoch)
    loader = DataLoader(items, batch_size=2, num_workers=workers, collate_fn=list)
    return [asked_of(datapoint) for batch in loader for datapoint in batch]


def truth_of(dataset, split="train"):
    """Category ids of the objects of each image, crowds left out."""
    document = json.loads((dataset / split / ANNOTATION_FILE).read_text())
    return {
        image["id"]: {
            entry["category_id"]
            for entry in document["annotations"]
            if entry["image_id"] == image["id"] and not entry["iscrowd"]
        }
        for image in document["images"]
    }


def test_training_asks_the_objects_and_negatives_up_to_the_cap(dataset):
    items = SeededItems(split_of(dataset, negatives="list", max_prompts_per_image=5), seed=0)
    for (_, present), datapoint in zip(truth_of(dataset).items(), (items[n] for n in range(6)), strict=True):
        found = {
            q.inference_metadata.original_category_id for q in datapoint.find_queries if q.object_ids_output
        }
        assert found == present
        assert len(datapoint.find_queries) == 5
        texts = [text for category, text in asked_of(datapoint) if category == -1]
        assert texts and set(texts) <= set(negative_phrases())
        assert "object" not in {text for _, text in asked_of(datapoint)}


def test_a_class_of_which_an_image_has_only_a_crowd_is_not_taught_as_absent(dataset):
    document = json.loads((dataset / "train" / ANNOTATION_FILE).read_text())
    (crowd,) = (entry["category_id"] for entry in document["annotations"] if entry["iscrowd"])
    items = SeededItems(split_of(dataset, negatives="classes"), seed=0)
    assert [category for category, _ in asked_of(items[4])] == [n for n in (1, 2, 3) if n != crowd]


def test_without_negatives_images_that_show_nothing_are_left_out(dataset):
    images = split_of(dataset, negatives="none")
    assert len(images) == 4
    assert all(query.object_ids_output for n in range(4) for query in images[n].find_queries)


def test_prompts_follow_seed_epoch_and_image_with_any_number_of_workers(dataset):
    options = {"negatives": "list", "templates": ["{}", "a {}"]}
    items = SeededItems(split_of(dataset, **options), seed=3)
    first, second = epoch_of(items, 0), epoch_of(items, 1)
    assert first != second
    assert epoch_of(items, 0, workers=2) == first
    again = SeededItems(split_of(dataset, **options), seed=3)
    again.set_epoch(1)
    assert asked_of(again[5]) == second[5]  # as when an epoch goes on in its middle
    assert epoch_of(SeededItems(split_of(dataset, **options), seed=4), 0) != first


def test_validation_asks_each_class_by_its_one_prompt_and_nothing_without_a_category(dataset):
    names, synonyms = {"purple cross": "violet plus"}, {"cyan crescent": ["moon"]}
    images = split_of(dataset, "val", names=names, synonyms=synonyms, templates=["a {}"])
    expected = [(1, "violet plus"), (2, "orange hexagon"), (3, "cyan crescent")]
    for _ in range(2):
        assert [asked_of(images[n]) for n in range(6)] == [expected] * 6


def test_validation_gives_what_the_official_loader_gives(dataset):
    from sam3.train.data.coco_json_loaders import COCO_FROM_JSON

    file = str(dataset / "valid" / ANNOTATION_FILE)
    ours, official = PromptedCoco(file, training=False), COCO_FROM_JSON(file)
    assert ours.getDatapointIds() == official.getDatapointIds()
    for index in ours.getDatapointIds():
        assert repr(ours.loadQueriesAndAnnotationsFromDatapoint(index)) == repr(
            official.loadQueriesAndAnnotationsFromDatapoint(index)
        )


def test_classes_without_a_cap_are_what_the_official_loader_asks_in_training(tmp_path):
    from sam3.train.data.coco_json_loaders import COCO_FROM_JSON

    write_coco(tmp_path, DEMO_CONCEPTS, 6, seed=1)
    file = str(tmp_path / ANNOTATION_FILE)
    ours = PromptedCoco(file, {"negatives": "classes", "max_prompts_per_image": None})
    official = COCO_FROM_JSON(file)
    for index in official.getDatapointIds():
        assert repr(ours.loadQueriesAndAnnotationsFromDatapoint(index)) == repr(
            official.loadQueriesAndAnnotationsFromDatapoint(index)
        )


def test_a_class_that_the_dataset_lacks_is_an_error(dataset):
    with pytest.raises(ConfigError, match=r"no class 'purple crss'; did you mean 'purple cross'\?"):
        PromptedCoco(str(dataset / "train" / ANNOTATION_FILE), {"names": {"purple crss": "x"}})


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """A cache that tests share, where they are not about it."""
    return tmp_path_factory.mktemp("answers")


@pytest.fixture(scope="module")
def known_shapes(tmp_path_factory):
    """Images of shapes that the tiny base knows, of which only one kind is a class; and the list of all of them."""
    folder = tmp_path_factory.mktemp("known")
    rng = np.random.RandomState(7)
    shown = []
    for number in range(8):
        scene = render_scene(rng, PRETRAINING_CONCEPTS, PLAIN, 112)
        Image.fromarray(scene.image).save(folder / f"{number}.png")
        shown.append({PRETRAINING_CONCEPTS[item.concept].prompt for item in scene.objects})
    images = [{"id": n, "file_name": f"{n}.png", "width": 112, "height": 112} for n in range(8)]
    document = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "cyan crescent"}]}
    (folder / ANNOTATION_FILE).write_text(json.dumps(document))
    phrases = folder / "phrases.txt"
    phrases.write_text("\n".join([*(concept.prompt for concept in PRETRAINING_CONCEPTS), "zebra"]))
    return folder, phrases, shown


def known_loader(known_shapes, cache, **prompts):
    folder, phrases, _ = known_shapes
    settings = {
        "negatives": "verified",
        "max_prompts_per_image": 30,
        "phrases": str(phrases),
        "cache": str(cache),
    }
    return PromptedCoco(str(folder / ANNOTATION_FILE), {**settings, **prompts})


def negatives_in(loader):
    """All that each image is asked in vain in some draws."""
    return [
        {
            query["query_text"]
            for _ in range(3)
            for query in loader.loadQueriesAndAnnotationsFromDatapoint(index)[0]
        }
        for index in loader.getDatapointIds()
    ]


def test_a_listed_phrase_that_is_visible_is_never_taught_as_absent(known_shapes, answers):
    folder, _, shown = known_shapes
    unverified = known_loader(known_shapes, answers, negatives="list")
    assert any(asked & seen for asked, seen in zip(negatives_in(unverified), shown, strict=True))
    verified = known_loader(known_shapes, answers)
    verify_negatives(verified, folder, TINY)
    for asked, seen in zip(negatives_in(verified), shown, strict=True):
        assert not asked & seen
        assert "zebra" in asked
        assert len(asked) > 9  # of 12 shapes, the word and the class


def test_answers_of_the_base_are_kept_and_asked_once(known_shapes, tmp_path, monkeypatch):
    folder, *_ = known_shapes
    seen = []
    first = known_loader(known_shapes, tmp_path)
    # The second process of two has not begun: its share is missing, and an interrupt would leave the same.
    with pytest.raises(FileNotFoundError):
        verify_negatives(
            first, folder, TINY, rank=0, processes=2, on_asked=lambda *counts: seen.append(counts)
        )
    assert seen == [(done, 4) for done in range(1, 5)]
    assert len(list(tmp_path.rglob("*.json"))) == 4
    verify_negatives(first, folder, TINY, on_asked=lambda *counts: seen.append(counts))
    assert seen[4:] == [(done, 4) for done in range(1, 5)]

    def loads(*_, **__):
        raise AssertionError("the base is not needed")

    monkeypatch.setattr(presence, "load_base", loads)
    again = known_loader(known_shapes, tmp_path, absent_below=0.5)  # another threshold needs no new answer
    verify_negatives(again, folder, TINY)
    assert np.array_equal(again._presence, first._presence, equal_nan=True)


@pytest.mark.parametrize("change", ["image", "phrases", "base"])
def test_another_image_list_or_base_is_asked_anew(change, known_shapes, tmp_path, monkeypatch):
    folder, phrases, _ = known_shapes
    loader = known_loader(known_shapes, tmp_path)
    before = presence._question(loader, 0, folder / "0.png", TINY, tmp_path).answer
    path, base = folder / "0.png", TINY
    if change == "image":
        path = folder / "1.png"
    elif change == "phrases":
        other = tmp_path / "other.txt"
        other.write_text(phrases.read_text() + "\npenguin")
        loader = known_loader(known_shapes, tmp_path, phrases=str(other))
    else:
        base = Base("random")
    assert presence._question(loader, 0, path, base, tmp_path).answer != before
    assert (
        presence._question(known_loader(known_shapes, tmp_path), 0, folder / "0.png", TINY, tmp_path).answer
        == before
    )


def test_without_answers_of_the_base_no_phrase_is_taken_for_absent(known_shapes, tmp_path):
    assert negatives_in(known_loader(known_shapes, tmp_path)) == [{"cyan crescent"}] * 8


def test_an_image_that_cannot_be_read_is_named(known_shapes, tmp_path):
    with pytest.raises(DataError, match="no_such_folder"):
        verify_negatives(known_loader(known_shapes, tmp_path), tmp_path / "no_such_folder", TINY)


def test_presence_is_the_base_s_own_score(known_shapes, answers):
    folder, _, shown = known_shapes
    loader = known_loader(known_shapes, answers)
    verify_negatives(loader, folder, TINY)
    model = load_base("tiny", device="cpu")
    transform = batches.official_transforms(112)
    prompt = sorted(shown[0])[0]
    ((stage,), _) = batches.forward(
        model, [transform(batches.make_datapoint(Image.open(folder / "0.png"), [prompt]))], "cpu"
    )
    scores = {asked.prompt: score for asked, score in loader._scores(0).items()}
    assert scores[prompt] == pytest.approx(stage["presence_logit_dec"].sigmoid().item(), abs=2e-3)
    assert scores[prompt] > 0.5 > scores["zebra"]


def test_the_record_holds_the_prompts_that_were_asked(dataset):
    data = {
        "train": {
            "dataset": {
                "ann_file": str(dataset / "train" / ANNOTATION_FILE),
                "coco_json_loader": {"prompts": {"names": {"orange hexagon": "honeycomb cell"}}},
            }
        }
    }
    assert prompts_and_images(data) == (["purple cross", "honeycomb cell", "cyan crescent"], 6)


def test_a_run_with_other_phrases_is_another_run(tmp_path):
    file = tmp_path / "phrases.txt"
    file.write_text("zebra\n")
    loader = {"prompts": {"phrases": str(file), "cache": "here", "negatives": "list"}}
    before = fingerprint_of_run(loader)
    file.rename(tmp_path / "moved.txt")
    moved = {"prompts": {**loader["prompts"], "phrases": str(tmp_path / "moved.txt"), "cache": "there"}}
    assert fingerprint_of_run(moved) == before
    (tmp_path / "moved.txt").write_text("penguin\n")
    assert [line.split(" was ")[0] for line in differences(before, fingerprint_of_run(moved))] == [
        "prompts.phrases"
    ]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        pytest.param({"prompts.negatives": "lists"}, "did you mean 'list'", id="value"),
        pytest.param({"prompts.negativ": "list"}, "did you mean 'negatives'", id="key"),
        pytest.param({"prompts.names": {"orange hexagn": "x"}}, "did you mean 'orange hexagon'", id="class"),
        pytest.param({"prompts.phrases": "no/such.txt"}, "cannot be read", id="file"),
    ],
)
def test_bad_prompts_are_found_before_anything_is_written(config, message, dataset, tmp_path):
    settings = TrainSettings(dataset, tmp_path / "run", base="tiny", config=config)
    with pytest.raises(Sam3LoraError, match=message):
        train(settings)
    assert not (tmp_path / "run").exists()


def test_files_of_a_run_are_written_by_their_absolute_paths(dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = TrainSettings(dataset, tmp_path / "run", config={"prompts.phrases": "mine.txt"})
    assert yaml.safe_load(run_yaml(settings))["prompts"]["phrases"] == str(tmp_path / "mine.txt")


def test_evaluation_asks_by_the_prompts_that_adapters_record(dataset, tmp_path):
    def adapter(name, **training):
        save_adapter(
            get_peft_sam3(load_base("tiny", device="cpu"), "minimal"), tmp_path / name, training=training
        )
        return tmp_path / name

    named = adapter("named", prompt_of={"purple cross": "violet plus"})
    assert common_prompts({"named": named, "plain": adapter("plain")}) == {"purple cross": "violet plus"}
    with pytest.raises(ConfigError, match="class 'purple cross': 'violet plus' by named, 'x' by other"):
        common_prompts({"named": named, "other": adapter("other", prompt_of={"purple cross": "x"})})
    split = dataset / "valid"
    asked = open_split(split, split / ANNOTATION_FILE, 112, prompt_of={"purple cross": "violet plus"})[0]
    assert asked_of(asked) == [(1, "violet plus"), (2, "orange hexagon"), (3, "cyan crescent")]
