"""What `make gpu` measured a device to achieve, as parts of the rates of the catalogue. Imports no torch."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from qlora_core.step_time import Range, Rates

NOMINAL = {
    "products": "flops",
    "attention": "flops",
    "wide_products": "wide_flops",
    "memory": "memory_bytes",
    "dequantization": "memory_bytes",
    "pcie": "pcie_bytes",
    "starting": None,
}
"""What each is a part of: fields of `qlora_core.step_time.Achieved`, and of its `Rates`; None: it is a rate itself."""


def measured_rates(record: Mapping[str, Any]) -> Mapping[str, Mapping[str, float]] | None:
    """Operations, bytes or kernels a second of a record of `make gpu`, by rate and shape; None where it has none."""
    return (record.get("rates") or {}).get("measured")


def achieved(record: Mapping[str, Any], nominal: Rates) -> dict[str, Range]:
    """The least, the median and the most over all shapes, each as a part of what the catalogue says of the GPU.

    Args:
        record: of `make gpu`, with its `rates`.
        nominal: of that GPU in the record's compute dtype.
    """
    found: dict[str, Range] = {}
    for what, field in NOMINAL.items():
        every = record["rates"]["measured"][what].values()
        ends = min(every), statistics.median(every), max(every)
        found[what] = Range(*(float(f"{each / (getattr(nominal, field) if field else 1):.3g}") for each in ends))
    return found
