"""`make load`: how long `qlora-plan serve` takes to answer while 50 clients ask twice a second each.

Every question is another one: no answer is kept from before. The clients are in a process of their own on the same
machine, and begin after one of each model's structures was asked for, as in a server that runs for a while.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import httpx

from benchmarks.place import Place
from benchmarks.speed import ROOT, facts, on
from qlora_core.files import write_json

RESULTS = ROOT / "benchmarks" / "results" / "load.json"
DOCUMENT = ROOT / "docs" / "serve.md"
PLACE = Place(DOCUMENT, "make load")
MODELS = ("llama-7b", "llama-13b", "llama-33b", "llama-65b", "llama-3.1-8b", "qwen2.5-7b")
PACKAGES = ("qlora-orchestrator", "fastapi", "uvicorn", "uvloop", "httptools", "httpx")
GPUS = ("rtx-4090", "l40s", "a100-80gb", "h100-80gb")


def question(chance: random.Random) -> dict[str, str]:
    """One that was hardly asked before."""
    return {
        "model": chance.choice(MODELS),
        "gpu": chance.choice(GPUS),
        "seq-len": str(chance.randint(64, 8192)),
        "micro-batch": str(chance.randint(1, 16)),
        "rank": chance.choice(("16", "64")),
    }


async def client(address: str, seconds: float, number: int, begin: float, took: list[float]) -> None:
    """Ask twice a second, whether the last answer has come or not, from a moment of its own after `begin` on.

    The moments are the loop's: what delays the client delays no later question, so that clients do not fall into step.
    """
    chance, loop = random.Random(number), asyncio.get_running_loop()  # noqa: S311
    moment = begin + chance.random() / 2

    async def ask(session: httpx.AsyncClient) -> None:
        began = time.perf_counter()
        response = await session.get("/api/plan", params=question(chance))
        response.raise_for_status()
        took.append(time.perf_counter() - began)

    # without a TLS context, of which each takes tens of milliseconds to make
    async with httpx.AsyncClient(base_url=address, timeout=60, verify=False) as session:  # noqa: S501
        asked = []
        for turn in range(round(2 * seconds)):
            await asyncio.sleep(max(0.0, moment + turn / 2 - loop.time()))
            asked.append(asyncio.create_task(ask(session)))
        await asyncio.gather(*asked)


async def load(address: str, clients: int, seconds: float) -> list[float]:
    """The seconds of all answers."""
    async with httpx.AsyncClient(base_url=address, timeout=60) as session:
        for model in MODELS:
            for gpu in GPUS:
                for rank in ("16", "64"):
                    asked = {"model": model, "gpu": gpu, "rank": rank}
                    (await session.get("/api/plan", params=asked)).raise_for_status()
    took: list[float] = []
    begin = asyncio.get_running_loop().time() + 1.0
    await asyncio.gather(*(client(address, seconds, number, begin, took) for number in range(clients)))
    return took


@click.command(name="benchmarks.load")
@click.option("--clients", type=click.IntRange(min=1), default=50, show_default=True)
@click.option("--seconds", type=click.FloatRange(min=1), default=30.0, show_default=True)
def main(clients: int, seconds: float) -> None:
    """Ask, and write what it took."""
    command = [str(Path(sys.executable).with_name("qlora-plan")), "serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None  # noqa: S101
            address = server.stdout.readline().split()[0]
            before = facts(*PACKAGES)
            took = sorted(asyncio.run(load(address, clients, seconds)))
        finally:
            server.terminate()
    percentiles = statistics.quantiles(took, n=100)
    found = {
        **before,
        "clients": clients,
        "answers": len(took),
        "median_ms": round(1000 * percentiles[49], 1),
        "p95_ms": round(1000 * percentiles[94], 1),
        "p99_ms": round(1000 * percentiles[98], 1),
        "most_ms": round(1000 * took[-1], 1),
    }
    write_json(RESULTS, found)
    said = words(found)
    PLACE.write(said)
    click.echo(said)


def words(found: Mapping[str, Any]) -> str:
    """What docs/serve.md says."""
    return (
        f"{found['clients']} clients, two questions a second each, {found['answers']:,} unlike ones in all, answered "
        f"by one process on the machine that asks ({on(found)}): median {found['median_ms']} ms, 95th percentile "
        f"{found['p95_ms']} ms, 99th {found['p99_ms']} ms, longest {found['most_ms']} ms. `make load` asks again.\n"
    )


if __name__ == "__main__":
    main()
