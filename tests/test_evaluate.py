"""Base and adapters side by side: the numbers of separate runs, image features computed once, clear refusals."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from sam3_lora import evaluate
from sam3_lora.adapter import get_peft_sam3, load_adapter, load_adapter_beside, save_adapter
from sam3_lora.base.checkpoint import TINY
from sam3_lora.base.loading import load_base
from sam3_lora.cli import main
from sam3_lora.data.shapes import ANNOTATION_FILE, VARIED, Concept, write_coco
from sam3_lora.errors import AdapterError, ConfigError, DataError, OutputError
from sam3_lora.evaluation import batches
from sam3_lora.evaluation.compare import unique_names
from sam3_lora.evaluation.metrics import evaluate_split
from sam3_lora.evaluation.scores import score_predictions
from sam3_lora.report import report_of_evaluation

from sam3.eval.cgf1_eval import CGF1Evaluator  # isort: skip
from sam3.model.vitdet import ViT  # isort: skip  (after the modules that stand in for triton)

KNOWN = (Concept("red", "circle"), Concept("blue", "square"), Concept("green", "star"))
NOWHERE = "purple cross"
IMAGES = 6
BATCH = 4  # the last batch is a part of one
SPLIT_KEYS = ["bbox_AP50", "segm_AP50", "bbox_AP", "segm_AP", "bbox_AP75", "segm_AP75", "mean_IoU"]
CGF1_KEYS = ["cgF1", "IL_MCC", "positive_micro_F1"]


def apart(model, path):
    return evaluate_split(
        model, path, path / ANNOTATION_FILE, resolution=TINY.resolution, batch_size=BATCH, device="cpu"
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Shapes that the base knows, and one class without objects."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("data")
    write_coco(folder / "valid", KNOWN, IMAGES, seed=5, style=VARIED, size=128)
    path = folder / "valid" / ANNOTATION_FILE
    document = json.loads(path.read_text())
    document["categories"].append({"id": 9, "name": NOWHERE})
    path.write_text(json.dumps(document))
    return folder


def make_adapter(folder, seed, components, **overrides):
    """Save an adapter whose LoRA matrices are noise, so that it changes what the base predicts."""
    adapted = get_peft_sam3(load_base("tiny"), components=components, **overrides)
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=noise)
    return save_adapter(adapted, folder)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    neck = r"backbone\.vision_backbone\.convs\.0\.conv_1x1"
    return {
        "decoder": make_adapter(runs / "decoder", 1, ["detr_decoder"]),
        "scoring": make_adapter(runs / "scoring", 2, ["scoring", "text_encoder"], kinds=["attention", "mlp"]),
        "neck": make_adapter(runs / "neck", 3, None, target_modules=neck),
        "vision": make_adapter(runs / "vision", 4, ["vision_encoder"]),
    }


@pytest.fixture(scope="module")
def result(data, adapters):
    return evaluate(data, adapters=adapters, batch_size=BATCH, device="cpu")


class TrunkCalls:
    """Counts the images that go through the vision trunk of any model."""

    def __init__(self):
        self.images = 0

    def __enter__(self):
        self.hook = torch.nn.modules.module.register_module_forward_hook(self.count)
        return self

    def count(self, module, inputs, output):
        if isinstance(module, ViT):
            self.images += len(inputs[0])

    def __exit__(self, *_):
        self.hook.remove()


@pytest.mark.parametrize("name", ["base", "decoder", "scoring", "neck", "vision"])
def test_side_by_side_gives_the_numbers_of_separate_runs(data, adapters, result, name):
    model = load_base("tiny")
    if name != "base":
        model = load_adapter(model, adapters[name]).get_base_model()
    alone = apart(model, data / "valid")
    together = result.base if name == "base" else result.adapters[name]
    difference = [
        abs(a["score"] - b["score"]) for a, b in zip(alone.predictions, together.predictions, strict=True)
    ]
    assert max(difference) < 1.01e-5, (
        "the official dumper rounds to five digits, so one step of the last is none"
    )
    assert together.overall.as_dict() == pytest.approx(alone.overall.as_dict(), abs=1e-6)


def test_the_models_differ_and_the_comparison_is_not_one_of_zeros(result):
    values = [model.overall.segm_AP for model in (result.base, *result.adapters.values())]
    assert len(set(values)) > 3
    assert 0.02 < result.base.overall.segm_AP < 0.98


@pytest.mark.parametrize(
    ("names", "passes"),
    [
        pytest.param([], 1, id="base alone"),
        pytest.param(["decoder", "scoring"], 1, id="adapters that leave the vision encoder alone"),
        pytest.param(["neck"], 1, id="adapter above the trunk"),
        pytest.param(["decoder", "vision"], 2, id="one on the trunk"),
    ],
)
def test_the_vision_trunk_sees_every_image_once(data, adapters, names, passes):
    with TrunkCalls() as calls:
        evaluate(
            data, adapters=[adapters[name] for name in names], base="tiny", batch_size=BATCH, device="cpu"
        )
    assert calls.images == IMAGES * passes


def test_the_vision_trunk_sees_an_image_once_however_many_categories_it_is_asked(
    data, adapters, result, monkeypatch
):
    monkeypatch.setattr(batches, "MAX_PROMPTS", 1)
    done = []
    with TrunkCalls() as calls:
        in_turns = evaluate(
            data,
            adapters=[adapters["decoder"]],
            batch_size=BATCH,
            device="cpu",
            on_progress=lambda *state: done.append(state),
        )
    assert calls.images == IMAGES
    assert done[-1] == (4 * IMAGES, 4 * IMAGES)
    assert in_turns.base.overall.defined() == pytest.approx(result.base.overall.defined(), abs=5e-4)


def test_adapters_beside_a_base_share_its_weights_and_leave_it_as_it_was(adapters):
    base = load_base("tiny")
    names = [name for name, _ in base.named_modules()]
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    trainable = [parameter.requires_grad for parameter in base.parameters()]
    beside = [load_adapter_beside(base, folder) for folder in adapters.values()]
    assert [name for name, _ in base.named_modules()] == names
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert [parameter.requires_grad for parameter in base.parameters()] == trainable
    storages = {tensor.untyped_storage().data_ptr() for tensor in base.parameters()}
    for model in beside:
        own = [n for n, p in model.named_parameters() if p.untyped_storage().data_ptr() not in storages]
        assert own and all("lora_" in name for name in own)


def test_an_adapter_that_changes_the_base_in_place_gets_a_copy_of_it(tmp_path):
    adapted = get_peft_sam3(load_base("tiny"), components=["detr_decoder"], bias="all")
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if name.endswith("bias"):
                parameter.add_(1)
    save_adapter(adapted, tmp_path / "biased")
    base = load_base("tiny")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    beside = load_adapter_beside(base, tmp_path / "biased")
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    trunk = "backbone.vision_backbone.trunk.blocks.0.mlp.fc1.bias"
    torch.testing.assert_close(beside.get_base_model().get_parameter(trunk), before[trunk] + 1)


def test_json_has_the_keys_of_metrics_json_and_names_a_single_adapter_twice(data, adapters, result):
    document = json.loads(json.dumps(result.as_dict()))
    assert list(document) == ["base", "adapters"]
    assert list(document["adapters"]) == list(adapters)
    assert list(document["base"]) == [*SPLIT_KEYS, *CGF1_KEYS, "per_class"]
    assert list(document["base"]["per_class"]) == [*(concept.prompt for concept in KNOWN), NOWHERE]
    alone = evaluate(data, adapters=[adapters["decoder"]], batch_size=BATCH, device="cpu").as_dict()
    assert alone["adapter"] == alone["adapters"]["decoder"]


def test_per_class_numbers_are_those_of_a_file_with_that_class_alone(data, result, tmp_path):
    document = json.loads((data / "valid" / ANNOTATION_FILE).read_text())
    for category in document["categories"][:-1]:
        alone = {
            **document,
            "categories": [category],
            "annotations": [a for a in document["annotations"] if a["category_id"] == category["id"]],
        }
        file = tmp_path / f"{category['id']}.json"
        file.write_text(json.dumps(alone))
        own = [p for p in result.base.predictions if p["category_id"] == category["id"]]
        overall = score_predictions(file, own).overall
        assert result.base.per_class[category["name"]].as_dict() == pytest.approx(overall.as_dict(), abs=1e-9)


def test_a_class_without_objects_has_no_numbers(result):
    assert set(result.base.per_class[NOWHERE].as_dict().values()) == {None}


def in_pairs(items, numbers):
    """Return annotations or results that name an (image, phrase) pair where they named an image and a category."""
    return [
        {**item, "image_id": numbers[item["image_id"], item["category_id"]], "category_id": 1}
        for item in items
    ]


@pytest.mark.parametrize("name", ["base", "decoder"])
def test_cgf1_and_its_parts_are_those_of_the_official_evaluator_run_by_hand(data, result, name, tmp_path):
    document = json.loads((data / "valid" / ANNOTATION_FILE).read_text())
    asked = [(image, category) for image in document["images"] for category in document["categories"]]
    numbers = {(image["id"], category["id"]): 700 + n for n, (image, category) in enumerate(asked)}
    truth = {
        "categories": [{"id": 1, "name": "object"}],
        "images": [
            {
                **image,
                "id": numbers[image["id"], category["id"]],
                "text_input": category["name"],
                "is_instance_exhaustive": True,
            }
            for image, category in asked
        ],
        "annotations": in_pairs(document["annotations"], numbers),
    }
    model = result.base if name == "base" else result.adapters[name]
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "predictions.json").write_text(json.dumps(in_pairs(model.predictions, numbers)))
    evaluator = CGF1Evaluator(str(tmp_path / "truth.json"), iou_type="segm")
    official = evaluator.evaluate(str(tmp_path / "predictions.json"))
    values = model.overall.as_dict()
    assert 0.02 < values["cgF1"] < 0.98, "a comparison of zeros proves nothing"
    assert [values[key] for key in CGF1_KEYS] == [official[f"cgF1_eval_segm_{key}"] for key in CGF1_KEYS]


def square(image_id, left, score=None, iscrowd=0):
    mask = np.zeros((100, 100), dtype=np.uint8, order="F")
    mask[0:10, left : left + 10] = 1
    rle = coco_mask.encode(mask)
    item = {
        "image_id": image_id,
        "category_id": 1,
        "bbox": [left, 0, 10, 10],
        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
    }
    return {**item, "area": 100, "iscrowd": iscrowd} if score is None else {**item, "score": score}


def test_mean_iou_takes_the_best_confident_prediction_of_each_object(tmp_path):
    objects = [square(1, 0), square(1, 50), square(2, 0), square(2, 60, iscrowd=1)]
    document = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 100, "height": 100} for i in (1, 2)],
        "categories": [{"id": 1, "name": "square"}],
        "annotations": [{**a, "id": number} for number, a in enumerate(objects, start=1)],
    }
    file = tmp_path / ANNOTATION_FILE
    file.write_text(json.dumps(document))
    predictions = [
        square(1, 0, score=0.9),  # IoU 1
        square(1, 55, score=0.5),  # 50 of 150 pixels
        square(1, 58, score=0.8),  # less
        square(1, 50, score=0.49),  # exact, but not confident
        square(2, 0, score=0.3),  # the only one, not confident
    ]
    scores = score_predictions(file, predictions)
    assert scores.overall.mean_IoU == pytest.approx((1 + 1 / 3 + 0) / 3)
    assert scores.per_class["square"].mean_IoU == scores.overall.mean_IoU


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        pytest.param(["runs/a", "runs/b"], ["a", "b"], id="folder names"),
        pytest.param(["a/adapters/best", "b/adapters/best"], ["a/adapters/best", "b/adapters/best"], id="parents"),
        pytest.param(["a/best", "a/last"], ["best", "last"], id="no longer than need be"),
        pytest.param(["x/base"], ["x/base"], id="never base"),
        pytest.param([], [], id="none"),
    ],
)  # fmt: skip
def test_adapters_are_named_by_the_ends_of_their_paths(folders, names, tmp_path):
    assert list(unique_names(tmp_path / folder for folder in folders)) == names


def test_a_folder_outside_the_dataset_can_be_the_split(data, result, tmp_path):
    shutil.copytree(data / "valid", tmp_path / "elsewhere")
    moved = evaluate(data, split=tmp_path / "elsewhere", base="tiny", batch_size=BATCH, device="cpu")
    assert moved.split == tmp_path / "elsewhere"
    assert moved.base.as_dict() == result.base.as_dict()


@pytest.fixture
def without_objects(data, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    path = folder / "valid" / ANNOTATION_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "annotations": []}))
    return folder


@pytest.fixture
def of_another_base(adapters, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(adapters["decoder"], folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "facebook/sam3"}))
    return folder


def test_adapters_of_different_bases_are_refused_before_any_is_loaded(data, adapters, of_another_base):
    with pytest.raises(
        AdapterError, match="different bases: decoder for 'tiny', other for 'facebook/sam3'; evaluate those"
    ):
        evaluate(data, adapters=[adapters["decoder"], of_another_base])


def test_all_folders_that_hold_no_adapter_are_named_at_once(data, tmp_path):
    (tmp_path / "run" / "adapters" / "best").mkdir(parents=True)
    with pytest.raises(AdapterError) as error:
        evaluate(data, adapters=[tmp_path / "none", tmp_path / "run"])
    assert f"{str(tmp_path / 'none')!r} is not an adapter folder" in str(error.value)
    assert f"did you mean {str(tmp_path / 'run' / 'adapters' / 'best')!r}?" in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"batch_size": 0}, "batch_size must be 1 or more", id="batch size"),
        pytest.param({"adapters": "runs/a"}, "must be a list of folders", id="one text"),
        pytest.param({"adapters": ["runs/a", "runs/b/../a"]}, "adapter given twice", id="twice"),
        pytest.param({"adapters": {"base": "runs/a"}}, "cannot be named 'base'", id="named base"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(data, options, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(data, **options)


def test_a_train_split_needs_areas_when_it_is_measured(data, tmp_path):
    shutil.copytree(data / "valid", tmp_path / "train")
    path = tmp_path / "train" / ANNOTATION_FILE
    document = json.loads(path.read_text())
    for entry in document["annotations"]:
        del entry["area"]
    path.write_text(json.dumps(document))
    with pytest.raises(DataError, match="annotation without 'area'"):
        evaluate(tmp_path, split="train", base="tiny")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param("--data {data} --split vaild", "no split 'vaild' in {data}; did you mean 'valid'?", id="typo"),
        pytest.param("--data {data} --split test", "no split 'test' in {data}. Its splits are valid", id="missing split"),
        pytest.param("--data {data}/none", "{data}/none does not exist; a dataset is a folder", id="missing folder"),
        pytest.param("--data {data}/valid", "{data}/valid is a single split; give the folder above it", id="split as data"),
        pytest.param("--data {empty}", "split without annotations: {empty}/valid", id="empty split"),
        pytest.param("--data {data} --adapter {data}/none", "'{data}/none' is not an adapter folder", id="missing adapter"),
        pytest.param("--data {data} --adapter {decoder} --adapter {other}", "different bases: decoder for 'tiny', other for", id="bases"),
        pytest.param("--data {data} --adapter {decoder} --base tinny", "unknown base 'tinny'; did you mean 'tiny'?", id="unknown base"),
        pytest.param("--data {data} --base tiny --output /proc/evaluation", "error: /proc/evaluation cannot be written: No such file", id="output that cannot be written"),
        pytest.param("--data {data} --output {data}", "{data} is not empty (it holds valid)", id="output in use"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_error(
    arguments, message, data, adapters, without_objects, of_another_base, capsys
):
    places = {
        "data": data,
        "empty": without_objects,
        "other": of_another_base,
        "decoder": adapters["decoder"],
    }
    assert main(["evaluate", *(word.format(**places) for word in arguments.split())]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: "), "no image has been measured before"
    assert captured.out == ""
    assert message.format(**places) in captured.err


def test_the_command_shows_both_tables_and_writes_what_it_showed(data, adapters, result, tmp_path, capsys):
    output = tmp_path / "evaluation"
    command = ["evaluate", "--data", str(data), "--batch-size", str(BATCH), "--output", str(output)]
    command += ["--adapter", str(adapters["decoder"]), "--adapter", str(adapters["vision"])]
    assert main(command) == 0
    captured = capsys.readouterr()
    header = next(line for line in captured.out.splitlines() if "metric" in line)
    assert [word for word in header.split() if word.isalpha()] == ["metric", "base", "decoder", "vision"]
    assert f"{result.base.overall.mean_IoU:.3f}" in captured.out
    assert "By class" in captured.out and KNOWN[0].prompt in captured.out
    assert captured.err.splitlines()[-1] == f"{IMAGES}/{IMAGES} images"
    written = json.loads((output / "metrics.json").read_text())
    assert written["base"] == result.as_dict()["base"]
    predictions = json.loads((output / "predictions" / "vision.json").read_text())
    assert predictions == result.adapters["vision"].predictions
    assert main(command) == 1
    assert "--overwrite to replace it" in capsys.readouterr().err


def test_the_report_of_an_evaluation_shows_all_models_side_by_side(data, adapters, result, tmp_path):
    text = report_of_evaluation(result, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<h1>Evaluation on “valid”</h1>" in text
    assert re.findall(r"<h2.*?>(.*?)</h2>", text) == [
        "Results", "What was evaluated", "Results by class", "Pictures",
    ]  # fmt: skip
    assert (
        f"<dd>{IMAGES} images, " in text
        and "<dd>red circle, blue square, green star, purple cross</dd>" in text
    )
    for name, folder in adapters.items():
        assert f'<th scope="col">{name}</th>' in text
        assert re.search(rf"<dt>Adapter “{name}”</dt><dd>{folder}, \d+ kB</dd>", text)
        assert f">{result.adapters[name].overall.cgF1:.3f}</span>" in text
    no_objects = text.partition(f"<span>{NOWHERE}</span>")[2].partition("</tbody>")[0]
    assert re.findall(r"<td>(.*?)</td>", no_objects) == ["–"] * 5 * 9
    assert len(re.findall("<article>", text)) == IMAGES, "two of each group"
    assert text.count("<img ") == IMAGES * (len(adapters) + 2)


def test_the_command_writes_a_report_of_the_base_alone(data, tmp_path, capsys):
    output = tmp_path / "evaluation"
    command = ["evaluate", "--data", str(data), "--base", "tiny", "--output", str(output), "--report"]
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["Report", str(output / "report.html")]
    text = (output / "report.html").read_text(encoding="utf-8")
    assert "<dt>Adapter" not in text and "difference" not in text
    assert text.count("<img ") == IMAGES * 2


def test_a_report_without_a_folder_for_it_is_wrong_usage(data, capsys):
    assert main(["evaluate", "--data", str(data), "--base", "tiny", "--report"]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.endswith("error: --report needs a folder for report.html: add --output DIR")


def test_the_command_prints_one_json_document(data, result, capsys):
    command = ["evaluate", "--data", str(data), "--base", "tiny", "--batch-size", str(BATCH), "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out) == {"base": result.as_dict()["base"], "adapters": {}}


def test_an_earlier_result_is_not_overwritten_from_python(result, tmp_path):
    from sam3_lora.evaluation.compare import save_evaluation

    (tmp_path / "notes.txt").touch()
    with pytest.raises(OutputError, match="is not empty"):
        save_evaluation(result, tmp_path)
