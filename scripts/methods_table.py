"""Write docs/reference/methods.md: which method of PEFT works on which component, tried on the tiny model.

OMP_NUM_THREADS=1 python -W ignore scripts/methods_table.py
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from sam3.model.data_misc import FindStage

from sam3_lora import Sam3LoraError, dataset_losses, get_peft_sam3, load_adapter, load_base, save_adapter
from sam3_lora.adapter.methods import REFUSED
from sam3_lora.adapter.starting import FROM_DATA
from sam3_lora.components import COMPONENTS, PATTERNS
from sam3_lora.data.shapes import PRETRAINING_CONCEPTS, write_coco

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "methods.md"

#: Name in the table -> keywords of get_peft_sam3.
LORA: dict[str, Method] = {
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
    "EVA": {"init_lora_weights": "eva"},
    "LoRA-GA": {"init_lora_weights": "lora_ga"},
}
#: Settings of every other method that PEFT has for Linear layers, small enough for the tiny model.
OTHERS: dict[str, Method] = {
    "LoHa": peft.LoHaConfig(r=2),
    "LoKr": peft.LoKrConfig(r=2),
    "OFT": peft.OFTConfig(oft_block_size=4),
    "BOFT": peft.BOFTConfig(boft_block_size=2),
    "HRA": peft.HRAConfig(r=2),
    "IA3": peft.IA3Config(),
    "VeRA": peft.VeraConfig(r=2),
    "PVeRA": peft.PveraConfig(r=2),
    "RandLoRA": peft.RandLoraConfig(r=2, randlora_alpha=4),
    "VB-LoRA": peft.VBLoRAConfig(r=2, num_vectors=8, vector_length=4, topk=1),
    "UniLoRA": peft.UniLoraConfig(r=2),
    "TinyLoRA": peft.TinyLoraConfig(r=2),
    "FourierFT": peft.FourierFTConfig(n_frequency=16, init_weights=True),
    "WaveFT": peft.WaveFTConfig(n_frequency=16),
    "C3A": peft.C3AConfig(block_size=2, init_weights=True),
    "RoAd": peft.RoadConfig(group_size=2),
    "MiSS": peft.MissConfig(r=2),
    "HiRA": peft.HiraConfig(r=2),
    "DEFT": peft.DeftConfig(r=2),
    "DeLoRA": peft.DeloraConfig(r=2),
    "GLoRA": peft.GloraConfig(r=2),
    "GraLoRA": peft.GraloraConfig(r=2, gralora_k=2),
    "PSOFT": peft.PsoftConfig(r=2),
    "SHiRA": peft.ShiraConfig(r=2),
    "AdaMSS": peft.AdamssConfig(r=2),
    "FRoD": peft.FrodConfig(),
    "Lily": peft.LilyConfig(r=2),
    "PEANuT": peft.PeanutConfig(r=2),
    "BEFT": peft.BeftConfig(),
    "Supertuning": peft.SupertuningConfig(),
}
WORKS = "works"

Method = dict[str, Any] | peft.PeftConfig

_RATE = 2e-3  # of two steps of SGD on the squares of all outputs: seen in the outputs, and far from exploding
_TOLERANCE = 1e-5  # relative to the largest value of an output
_TOLERANCE_OF_LORA_GA = (
    1e-4  # it takes as much out of a weight as there is, and puts it back when it is saved
)
_HEAD = """\
# Methods

`scripts/methods_table.py` writes this page: it tries every method of PEFT {version} on every component of the tiny model.

"works" means, for all kinds of modules of the component: two training steps change the outputs; saved and loaded into an
untouched base, they are the same; and so they are with the adapter merged, all within 1e-5 of the largest value (1e-4 with
LoRA-GA, which moves as much weight as there is). The number of a note says what is refused and why, always before anything
is changed.

## Variants of LoRA

With rank 2. Each is a keyword of [`get_peft_sam3`](python-api.md#get_peft_sam3), or of `sam3-lora train` as
`--set use_dora=true`; `init_lora_weights` for PiSSA, OLoRA, orthogonal and gaussian.

{lora}

### Start from data

EVA starts A from the main directions of what enters each module and moves ranks to where they explain most; LoRA-GA starts
A and B from the gradients of the weights, and needs memory for those of all adapted modules. Both run over images of
`train/` first, here two of the pretraining's:

```python
steps = sam3_lora.dataset_losses("my_dataset", images=16)
model = get_peft_sam3(load_base(), "balanced", init_lora_weights="eva", init_data=steps)
```

For training: `--set init_lora_weights=eva adapter.init_data=my_dataset`. Ranks, and with them the number of
parameters, are EVA's own afterwards (`eva_config=peft.EvaConfig(rho=1)` keeps them). Both are saved as plain LoRA.

## Other methods

Their settings stand in the place of the preset, and the modules are chosen as for LoRA:

```python
get_peft_sam3(model, peft.LoHaConfig(r=8, alpha=16), components=["detr_decoder"], kinds=["attention"])
```

For the official trainer the config names the class: `adapter.preset: {{_target_: peft.LoHaConfig, r: 8, alpha: 16}}`,
or `sam3-lora train ... --set 'adapter.preset={{"_target_": "peft.LoHaConfig", "r": 8, "alpha": 16}}'`.
Before the model is touched, one module of each kind gets the adapter on a copy: its outputs must stay the same until it
is trained, and every tensor of it must have an effect and a gradient. What is not LoRA can be saved, loaded, switched,
disabled, merged and verified; scaling per component, combination, hot swapping and a quantised base are for LoRA alone.

{others}

Not for SAM3:

{refused}

## Notes

{notes}
"""


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """Return the text of the page, from trying every cell."""
    reasons: list[str] = []
    return _HEAD.format(
        version=peft.__version__,
        lora=_table(LORA, reasons),
        others=_table(OTHERS, reasons),
        refused="\n".join(f"- {method}: {reason}" for method, reason in REFUSED.items()),
        notes="\n".join(f"{number}. {reason}" for number, reason in enumerate(reasons, 1)),
    )


def _table(methods: Mapping[str, Method], reasons: list[str]) -> str:
    lines = [f"| method | {' | '.join(COMPONENTS)} |", f"| --- |{' --- |' * len(COMPONENTS)}"]
    for name, method in methods.items():
        cells = []
        for component in COMPONENTS:
            print(f"{name}, {component}: ", end="", flush=True)
            word, _, reason = try_out(component, method).partition(": ")
            print(word, reason)
            if reason and reason not in reasons:
                reasons.append(reason)
            cells.append(f"{word} ({reasons.index(reason) + 1})" if reason else word)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def try_out(component: str, method: Method) -> str:
    """Return :data:`WORKS`, or how far this method works on this component, a colon, and why no further."""
    kinds = list(PATTERNS[component])  # type: ignore[index]
    result = _try_kinds(component, kinds, method)
    if not result.startswith("no: "):
        return result
    reason = result.removeprefix("no: ")
    for left_out in ("conv", "heads"):
        rest = [kind for kind in kinds if kind != left_out]
        if rest != kinds and not (better := _try_kinds(component, rest, method)).startswith("no: "):
            return f"all but {left_out}{better.removeprefix(WORKS).partition(':')[0]}: {reason}"
    return result


def _try_kinds(component: str, kinds: list[str], method: Method) -> str:
    base = _untouched()
    before = outputs(base)
    torch.manual_seed(0)
    try:
        adapted = _adapted(base, method, components=[component], kinds=kinds)
    except Sam3LoraError as error:
        return f"no: {_reason(error)}"
    from_gradients = isinstance(method, dict) and method.get("init_lora_weights") == "lora_ga"
    tolerance = _TOLERANCE_OF_LORA_GA if from_gradients else _TOLERANCE
    _train(adapted)
    expected = outputs(adapted.get_base_model())
    if not all(output.isfinite().all() for output in expected.values()):
        return "no: training gives NaN or infinity"
    if not _differ(expected, before, 1e-6):
        return "no: training changes no output"
    with tempfile.TemporaryDirectory() as folder:
        try:
            loaded = load_adapter(_untouched(), save_adapter(adapted, Path(folder) / "adapter"))
        except Sam3LoraError as error:
            return f"no: {_reason(error)}"
    if _differ(outputs(loaded.get_base_model()), expected, tolerance):
        return "no: a reloaded adapter gives other outputs"
    try:
        merged = outputs(loaded.merge_and_unload())
    except Exception as error:  # of whatever kind PEFT raises
        return f"works, no merging: {_reason(error)}"
    return (
        "works, no merging: a merged adapter gives other outputs"
        if _differ(merged, expected, tolerance)
        else WORKS
    )


def _adapted(base: Any, method: Method, **places: Any) -> Any:
    if isinstance(method, peft.PeftConfig):
        return get_peft_sam3(base, method, **places)
    from_data = method.get("init_lora_weights") in FROM_DATA
    with tempfile.TemporaryDirectory() as folder:
        if from_data:
            write_coco(Path(folder) / "train", PRETRAINING_CONCEPTS[:2], 2, seed=0)
        steps = dataset_losses(folder) if from_data else None
        return get_peft_sam3(base, r=2, init_data=steps, **places, **method)


def _reason(error: Exception) -> str:
    """Return the last line of an error without the names of modules, of which there may be many."""
    line = str(error).splitlines()[-1].strip().removeprefix("- ")
    line = re.sub(r"^.*(cannot start from these weights|does not work on these modules): ", "", line)
    line = re.sub(r"\w+(\.\w+)+: ", "", line)
    line = re.sub(r"PEFT refuses these settings \((\w+)\): ", r"\1: ", line)
    line = re.sub(r"KeyError: .*", "it has no place for some modules", line)
    line = re.sub(r"^\w+Error: ", "", line).removesuffix(".")
    line = re.sub(
        r"\w+ does not support target modules of type <class '.*Conv2d'> yet", "Conv2d is not supported", line
    )
    return re.sub(r"Target module (\w+)\(.*\) is not (a plain|supported).*", r"\1 is not supported", line)


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
