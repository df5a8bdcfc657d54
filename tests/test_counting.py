"""What a training step does and holds, counted on modules small enough to know the numbers by hand."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from sam3_lora.counting import StepCount, count_step

ROWS, WIDTH, FLOAT = 32, 64, 4
MATRIX, ACTIVATION = WIDTH * WIDTH * FLOAT, ROWS * WIDTH * FLOAT


def count(checkpointed: bool = False, frozen: bool = False, parts: tuple[int, ...] = ()) -> StepCount:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3)))
    model[0].requires_grad_(not frozen)
    x = torch.zeros(ROWS, WIDTH)
    run = (lambda: checkpoint(model, x, use_reentrant=False)) if checkpointed else (lambda: model(x))
    return count_step(
        lambda: run().sum(), [*model.parameters(), x], {f"layer {n}": [model[n]] for n in parts}
    )


def test_a_step_has_the_flops_of_its_matrix_products():
    products = 3 + 3 + 2  # forward, of the weights, and of the inputs but for the first
    assert count().flops == products * 2 * ROWS * WIDTH * WIDTH


def test_attention_on_the_cpu_is_counted():
    q, k, v = (torch.zeros(1, 2, ROWS, WIDTH, requires_grad=True) for _ in range(3))
    step = count_step(lambda: nn.functional.scaled_dot_product_attention(q, k, v).sum(), [q, k, v])
    products = 2 + 5  # forward, and backward with the scores computed again
    assert step.flops == products * 2 * 2 * ROWS * ROWS * WIDTH


def test_a_checkpoint_saves_nothing_inside_and_repeats_what_the_backward_needs():
    plain, checkpointed = count(), count(checkpointed=True)
    assert plain.saved_bytes == 2 * ACTIVATION  # what enters the second and the third layer
    assert checkpointed.saved_bytes == 0
    # The last product is not repeated: torch stops once it has the inputs of all.
    assert checkpointed.flops - plain.flops == 2 * 2 * ROWS * WIDTH * WIDTH


@pytest.mark.parametrize(("frozen", "trained"), [(False, 3), (True, 2)])
def test_gradients_are_as_large_as_what_is_trained(frozen, trained):
    assert count(frozen=frozen).gradient_bytes == trained * MATRIX


def test_live_bytes_are_what_the_forward_holds():
    alive = 3 * MATRIX + ACTIVATION + 2 * ACTIVATION + FLOAT  # weights, batch, saved, and the loss
    assert count().forward_bytes == alive
    assert count().peak_bytes > alive


def test_fake_tensors_give_the_same_numbers_as_real_ones():
    real = count()
    with FakeTensorMode():
        assert count() == real == count()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_parts_get_their_own_backward_and_recomputation(checkpointed):
    product = 2 * ROWS * WIDTH * WIDTH
    step = count(checkpointed, parts=(0, 1))
    repeated = product if checkpointed else 0
    assert step.parts["layer 0"].flops == 2 * product + repeated  # forward, and of the weights
    assert step.parts["layer 1"].flops == 3 * product + repeated
    assert step.parts["rest"].flops == 3 * product
    assert step.parts["given"].forward_bytes == 3 * MATRIX + ACTIVATION
    assert step.parts["layer 0"].forward_bytes == (0 if checkpointed else ACTIVATION)
    assert sum(part.peak_bytes for part in step.parts.values()) == step.peak_bytes
