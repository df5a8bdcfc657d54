"""A batch in one forward pass and in several, on the tiny model without noise, with the losses of our configs.

python tests/accumulated_step.py prints how far they are apart.
"""

import json
import tempfile
from pathlib import Path

import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from official_step import register_resolvers

from sam3_lora.data.coco import ANNOTATION_FILE
from sam3_lora.data.shapes import DEMO_CONCEPTS, write_coco
from sam3_lora.memory.modes import makes_noise

IMAGES = 4


def write_uneven_images(folder: Path) -> Path:
    """Write four images a split with 0, 1, 2 and 4 objects: a mean over images is not one over objects."""
    for split in ("train", "valid"):
        write_coco(folder / split, DEMO_CONCEPTS, 3 * IMAGES, seed=3)
        file = folder / split / ANNOTATION_FILE
        content = json.loads(file.read_text())
        content["images"] = content["images"][:IMAGES]
        kept = {1: 0, 2: 1, 3: 2, 4: 9}
        objects = []
        for annotation in content["annotations"]:
            image_id = (annotation["image_id"] - 1) % IMAGES + 1  # more objects than one scene has
            if kept[image_id]:
                kept[image_id] -= 1
                objects.append({**annotation, "image_id": image_id})
        file.write_text(json.dumps({**content, "annotations": objects}))
    return folder


def make(dataset: Path, *overrides: str, normalization: str = "local"):
    """Return model, loss and the four datapoints; the adapter acts, and nothing draws random numbers."""
    register_resolvers()
    with initialize_config_module("sam3.train", version_base="1.2"):
        config = compose("sam3_lora/demo", overrides=[f"paths.dataset_root={dataset}", *overrides])
    torch.manual_seed(0)
    model = instantiate(config.trainer.model)
    model.train()
    silence(model)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    images = instantiate(config.trainer.data.train.dataset)
    loss = instantiate(config.trainer.loss.all, normalization=normalization)
    return model, loss, [images[number] for number in range(IMAGES)], collator(config)


def collator(config):
    return instantiate(config.trainer.data.train.collate_fn, gradient_accumulation_steps=1)


def silence(model: torch.nn.Module) -> None:
    """Take dropout and DropPath out of a model, which keeps its training mode."""
    for module in filter(makes_noise, model.modules()):
        for name in ("p", "drop_prob", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def gradients(model, loss, batches, whole=True):
    """Return the summed losses and the gradients of several forward passes, as the official trainer makes them."""
    model.zero_grad(set_to_none=True)
    if whole:
        loss.expect([batch.find_targets[0] for batch in batches], torch.device("cpu"))
    values = []
    for batch in batches:
        inner = getattr(model, "module", model)
        outputs = model(batch)
        value = loss(outputs, [inner.back_convert(target) for target in batch.find_targets])["core_loss"]
        value.backward()
        values.append(float(value.detach()))
    return values, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def worst_difference(found, expected):
    """Return the largest relative difference of any tensor's gradient."""
    assert found.keys() == expected.keys()
    biggest = max(gradient.norm() for gradient in expected.values())
    return max(
        float((found[name] - gradient).norm() / gradient.norm())
        for name, gradient in expected.items()
        if gradient.norm() > 1e-6 * biggest  # the rest is rounding, as of a bias that softmax does not see
    )


def main() -> None:
    """Print how far the gradients of several passes are from those of one, with our counts and as officially summed."""
    model, loss, points, collate = make(write_uneven_images(Path(tempfile.mkdtemp())))
    _, expected = gradients(model, loss, [collate(points)["all"]])
    loss.expect([], torch.device("cpu"))
    for count in (2, 4):
        passes = [collate(points[start::count])["all"] for start in range(count)]
        _, summed = gradients(model, loss, passes, whole=False)
        summed = {name: tensor / count for name, tensor in summed.items()}
        _, ours = gradients(model, loss, passes)
        loss.expect([], torch.device("cpu"))
        for name, found in (("official sum / passes", summed), ("AccumulatedLoss", ours)):
            print(
                f"{count} passes, {name}: all {overall(found, expected):.1e}, worst {worst_difference(found, expected):.1e}"
            )


def overall(found, expected):
    """Return the relative difference of all gradients together."""
    whole = [torch.cat([tensor.flatten() for tensor in side.values()]) for side in (found, expected)]
    return float((whole[0] - whole[1]).norm() / whole[1].norm())


if __name__ == "__main__":
    main()
