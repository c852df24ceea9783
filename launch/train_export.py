"""qlora-train export: an adapter for others to load, or merged with its base into a model of its own."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clusters.errors import RunFailed, request_error
from launch import command
from launch.options import passed
from launch.report.words import gib

if TYPE_CHECKING:
    from orchestrator.trained import Trained
    from qlora_core.training.check import Check

CAVEAT = (
    "The adapter was trained on a base in {bits} bit, whose rounding it learned to live with. It is merged into the "
    "base in 16 bit, since merging into {bits} bit would round it away: the merged model differs a little from the "
    "trained one."
)


@click.command("export")
@click.argument("trained", type=click.Path(path_type=Path), metavar="RUN|ADAPTER")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder to write; it must not be there yet."
)
@click.option("--merge", "merges", is_flag=True, help="Merge with the base in 16 bit; else the adapter is written.")
@click.option("--base", help="The base's folder or Hub id, where it is not the one that the adapter names.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), default="bfloat16", show_default=True)
@click.option(
    "--max-shard-size",
    default="5GB",
    show_default=True,
    help="Largest file; about as much memory is needed.",
)
@click.option(
    "--check/--no-check",
    default=None,
    help="Compare the merged model's held-out loss with the adapter's. Default: where the run's examples are there and "
    "the model fits into memory.",
)
@click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.pass_context
def export(
    context: click.Context,
    /,
    trained: Path,
    out: Path,
    merges: bool,
    base: str | None,
    dtype: str,
    max_shard_size: str,
    check: bool | None,
    as_json: bool,
    debug: bool,
) -> int:
    """Export what was trained: a RUN's folder or an ADAPTER's."""
    if not merges and (idle := sorted({"base", "dtype", "max_shard_size", "check"} & passed(context))):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
        raise click.UsageError(f"Only a merge has a use for {flags}: add --merge, or leave that out.")
    command.require_train_extra("qlora-train export")
    if out.exists():
        raise request_error("--out", out, "it is there already", "Choose a folder that is not, or remove it")
    from qlora_core.quiet import quiet_libraries

    quiet_libraries()
    from orchestrator.trained import find_trained

    found = find_trained(trained)
    answer = export_merged(found, out, base, dtype, max_shard_size, check) if merges else export_adapter(found, out)
    for warning in answer["warnings"]:
        command.warn(warning)
    if as_json:
        click.echo(json.dumps(answer, indent=2))
    else:
        for line in answer["lines"]:
            click.echo(line)
    return 0


def export_adapter(trained: Trained, out: Path) -> dict[str, Any]:
    """Copy the adapter as it is, and say what vLLM would make of it."""
    from qlora_core.files import replace_folder
    from qlora_core.training.vllm import outside_vllm, vllm_rank

    outside = outside_vllm(trained.adapter.config, trained.adapter.shapes)
    rank = vllm_rank(trained.adapter.config)
    try:
        with replace_folder(out) as temporary:
            shutil.copytree(trained.adapter.folder, temporary)
    except OSError as error:
        raise RunFailed(f"The adapter could not be written to {out}: {error}.", "Choose another --out.") from error
    lines = [f"The adapter is in {out}, in peft's layout."]
    if not outside:
        lines.append(f"By vLLM's sources it serves this adapter with --enable-lora --max-lora-rank {rank} (not tried).")
    return {
        "out": str(out),
        "merged": False,
        "vllm": {"max_lora_rank": rank, "outside": outside},
        "warnings": [f"vLLM would not serve this adapter: {reason}" for reason in outside],
        "lines": lines,
    }


def export_merged(
    trained: Trained, out: Path, base: str | None, dtype: str, max_shard_size: str, check: bool | None
) -> dict[str, Any]:
    """Merge the adapter into its base, and compare the two."""
    from orchestrator.trained import base_of
    from qlora_core.training.merge import merged_folder

    folder, repo = base_of(trained, base, lambda text: click.echo(text, err=True))
    stored = trained.base_recipe.quantization
    warnings = [CAVEAT.format(bits=8 if stored == "int8" else 4)] if stored != "none" else []
    with merged_folder(folder, trained.adapter.folder, out, dtype=dtype, max_shard_size=max_shard_size, repo=repo) as (
        temporary,
        merged,
    ):
        checked, why_not = compare(trained, folder, temporary, dtype, merged.bytes, check)
    lines = [f"Merged {merged.layers} layers; {gib(merged.bytes)} in {dtype}, {merged.shards} file(s) in {out}."]
    before = None if trained.record is None else trained.record.results.get("eval_after")
    if checked is not None:
        lines.append(
            f"Held-out loss: {checked.merged:.4f} merged, {checked.unmerged:.4f} as base in {dtype} with the adapter"
            + (f", {before:.4f} as it was trained." if before is not None else ".")
        )
    elif why_not:
        warnings.append(f"The merged model was not compared with the adapter: {why_not}.")
    return {
        "out": str(out),
        "merged": True,
        **dataclasses.asdict(merged),
        "dtype": dtype,
        "held_out_loss": None if checked is None else {**dataclasses.asdict(checked), "trained": before},
        "warnings": warnings,
        "lines": lines,
    }


def compare(
    trained: Trained, base: Path, merged: Path, dtype: str, size: int, check: bool | None
) -> tuple[Check | None, str]:
    """The losses of the merged model and the adapter, or why they were not compared.

    Raises:
        RequestError: it was asked for, and there are no held-out examples.
        RunFailed: they differ.
    """
    from orchestrator.machine import describe
    from qlora_core.training.check import check_merged
    from qlora_core.training.examples import Examples

    if check is False:
        return None, ""
    examples = None if trained.held_out is None else Examples(trained.held_out)
    if not examples:
        if check:
            rule = "the adapter comes without its run's held-out examples"
            raise request_error("--check", trained.adapter.folder, rule, "Give the run's folder, or leave --check out")
        return None, "there are no held-out examples of its run"
    machine = describe()
    if check is None and size > machine.memory_bytes:
        return None, f"it takes {gib(size)} of memory, and {gib(machine.memory_bytes)} are free"
    import torch

    click.echo("Comparing the held-out loss with the adapter's; --no-check leaves it out.", err=True)  # it takes long
    return check_merged(merged, base, trained.adapter.folder, examples, dtype, torch.device(machine.kind)), ""
