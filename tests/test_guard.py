"""The guard: adapters that were ruined on purpose, and the numbers behind the verdict."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.cocoeval import COCOeval
from tiny_forward import untouched

from sam3_lora import guard
from sam3_lora.adapter import active_adapters, get_peft_sam3, load_adapter, save_adapter, scale_adapter
from sam3_lora.base.checkpoint import TINY
from sam3_lora.cli import main
from sam3_lora.data.coco import ANNOTATION_FILE, read_split
from sam3_lora.data.shapes import DEMO_CONCEPTS, PRETRAINING_CONCEPTS, write_coco
from sam3_lora.errors import AdapterError, ConfigError, DataError
from sam3_lora.evaluation import guarding
from sam3_lora.evaluation.batches import make_datapoint, official_transforms
from sam3_lora.evaluation.metrics import PairScore, evaluate_split, pair_scores
from sam3_lora.evaluation.probe import Probe, make_probe, shipped_phrases
from sam3_lora.evaluation.scores import ap50_of_draws, read_truth
from sam3_lora.evaluation.statistics import bootstrap, calibration_error, matthews_correlation
from sam3_lora.evaluation.verdict import CUTOFFS, Answers, judge

from sam3.train.data.collator import collate_fn_api  # isort: skip  (after the modules that stand in for triton)

torch.set_num_threads(1)

PHRASES = ["giraffe", "violin", "cactus", "umbrella", "pyramid", "candle", "top hat", "camel"]
TAUGHT = ["pear", "boot", "lamp", "river", "chair", "spoon", "door", "cloud"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_coco(folder / "new" / "valid", DEMO_CONCEPTS, 6, seed=1)
    write_coco(folder / "old" / "valid", PRETRAINING_CONCEPTS, 8, seed=2)
    return folder


@pytest.fixture(scope="module")
def ruined(data):
    """An adapter that was trained to find everything it is asked for, wherever it is asked."""
    model = get_peft_sam3(untouched(), "minimal").eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    transform = official_transforms(TINY.resolution)
    images = [Image.open(path) for path in sorted((data / "new/valid").glob("*.png"))]
    for step in range(20):
        random.seed(step)
        datapoint = transform(make_datapoint(images[step % len(images)], random.sample(TAUGHT, 4)))
        (out,) = model.get_base_model()(
            collate_fn_api([datapoint], dict_key="all", with_seg_masks=False)["all"]
        )
        found = torch.nn.functional.logsigmoid(out["pred_logits"].amax(1)).mean()
        present = torch.nn.functional.logsigmoid(out["presence_logit_dec"]).mean()
        optimizer.zero_grad()
        (-found - present).backward()
        optimizer.step()
    return model


def test_a_fresh_adapter_is_kept(data):
    model = get_peft_sam3(untouched(), "balanced")
    report = guard(model, data / "new", general=data / "old", phrases=PHRASES)
    assert report.verdict == "kept"
    assert report.reasons == []
    assert all(change.change == change.low == change.high == 0 for change in report.measures.values())
    assert report.measures["general_AP50"].base > 0.8
    assert report.measures["false_fire"].base == 0
    assert (report.images, report.phrases) == (6, 8)


def test_an_adapter_that_fires_on_everything_is_lost(ruined, data):
    report = guard(ruined, data / "new", general=data / "old", phrases=PHRASES)
    assert report.verdict == "lost"
    assert report.measures["false_fire"].adapter > 0.9
    assert report.measures["ECE"].adapter > report.measures["ECE"].base + 0.3
    assert report.measures["general_AP50"].adapter < 0.5 * report.measures["general_AP50"].base
    assert [reason.split()[0] for reason in report.reasons] == ["false_fire", "general_AP50"]
    assert all(after > before for before, after in report.fires_most.values())


def test_a_little_of_it_has_drifted_and_less_is_kept(ruined, data):
    low, high, verdicts = 0.0, 0.4, []
    while "drifted" not in verdicts and high - low > 1e-4:  # towards where it starts to fire
        share = (low + high) / 2
        scale_adapter(ruined, share)
        report = guard(ruined, data / "new", phrases=PHRASES)
        scale_adapter(ruined, 1)
        verdicts.append(report.verdict)
        low, high = (share, high) if report.verdict == "kept" else (low, share)
    assert verdicts[-1] == "drifted"
    assert low > 0  # less of it was kept
    fire = report.measures["false_fire"]
    assert 0.05 <= fire.change < 0.25
    assert fire.low > 0


def test_modes_and_adapter_are_as_before(ruined, data):
    ruined.train()
    modes = [module.training for module in ruined.modules()]
    guard(ruined, data / "new", phrases=PHRASES[:2], max_images=1)
    assert [module.training for module in ruined.modules()] == modes
    assert active_adapters(ruined) == ["default"]
    ruined.eval()


def test_a_merged_adapter_needs_its_base(data):
    merged = get_peft_sam3(untouched(), "minimal")
    merged.merge_adapter()
    with pytest.raises(AdapterError, match="merged into the weights"):
        guard(merged, data / "new", phrases=PHRASES[:2], max_images=1)
    report = guard(merged, data / "new", phrases=PHRASES[:2], max_images=1, base=untouched())
    assert report.verdict == "kept"


def test_a_change_that_one_image_makes_is_none():
    """A quarter of all pairs, but all in one of four images: draws without it show no change."""
    probe = Probe([Path("unread")] * 4, PHRASES, np.zeros((4, len(PHRASES)), dtype=bool), classes=0)
    silent = [[PairScore(0.1, 0.1)] * len(PHRASES)] * 4
    one = [[PairScore(0.9, 0.9)] * len(PHRASES), *silent[1:]]
    assert judge(probe, Answers(silent), Answers(one)).verdict == "kept"
    assert judge(probe, Answers(silent), Answers(one)).measures["false_fire"].adapter == 0.25
    all_four = judge(probe, Answers(silent), Answers(one[:1] * 4))
    assert all_four.verdict == "lost"


def test_the_probe_asks_classes_and_unrelated_phrases(data):
    split = read_split(data / "new/valid")
    probe = make_probe(split, ["purple rain", "violin", "violin", "a cross"], max_images=3, seed=4)
    assert list(probe.prompts) == ["purple cross", "orange hexagon", "cyan crescent", "violin"]
    assert list(probe.phrases) == ["violin"]
    assert not probe.present[:, 3].any()
    for path, row in zip(probe.images, probe.present, strict=True):
        (image,) = (i for i in split.images if split.folder / i["file_name"] == path)
        shown = {a["category_id"] for a in split.annotations if a["image_id"] == image["id"]}
        names = {c["id"]: c["name"] for c in split.categories}
        assert {name for name, here in zip(probe.prompts, row, strict=True) if here} == {
            names[c] for c in shown
        }
    assert make_probe(split, max_images=3, seed=4).images == probe.images
    assert make_probe(split, max_images=3, seed=5).images != probe.images


def test_a_class_is_asked_by_the_prompt_that_the_adapter_was_trained_with(data, tmp_path, monkeypatch):
    model = get_peft_sam3(untouched(), "minimal")
    folder = save_adapter(
        model, tmp_path / "adapter", training={"prompt_of": {"purple cross": "violet plus"}}
    )
    asked = []
    ask = guarding.pair_scores
    monkeypatch.setattr(
        guarding, "pair_scores", lambda m, i, prompts, **o: asked.extend(prompts) or ask(m, i, prompts, **o)
    )
    guard(load_adapter(untouched(), folder), data / "new", phrases=PHRASES[:1], max_images=1)
    assert list(asked[0]) == ["violet plus", "orange hexagon", "cyan crescent", "giraffe"]


def test_wrong_requests_are_refused(data, ruined):
    with pytest.raises(ConfigError, match="no phrase is left"):
        guard(ruined, data / "new", phrases=["red cross"])
    with pytest.raises(ConfigError, match="max_images must be 1 or more"):
        guard(ruined, data / "new", max_images=0)
    with pytest.raises(ConfigError, match="batch_size must be 1 or more"):
        guard(ruined, data / "new", batch_size=0)
    with pytest.raises(DataError, match="no split 'test'"):
        guard(ruined, data / "new", split="test")


def test_the_shipped_phrases_are_many_short_and_no_concept_of_the_tiny_base():
    phrases = shipped_phrases()
    assert len(phrases) == len(set(phrases)) >= 40
    words = {word for concept in (*DEMO_CONCEPTS, *PRETRAINING_CONCEPTS) for word in concept.prompt.split()}
    assert not {word for phrase in phrases for word in phrase.split()} & words


def test_every_cutoff_has_a_reason():
    assert all(len(cutoff.reason) > 20 and cutoff.drifted < cutoff.lost for cutoff in CUTOFFS)


def test_the_calibration_error_is_the_gap_between_confidence_and_truth():
    assert calibration_error(np.array([0.95, 0.95]), np.array([True, True])) == pytest.approx(0.05)
    assert calibration_error(np.array([1.0, 1.0, 0.0]), np.array([False, False, False])) == pytest.approx(
        2 / 3
    )
    mixed = calibration_error(np.array([0.2, 0.2, 0.8, 0.8]), np.array([False, True, True, True]))
    assert mixed == pytest.approx(0.5 * 0.3 + 0.5 * 0.2)


def test_the_correlation_is_that_of_matthews():
    answer, truth = np.array([1, 1, 1, 0, 0, 1], dtype=bool), np.array([1, 1, 0, 0, 1, 0], dtype=bool)
    tp, fp, fn, tn = 2, 2, 1, 1
    expected = (tp * tn - fp * fn) / ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    assert matthews_correlation(answer, truth) == pytest.approx(expected)
    assert matthews_correlation(np.ones(3, dtype=bool), np.array([True, False, True])) == 0


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = 0
    for draw in range(100):
        sample = rng.random(40) < 0.3
        interval = bootstrap(
            40, lambda places, sample=sample: float(sample[places].mean()), seed=draw, times=200
        )
        assert interval.value == pytest.approx(sample.mean())
        held += interval.low <= 0.3 <= interval.high
    assert 85 <= held <= 100


def test_ap50_of_all_images_is_that_of_coco_and_a_draw_counts_an_image_twice(data):
    folder = data / "old/valid"
    results = evaluate_split(
        untouched(), folder, folder / ANNOTATION_FILE, resolution=TINY.resolution, batch_size=4, device="cpu"
    )
    images, ap50 = ap50_of_draws(folder / ANNOTATION_FILE, results.predictions)
    assert images == 8
    assert ap50(np.arange(8)) == pytest.approx(results.overall.segm_AP50)
    truth = read_truth(folder / ANNOTATION_FILE)
    evaluation = COCOeval(truth, truth.loadRes([dict(r) for r in results.predictions]), "segm")
    evaluation.params.imgIds = sorted(truth.imgs)[:1]
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert ap50(np.zeros(8, dtype=int)) == pytest.approx(evaluation.stats[1])


def test_pairs_are_asked_in_turns_with_the_same_scores(data):
    model = untouched()
    paths = sorted((data / "new/valid").glob("*.png"))[:3]
    asked = [PHRASES[:3], [], PHRASES[:5]]
    options = {"resolution": TINY.resolution, "device": "cpu"}
    seen = []
    together = pair_scores(model, paths, asked, on_progress=lambda *count: seen.append(count), **options)
    assert [len(row) for row in together] == [3, 0, 5]
    assert seen[-1] == (3, 3)
    in_turns = pair_scores(model, paths, asked, batch_size=1, prompts_at_once=2, **options)
    np.testing.assert_allclose(
        np.concatenate([r for r in together if r]), np.concatenate([r for r in in_turns if r]), atol=1e-5
    )


@pytest.fixture(scope="module")
def folder(ruined, tmp_path_factory):
    return save_adapter(ruined, tmp_path_factory.mktemp("ruined") / "adapter", prompts=["purple cross"])


def test_the_command_prints_the_verdict_and_writes_it(folder, data, tmp_path, capsys):
    command = ["evaluate", "--data", str(data / "new"), "--adapter", str(folder), "--base", "tiny", "--guard"]
    command += ["--general", str(data / "old"), "--output", str(tmp_path / "out"), "--report", "--json"]
    assert main(command) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out/metrics.json").read_text())
    assert printed["guard"]["verdict"] == "lost"
    assert printed["guards"] == {"adapter": printed["guard"]}
    by_hand = guard(load_adapter(untouched(), folder), data / "new", general=data / "old")
    assert printed["guard"]["measures"]["false_fire"]["adapter"] == by_hand.measures["false_fire"].adapter
    page = (tmp_path / "out/report.html").read_text()
    assert "lost" in page
    assert "false fire" in page


def test_the_command_shows_a_table_for_people(folder, data, capsys):
    command = ["evaluate", "--data", str(data / "new"), "--adapter", str(folder), "--base", "tiny", "--guard"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "adapter: lost" in shown
    assert "6 images for 48 things that they do not show" in shown
    assert "Fires most" in shown


def test_a_general_dataset_without_the_guard_is_a_mistake(data, capsys):
    assert (
        main(["evaluate", "--data", str(data / "new"), "--base", "tiny", "--general", str(data / "old")]) == 2
    )
    assert "add --guard" in capsys.readouterr().err
