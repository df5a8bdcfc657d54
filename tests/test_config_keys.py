"""Every documented key of the configs, flipped: what it says must be seen in something real that was built from it.

To add a key, document it in docs/reference/configs.md and add a row: the value to flip it to and an observable, a function
that takes a Config and returns something that must differ. ``beside`` holds keys that both sides need.
"""

import os
import random
import re
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import submitit
import torch
from hydra import initialize_config_module
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from sam3_lora.adapter import adapted_modules, count_parameters, get_peft_sam3, save_adapter
from sam3_lora.base.loading import load_base
from sam3_lora.data.shapes import DEMO_CONCEPTS, write_coco
from sam3_lora.training.composition import GROUPS, common_defaults, shipped_config
from sam3_lora.training.in_force import learning_rates
from sam3_lora.training.overrides import choices
from sam3_lora.training.trainer import LoraTrainer

from sam3.train import train as official_script  # isort: skip  (after the modules that stand in for triton)
from sam3.train.optim.optimizer import construct_optimizer  # isort: skip
from sam3.train.utils.train_utils import register_omegaconf_resolvers  # isort: skip

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "configs.md"


class Config:
    """The tiny run of a composed config, of which each part is built when a row asks for it."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @cached_property
    def trainer(self) -> LoraTrainer:
        try:
            return instantiate(self.config.trainer, _recursive_=False)
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()

    @cached_property
    def model(self) -> Any:
        return instantiate(self.config.trainer.model)

    @cached_property
    def optimizer(self) -> Any:
        """As the official trainer makes it; the model does not depend on its settings."""
        optim = self.config.trainer.optim
        return construct_optimizer(_model(), optim.optimizer, optim.options, optim.param_group_modifiers)

    @cached_property
    def loss(self) -> Any:
        return instantiate(self.config.loss, normalization="local")

    def items(self, split: str = "train") -> list[Any]:
        dataset = instantiate(self.config.trainer.data[split].dataset)
        return [dataset[index] for index in range(len(dataset))]


@lru_cache
def _model() -> Any:
    return get_peft_sam3(load_base("tiny", device="cpu"), "balanced").get_base_model()


Observable = Callable[[Config], Any]


@dataclass(frozen=True)
class Row:
    flipped: Any
    observable: Observable
    beside: Mapping[str, Any] = field(default_factory=dict)


def outcome(build: Observable) -> Observable:
    """Observe whether something is built, and the error if not: for keys that refuse other values."""

    def observe(config: Config) -> str:
        try:
            build(config)
            return "built"
        except InstantiationException as error:
            return str(error)

    return observe


def of_trainer(name: str) -> Observable:
    return lambda config: getattr(config.trainer, name)


def wandb(config: Config) -> Any:
    """What the trainer takes of it, or the error where the package is not installed."""
    try:
        return config.trainer._wandb
    except InstantiationException as error:
        return str(error)


def rates(config: Config) -> list[Any]:
    """What the optimizer does in the first, a middle and a late step: rate and decay of each group."""
    found = []
    for step in (0, 1, 5, 9):
        config.optimizer.step_schedulers(step / 10, step)
        groups = config.optimizer.optimizer.param_groups
        found.append([(group["lr"], group["weight_decay"], len(group["params"])) for group in groups])
    return found


def clipped(config: Config) -> float:
    """The length of a long gradient after it was clipped."""
    parameters = [p for p in config.trainer.model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    config.trainer.gradient_clipper(model=config.trainer.model)
    return round(torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in parameters])).item(), 3)


def validated(config: Config) -> list[bool]:
    return [config.trainer.is_intermediate_val_epoch(epoch) for epoch in range(5)]


def saved(config: Config) -> list[str]:
    """What is on the disk after the ends of two epochs."""
    for epoch in (1, 2):
        config.trainer.epoch = epoch - 1
        config.trainer.save_checkpoint(epoch)
    run = Path(config.config.launcher.experiment_log_dir)
    return sorted(
        str(p.relative_to(run)) for p in run.rglob("*") if p.suffix == ".pt" or p.parent.name == "adapters"
    )


def pixels(split: str) -> Observable:
    return lambda config: [float(item.images[0].data.sum()) for item in config.items(split)]


def queries(split: str) -> Observable:
    return lambda config: [len(item.find_queries) for item in config.items(split)]


def seeded_pixels(config: Config) -> list[float]:
    dataset = config.trainer.train_dataset.dataset
    return [float(dataset[index].images[0].data.sum()) for index in range(3)]


def asked(config: Config) -> list[list[str]]:
    random.seed(0)
    return [[query.query_text for query in item.find_queries] for item in config.items()]


def prompted(config: Config) -> Any:
    """The loader of the trainer, with the base's answers."""
    return config.trainer.train_dataset.dataset.dataset.coco


def absent(config: Config) -> list[Any]:
    """What is asked of an image in which the base sees something a little."""
    coco = prompted(config)
    thing = next(item for item in coco.sampler.negatives() if item.category is None)
    return coco.sampler.draw([], [], {thing: 0.2})


def cached(config: Config) -> int:
    """How many images the base was asked about, of those in the cache of the config."""
    assert prompted(config)._presence is not None
    cache = config.config.prompts.cache
    return len(list(Path(cache).rglob("*.json"))) if cache else 0


def loader(split: str, name: str) -> Observable:
    return lambda config: getattr(getattr(config.trainer, f"{split}_dataset"), name)


def anatomy(config: Config) -> list[Any]:
    """Each module of the model in training: class, mode, hooks, dtype, and how many prompts at once."""
    return [
        (
            name,
            type(module).__name__,
            module.training,
            len(module._forward_hooks)
            + len(module._forward_pre_hooks)
            + len(vars(module).get("__dict__", ())),
            sorted(key for key in vars(module) if not key.startswith("_")),
            getattr(module, "prompts_at_once", None),
            next((p.dtype for p in module.parameters(recurse=False)), None),
        )
        for name, module in config.model.train().named_modules()
    ]


def trained(config: Config) -> tuple[int, int]:
    return len(adapted_modules(config.model)), count_parameters(config.model).trainable


def masks(name: str) -> Observable:
    return lambda config: getattr(config.loss.loss_fns_find[2], name)


def launch(config: Config) -> list[Any]:
    """What the official script would start: here, or on Slurm, which is recorded instead of asked."""
    started: list[Any] = []

    class Recorder:
        def __init__(self, folder: str) -> None:
            pass

        def update_parameters(self, **parameters: Any) -> None:
            started.append(parameters)

        def submit(self, runner: Any) -> Namespace:
            return Namespace(job_id="1")

    run = Path(config.config.launcher.experiment_log_dir)
    run.mkdir(exist_ok=True)
    (run / "run.yaml").write_text("# @package _global_\n" + OmegaConf.to_yaml(config.config))
    options = dict.fromkeys(("use_cluster", "num_gpus", "num_nodes", "partition", "account", "qos"))
    with pytest.MonkeyPatch.context() as patch, initialize_config_module("sam3.train", version_base="1.2"):
        patch.setattr(submitit, "AutoExecutor", Recorder)
        patch.setattr(official_script, "single_node_runner", lambda *_: started.append("here"))
        official_script.main(Namespace(config=str(run / "run"), **options))
    (run / "config.yaml").unlink()  # the trainer would take it for its own
    return started


def of_masks(config: Config) -> Any:
    """What there is of masks: the head, the terms of the loss, the meters, and the masks of the first image."""
    objects = config.items()[0].images[0].objects
    return (
        config.model.segmentation_head is not None,
        len(config.loss.terms),
        sorted(config.trainer.meters["val"]["valid"]),
        [item.segment is not None for item in objects],
    )


def averaged(config: Config) -> bool:
    """Whether one step of the optimizer leaves an average that is not the weights themselves."""
    trainer = config.trainer
    parameter = next(p for p in trainer.model.parameters() if p.requires_grad)
    parameter.grad = torch.ones_like(parameter)
    trainer.optim.optimizer.step()
    with trainer._averaged():
        seen = parameter.detach().clone()
    return torch.equal(seen, parameter)


def stops_early(config: Config) -> bool:
    """Whether a second validation without a rise is the last thing that a run does."""
    trainer = config.trainer
    trainer._save_adapters = trainer._keep_dumps = trainer._thresholds = lambda *_, **__: None
    with one_process():
        for trainer.epoch in (0, 1):
            trainer._keep_best({"segm_AP": 0.5})
            trainer._stop_if_no_better()
    return bool(trainer.max_epochs == 2)


@contextmanager
def one_process() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def prepared(config: Config) -> bool:
    return config.trainer is not None and Path(config.config.paths.dataset_root, "../drawn").is_dir()


VERIFIED = {"prompts.negatives": "verified"}
SLURM = {"submitit.use_cluster": True}

ROWS: dict[str, Row] = {
    "paths.dataset_root": Row("{tmp}/other", pixels("val")),
    "paths.experiment_log_dir": Row(
        "{tmp}/elsewhere", lambda c: "elsewhere" in c.trainer.checkpoint_conf.save_dir
    ),
    "base.name": Row("facebook/sam3", outcome(lambda c: c.model)),  # which takes other images
    "base.quantization": Row("int8", anatomy),
    "base.resolution": Row(64, outcome(lambda c: c.model)),
    "base.num_queries": Row(17, lambda c: c.loss.loss_fns_find[1].pad_n_queries),
    "adapter.preset": Row("minimal", trained),
    "adapter.overrides": Row({"r": 3}, trained),
    "adapter.init_data": Row("{tmp}/data", outcome(lambda c: c.model)),  # which needs eva or lora_ga
    "training.img_folder_train": Row("{tmp}/other/train", pixels("train")),
    "training.ann_file_train": Row("{tmp}/other/train/_annotations.coco.json", queries("train")),
    "training.img_folder_val": Row("{tmp}/other/valid", pixels("val")),
    "training.ann_file_val": Row("{tmp}/other/valid/_annotations.coco.json", queries("val")),
    "training.max_epochs": Row(3, of_trainer("max_epochs")),
    "training.batch_size": Row(2, loader("train", "batch_size")),
    "training.gradient_accumulation_steps": Row(2, of_trainer("gradient_accumulation_steps")),
    "training.lr": Row(0.01, rates),
    "training.lr_scale": Row(0.5, rates),
    "training.lr_transformer": Row(0.01, rates),
    "training.lr_vision_backbone": Row(0.01, rates),
    "training.lr_language_backbone": Row(0.01, rates),
    "training.final_lr_ratio": Row(0.5, rates),
    "training.warmup_steps": Row(5, rates, {"schedule": "inverse_square_root"}),
    "training.cooldown_steps": Row(5, rates, {"schedule": "inverse_square_root"}),
    "training.timescale": Row(5, rates, {"schedule": "inverse_square_root", "training.warmup_steps": 1}),
    "training.lora_plus_ratio": Row(16, rates),
    "training.weight_decay": Row(0.1, rates),
    "training.gradient_clip_max_norm": Row(0.1, clipped),
    "training.amp_enabled": Row(True, lambda c: c.trainer.optim_conf.amp.enabled),
    "training.amp_dtype": Row("float16", outcome(lambda c: c.model), {"training.amp_enabled": True}),
    "training.seed": Row(1, seeded_pixels, {"training.augment": "all"}),
    "training.val_epoch_freq": Row(2, validated),
    "training.skip_first_val": Row(True, validated),
    "training.save_checkpoints": Row(False, saved),
    "training.checkpoint_freq": Row(2, saved),
    "training.save_every_steps": Row(1, lambda c: c.trainer._save_every_steps),
    "training.enable_segmentation": Row(False, of_masks),
    "training.best_metric": Row("bbox_AP", of_trainer("best_metric")),
    "training.ema_decay": Row(0.9, averaged),
    "training.early_stopping_patience": Row(1, stops_early),
    "training.csv": Row(True, lambda c: c.trainer._csv),
    "training.wandb": Row("project", wandb),
    "training.max_objects": Row(0, queries("train")),
    "training.augment": Row("color", pixels("train")),
    "training.resize": Row("official", pixels("train")),
    "training.num_train_workers": Row(3, loader("train", "num_workers")),
    "training.num_val_workers": Row(3, loader("val", "num_workers")),
    "training.find_unused_parameters": Row(True, lambda c: c.trainer.model.find_unused_parameters),
    "prompts.negatives": Row("none", asked),
    "prompts.max_prompts_per_image": Row(7, asked, {"prompts.negatives": "list"}),
    "prompts.names": Row({"purple cross": "plus sign"}, asked),
    "prompts.synonyms": Row({"purple cross": ["plus sign", "addition mark"]}, asked),
    "prompts.templates": Row(["a {}"], asked),
    "prompts.phrases": Row("{tmp}/phrases.txt", asked, {"prompts.negatives": "list"}),
    "prompts.candidates": Row(3, lambda c: int((~np.isnan(prompted(c)._presence)).sum()), VERIFIED),
    "prompts.absent_below": Row(0.1, absent, VERIFIED),
    "prompts.cache": Row("{tmp}/answers", cached, VERIFIED),
    "memory.eval_frozen": Row(False, anatomy),
    "memory.bf16_base": Row(True, anatomy, {"training.amp_enabled": True}),
    "memory.segmentation_chunk": Row(None, anatomy),
    "memory.recompute_box_bias": Row(False, anatomy),
    "memory.recompute_neck": Row(False, anatomy),
    "memory.mask_loss_chunk": Row(2, masks("chunk")),
    "memory.mask_points": Row(100, masks("num_sample_points")),
    "launcher.num_nodes": Row(2, launch, SLURM),
    "launcher.gpus_per_node": Row(2, launch, SLURM),
    "submitit.use_cluster": Row(True, launch),
    "submitit.partition": Row("gpu", launch, SLURM),
    "submitit.account": Row("me", launch, SLURM),
    "submitit.qos": Row("high", launch, SLURM),
    "submitit.name": Row("mine", launch, SLURM),
    "submitit.mem_gb": Row(64, launch, SLURM),
    "submitit.constraints": Row("a100", launch, SLURM),
    "submitit.timeout_hour": Row(1, launch, SLURM),
    "submitit.cpus_per_task": Row(2, launch, SLURM),
    "trainer.adapter_dir": Row("{tmp}/adapters", saved),
    "trainer.best_metric": Row(None, of_trainer("best_metric")),
    "trainer.ema_decay": Row(0.9, averaged),
    "trainer.early_stopping_patience": Row(1, stops_early),
    "trainer.adapter_freq": Row(2, saved),
    "trainer.save_every_steps": Row(7, lambda c: c.trainer._save_every_steps),
    "trainer.save_checkpoints": Row(False, saved),
    "trainer.csv": Row(True, lambda c: c.trainer._csv),
    "trainer.wandb": Row("project", wandb),
    "trainer.prepare": Row(
        {"_target_": "sam3_lora.training.render_demo_dataset", "folder": "{tmp}/drawn"},
        prepared,
    ),
    "trainer.accelerator": Row("nothing", outcome(lambda c: c.trainer)),
    "trainer.model.adapter_path": Row("{tmp}/adapter", trained),
}


def documented() -> list[str]:
    page = PAGE.read_text(encoding="utf-8")
    first_cells = [row.split(" | ")[0] for row in page.splitlines() if row.startswith("| `")]
    keys = [key for cell in first_cells for key in re.findall(r"`([\w.]+)`", cell)]
    named_things = {"loss._target_", "trainer._target_", "trainer.model._target_", "trainer.prepare._target_"}
    return [key for key in keys if "." in key and not key.startswith("sam3_lora") and key not in named_things]


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    for name, seed, concepts in (("data", 0, DEMO_CONCEPTS), ("other", 5, DEMO_CONCEPTS[:2])):
        write_coco(folder / name / "train", concepts, 8, seed=seed)
        write_coco(folder / name / "valid", concepts, 3, seed=seed + 1)
    (folder / "phrases.txt").write_text("purple elephant\nskyscraper\n")
    save_adapter(get_peft_sam3(load_base("tiny", device="cpu"), "minimal"), folder / "adapter")
    return folder


@pytest.fixture(scope="module")
def make_config(tmp):
    """Return a function that composes the tiny run with some keys changed; same keys, same object."""
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    before = dict(os.environ)
    os.environ.update(environment, MASTER_PORT="0")
    if not OmegaConf.has_resolver("get_method"):
        register_omegaconf_resolvers()
    made: dict[str, Config] = {}

    def make(changes: Mapping[str, Any]) -> Config:
        if repr(changes) not in made:
            usual = {
                "paths.dataset_root": str(tmp / "data"),
                "paths.experiment_log_dir": str(tmp / f"run{len(made)}"),
                "trainer.prepare": None,
            }
            keys = {key: at(tmp, value) for key, value in changes.items()}
            chosen = {key: value for key, value in keys.items() if key in GROUPS}
            config = shipped_config(name="demo", choices=chosen)
            for key, value in {**usual, **{k: v for k, v in keys.items() if k not in GROUPS}}.items():
                OmegaConf.update(config, key, value, force_add=True)
            made[repr(changes)] = Config(config)
        return made[repr(changes)]

    yield make
    os.environ.clear()
    os.environ.update(before)


def at(folder: Path, value: Any) -> Any:
    if isinstance(value, dict):
        return {key: at(folder, inner) for key, inner in value.items()}
    return value.replace("{tmp}", str(folder)) if isinstance(value, str) else value


def test_every_documented_key_has_a_row_and_every_row_is_documented():
    assert len(documented()) > 55
    assert set(documented()) - set(ROWS) == set(), "add a row to ROWS"
    assert set(ROWS) - set(documented()) == set(), "document it in docs/reference/configs.md"


@pytest.mark.parametrize("key", ROWS)
def test_a_key_that_is_flipped_changes_what_is_built(key, make_config):
    row = ROWS[key]
    before = row.observable(make_config(row.beside))
    after = row.observable(make_config({**row.beside, key: row.flipped}))
    assert before != after


def test_the_trainer_has_the_optimizer_that_the_rows_look_at(make_config):
    config = make_config({})
    of_trainer = [group["lr"] for group in config.trainer.optim.optimizer.param_groups]
    config.optimizer.step_schedulers(0.0, 0)
    assert of_trainer == [group["lr"] for group in config.optimizer.optimizer.param_groups]


def test_what_is_observed_does_not_differ_by_itself(make_config):
    one, other = (
        make_config({"training.seed": 0}),
        make_config({"training.seed": 0, "training.lr_scale": 1.0}),
    )
    for observe in (
        rates,
        clipped,
        validated,
        saved,
        seeded_pixels,
        anatomy,
        trained,
        pixels("train"),
        launch,
    ):
        assert observe(one) == observe(other)


@pytest.mark.parametrize(
    ("keys", "lines"),
    [
        ({}, {"Learning rate": "0.003 to 8.8e-05, AdamW, weight decay 0.0001, 136 tensors"}),
        (
            {"schedule": "constant", "training.lr_scale": 0.5, "training.lr_language_backbone": 1e-4},
            {
                "Learning rate": "0.0015, AdamW, weight decay 0.0001, 120 tensors",
                "Learning rate of the text encoder": "5e-05, AdamW, weight decay 0.0001, 16 tensors",
            },
        ),
        (
            {"schedule": "inverse_square_root", "training.warmup_steps": 2, "training.cooldown_steps": 2},
            {
                "Learning rate": "0, 0.0028 in the middle, 0.00129 at the end, AdamW, weight decay 0.0001, 136 tensors"
            },
        ),
    ],
    ids=["all parts alike", "one apart", "up and down"],
)
def test_the_rates_in_force_are_a_line_for_each_that_differs(make_config, keys, lines):
    assert learning_rates(make_config(keys).trainer, steps=10) == lines


CHOICES: dict[tuple[str, str], Observable] = {
    ("schedule", "constant"): rates,
    ("schedule", "inverse_square_root"): rates,
    ("hardware", "cpu"): lambda c: c.config.trainer.accelerator,
}


def test_every_choice_of_a_group_that_is_not_the_default_is_in_the_table():
    chosen = [entry for entry in common_defaults() if isinstance(entry, DictConfig)]
    defaults = {key.rpartition("/")[2]: choice for entry in chosen for key, choice in entry.items()}
    assert {(g, c) for g in GROUPS for c in choices(g) if defaults[g] != c} == set(CHOICES)


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_a_choice_of_a_group_changes_what_is_built(group, choice, make_config):
    observe = CHOICES[group, choice]
    assert observe(make_config({})) != observe(make_config({group: choice}))
