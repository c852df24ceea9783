"""Data: from wherever it lies, in whatever of the known formats, to token ids and which of them are learned."""

from qlora_core.training.dataset.encode import encode_file
from qlora_core.training.dataset.options import DataOptions
from qlora_core.training.dataset.report import DataReport

__all__ = ["DataOptions", "DataReport", "encode_file"]
