"""Settings that must be in place before anything imports torch, numpy or matplotlib; child processes inherit them."""

import os
import tempfile

os.environ["OMP_NUM_THREADS"] = "1"  # more threads than cores make the small models several times slower
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach the network
os.environ["TOKENIZERS_PARALLELISM"] = "false"

_CACHE = tempfile.TemporaryDirectory()  # deleted at the end
os.environ["SAM3_LORA_CACHE"] = _CACHE.name
