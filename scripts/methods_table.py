"""Write docs/reference/methods.md: which variant of LoRA works on which component, tried on the tiny model.

OMP_NUM_THREADS=1 python -W ignore scripts/methods_table.py
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from sam3.model.data_misc import FindStage

from sam3_lora import Sam3LoraError, get_peft_sam3, load_adapter, load_base, save_adapter
from sam3_lora.components import COMPONENTS, PATTERNS

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "methods.md"

#: Name in the table -> keywords of get_peft_sam3.
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rank-stabilised (rsLoRA)": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "`lora_dropout`": {"lora_dropout": 0.1},
    "`lora_bias`": {"lora_bias": True},
    '`bias="lora_only"`': {"bias": "lora_only"},
}
WORKS = "works"

_RATE = 2e-3  # of two steps of SGD on the squares of all outputs: seen in the outputs, and far from exploding
_TOLERANCE = 1e-5  # relative to the largest value of an output
_HEAD = """\
# Variants of LoRA

`scripts/methods_table.py` writes this page. "works" means, for all kinds of modules of the component in the tiny model,
{ranks}: two training steps change the outputs; saved and loaded into an untouched base, they are the same; and so
they are with the adapter merged, all within 1e-5 of the largest value. The number of a note says what is
refused and why, always before anything is changed.

Each is a keyword of [`get_peft_sam3`](python-api.md#get_peft_sam3), or of `sam3-lora train` as `--set use_dora=true`;
`init_lora_weights` for PiSSA, OLoRA, orthogonal and gaussian.

"""


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """Return the text of the page, from trying every cell."""
    reasons: list[str] = []
    lines = [
        f"| method | {' | '.join(COMPONENTS)} |",
        f"| --- |{' --- |' * len(COMPONENTS)}",
    ]
    for method, keywords in METHODS.items():
        cells = []
        for component in COMPONENTS:
            result = try_out(component, keywords)
            if result != WORKS and result not in reasons:
                reasons.append(result)
            word = result.partition(":")[0] if result.startswith("all but") else "no"
            cells.append(WORKS if result == WORKS else f"{word} ({reasons.index(result) + 1})")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    head = _HEAD.format(ranks="with rank 2")
    return head + "\n".join(lines) + "\n" + ("\n" + "\n".join(notes) + "\n" if notes else "")


def try_out(component: str, keywords: dict[str, Any]) -> str:
    """Return :data:`WORKS`, or why this method does not work on this component."""
    kinds = list(PATTERNS[component])  # type: ignore[index]
    result = _try_kinds(component, kinds, keywords)
    for left_out in ("conv", "heads"):
        if result != WORKS and left_out in kinds:
            rest = [kind for kind in kinds if kind != left_out]
            if _try_kinds(component, rest, keywords) == WORKS:
                return f"all but {left_out}: {result}"
    return result


def _try_kinds(component: str, kinds: list[str], keywords: dict[str, Any]) -> str:
    base = _untouched()
    before = outputs(base)
    torch.manual_seed(0)
    try:
        adapted = get_peft_sam3(base, components=[component], kinds=kinds, r=2, **keywords)
    except Sam3LoraError as error:
        return str(error).splitlines()[-1].strip().rpartition(": ")[2]
    _train(adapted)
    expected = outputs(adapted.get_base_model())
    if not _differ(expected, before, 1e-4):
        return "training changes no output"
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_adapter(_untouched(), save_adapter(adapted, Path(folder) / "adapter"))
    if _differ(outputs(loaded.get_base_model()), expected, _TOLERANCE):
        return "a reloaded adapter gives other outputs"
    if _differ(outputs(loaded.merge_and_unload()), expected, _TOLERANCE):
        return "a merged adapter gives other outputs"
    return WORKS


def outputs(model: Any) -> dict[str, torch.Tensor]:
    """Return all outputs for a random image, with words and a box as prompt."""
    with torch.no_grad():
        return _forward(model)


def _untouched() -> Any:
    return load_base("tiny", device="cpu")


def _train(adapted: Any) -> None:
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=_RATE)
    for _ in range(2):
        optimizer.zero_grad()
        sum(output.square().mean() for output in _forward(adapted.get_base_model()).values()).backward()
        optimizer.step()
    adapted.eval()


def _forward(model: Any) -> dict[str, torch.Tensor]:
    image = torch.rand((1, 3, 112, 112), generator=torch.Generator().manual_seed(3)) * 2 - 1
    features = model.backbone.forward_image(image)
    features.update(model.backbone.forward_text(["a red circle"], device="cpu"))
    prompt = model._get_dummy_prompt()
    prompt.append_boxes(torch.tensor([[[0.4, 0.5, 0.3, 0.2]]]), torch.ones(1, 1, dtype=torch.bool))
    one = torch.tensor([0])
    find = FindStage(one, one, None, None, None, None, None)
    out = model.forward_grounding(features, find, None, prompt)
    names = ("pred_logits", "pred_boxes", "pred_masks", "semantic_seg", "presence_logit_dec")
    return {name: out[name] for name in names}


def _differ(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> bool:
    return any(
        (found[name] - tensor).abs().max() > tolerance * tensor.abs().max().clamp(min=1)
        for name, tensor in expected.items()
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main()
