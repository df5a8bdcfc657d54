"""How long adding an adapter to the full-size model takes, as a share of building that model. Needs 5 GB of memory.

OMP_NUM_THREADS=1 python -W ignore benchmarks/injection.py
"""

import time

from sam3_lora import PRESETS, get_peft_sam3, load_base


def main() -> None:
    start = time.process_time()
    model = load_base("random", device="cpu", eval_mode=False)
    build = time.process_time() - start
    print(f"build of the base: {build:.1f} CPU s")
    for preset in PRESETS:
        start = time.process_time()
        adapted = get_peft_sam3(model, preset)
        took = time.process_time() - start
        print(f"{preset}: {took:.2f} CPU s, {took / build:.1%} of the build")
        adapted.unload()  # the attention stays split, which saves the next one 0.02 s


if __name__ == "__main__":
    main()
