"""One of two processes that compare two passes with one, and both processes together with one that has all images, under
DistributedDataParallel and the official normalisation.

python tests/accumulated_processes.py DATASET STORE RANK
"""

import contextlib
import json
import sys
from pathlib import Path

import accumulated_step
import torch
from accumulated_step import make, overall, worst_difference
from torch.nn.parallel import DistributedDataParallel


def gradients(model, loss, batches):
    model.zero_grad(set_to_none=True)
    loss.expect([batch.find_targets[0] for batch in batches], torch.device("cpu"))
    for number, batch in enumerate(batches, 1):
        with contextlib.nullcontext() if number == len(batches) else model.no_sync():
            outputs = model(batch)
            targets = [model.module.back_convert(target) for target in batch.find_targets]
            loss(outputs, targets)["core_loss"].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def main():
    dataset, store, rank = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model, loss, points, collate = make(dataset, "adapter.preset=minimal", normalization="global")
    _, alone, _, _ = make(dataset, "adapter.preset=minimal")
    _, expected = accumulated_step.gradients(model, alone, [collate(points)["all"]])
    model = DistributedDataParallel(model, find_unused_parameters=False)
    own = points[rank::2]  # 0 and 2 objects, or 1 and 4
    one = gradients(model, loss, [collate(own)["all"]])
    two = gradients(model, loss, [collate([point])["all"] for point in own])
    print(
        json.dumps(
            {
                "passes": [overall(two, one), worst_difference(two, one)],
                "processes": [overall(one, prefixed(expected)), worst_difference(one, prefixed(expected))],
            }
        )
    )


def prefixed(tensors):
    return {f"module.{name}": tensor for name, tensor in tensors.items()}


if __name__ == "__main__":
    main()
