"""Libraries on their best behaviour: without chat that a run's own display replaces, and without idle imports."""

from __future__ import annotations

import gc
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from unittest.mock import patch


def quiet_libraries() -> None:
    """Keep transformers, bitsandbytes, DeepSpeed and torch from printing below the level of an error."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", module=r"(torch|bitsandbytes|transformers|peft|deepspeed)(\..*)?")
    # where the first step's scaled gradient overflows, and the optimizer is not asked
    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
    for name in ("bitsandbytes", "DeepSpeed", "deepspeed", "transformers", "peft", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


@contextmanager
def uncollected() -> Iterator[None]:
    """Collect no cycles while libraries are imported: none is to be freed, and to look takes long."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def import_configurations() -> None:
    """Import what the configurations of transformers' models are made of, without what its models are made of.

    Beside a tokenizer it reads the model's configuration, whose checks know the names of activations, and the module
    that has these brings accelerate, torch.distributed and torch._dynamo (transformers 5.23, utils/type_validators.py).
    They know none where torch is not there, and then let any name pass.
    """
    from transformers import video_utils  # noqa: F401  # imported by it, and not to be told the same
    from transformers.utils import import_utils

    with patch.object(import_utils, "is_torch_available", return_value=False), suppress(ImportError):
        import transformers.utils.type_validators  # noqa: F401


def import_bitsandbytes() -> None:
    """Import bitsandbytes before peft or transformers does, without what it brings and nobody here calls.

    It hands four functions of its backend for devices without kernels of their own to torch.compile, which imports all
    of inductor (bitsandbytes 0.50, backends/default/ops.py), and keeps them as they are where that fails. Of these a
    CPU calls one, to dequantize a weight with an odd last dimension, and CUDA none.
    """
    import torch

    with patch.object(torch, "compile", side_effect=RuntimeError("not while bitsandbytes is imported")):
        import bitsandbytes  # noqa: F401
