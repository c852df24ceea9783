"""Real steps by our engines on this CPU, every storage followed, beside what the formula says for each rank."""

from __future__ import annotations

import gc
import os
import pickle
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from time import sleep
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from transformers import AutoModelForCausalLM, LlamaConfig

from qlora_core.huggingface.config import architecture_from_config
from qlora_core.memory import sharding
from qlora_core.memory.device import Device
from qlora_core.memory.estimate import Phase, Phases
from qlora_core.memory.formula import estimate
from qlora_core.memory.measure import PHASES, StorageMeter
from qlora_core.recipe import Dtype, Recipe
from qlora_core.strategy import Strategy
from qlora_core.training.dataset.tokens import Encoded, save_examples
from qlora_core.training.engines import build_engine
from qlora_core.training.examples import Examples, Rows
from qlora_core.training.loop import TrainingRun, one_step, rehearse
from qlora_core.training.loss import SummedLoss
from qlora_core.training.model import autocast_dtype, load_base, make_trainable

TINY = LlamaConfig(
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    vocab_size=2048,
    max_position_embeddings=1024,
    tie_word_embeddings=False,
)
SEQ_LEN = 128
STEPS = 2
"""The optimizer's state and ZeRO-3's trace of the modules exist from the second step on."""
CPU = torch.device("cpu")
LET_GO = 0.02
"""Seconds after which gloo's threads hold nothing any more of what has been reduced."""


class Case(NamedTuple):
    """One way to run a step; the longest examples fill every micro-batch."""

    zero_stage: Any = 0
    accumulation: int = 1
    checkpointing: bool = True
    loss: Any = "chunked"
    optimizer: Any = "adamw"
    dtype: Dtype = "float32"
    micro_batch: int = 2
    offload: Any = "none"
    attention: Any = "sdpa"
    changes: tuple[tuple[str, Any], ...] = ()

    def strategy(self, world_size: int) -> Strategy:
        return Strategy(
            world_size=world_size,
            micro_batch=self.micro_batch,
            gradient_accumulation=self.accumulation,
            gradient_checkpointing=self.checkpointing,
            attention=self.attention,
            loss=self.loss,
            paged_optimizer=False,
            zero_stage=self.zero_stage,
            offload=self.offload,
        )

    def recipe(self, world_size: int) -> Recipe:
        sequences = self.strategy(world_size).sequences_per_step
        fields: dict[str, Any] = {"rank": 16, "seq_len": SEQ_LEN, "tokens_per_step": SEQ_LEN * sequences}
        return Recipe(**{**fields, "autocast": False, **dict(self.changes)}, optimizer=self.optimizer)


AUTOCAST = (("autocast", True),)
FULL = (("method", "full"), ("quantization", "none"))
SIXTEEN_BIT = (("method", "lora"), ("quantization", "none"))
INT8 = (("quantization", "int8"), ("double_quantization", False))
ALONE = [
    Case(),
    Case(accumulation=2, optimizer="adamw_8bit"),
    Case(checkpointing=False, loss="full"),
    Case(loss="full", dtype="bfloat16", micro_batch=4),
    Case(changes=FULL),
    Case(accumulation=2, optimizer="adamw_8bit", dtype="bfloat16", changes=FULL),
    Case(accumulation=2, changes=(("use_dora", True), ("dropout", 0.1), ("loraplus_lr_ratio", 4.0))),
    Case(changes=(("neftune_alpha", 5.0),)),
    Case(changes=INT8),
    Case(changes=(*INT8, ("targets", ("q_proj", "v_proj")))),
    Case(dtype="bfloat16", changes=(("quantization", "fp4"), ("double_quantization", False))),
    Case(accumulation=2, dtype="bfloat16", changes=AUTOCAST),
    Case(checkpointing=False, dtype="bfloat16", changes=AUTOCAST),
    Case(loss="full", dtype="bfloat16", changes=AUTOCAST),
    Case(dtype="bfloat16", changes=(*INT8, *AUTOCAST)),
    Case(dtype="bfloat16", changes=(*SIXTEEN_BIT, *AUTOCAST)),
    Case(dtype="bfloat16", changes=(*FULL, *AUTOCAST)),
]
# ZeRO-3 comes last: it replaces torch's linear function for the rest of its process
TOGETHER = [
    case
    for stage in (0, 1, 2, 3)
    for case in (
        Case(stage, accumulation=2, optimizer="adamw_8bit"),
        Case(stage, checkpointing=False, loss="full"),
        Case(stage, dtype="bfloat16", micro_batch=4),
        Case(stage, dtype="bfloat16", checkpointing=False, changes=AUTOCAST),
        Case(stage, accumulation=2, dtype="bfloat16", changes=AUTOCAST),
        Case(stage, dtype="bfloat16", checkpointing=False, changes=SIXTEEN_BIT),
        Case(stage, accumulation=2, changes=FULL),
        Case(stage, changes=(("rank", 64), ("loraplus_lr_ratio", 4.0))),
    )
]
# a CPU's memory is the host's: what is offloaded stays in it, and both are measured together
OFFLOADED = [
    case
    for stage, offload in ((1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "all"))
    for case in (
        Case(stage, accumulation=2, offload=offload),
        Case(stage, accumulation=2, offload=offload, changes=FULL),
        Case(stage, accumulation=2, dtype="bfloat16", offload=offload, changes=FULL),
        Case(stage, dtype="bfloat16", offload=offload, changes=(("lora_dtype", "bfloat16"),)),
        Case(stage, accumulation=2, optimizer="adamw_8bit", offload=offload, changes=(("rank", 64),)),
    )
]
SAMPLE = [*TOGETHER[:28:7], *OFFLOADED[4::5], *TOGETHER[28::7]]
"""A case of each stage, and of stages 2 and 3 offloaded; `make grids` looks at all."""
REST = sorted(
    (case for case in (*TOGETHER, *OFFLOADED) if case not in SAMPLE),
    key=lambda case: case.zero_stage,
)
IN_BUCKETS = [
    case
    for stage in (1, 2, 3)
    for case in (
        Case(stage, accumulation=2, changes=FULL),
        Case(stage, changes=FULL, dtype="bfloat16", optimizer="adamw_8bit"),
        Case(stage, accumulation=2, changes=FULL, dtype="bfloat16"),
        Case(stage, changes=FULL, checkpointing=False, loss="full"),
        Case(stage, accumulation=2, changes=(("rank", 256),)),
        Case(stage, changes=FULL, offload="optimizer"),
        Case(stage, accumulation=2, changes=FULL, dtype="bfloat16", offload="optimizer"),
    )
]


class TidyMeter(StorageMeter):
    """Without what waits for the cycle collector."""

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        gc.collect()
        sleep(LET_GO)
        with super().phase(name):
            yield

    def forget_first_step(self) -> None:
        """An estimate is of later steps; in its first ZeRO-3 fetches even what it will keep whole."""
        self._peaks.highest = dict.fromkeys(PHASES, 0)


def patient(reduction: Callable[..., Any]) -> Callable[..., Any]:
    """Until gloo's thread has let go of the tensors: it does so some time after it told that it is done."""

    @wraps(reduction)
    def wrapped(*args: Any, **options: Any) -> Any:
        work = reduction(*args, **options)
        if not options.get("async_op"):
            sleep(LET_GO)
        return work

    return wrapped


class Watch:
    """An observer that asks for nothing."""

    def event(self, kind: str, **facts: Any) -> None:
        pass

    def alive(self) -> None:
        pass

    def stop_requested(self) -> bool:
        return False

    def checkpoint_saved(self, path: Path, step: int) -> None:
        pass


def measure(folder: Path, case: Case, rank: int, world_size: int) -> Phases:
    """The peaks of a rank over real steps, each of which `one_step` makes as in a run."""
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # else each of the meter's collections looks at all that was ever imported
    recipe, strategy = case.recipe(world_size), case.strategy(world_size)
    meter = TidyMeter()
    base = load_base(str(folder), recipe, strategy, case.dtype, CPU)
    model = make_trainable(base, recipe, seed=0)
    model.train()
    meter.loaded(model)
    loss = SummedLoss(model, strategy.loss, autocast_dtype(recipe, case.dtype))
    with meter.setup():
        engine = build_engine(loss, recipe, strategy)
    data = Examples(folder / "train.safetensors")
    run = TrainingRun(
        recipe=recipe,
        strategy=strategy,
        seed=0,
        total_steps=STEPS,
        save_every=STEPS,
        model=model,
        engine=engine,
        tokenizer=cast(Any, SimpleNamespace(pad_token_id=0)),
        train_data=Rows(data, recipe, seed=0),
        eval_data=data,
        meter=meter,
        device=CPU,
        rank=rank,
        checkpoints=folder,
        facts={},
    )
    for step in range(STEPS):
        one_step(run, step, Watch())
        if step == 0:
            meter.forget_first_step()
            rehearse(run, Watch())  # as a run does; it must need what a step needs, and leave nothing for the next
    return meter.peaks()


def measure_rank(rank: int, world_size: int, port: int, folder: Path, cases: list[Case], bucket: int) -> None:
    """One process of several: all cases, one after the other, into a file of its own."""
    sharding.LARGEST_BUCKET_ELEMENTS = bucket
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)}
    os.environ.update({**address, "RANK": str(rank), "LOCAL_RANK": str(rank)})
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    for name in ("all_reduce", "reduce", "reduce_scatter_tensor"):
        setattr(dist, name, patient(getattr(dist, name)))
    peaks = [measure(folder, case, rank, world_size) for case in cases]
    (folder / f"peaks-{rank}.pickle").write_bytes(pickle.dumps(peaks))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(TINY, tmp_path_factory.mktemp("tiny"))


def saved(config: LlamaConfig, path: Path) -> Path:
    """A model of `config`, and examples for it."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    ids = torch.randint(1, TINY.vocab_size, (16, SEQ_LEN)).tolist()
    save_examples([Encoded(row, [True] * SEQ_LEN) for row in ids], path / "train.safetensors")
    return path


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> list[list[Phases]]:
    """The peaks of each of two ranks, for each case of SAMPLE."""
    return on_two_ranks(folder, SAMPLE)


def on_two_ranks(folder: Path, cases: list[Case], bucket: int = sharding.LARGEST_BUCKET_ELEMENTS) -> list[list[Phases]]:
    """The peaks of each of two ranks, for each case; buckets of gradients hold so many elements."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(measure_rank, (2, port, folder, cases, bucket), nprocs=2)  # type: ignore[no-untyped-call]
    return [pickle.loads((folder / f"peaks-{rank}.pickle").read_bytes()) for rank in (0, 1)]  # noqa: S301 - our own


def assert_said(case: Case, world_size: int, real: Phases, name: str = "tiny", config: LlamaConfig = TINY) -> None:
    # what the formula keeps, it keeps by architecture, of which the name is a part
    architecture = architecture_from_config(config.to_dict(), name=name, source="tiny")
    device = Device(kind="cpu", compute_dtype=case.dtype)
    said = estimate(architecture, case.recipe(world_size), case.strategy(world_size), device).gpu
    peak = max(real.forward, real.backward, real.optimizer)
    assert 0.98 * said.allocated_bytes <= peak <= 1.02 * said.allocated_bytes
    for phase in Phases._fields:
        wanted, found = getattr(said.phases, phase), getattr(real, phase)
        assert 0.97 * wanted <= found <= 1.03 * wanted, phase


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.grid if index % 2 else ()) for index, case in enumerate(ALONE)],
    ids=str,
)
def test_one_process_needs_what_the_formula_says(folder: Path, case: Case) -> None:
    assert_said(case, 1, measure(folder, case, rank=0, world_size=1))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_that_is_dropped_out_keeps_its_scores(tmp_path: Path, attention: Any) -> None:
    config = LlamaConfig(**{**TINY.to_dict(), "attention_dropout": 0.1})
    case = Case(checkpointing=False, dtype="bfloat16", attention=attention)
    real = measure(saved(config, tmp_path), case, rank=0, world_size=1)
    assert_said(case, 1, real, "dropped", config)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("index", range(len(SAMPLE)), ids=[str(case) for case in SAMPLE])
def test_each_of_two_ranks_needs_what_the_formula_says(two_ranks: list[list[Phases]], index: int, rank: int) -> None:
    assert_said(SAMPLE[index], 2, two_ranks[rank][index])


@pytest.mark.grid
def test_so_does_each_of_the_other_cases(folder: Path) -> None:
    for peaks in on_two_ranks(folder, REST):
        for case, real in zip(REST, peaks, strict=True):
            assert_said(case, 2, real)


@pytest.mark.grid
@pytest.mark.parametrize(("bucket", "vocab"), [(300_000, 16384), (100_000, 2048)])
def test_the_fullest_rank_needs_what_the_formula_says_where_a_bucket_does_not_hold_all_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket: int, vocab: int
) -> None:
    """Embedding and head pass the bucket by, or nearly all weights, as those of a real model do."""
    monkeypatch.setattr(sharding, "LARGEST_BUCKET_ELEMENTS", bucket)
    config = LlamaConfig(**{**TINY.to_dict(), "vocab_size": vocab})
    folder = saved(config, tmp_path)
    for case, peaks in zip(IN_BUCKETS, zip(*on_two_ranks(folder, IN_BUCKETS, bucket), strict=True), strict=True):
        fullest = {phase: max(getattr(rank, phase) for rank in peaks) for phase in Phases._fields}
        assert_said(case, 2, Phases(**fullest), f"{vocab} tokens, buckets of {bucket}", config)
