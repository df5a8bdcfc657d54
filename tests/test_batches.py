"""Batches of a given size, as cost is measured and counted on."""

import pytest
import torch

from sam3_lora.evaluation.batches import sized_batch

SIDE = 112


@pytest.mark.parametrize(
    ("images", "prompts", "objects", "spread"),
    [
        pytest.param(1, 1, 5, [5], id="one of each"),
        pytest.param(2, 3, 5, [2, 2, 1], id="several"),
        pytest.param(1, 2, 0, [0, 0], id="no object"),
    ],
)
def test_a_sized_batch_asks_every_prompt_of_every_image(images, prompts, objects, spread):
    batch = sized_batch(images, prompts, objects, resolution=SIDE)
    (find,), (target,) = batch.find_inputs, batch.find_targets
    assert batch.img_batch.shape == (images, 3, SIDE, SIDE)
    assert find.img_ids.tolist() == [image for image in range(images) for _ in range(prompts)]
    assert find.text_ids.tolist() == list(range(prompts)) * images
    assert target.num_boxes.tolist() == spread * images


def test_the_masks_of_a_sized_batch_fill_their_boxes():
    batch = sized_batch(1, 1, 20, resolution=SIDE)
    target = batch.find_targets[0]
    areas = target.segments.sum((1, 2))
    sides = (target.boxes_padded[0, :, 2:] * SIDE).round()
    assert areas.tolist() == sides.prod(1).tolist()
    assert (areas > 0).all()
    assert torch.equal(batch.img_batch, sized_batch(1, 1, 20, resolution=SIDE).img_batch)
