"""The description of a cluster: what it says in bytes, and every mistake of a file told at once."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clusters.cluster import Cluster, Pool, load_cluster
from clusters.cluster_file import ClusterForm, PoolForm
from clusters.errors import RequestError
from clusters.gpu import GIB, find_gpu

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "clusters" / "examples"
POOL = "- {name: a, gpu: t4, gpus_per_node: 1}\n"
MINIMAL = "name: team\npools:\n" + POOL

Load = Callable[[str], Cluster]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Loads a text as a file."""

    def load_text(text: str) -> Cluster:
        path = tmp_path / "cluster.yaml"
        path.write_text(text, encoding="utf-8")
        return load_cluster(path)

    return load_text


def problems(load: Load, text: str) -> dict[str, str]:
    """What is wrong with a text, by place."""
    with pytest.raises(RequestError) as error:
        load(text)
    found = {problem.where: str(problem) for problem in error.value.problems}
    assert len(found) == len(error.value.problems), "one problem for a field"
    return found


# --- what is right ----------------------------------------------------------------------------------------------------


def test_a_pool_says_in_bytes_what_its_nodes_have(load: Load) -> None:
    cluster = load(
        "name: team\ncurrency: EUR\nprices_as_of: 2026-11-01\npools:\n"
        "- {name: a100, gpu: NVIDIA A100-SXM4-80GB, gpus_per_node: 8, nodes: 4, host_ram_gib: 2048, disk_gib: 0.5,"
        " network_gbit_per_s: 1600, price_per_hour: 20.5, spot: true, nvlink: false}\n"
    )
    (pool,) = cluster.pools
    assert (cluster.name, cluster.currency, cluster.prices_as_of) == ("team", "EUR", "2026-11-01")
    assert (pool.name, pool.gpu, pool.gpus_per_node, pool.nodes, pool.gpus) == ("a100", find_gpu("a100-80gb"), 8, 4, 32)
    assert pool.usable_bytes == pool.gpu.usable_bytes
    assert (pool.host_ram_bytes, pool.disk_bytes) == (2 * 1024**4, 1024**3 // 2)
    assert pool.network_bytes_per_s == 200_000_000_000  # 1600 Gbit/s are 200 GB/s
    assert (pool.price_per_hour, pool.spot, pool.nvlink) == (20.5, True, False)


def test_what_is_left_out_is_not_stated(load: Load) -> None:
    (pool,) = load(MINIMAL).pools
    assert pool.nodes == 1
    assert (pool.host_ram_bytes, pool.disk_bytes, pool.network_bytes_per_s, pool.price_per_hour) == (None,) * 4
    assert not pool.spot


@pytest.mark.parametrize(("gpu", "nvlink"), [("h100", True), ("a40", False), ("rtx-3090", False), ("l4", False)])
def test_nvlink_is_by_default_what_boards_have_and_cards_have_not(load: Load, gpu: str, nvlink: bool) -> None:
    assert load(MINIMAL.replace("t4", gpu)).pools[0].nvlink is nvlink


@pytest.mark.parametrize("day", ["2026-11-01", "'2026-11-01'"])
def test_a_day_may_be_quoted(load: Load, day: str) -> None:
    assert load(f"{MINIMAL}prices_as_of: {day}").prices_as_of == "2026-11-01"


def test_a_price_may_be_nothing(load: Load) -> None:
    text = MINIMAL.replace("node: 1", "node: 1, price_per_hour: 0") + "currency: EUR"
    assert load(text).pools[0].price_per_hour == 0


@pytest.mark.parametrize(
    ("name", "pools"),
    [
        ("workstation", {("rtx-4090", 4, 1)}),
        ("two-pools", {("a100-80gb", 8, 2), ("l40s", 4, 3)}),
        ("thousand", None),
    ],
)
def test_an_example_is_what_its_name_says(name: str, pools: set[tuple[str, int, int]] | None) -> None:
    cluster = load_cluster(EXAMPLES / f"{name}.yaml")
    assert cluster.name == name
    if pools is None:
        assert (len({pool.gpu for pool in cluster.pools}), sum(pool.gpus for pool in cluster.pools)) == (5, 1024)
    else:
        assert {(pool.gpu.name, pool.gpus_per_node, pool.nodes) for pool in cluster.pools} == pools


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_an_example_with_prices_says_that_they_are_made_up_and_when(path: Path) -> None:
    cluster = load_cluster(path)
    if any(pool.price_per_hour is not None for pool in cluster.pools):
        assert "put in your own" in path.read_text()
        assert cluster.prices_as_of is not None


def test_the_example_of_the_document_is_read(load: Load) -> None:
    [text] = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "clusters.md").read_text(), re.S)
    assert [pool.gpus for pool in load(text).pools] == [32, 4]


def test_the_document_has_every_field() -> None:
    documented = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "clusters.md").read_text(), re.M)
    assert sorted(documented) == sorted([*ClusterForm.model_fields, *PoolForm.model_fields])


# --- what is wrong ----------------------------------------------------------------------------------------------------


def test_all_mistakes_are_told_at_once_by_pool_and_field(load: Load) -> None:
    found = problems(
        load,
        """
        name: my team
        nam: twice
        pools:
        - {name: a, gpu: a100, gpus_per_node: 0, nodes: -1, host_ram_gib: 0, price_per_hour: -1, spots: true}
        - {name: b, gpu: rtx-4091, gpus_per_node: 1, nodes: 1000000000000, network_gbit_per_s: .inf}
        - {name: a, gpu: t4, gpus_per_node: true}
        - 7
        - {gpu: [t4], nodes: 1.5, gpus_per_node: 8}
        """,
    )
    assert set(found) == {
        "name",
        "nam",
        "currency",
        *(f"pool a.{field}" for field in ("gpu", "gpus_per_node", "nodes", "host_ram_gib", "price_per_hour", "spots")),
        *(f"pool b.{field}" for field in ("gpu", "nodes", "network_gbit_per_s")),
        *(f"pool 3.{field}" for field in ("name", "gpus_per_node")),
        "pool 4",
        *(f"pool 5.{field}" for field in ("name", "gpu", "nodes")),
    }
    assert "a100-40gb, a100-80gb" in found["pool a.gpu"]
    assert "Did you mean rtx-4090" in found["pool b.gpu"]
    assert "Did you mean spot?" in found["pool a.spots"]
    assert "no currency" in found["currency"]
    assert "another pool has that name" in found["pool 3.name"]
    assert "1000000000000" in found["pool b.nodes"]


@pytest.mark.parametrize(
    ("text", "where", "says"),
    [
        ("name: a\npools: []", "pools", "at least 1"),
        ("name: a\npools: {a: 1}", "pools", "valid list"),
        ("name: a", "pools", "required"),
        ("pools:\n" + POOL, "name", "required"),
        (MINIMAL + "prices_as_of: yesterday", "prices_as_of", "a day such as"),
        (MINIMAL + "prices_as_of: 20261101", "prices_as_of", "a day such as"),
        (MINIMAL + "prices_as_of: 2026-11-01 10:00:00", "prices_as_of", "a day such as"),
        (MINIMAL + "currency: 5", "currency", "string"),
        (MINIMAL.replace("t4", "cpu"), "pool a.gpu", "not a GPU known here"),
        (MINIMAL.replace("t4", "''"), "pool a.gpu", "--list-gpus"),
        (MINIMAL + MINIMAL, "cluster description", "name is given twice"),
        (MINIMAL.replace("node: 1", "node: 1, gpu: a10"), "cluster description", "gpu is given twice"),
        ("", "cluster description", "it is empty"),
        ("[]", "cluster description", "no mapping"),
        ("name: [", "cluster description", "not YAML at line"),
        ("a: !!python/object/apply:os.system [ls]", "cluster description", "not YAML at line 1"),
    ],
)
def test_a_mistake_is_told_in_words_of_the_file(load: Load, text: str, where: str, says: str) -> None:
    assert says in problems(load, text)[where]


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda path: None, "there is no such file"),
        (lambda path: path.mkdir(), "it is a folder"),
        (lambda path: path.write_bytes(b"name: \xff\xfe"), "not text in UTF-8"),
        (lambda path: path.write_text("a: é\n" * 30_000), "larger than 64 KiB"),
        (lambda path: path.symlink_to("/dev/zero"), "larger than 64 KiB"),
    ],
    ids=["none", "folder", "not UTF-8", "large", "endless"],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path: Path, make: Callable[[Path], Any], rule: str) -> None:
    path = tmp_path / "cluster.yaml"
    make(path)
    with pytest.raises(RequestError, match=rule):
        load_cluster(path)


def test_a_path_with_a_zero_byte_is_a_request_error() -> None:
    with pytest.raises(RequestError, match="cannot be read"):
        load_cluster(Path("a\0b"))


@pytest.mark.parametrize("link", ["[{}]", "{{<<: [{}], {}: 1}}"], ids=["aliases", "merges"])
def test_a_bomb_of_aliases_is_refused_at_once_in_a_short_message(load: Load, link: str) -> None:
    names = [f"n{number}" for number in range(12)]
    bomb = "n0: &n0 {x: 1}\n"
    for inner, name in itertools.pairwise(names):
        bomb += f"{name}: &{name} {link.format(', '.join([f'*{inner}'] * 9), name)}\n"
    started = time.monotonic()
    found = problems(load, MINIMAL + bomb + "currency: *n11\n")
    assert time.monotonic() - started < 60
    assert len(found["currency"]) < 500


# --- junk -------------------------------------------------------------------------------------------------------------

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**30, -(2**63), 1, 8])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["a", "a100", "t4", "EUR", "2026-11-01", "\0"])
    | st.dates()
    | st.binary(max_size=3)
)
FIELDS = st.sampled_from([*PoolForm.model_fields, *ClusterForm.model_fields]) | st.text(max_size=5)
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS | st.integers(-5, 5), inner, max_size=6),
    max_leaves=12,
)
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(junk=st.dictionaries(FIELDS | st.integers(-5, 5), JUNK | st.lists(JUNK, max_size=3), max_size=6))
@FUZZ
def test_junk_is_a_cluster_or_a_request_error(load: Load, junk: dict[Any, Any]) -> None:
    with suppress(RequestError):
        load(yaml.safe_dump(junk))


@given(pool=st.dictionaries(st.sampled_from([*PoolForm.model_fields]), SCALARS, max_size=4))
@FUZZ
def test_a_right_pool_with_junk_in_it_is_right_or_wrong_in_those_fields(load: Load, pool: dict[str, Any]) -> None:
    fields = {"name": "a", "gpu": "t4", "gpus_per_node": 1, **pool}
    wrong: set[str] = set()
    pools: tuple[Pool, ...] = ()
    try:
        pools = load(yaml.safe_dump({"name": "x", "currency": "EUR", "pools": [fields]})).pools
    except RequestError as error:
        wrong = {problem.where.rpartition(".")[2] for problem in error.problems}
    assert wrong <= set(pool)
    assert bool(wrong) != bool(pools)
    assert all(1 <= read.gpus <= 1024 * 100_000 for read in pools)
    assert all(read.host_ram_bytes is None or 0 <= read.host_ram_bytes <= 2**30 * GIB for read in pools)


@given(text=st.text(max_size=60) | st.text(alphabet="[]{}:,-&*!<>|'\"#%@`\n a1", max_size=60))
@FUZZ
def test_any_text_is_a_cluster_or_a_request_error(load: Load, text: str) -> None:
    with suppress(RequestError):
        load(text)
