"""The report: one HTML file with everything in it, and the right images on it."""

import json
import math
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from PIL import Image
from report_example import FACTS, NOTES, made_up_history, write_comparison, write_example

from sam3_lora.data.coco import ANNOTATION_FILE
from sam3_lora.evaluation.images import image_ious
from sam3_lora.report import GROUPS, History, ReportError, Step, choose_pictures, read_history, write_report
from sam3_lora.report.charts import ticks
from sam3_lora.training.progress import append_event

UNCLOSED = {"meta", "img", "link", "wbr"}


class Page(HTMLParser):
    """A page as lists: elements with their attributes, texts by the elements that they are in."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.texts = [], [], []
        self.feed(text)
        assert not self.open, "every element is closed"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in UNCLOSED:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((tuple(self.open), data.strip()))

    def all(self, tag, style=None):
        return [
            values for name, values in self.elements if name == tag and style in (None, values.get("class"))
        ]

    def texts_in(self, tag):
        return [text for path, text in self.texts if tag in path]


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    return write_example(tmp_path_factory.mktemp("example"))


@pytest.fixture(scope="module")
def page(example):
    return Page(example.read_text(encoding="utf-8"))


def test_headings_form_an_outline(page):
    levels = [int(tag[1]) for tag, _ in page.elements if tag in ("h1", "h2", "h3", "h4")]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(later <= earlier + 1 for earlier, later in pairwise(levels))
    assert page.texts_in("h2") == ["Results", "What was trained", "How it learned", "Pictures"]
    assert page.texts_in("h3") == ["Best", "Median", "Worst"]


def test_the_page_needs_nothing_but_itself(example, page):
    text = example.read_text(encoding="utf-8")
    assert "http://" not in text
    assert "https://" not in text
    assert "url(" not in text
    assert not page.all("script")
    assert not page.all("link")
    assert all(image["src"].startswith("data:image/jpeg;base64,") for image in page.all("img"))
    (policy,) = (meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'")


def test_the_page_stays_small(example):
    assert example.stat().st_size < 2_000_000


def test_large_pictures_are_stored_smaller(tmp_path):
    from sam3_lora.report import Picture
    from sam3_lora.visualization import SheetRow

    noise = Image.effect_noise((448, 448), 100).convert("RGB")
    row = SheetRow(noise, "noise.png", ["dog"], {"base": [], "adapter": []})
    pictures = {name: [Picture(row, {})] * 2 for name in GROUPS}
    path = write_report(tmp_path / "r.html", title="t", facts={}, metrics={}, pictures=pictures)
    assert path.stat().st_size < 2_000_000


def test_the_table_compares_every_metric_with_the_base(page):
    cells = [text for path, text in page.texts if "th" in path or "td" in path]
    assert cells[:4] == ["metric", "base", "adapter", "difference"]
    rows = [cells[start : start + 4] for start in range(4, len(cells), 4)]
    assert rows == [
        ["Boxes, AP", "0.031", "0.613", "+0.582"],
        ["Boxes, AP50", "0.052", "0.881", "+0.829"],
        ["Masks, AP", "0.020", "0.554", "+0.534"],
        ["Masks, AP50", "0.041", "0.862", "+0.821"],
    ]
    assert {values.get("scope") for values in page.all("th")} == {"col", "row"}


@pytest.mark.parametrize(
    ("before", "after", "shown"),
    [
        (0.5, 0.25, "−0.250"),
        (0.1, 0.1004, "±0.000"),
        (0.0, 1.0, "+1.000"),
        pytest.param(0.0004, 0.0006, "+0.001", id="as the shown numbers differ"),
    ],
)
def test_differences_have_a_sign(tmp_path, before, after, shown):
    metrics = {"base": {"cgF1": before}, "adapter": {"cgF1": after}}
    path = write_report(tmp_path / "r.html", title="t", facts={}, metrics=metrics)
    assert Page(path.read_text()).texts_in("td")[-1] == shown


def test_a_metric_of_one_model_only_has_no_difference(tmp_path):
    metrics = {"base": {}, "a": {"segm_AP": 0.5}, "b": {"segm_AP": 0.75}}
    page = Page(write_report(tmp_path / "r.html", title="t", facts={}, metrics=metrics).read_text())
    assert page.texts_in("td") == ["–", "0.500", "–", "0.750", "–"]


def test_a_comparison_has_a_table_by_class_with_dashes_for_what_is_not_defined(tmp_path):
    page = Page(write_comparison(tmp_path).read_text(encoding="utf-8"))
    assert page.texts_in("h2") == ["Results", "What was evaluated", "Results by class", "Pictures"]
    groups = [values for values in page.all("th") if values.get("scope") == "rowgroup"]
    assert [values["colspan"] for values in groups] == ["6"] * 4
    values = page.texts_in("td")
    of_class = ["0.090", "0.720", "+0.630", "0.900", "+0.810"]
    assert values[15:20] == of_class, "the first row below the first class"
    assert values[-15:] == ["–"] * 15
    assert values[10] == "−0.030", "a minus, as in the differences"
    assert len(page.all("img")) == 3 * 3 * 4


def test_only_the_first_hundred_classes_are_shown(tmp_path):
    classes = {f"class {number}": {"base": {"cgF1": 0.5}} for number in range(103)}
    text = write_report(tmp_path / "r.html", title="t", facts={}, metrics={}, classes=classes).read_text()
    assert text.count('scope="rowgroup"') == 100
    assert "3 more classes are left out here." in text


def test_a_result_that_is_not_defined_does_not_lead_the_page(tmp_path):
    metrics = {"base": {"segm_AP50": None, "segm_AP": 0.2}, "adapter": {"segm_AP50": 0.5, "segm_AP": 0.4}}
    page = Page(write_report(tmp_path / "r.html", title="t", facts={}, metrics=metrics).read_text())
    assert page.texts_in("strong") == ["0.400"]


def test_the_best_adapter_leads_the_page(tmp_path):
    metrics = {name: {"segm_AP": value} for name, value in (("base", 0.9), ("a", 0.5), ("b", 0.3))}
    page = Page(write_report(tmp_path / "r.html", title="t", facts={}, metrics=metrics).read_text())
    assert page.texts_in("strong") == ["0.500"]
    assert page.texts_in("small") == ["Masks, AP: base → a"]


def test_facts_and_notes_are_there(page):
    assert dict(zip(page.texts_in("dt"), page.texts_in("dd"), strict=True)) == FACTS
    assert [text for text in page.texts_in("p") if text in NOTES] == NOTES


def test_texts_are_escaped(tmp_path):
    hostile = '<script>alert("1 & 2")</script>'
    row_metrics = {hostile: {hostile: 0.1}, "b": {hostile: 0.2}}
    path = write_report(
        tmp_path / "r.html", title=hostile, facts={hostile: hostile}, metrics=row_metrics, notes=[hostile],
        classes={hostile: row_metrics}, facts_heading=hostile,
    )  # fmt: skip
    page = Page(path.read_text())
    assert not page.all("script")
    assert page.texts_in("h1") == [hostile]
    assert page.texts_in("dd") == [hostile]
    assert hostile in page.texts_in("th")


def test_category_and_file_names_are_escaped(tmp_path):
    from sam3_lora.report import Picture
    from sam3_lora.visualization import GROUND_TRUTH, Instance, SheetRow

    name = '<b>R&D</b> "cat"\'s'
    item = Instance(name, (1, 1, 30, 30))
    row = SheetRow(
        Image.new("RGB", (64, 48)), f"{name}.png", [name], {GROUND_TRUTH: [item, item], "adapter": []}
    )
    pictures = {"best": [Picture(row, {"adapter": 0.0})]}
    page = Page(
        write_report(tmp_path / "r.html", title="t", facts={}, metrics={}, pictures=pictures).read_text()
    )
    assert page.texts_in("h4") == [f"{name}.png"]
    assert page.texts_in("ul") == [name]
    assert [image["alt"] for image in page.all("img")] == [
        f"{name}.png, ground truth: 2 × {name}",
        f"{name}.png, adapter: nothing",
    ]


def test_every_picture_has_its_text_and_its_shape(page):
    images = page.all("img")
    assert len(images) == 3 * 3 * 3
    assert all(image["alt"].count(": ") == 1 for image in images)
    assert all(image["width"] == image["height"] == "112" for image in images)


def circles(page_text, name):
    group = page_text.partition(f'data-name="{name}"')[2].partition("</g>")[0]
    return group.count("<circle"), group.count("<title>")


@pytest.mark.parametrize("steps", [1, 5, 30])
def test_curves_have_a_point_with_a_title_for_each_value(tmp_path, steps):
    history = made_up_history(epochs=10, steps=steps)
    text = write_report(tmp_path / "r.html", title="t", facts={}, metrics={}, history=history).read_text()
    assert circles(text, "each step") == (10 * steps, 10 * steps)
    for name in ("mean of the epoch", "masks, AP50", "masks, AP", "boxes, AP50", "boxes, AP"):
        assert circles(text, name) == (10, 10), name
    assert "epoch 1, step 1: loss" in text
    assert text.count("best adapter</text>") == 2


def test_long_runs_are_drawn_as_means_of_some_steps(tmp_path):
    history = made_up_history(epochs=10, steps=1000)
    path = write_report(tmp_path / "r.html", title="t", facts={}, metrics={}, history=history)
    assert circles(path.read_text(), "mean of 25 steps")[0] == 400
    assert path.stat().st_size < 100_000


def test_a_loss_that_is_no_number_is_a_gap(tmp_path):
    steps = [Step(1, i, 4, loss) for i, loss in enumerate((3.0, math.nan, math.inf, 1.0), start=1)]
    text = write_report(
        tmp_path / "r.html", title="t", facts={}, metrics={}, history=History(steps, {})
    ).read_text()
    assert circles(text, "each step") == (2, 2)
    assert "nan" not in text.lower().partition("<main>")[2].replace("inherit", "")


@pytest.mark.parametrize(
    ("top", "expected"),
    [
        (1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (287.0, [0, 100, 200, 300]),
        (12, [0, 2.5, 5, 7.5, 10, 12.5]),
        (0.0, [0, 1]),
        (3e-7, [0, 1e-7, 2e-7, 3e-7]),
    ],
)
def test_ticks_are_round_and_reach_the_top(top, expected):
    assert ticks(top) == pytest.approx(expected)


def test_a_report_of_nothing_is_still_a_page(tmp_path):
    text = write_report(tmp_path / "r.html", title="t", facts={}, metrics={}).read_text()
    assert Page(text).texts_in("h2") == ["Results", "What was trained"]


SQUARES = {"height": 100, "width": 200}


def squares(*, images, found):
    """Return ground truth with a 10 px square of category 1 on each image, and results as given by (image, offset)."""
    document = {
        "images": [{"id": i, "file_name": f"{i}.png", **SQUARES} for i in images],
        "categories": [{"id": 1, "name": "square"}],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "bbox": [0, 0, 10, 10], "iscrowd": 0,
             "segmentation": [[0, 0, 10, 0, 10, 10, 0, 10]]}
            for i in images
        ],
    }  # fmt: skip
    results = [
        {"image_id": image, "category_id": 1, "score": 0.9, "bbox": [offset, 0, 10, 10]}
        for image, offset in found
    ]
    return document, results


def test_the_iou_of_an_image_is_that_of_the_best_prediction_of_each_object():
    document, results = squares(images=[1, 2, 3], found=[(1, 0), (1, 5), (2, 5)])
    assert image_ious(document, results) == pytest.approx({1: 1.0, 2: 1 / 3, 3: 0.0})


def test_masks_are_compared_where_both_sides_have_them():
    document, results = squares(images=[1], found=[(1, 0)])
    results[0]["segmentation"] = {"size": [100, 200], "counts": [0, 10, 100 * 200 - 10]}  # one column of ten
    assert image_ious(document, results) == pytest.approx({1: 0.1})


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"score": 0.49}, id="unsure"),
        pytest.param({"category_id": 2}, id="another category"),
    ],
)
def test_predictions_that_do_not_count(change):
    document, results = squares(images=[1], found=[(1, 0)])
    assert image_ious(document, [{**results[0], **change}]) == {1: 0.0}


def test_crowds_and_images_without_objects_are_left_out():
    document, _ = squares(images=[1, 2], found=[])
    document["annotations"][0]["iscrowd"] = 1
    assert image_ious(document, []) == {2: 0.0}


@pytest.mark.parametrize(
    ("number", "groups"),
    [
        pytest.param(0, ([], [], []), id="no image"),
        pytest.param(1, ([1], [], []), id="one image"),
        pytest.param(2, ([1], [], [2]), id="two images"),
        pytest.param(3, ([1], [2], [3]), id="three images"),
        pytest.param(5, ([1], [3], [5]), id="five images"),
        pytest.param(9, ([1, 2, 3], [4, 5, 6], [9, 8, 7]), id="nine images"),
        pytest.param(11, ([1, 2, 3], [5, 6, 7], [11, 10, 9]), id="eleven images"),
    ],
)
def test_best_median_and_worst_images_are_those_of_the_last_column(tmp_path, number, groups):
    """Image i is found with an error that grows with i by the adapter, and the other way round by the base."""
    images = list(range(1, number + 1))
    document, adapter = squares(images=images, found=[(i, i / 2) for i in images])
    _, base = squares(images=images, found=[(i, (number - i) / 2) for i in images])
    (tmp_path / ANNOTATION_FILE).write_text(json.dumps(document))
    for image in images:
        Image.new("RGB", (200, 100)).save(tmp_path / f"{image}.png")
    chosen = choose_pictures(tmp_path / ANNOTATION_FILE, tmp_path, {"base": base, "adapter": adapter})
    assert list(chosen) == list(GROUPS)
    names = [[picture.row.name for picture in pictures] for pictures in chosen.values()]
    assert names == [[f"{i}.png" for i in group] for group in groups]
    if number > 1:
        assert chosen["best"][0].ious["adapter"] == pytest.approx(9.5 / 10.5)
        assert chosen["worst"][0].ious["base"] == 1.0


def a_step(logs, epoch, step, loss):
    append_event(logs, "step", epoch=epoch, step=step, steps=2, loss=loss)


def test_the_history_of_a_resumed_run_counts_every_step_once(tmp_path):
    logs = tmp_path / "logs"
    logs.mkdir()
    append_event(logs, "start", epochs=2, trainable_parameters=3, total_parameters=100)
    a_step(logs, 1, 1, 9.0)
    a_step(logs, 1, 2, 8.0)
    append_event(logs, "metrics", epoch=1, segm_AP=0.1)
    a_step(logs, 2, 1, 7.5)
    with open(logs / "progress.jsonl", "a") as file:
        file.write('{"event": "st')  # killed here; the next start goes on behind it
        file.write("\n")
    append_event(logs, "start", epochs=2, trainable_parameters=3, total_parameters=100)
    a_step(logs, 2, 1, 7.0)
    a_step(logs, 2, 2, 6.0)
    append_event(logs, "metrics", epoch=2, segm_AP=0.2)
    append_event(logs, "metrics", epoch=3, segm_AP=0.2)  # a finished run that was started again
    (logs / "best_metrics.json").write_text('{"epoch": 2, "best_metric": "segm_AP", "segm_AP": 0.2}')

    history = read_history(tmp_path)
    assert [(step.epoch, step.step, step.loss) for step in history.steps] == [
        (1, 1, 9.0), (1, 2, 8.0), (2, 1, 7.0), (2, 2, 6.0),
    ]  # fmt: skip
    assert history.metrics == {1: {"segm_AP": 0.1}, 2: {"segm_AP": 0.2}}
    assert (history.best_epoch, history.best_metric) == (2, "segm_AP")
    assert history.start == {"epochs": 2, "trainable_parameters": 3, "total_parameters": 100}
    assert [step.epochs_done for step in history.steps] == [0.5, 1.0, 1.5, 2.0]


def test_a_folder_without_a_run_has_no_history(tmp_path):
    with pytest.raises(ReportError, match="tells of no run; give the folder that 'train' or 'demo' filled"):
        read_history(tmp_path)
