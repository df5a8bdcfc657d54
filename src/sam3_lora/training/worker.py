"""One process of a training that another launcher started: torchrun, ``accelerate launch``, or anything that sets their
environment variables.

torchrun --nproc-per-node 2 -m sam3_lora.training.worker -c sam3_lora/balanced paths.dataset_root=/data/my_dataset
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from sam3_lora.base.cpu import provide_triton
from sam3_lora.errors import ConfigError, Sam3LoraError
from sam3_lora.output import write_text_atomic

provide_triton()

from sam3.train.utils.train_utils import register_omegaconf_resolvers  # noqa: E402

#: What says who a process is and where the others are: torch.distributed's own names.
ENVIRONMENT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def run_worker(config: str, overrides: Sequence[str] = ()) -> None:
    """Train as the process that the environment names, to the end.

    Args:
        config: As ``-c`` of the official script: an absolute path, or a name such as ``sam3_lora/balanced``.
        overrides: ``key=value`` in Hydra's spelling.

    Raises:
        ConfigError: Without a launcher's environment variables.
    """
    if missing := [name for name in ENVIRONMENT if name not in os.environ]:
        raise ConfigError(
            f"no launcher has set {', '.join(missing)}; start this with torchrun or accelerate launch, "
            "or use sam3-lora train"
        )
    register_omegaconf_resolvers()
    with initialize_config_module("sam3.train", version_base="1.2"):
        run = compose(config_name=config, overrides=list(overrides))
    run.launcher.gpus_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    run.launcher.num_nodes = int(os.environ["WORLD_SIZE"]) // run.launcher.gpus_per_node
    if os.environ["RANK"] == "0":
        _write_configs(run, Path(run.launcher.experiment_log_dir))
    instantiate(run.trainer, _recursive_=False).run()


def _write_configs(run: DictConfig, folder: Path) -> None:
    """Leave in the run folder what the official script leaves there."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomic(folder / "config.yaml", OmegaConf.to_yaml(run))
    write_text_atomic(folder / "config_resolved.yaml", OmegaConf.to_yaml(run, resolve=True))


def main() -> None:
    """Read the command line; an error of this library is one message."""
    parser = argparse.ArgumentParser(prog="python -m sam3_lora.training.worker", description=__doc__)
    parser.add_argument("-c", "--config", required=True, help="as -c of the official script")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys of the config")
    args = parser.parse_args()
    try:
        run_worker(args.config, args.overrides)
    except Sam3LoraError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
