"""The Predictor beside the official processor, on the real tiny model; and what it says about bad input."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from sam3.model.sam3_image_processor import Sam3Processor

import sam3_lora
from sam3_lora.adapter import active_adapters, get_peft_sam3, load_adapter, save_adapter
from sam3_lora.attention import split_attention
from sam3_lora.base.checkpoint import TINY
from sam3_lora.base.loading import load_base
from sam3_lora.base.official import build_meta_sam3
from sam3_lora.data.image_files import read_image, to_rgb
from sam3_lora.errors import AdapterError, ConfigError, DataError
from sam3_lora.inference import Prediction, Predictor

PROMPTS = ["red circle", "blue square", "a purple elephant"]
BOXES = [(10.0, 20.0, 90.0, 75.5), (100.0, 30.0, 159.0, 119.0)]
LOW = 0.0  # so that something is found, whatever the weights


def picture(width=160, height=120):
    image = Image.new("RGB", (width, height), (120, 120, 110))
    pen = ImageDraw.Draw(image)
    pen.ellipse((10, 20, 90, 75), fill=(220, 40, 40))
    pen.rectangle((100, 30, 158, 110), fill=(50, 80, 230))
    return image


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return load_base("tiny", device="cpu")


@pytest.fixture
def predictor(model):
    return Predictor(model, threshold=LOW)


def official(model, image, prompt, boxes_xyxy=(), threshold=LOW):
    """Ask the official processor as its own examples do, and put the best first."""
    processor = Sam3Processor(model, TINY.resolution, "cpu", threshold)
    state = processor.set_text_prompt(prompt, processor.set_image(image))
    for x0, y0, x1, y1 in boxes_xyxy:
        w, h = image.size
        box = [(x0 + x1) / 2 / w, (y0 + y1) / 2 / h, (x1 - x0) / w, (y1 - y0) / h]
        state = processor.add_geometric_prompt(box, True, state)
    order = state["scores"].argsort(descending=True, stable=True)
    return [state[key][order].numpy() for key in ("boxes", "scores", "masks")]


def assert_equal_to_official(prediction, expected):
    boxes, scores, masks = expected
    assert len(prediction) == len(scores) > 0
    np.testing.assert_allclose(prediction.boxes_xyxy, boxes, rtol=0, atol=1e-5)
    np.testing.assert_allclose(prediction.scores, scores, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(prediction.masks, masks[:, 0])


@pytest.mark.parametrize("boxes", [[], BOXES[:1], BOXES], ids=["words", "and a box", "and two boxes"])
def test_each_of_several_prompts_equals_the_official_processor_asked_alone(model, predictor, boxes):
    image = picture()
    predictions = predictor.predict(image, PROMPTS, boxes)
    assert [prediction.prompt for prediction in predictions] == PROMPTS
    for prediction in predictions:
        assert_equal_to_official(prediction, official(model, image, prediction.prompt, boxes))


def test_boxes_change_what_is_found(predictor):
    (without,), (with_box,) = (predictor.predict(picture(), ["visual"], boxes, 0) for boxes in ([], BOXES))
    assert not np.array_equal(without.scores, with_box.scores)


def test_the_features_of_an_image_are_computed_once_for_all_prompts(predictor, monkeypatch):
    calls = []
    backbone = predictor.model.backbone
    real = backbone.forward_image
    monkeypatch.setattr(backbone, "forward_image", lambda image: calls.append(image.shape) or real(image))
    predictor.predict(picture(), PROMPTS, BOXES)
    assert calls == [(1, 3, TINY.resolution, TINY.resolution)]


def test_a_prediction_is_plain_numpy_best_first_in_pixels_of_the_image(predictor):
    (found,) = predictor.predict(picture(), ["red circle"], threshold=0.0)
    assert isinstance(found, Prediction)
    n = len(found)
    assert (found.boxes_xyxy.shape, found.boxes_xyxy.dtype) == ((n, 4), np.float32)
    assert (found.masks.shape, found.masks.dtype) == ((n, 120, 160), bool)
    assert (found.scores.shape, found.scores.dtype) == ((n,), np.float32)
    assert (np.diff(found.scores) <= 0).all()
    assert found.boxes_xyxy[:, 2].max() > TINY.resolution, "not in pixels of the resized square"


def test_nothing_above_the_threshold_is_an_empty_prediction(predictor):
    (found,) = predictor.predict(picture(), ["red circle"], threshold=1.0)
    assert len(found) == 0
    assert (found.boxes_xyxy.shape, found.masks.shape) == ((0, 4), (0, 120, 160))
    assert found.as_coco_results(1, 1) == []


def test_the_threshold_of_one_call_does_not_stay(predictor):
    before = predictor.predict(picture(), ["red circle"])
    predictor.predict(picture(), ["red circle"], threshold=1.0)
    assert len(predictor.predict(picture(), ["red circle"])[0]) == len(before[0])


def test_coco_results_hold_the_same_boxes_scores_and_masks(predictor):
    (found,) = predictor.predict(picture(), ["red circle"])
    results = found.as_coco_results(image_id=7, category_id=3)
    assert {(result["image_id"], result["category_id"]) for result in results} == {(7, 3)}
    x, y, width, height = np.array([result["bbox"] for result in results]).T
    np.testing.assert_allclose(np.stack([x, y, x + width, y + height], 1), found.boxes_xyxy, atol=1e-5)
    assert [result["score"] for result in results] == found.scores.tolist()
    decoded = [coco_mask.decode(result["segmentation"]).astype(bool) for result in results]
    np.testing.assert_array_equal(decoded, found.masks)


def test_many_images_one_by_one(predictor):
    images = [picture(), picture(80, 200)]
    many = predictor.predict_images(iter(images), ["red circle"])
    for image in images:
        np.testing.assert_array_equal(next(many)[0].masks, predictor.predict(image, ["red circle"])[0].masks)
    assert next(many, None) is None


def test_many_images_are_refused_before_the_first_is_read(predictor):
    with pytest.raises(ConfigError, match="no prompt"):
        predictor.predict_images(["nothing.jpg"], [])


def test_modes_are_restored_and_the_model_can_still_be_trained():
    model = get_peft_sam3(load_base("tiny", device="cpu"), preset="minimal").get_base_model().train()
    model.backbone.eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    Predictor(model, threshold=LOW).predict(picture(), ["red circle"])
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)

    from tiny_forward import forward_with_gradients

    model.eval()
    forward_with_gradients(model)["pred_logits"].sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter that changes the output."""
    adapted = get_peft_sam3(load_base("tiny", device="cpu"), preset="balanced", init_lora_weights=False)
    return save_adapter(adapted, tmp_path_factory.mktemp("adapters") / "mine")


def test_from_adapter_takes_the_base_of_the_adapter(adapter, model):
    predictor = Predictor.from_adapter(adapter, device="cpu", threshold=0.0)
    (found,) = predictor.predict(picture(), ["red circle"])
    by_hand = load_adapter(load_base("tiny", device="cpu"), adapter).get_base_model()
    expected = official(by_hand, picture(), "red circle", threshold=0.0)
    assert_equal_to_official(found, expected)
    assert not np.allclose(found.scores, official(model, picture(), "red circle", threshold=0.0)[1])


def test_a_peft_model_is_taken_for_the_model_inside(adapter):
    peft_model = load_adapter(load_base("tiny", device="cpu"), adapter)
    assert Predictor(peft_model).model is peft_model.get_base_model()


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """An adapter that leaves the image features as they are."""
    adapted = get_peft_sam3(load_base("tiny", device="cpu"), preset="text", init_lora_weights=False)
    return save_adapter(adapted, tmp_path_factory.mktemp("adapters") / "words")


@pytest.fixture
def several(adapter, words):
    """A predictor with two adapters, of which the first is active."""
    base = load_base("tiny", device="cpu")
    for name, folder in {"mine": adapter, "words": words}.items():
        load_adapter(base, folder, name)
    return Predictor(base, threshold=LOW)


def assert_same_predictions(found, expected):
    for one, other in zip(found, expected, strict=True):
        for name in ("boxes_xyxy", "masks", "scores"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_each_call_names_its_adapter_and_leaves_the_active_one(several, predictor, adapter, words):
    alone = {
        "mine": Predictor(load_adapter(load_base("tiny", device="cpu"), adapter), threshold=LOW),
        "words": Predictor(load_adapter(load_base("tiny", device="cpu"), words), threshold=LOW),
        "base": predictor,
    }
    split_attention(predictor.model)  # or its last bits would be others
    for name in ("words", "base", "mine", None):
        expected = alone[name or "mine"].predict(picture(), PROMPTS, BOXES)
        assert_same_predictions(several.predict(picture(), PROMPTS, BOXES, adapter=name), expected)
        (found,) = several.predict_images([picture()], PROMPTS, BOXES, adapter=name)
        assert_same_predictions(found, expected)
        assert active_adapters(several.model) == ["mine"]
    together = several.predict_with(picture(), PROMPTS, ["words", "mine", "base"], BOXES)
    assert list(together) == ["words", "mine", "base"]
    for name, found in together.items():
        assert_same_predictions(found, alone[name].predict(picture(), PROMPTS, BOXES))


def test_adapters_that_leave_the_image_encoder_alone_share_the_features_of_an_image(several, monkeypatch):
    calls = []
    backbone = several.model.backbone
    real = backbone.forward_image
    monkeypatch.setattr(
        backbone, "forward_image", lambda image: calls.append(active_adapters(several.model)) or real(image)
    )
    several.predict_with(picture(), PROMPTS, ["base", "words"])
    assert calls == [[]]
    calls.clear()
    several.predict_with(picture(), PROMPTS, ["words", "mine", "base", "mine"])
    assert calls == [["words"], ["mine"], ["mine"]]


def test_the_base_of_a_model_without_adapters_is_the_model(predictor):
    expected = predictor.predict(picture(), PROMPTS)
    assert_same_predictions(predictor.predict(picture(), PROMPTS, adapter="base"), expected)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        pytest.param("wrods", "this model has no adapter 'wrods'; did you mean 'words'?", id="misspelt"),
        pytest.param("x", "this model has no adapter 'x'; it has mine, words, base", id="unknown"),
        pytest.param(
            ["mine", "words"], "predict image by image for an adapter of its own for each", id="mixed"
        ),
    ],
)
def test_an_adapter_that_is_not_there_is_reported_with_all_else_that_is_wrong(several, name, problem):
    with pytest.raises(ConfigError, match="2 problems") as caught:
        several.predict(picture(), [""], adapter=name)
    assert problem in str(caught.value)
    with pytest.raises(ConfigError, match="2 problems"):
        several.predict_images([picture()], [""], adapter=name)
    with pytest.raises(ConfigError, match="adapters must be a list"):
        several.predict_with(picture(), PROMPTS, "mine")


def test_an_adapter_that_names_no_base_needs_one(adapter, tmp_path):
    model = load_base("tiny", device="cpu")
    del model.name_or_path
    folder = save_adapter(get_peft_sam3(model, preset="minimal"), tmp_path / "nameless")
    with pytest.raises(AdapterError, match="does not say which base it was made for; name it with base="):
        Predictor.from_adapter(folder)
    assert Predictor.from_adapter(folder, base="tiny", device="cpu").resolution == TINY.resolution


def test_the_resolution_is_read_from_the_model():
    with torch.device("meta"):
        assert Predictor(build_meta_sam3()).resolution == 1008


def test_everything_wrong_with_the_constructor_comes_at_once(model):
    with pytest.raises(ConfigError) as caught:
        Predictor(model, threshold=7, resolution=1008)
    assert str(caught.value) == (
        "2 problems:\n  threshold must be from 0 to 1, got 7\n  resolution 1008: this model takes 112"
    )


def test_another_kind_of_model_is_refused():
    with pytest.raises(ConfigError, match="needs a Sam3Image, got a Linear"):
        Predictor(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("request_", "problem"),
    [
        pytest.param({"prompts": []}, "no prompt; name at least one thing to find", id="no prompt"),
        pytest.param({"prompts": ["cat", " "]}, "prompt 2 is ' '; name the thing to find", id="blank prompt"),
        pytest.param({"prompts": "cat"}, "prompts must be a list, such as ['cat']", id="a string"),
        pytest.param({"threshold": 7}, "threshold must be from 0 to 1, got 7", id="threshold 7"),
        pytest.param({"threshold": float("nan")}, "threshold must be from 0 to 1, got nan", id="threshold NaN"),
        pytest.param({"boxes_xyxy": [(5, 5, 5, 9)]}, "box (5, 5, 5, 9) is empty", id="flat box"),
        pytest.param({"boxes_xyxy": [(9, 9, 5, 5)]}, "box (9, 9, 5, 5) is empty", id="corners swapped"),
        pytest.param({"boxes_xyxy": [(0, 0, 161, 9)]}, "box (0, 0, 161, 9) leaves the image, which is 160 wide and 120 high", id="box past the edge"),
        pytest.param({"boxes_xyxy": [(-1, 0, 5, 9)]}, "box (-1, 0, 5, 9) leaves the image", id="negative edge"),
        pytest.param({"boxes_xyxy": [(0, 0, float("nan"), 9)]}, "has a NaN or infinite number", id="NaN edge"),
        pytest.param({"boxes_xyxy": [(1, 2, 3)]}, "box (1, 2, 3) is not four numbers", id="three numbers"),
        pytest.param({"boxes_xyxy": (0, 0, 5, 5)}, "box 0 is not four numbers", id="a box instead of a list"),
    ],
)  # fmt: skip
def test_bad_requests(request_, problem, predictor):
    with pytest.raises(ConfigError) as caught:
        predictor.predict(picture(), **{"prompts": ["cat"], **request_})
    assert problem in str(caught.value)


def test_all_problems_of_a_request_come_at_once(predictor):
    with pytest.raises(ConfigError, match="4 problems") as caught:
        predictor.predict(picture(), ["", "cat"], [(0, 0, 999, 9), (1, 1, 1, 1)], threshold=-1)
    assert len(str(caught.value).splitlines()) == 5


def sixteen_bit_grey():
    return Image.fromarray(np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (48, 1)))


IMAGES = {
    "grey": lambda: picture().convert("L"),
    "black and white": lambda: picture().convert("1"),
    "alpha": lambda: picture().convert("RGBA"),
    "grey alpha": lambda: picture().convert("LA"),
    "palette": lambda: picture().convert("P"),
    "CMYK": lambda: picture().convert("CMYK"),
    "16 bits": sixteen_bit_grey,
    "32 bits": lambda: sixteen_bit_grey().convert("I"),
    "float": lambda: Image.fromarray(np.random.RandomState(0).rand(20, 30).astype(np.float32)),
    "one pixel": lambda: Image.new("RGB", (1, 1), "red"),
    "one row": lambda: Image.new("RGB", (500, 1), "red"),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_every_kind_of_image_is_seen_as_8_bit_rgb(kind, model, predictor):
    image = IMAGES[kind]()
    (found,) = predictor.predict(image, ["red circle"])
    rgb = to_rgb(image)
    assert (rgb.mode, rgb.size) == ("RGB", image.size)
    assert_equal_to_official(found, official(model, rgb, "red circle"))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_files_are_scaled_not_clipped(suffix, tmp_path):
    sixteen_bit_grey().save(tmp_path / f"deep{suffix}")
    values = np.asarray(read_image(tmp_path / f"deep{suffix}"))
    np.testing.assert_array_equal(values[0, :, 0], np.round(np.linspace(0, 65535, 64).astype(int) / 257))


def test_alpha_is_left_out_as_in_training(tmp_path):
    image = picture().convert("RGBA")
    image.putalpha(0)
    image.save(tmp_path / "clear.png")
    assert np.array_equal(read_image(tmp_path / "clear.png"), picture())


def test_a_palette_with_transparency_gives_no_warning(tmp_path, recwarn):
    picture().quantize(8).save(tmp_path / "logo.png", transparency=bytes([0, 100, 255]))
    assert read_image(tmp_path / "logo.png").mode == "RGB"
    assert not recwarn.list


FLIPS = Image.Transpose
STORED = {  # orientation in the EXIF data -> how the picture lies in the file
    1: None,
    2: FLIPS.FLIP_LEFT_RIGHT,
    3: FLIPS.ROTATE_180,
    4: FLIPS.FLIP_TOP_BOTTOM,
    5: FLIPS.TRANSPOSE,
    6: FLIPS.ROTATE_90,
    7: FLIPS.TRANSVERSE,
    8: FLIPS.ROTATE_270,
}


@pytest.mark.parametrize("orientation", STORED)
def test_a_rotation_in_the_exif_data_is_applied(orientation, tmp_path):
    flip, exif = STORED[orientation], Image.Exif()
    exif[0x0112] = orientation
    stored = picture() if flip is None else picture().transpose(flip)
    stored.save(tmp_path / "photo.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "photo.png"), picture())


def write_truncated_jpeg(path):
    picture(600, 500).save(path)
    path.write_bytes(path.read_bytes()[:2000])


def write_negative_tiff(path):
    Image.fromarray(np.full((4, 4), -3, dtype=np.int32)).save(path, format="TIFF")


@pytest.mark.parametrize(
    ("write", "problem"),
    [
        pytest.param(lambda path: None, "no file {}", id="missing"),
        pytest.param(lambda path: path.touch(), "{} is empty", id="empty"),
        pytest.param(lambda path: path.write_text("hello"), "{} is not an image", id="text"),
        pytest.param(lambda path: path.mkdir(), "{} cannot be read: Is a directory", id="folder"),
        pytest.param(write_truncated_jpeg, "{} is damaged: image file is truncated", id="truncated"),
        pytest.param(write_negative_tiff, "{} has pixel values from -3 to -3; scale them to 0 to 65535", id="negative"),
    ],
)  # fmt: skip
def test_a_bad_file_is_one_error_that_names_it(write, problem, predictor, tmp_path):
    path = tmp_path / "photo.jpg"
    write(path)
    with pytest.raises(DataError) as caught:
        predictor.predict(path, ["red circle"])
    assert str(caught.value).startswith(problem.format(path))


def test_the_names_are_public():
    assert sam3_lora.Predictor is Predictor
    assert sam3_lora.Prediction is Prediction
