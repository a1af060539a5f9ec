import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

if not torch.cuda.is_available():
    # Triton's interpreter runs the kernels on the CPU. It is chosen when Triton is imported.
    os.environ["TRITON_INTERPRET"] = "1"

import transformers
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("quick", max_examples=60, deadline=None, derandomize=True)
settings.load_profile("quick")
transformers.logging.set_verbosity_error()
