"""A batch in several forward passes has the gradients, losses and result of the same batch in one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accumulated_step import gradients, make, overall, worst_difference, write_uneven_images


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_uneven_images(tmp_path_factory.mktemp("data"))


def passes(points, collate, count):
    return [collate(points[start::count])["all"] for start in range(count)]


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param((), id="as shipped"),
        pytest.param(("memory.mask_loss_chunk=null", "memory.segmentation_chunk=null"), id="official masks"),
        pytest.param(("training.enable_segmentation=false",), id="boxes only"),
    ],
)
def test_gradients_of_several_passes_are_those_of_one(dataset, overrides):
    model, loss, points, collate = make(dataset, *overrides)
    assert [int(batch.find_targets[0].num_boxes.sum()) for batch in passes(points, collate, 4)] == [
        0,
        1,
        2,
        4,
    ]
    (expected_loss,), expected = gradients(model, loss, passes(points, collate, 1))
    values, found = gradients(model, loss, passes(points, collate, 4))
    assert sum(values) / 4 == pytest.approx(expected_loss, rel=1e-5)
    assert overall(found, expected) <= 1e-5
    assert worst_difference(found, expected) <= 1e-4  # in float64 it is 6e-14: the rest is rounding


def test_the_official_sum_over_passes_is_another_gradient(dataset):
    model, loss, points, collate = make(dataset)
    _, expected = gradients(model, loss, passes(points, collate, 1))
    loss.expect([], torch.device("cpu"))
    _, found = gradients(model, loss, passes(points, collate, 4), whole=False)
    assert worst_difference({name: tensor / 4 for name, tensor in found.items()}, expected) > 0.1


def test_one_pass_is_the_official_loss_to_the_bit(dataset):
    model, loss, points, collate = make(dataset)
    (value,), found = gradients(model, loss, passes(points, collate, 1))
    (official,), expected = gradients(model, loss, passes(points, collate, 1), whole=False)
    assert value == official
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_presence_of_a_prompt_is_trained(dataset):
    model, loss, points, collate = make(
        dataset, "adapter.preset=minimal", "training.enable_segmentation=false"
    )
    nothing = [collate(points[:1])["all"]]  # no object in it: presence is all that there is to learn
    (value,), found = gradients(model, loss, nothing)
    assert value > 0
    assert any(tensor.any() for tensor in found.values())


@pytest.mark.slow
def test_passes_and_processes_have_the_gradients_of_one_process_with_all_images(dataset, tmp_path):
    script = Path(__file__).with_name("accumulated_processes.py")
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", script, dataset, tmp_path / "store", str(rank)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        found = json.loads(output.splitlines()[-1])
        for overall_difference, worst_tensor in found.values():
            assert overall_difference <= 1e-5
            assert worst_tensor <= 1e-4  # rounding, as above
