import argparse
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from sam3_lora import TrainSettings
from sam3_lora.cli import build_parser
from sam3_lora.errors import ConfigError
from sam3_lora.training.composition import shipped_config
from sam3_lora.training.effective import ineffective_problems
from sam3_lora.training.overrides import SETTING_KEYS, override_problems, parse_overrides
from sam3_lora.training.settings import check_settings, run_choices, run_yaml


def settings(**changes):
    return TrainSettings(**{"data": Path("d"), "output": Path("o"), "base": "tiny", **changes})


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("training.lr=2e-4", "training.lr", 2e-4),
        ("training.augment=[flip,scale]", "training.augment", ["flip", "scale"]),
        ("training.save_every_steps=null", "training.save_every_steps", None),
        ("training.skip_first_val=True", "training.skip_first_val", True),
        ("adapter.overrides={r: 4}", "adapter.overrides", {"r": 4}),
        ("training.img_folder_val='/a b/c'", "training.img_folder_val", "/a b/c"),
        ("schedule=constant", "schedule", "constant"),
        ("sam3_lora/schedule=constant", "schedule", "constant"),
        ("+trainer.adapter_freq=2", "+trainer.adapter_freq", 2),
    ],
)
def test_words_are_read_as_hydra_reads_them(word, key, value):
    assert parse_overrides([word]) == {key: value}


def test_words_that_are_no_setting_of_one_run_are_refused_together():
    with pytest.raises(ConfigError) as caught:
        parse_overrides(["training.lr=1,2", "~training.lr", "training.lr=[1"])
    text = str(caught.value)
    assert text.startswith("3 problems:\n  'training.lr=1,2' names several runs")
    assert "'~training.lr': a run cannot leave a key out" in text
    assert "'training.lr=[1' is no key=value: " in text


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"training.lr_scal": 1}, "unknown key 'training.lr_scal': training has no 'lr_scal'; did you mean 'lr_scale'?"),
        ({"trainig.lr": 1}, "unknown key 'trainig.lr': the config has no 'trainig'; did you mean 'training'?"),
        ({"shedule": "constant"}, "unknown key 'shedule'; did you mean 'schedule'?"),
        ({"schedule": "const"}, "schedule=const: there is no such schedule; did you mean 'constant'?"),
        ({"r": 8}, "unknown key 'r'; a keyword of the adapter is --set r=... or adapter.overrides.r=..."),
        ({"rank": 8}, "unknown key 'rank'; it is r here"),
        ({"training.amp": True}, "unknown key 'training.amp'; it is training.amp_enabled now"),
        ({"training.num_workers": 1}, "it is training.num_train_workers now"),
        ({"training.final_lr": 1e-6}, "it is training.final_lr_ratio now"),
        ({"schedule": "constant", "training.final_lr_ratio": 0.1}, "training has no 'final_lr_ratio'"),
        ({"training.warmup_steps": 5}, "training has no 'warmup_steps'"),
        ({"training.skip_first_val": "yes"}, "training.skip_first_val needs true or false, got 'yes'"),
        ({"training.max_epochs": 0}, "training.max_epochs must be 1 or more, got 0"),
        ({"training.lr_scale": -1}, "training.lr_scale must be 0 or more, got -1"),
        ({"+training.lr": 1}, "+training.lr: there is such a key; write training.lr=1"),
        ({"+training.mine": 1}, "training has no 'mine'; a new one would have no effect"),
        ({"training": 3}, "training is a block, not a value; its keys are training.img_folder_train"),
    ],
)  # fmt: skip
def test_a_key_that_would_do_nothing_is_named_with_what_it_may_mean(config, message):
    (problem,) = override_problems(config, "balanced")
    assert message in problem


def test_what_is_set_twice_must_agree():
    check_settings(settings(lr=0.1, config={"training.lr": 0.1, "base.name": "tiny"}))
    with pytest.raises(ConfigError) as caught:
        check_settings(
            settings(
                lr=0.1,
                num_gpus=2,
                overrides={"r": 4},
                config={"training.lr": 0.2, "launcher.gpus_per_node": 1, "adapter.preset": "full", "adapter.overrides.r": 8},
            )
        )  # fmt: skip
    text = str(caught.value)
    assert "training.lr is 0.2, but lr is 0.1: give one of them, --lr" in text
    assert "launcher.gpus_per_node is 1, but num_gpus is 2: give one of them, --num-gpus" in text
    assert "adapter.preset is 'full', but preset is 'balanced': give one of them, --preset" in text
    assert "r is set twice, to different values" in text


def test_keywords_of_the_adapter_are_checked_as_such():
    with pytest.raises(ConfigError, match="it is r here"):
        check_settings(settings(config={"adapter.overrides.rank": 8}))


def test_the_run_file_chooses_groups_adds_keys_and_names_paths_from_the_root():
    run = yaml.safe_load(
        run_yaml(
            settings(
                config={
                    "schedule": "constant",
                    "+trainer.adapter_freq": 2,
                    "adapter.overrides.r": 4,
                    "training.img_folder_val": "pictures",
                    "training.ann_file_val": "${paths.dataset_root}/v.json",
                }
            )
        )
    )
    assert run["defaults"][2:] == [{"override /sam3_lora/schedule": "constant"}, "_self_"]
    assert run["trainer"] == {"adapter_freq": 2}
    assert run["adapter"]["overrides"] == {"r": 4}
    assert run["training"]["img_folder_val"] == str(Path("pictures").resolve())
    assert run["training"]["ann_file_val"] == "${paths.dataset_root}/v.json"


def train_options():
    (verbs,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return [a for a in verbs.choices["train"]._actions if a.option_strings]


def test_an_option_is_its_key_below_training_with_hyphens():
    """Those that are not below ``training`` are named in one table; the others are about the command, not the run."""
    about_the_command = {"help", "resume", "overwrite", "set", "report", "json", "dry_run"}
    known = shipped_config()
    for option in train_options():
        (word,) = {o for o in option.option_strings if o.startswith("--")}
        if option.dest in about_the_command:
            continue
        assert word == "--" + option.dest.replace("_", "-")
        key = SETTING_KEYS[option.dest]
        block, name = key.split(".")
        assert name in known[block]
        assert key.split(".")[1] == option.dest or block not in ("training", "submitit")
    assert set(SETTING_KEYS) == {option.dest for option in train_options()} - about_the_command


def composed(text, tmp_path):
    (tmp_path / "run.yaml").write_text("# @package _global_\n" + text)
    with initialize_config_module("sam3.train", version_base="1.2"):
        return compose(str(tmp_path / "run"))


def test_a_yaml_of_ones_own_is_told_what_nothing_reads(tmp_path):
    config = composed(
        "defaults: [/sam3_lora/balanced, _self_, override /sam3_lora/schedule: constant]\n"
        "traning: {max_epochs: 1}\n"
        "lora: {rank: 4}\n"
        "training: {foo: 1, amp: false, final_lr_ratio: 0.1, val_epoch_frq: 2}\n",
        tmp_path,
    )
    assert sorted(ineffective_problems(config)) == [
        "training.amp: nothing reads this key; it is training.amp_enabled now",
        "training.final_lr_ratio: nothing reads this key",
        "training.foo: nothing reads this key",
        "training.val_epoch_frq: nothing reads this key; did you mean 'val_epoch_freq'?",
        "traning: no config of ours has such a block, and nothing refers to it; did you mean 'training'?",
        "unknown key 'lora.rank'; it is r here",
    ]


@pytest.mark.parametrize("name", ["balanced", "demo", "full", "tracker_safe"])
def test_all_that_our_configs_have_is_read(name, tmp_path):
    for schedule in ("cosine", "constant", "inverse_square_root"):
        defaults = f"defaults: [/sam3_lora/{name}, _self_, override /sam3_lora/schedule: {schedule}]\n"
        assert ineffective_problems(composed(defaults, tmp_path)) == []


def test_names_of_ones_own_that_others_refer_to_are_no_mistake(tmp_path):
    text = (
        "defaults: [/sam3_lora/balanced, _self_]\n"
        "mine: {epochs: 3, shared: {a: 1}}\n"
        "paths: {images: /images}\n"
        "training: {max_epochs: '${mine.epochs}', img_folder_train: '${paths.images}/train'}\n"
    )
    assert ineffective_problems(composed(text, tmp_path)) == []


def test_a_config_of_the_official_layout_without_our_blocks_is_left_alone(tmp_path):
    assert (
        ineffective_problems(composed("paths: {bpe_path: x}\nscratch: {resolution: 1008}\n", tmp_path)) == []
    )


OFFICIAL_FEATURES = {
    "layer decay": "trainer: {optim: {param_group_modifiers: [{_target_: sam3.train.optim.optimizer.layer_decay_param_modifier, "
    "_partial_: true, layer_decay_value: 0.9, apply_to: backbone.vision_backbone.trunk}]}}",
    "no weight decay on biases": "trainer: {optim: {options: {weight_decay: [{scheduler: {_target_: "
    "fvcore.common.param_scheduler.ConstantParamScheduler, value: 0.1}}, {scheduler: {_target_: "
    "fvcore.common.param_scheduler.ConstantParamScheduler, value: 0.0}, param_names: ['*bias*'], module_cls_names: "
    "[torch.nn.LayerNorm]}]}}}",
    "SGD": "trainer: {optim: {optimizer: {_target_: torch.optim.SGD, momentum: 0.9, lr: 0.1}}}",
}  # fmt: skip


@pytest.mark.parametrize("feature", OFFICIAL_FEATURES)
def test_other_features_of_the_official_recipe_are_reached_by_overrides(feature, tmp_path):
    from sam3_lora.adapter import get_peft_sam3
    from sam3_lora.base.cpu import provide_triton
    from sam3_lora.base.loading import load_base

    provide_triton()
    from sam3.train.optim.optimizer import construct_optimizer
    from sam3.train.utils.train_utils import register_omegaconf_resolvers

    if not OmegaConf.has_resolver("times"):
        register_omegaconf_resolvers()
    model = get_peft_sam3(load_base("tiny", device="cpu"), "balanced").get_base_model()
    built = []
    for text in ("", OFFICIAL_FEATURES[feature] + "\n"):
        optim = composed("defaults: [/sam3_lora/balanced, _self_]\n" + text, tmp_path).trainer.optim
        built.append(
            construct_optimizer(model, optim.optimizer, optim.options, optim.param_group_modifiers).optimizer
        )
    usual, changed = built
    assert (type(changed), [(g["lr"], g["weight_decay"]) for g in changed.param_groups]) != (
        type(usual),
        [(g["lr"], g["weight_decay"]) for g in usual.param_groups],
    )


def test_a_run_is_asked_for_the_choices_that_it_was_started_with():
    def choices(**changes):
        return run_choices(OmegaConf.create(run_yaml(settings(**changes))))

    assert choices()["schedule"] == "cosine"
    assert choices(config={"schedule": "constant"}) == {**choices(), "schedule": "constant"}
