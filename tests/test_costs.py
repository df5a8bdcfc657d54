"""One real step of the full-size model, counted on fake tensors."""

import pytest

from sam3_lora.costs.step import FullSizeStep, spread_objects
from sam3_lora.errors import ConfigError


@pytest.fixture(scope="module")
def minimal():
    return FullSizeStep("minimal")


@pytest.mark.timeout(120)
def test_a_step_of_minimal_is_counted_to_the_byte(minimal):
    """FLOPs and bytes of the committed table (docs/reference/counts.md)."""
    step = minimal.count(prompts=1, objects=5, batch=1)
    assert sum(part.flops for part in step.parts.values()) == step.flops
    assert sum(part.peak_bytes for part in step.parts.values()) == step.peak_bytes
    assert sum(part.forward_bytes for part in step.parts.values()) == step.forward_bytes
    assert step.parts["vision_encoder"].forward_bytes == 0


@pytest.mark.parametrize(
    ("prompts", "objects", "spread"),
    [(1, 5, [5]), (4, 5, [2, 1, 1, 1]), (3, 2, [1, 1, 0])],
)
def test_objects_are_spread_evenly_over_the_prompts(prompts, objects, spread):
    assert spread_objects(prompts, objects) == spread


@pytest.mark.parametrize("wrong", [{"prompts": 0}, {"objects": 0}, {"batch": 0}, {"objects": 201}])
def test_batches_that_cannot_be_are_refused(minimal, wrong):
    with pytest.raises(ConfigError, match=r"1 or more|200 objects at most"):
        minimal.count(**wrong)
