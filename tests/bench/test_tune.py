"""Measured tiles: how ``gemm_tile`` uses a table, and how the tuner fills a table."""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import warnings

import pytest
import torch
import triton

from bench import tune
from fastmlp.kernels import configs, tuned
from fastmlp.kernels.device import Device
from tests.ptxsim import SimulatedGPU
from tests.support.faults import KINDS, every_point

A100 = Device("cuda", 80, 108, 166912)
SHAPE = (64, 512, 784)
KEY = "cuda-80-108"
#: Taken at import, because another function keeps the user's cache out of the tests while they run.
table_path = tuned.table_path


def by_rule(device: Device = A100) -> configs.Tile:
    return configs.gemm_tile("fwd", *SHAPE, torch.float32, device, wide=True)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty user's cache, with nothing remembered of another cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuned, "table_path", table_path)
    configs.use_new_table()
    yield tmp_path / "fastmlp" / "tiles" / f"{KEY}.json"
    configs.use_new_table()


@pytest.fixture
def other():
    """A tile of the candidates that the rule does not choose."""
    rule = by_rule()
    return next(tile for tile in configs.all_tiles("fwd", torch.float32, A100, wide=True) if tile != rule)


def table(tile, **changes) -> dict:
    rows, cols, depth = SHAPE
    entry = {"kind": "fwd", "dtype": "float32", "rows": rows, "cols": cols, "depth": depth, "tile": list(tile[:5])}
    return {"device": KEY, "triton": triton.__version__, "entries": [entry], **changes}


def test_a_measured_tile_is_preferred(cache, other):
    rule = by_rule()
    assert tune.save_table(table(other)) == cache
    assert by_rule() == other  # without a new process
    assert isinstance(by_rule(), configs.Tile)
    cells = [  # the same powers of two above all three sizes
        (((33, 257, 513), torch.float32, A100), other),
        (((65, 512, 784), torch.float32, A100), None),
        (((64, 512, 512), torch.float32, A100), None),
        (((64, 512, 784), torch.bfloat16, A100), None),
        (((64, 512, 784), torch.float32, Device("cuda", 80, 107, 166912)), None),
    ]
    for (shape, dtype, device), expected in cells:
        got = configs.gemm_tile("fwd", *shape, dtype, device, wide=True)
        cache.rename(cache.with_suffix(".aside"))
        configs.use_new_table()
        unmeasured = configs.gemm_tile("fwd", *shape, dtype, device, wide=True)
        cache.with_suffix(".aside").rename(cache)
        configs.use_new_table()
        assert got == (unmeasured if expected is None else expected), shape
    assert configs.gemm_tile("dgrad", *SHAPE, torch.float32, A100, wide=True) == rule


@pytest.mark.parametrize("tile", [(48, 48, 48, 4, 2), (256, 256, 64, 8, 4), (32, 32)], ids=str)
def test_only_candidates_are_used(tile):
    rule = by_rule()
    tune.save_table(table(tile))
    assert by_rule() == rule


def test_a_table_of_another_triton_is_ignored(other):
    rule = by_rule()
    tune.save_table(table(other, triton="3.0.0"))
    assert by_rule() == rule


@pytest.mark.parametrize(
    "text", ["{", "[]", json.dumps({"triton": triton.__version__}), json.dumps(table((), entries=[{}]))]
)
def test_a_broken_table_warns_once_and_is_ignored(cache, text):
    rule = by_rule()
    cache.parent.mkdir(parents=True)
    cache.write_text(text)
    configs.use_new_table()
    with pytest.warns(UserWarning, match=r"cuda-80-108\.json cannot be used .*fastmlp bench tune"):
        assert by_rule() == rule
    configs.gemm_tile("dgrad", *SHAPE, torch.float32, A100, wide=True)  # a second warning would be an error


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 200_000,
        b"\xff\xfe",
        b"null",
        b'{"entries": 5}',
        b'{"triton": "VERSION", "entries": [{"kind": "fwd", "dtype": [], "rows": 1, "cols": 1, "depth": 1, '
        b'"tile": []}]}',
        b'{"triton": "VERSION", "entries": [{"kind": "fwd", "dtype": "float32", "rows": 1e999, "cols": 1, "depth": 1, '
        b'"tile": [1]}]}',
        b'{"triton": "VERSION", "entries": [{"kind": "fwd", "dtype": "float32", "rows": 1, "cols": 1, "depth": 1, '
        b'"tile": [1e999]}]}',
        b"{" + b" " * (17 << 20) + b"}",
    ],
    ids=range(8),
)
def test_any_content_is_ignored_and_replaced(cache, other, content):
    rule = by_rule()
    cache.parent.mkdir(parents=True)
    cache.write_bytes(content.replace(b"VERSION", triton.__version__.encode()))
    configs.use_new_table()
    with pytest.warns(UserWarning, match="cannot be used"):
        assert by_rule() == rule
    tune.save_table(table(other))
    assert by_rule() == other


def test_a_table_is_added_to_the_one_before(cache, other):
    rule, first = by_rule(), table(other)["entries"][0]
    for kind in ("dgrad", "wgrad"):
        tune.save_table(table(other, entries=[{**first, "kind": kind}]))
    tune.save_table(table(other))
    kept = json.loads(cache.read_text())["entries"]
    assert [entry["kind"] for entry in kept] == ["dgrad", "wgrad", "fwd"]
    # A product that was measured again, and for which the rule is best now, loses its entry.
    tune.save_table(table(other, entries=[], rule_is_best=[["fwd", "float32", *SHAPE]]))
    assert by_rule() == rule
    assert [entry["kind"] for entry in json.loads(cache.read_text())["entries"]] == ["dgrad", "wgrad"]
    tune.save_table(table(other, triton="3.0.0"))
    assert [entry["kind"] for entry in json.loads(cache.read_text())["entries"]] == ["fwd"]


def test_four_writers_at_once_lose_nothing(cache, other):
    first = table(other)["entries"][0]

    def write(number: int) -> None:
        for i in range(5):
            tune.save_table(table(other, entries=[{**first, "rows": 1000 * number + i}]))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(json.loads(cache.read_text())["entries"]) == 20


@pytest.mark.skipif(os.name != "posix", reason="locks of POSIX")
@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_at_any_call(cache, other, kind):
    first = table(other)["entries"][0]

    def before() -> None:
        cache.unlink(missing_ok=True)
        tune.save_table(table(other))

    def work() -> None:
        with contextlib.suppress(OSError, KeyboardInterrupt):
            tune.save_table(table(other, entries=[{**first, "kind": "dgrad"}]))

    points = list(every_point(cache.parent, kind, before, work))
    assert len(points) >= (1 if kind == "half" else 12)
    for _ in every_point(cache.parent, kind, before, work):
        tune.save_table(table(other, entries=[{**first, "kind": "wgrad"}]))
        assert {entry["kind"] for entry in json.loads(cache.read_text())["entries"]} >= {"fwd", "wgrad"}


def test_the_interpreter_has_no_table(other):
    device = Device("interpreter", 0, 4, 1 << 20)
    chosen = by_rule(device)
    tune.save_table({**table(other), "device": "interpreter-0-4"})
    with warnings.catch_warnings():
        assert by_rule(device) == chosen


def test_products_of_a_step():
    def shapes(kind: str) -> list[tuple[int, int, int]]:
        found = tune.products(kind, 3, torch.float32, "cpu", (8, 6, 6, 6, 4))
        return [(p.rows, p.cols, p.depth) for p in found]

    assert shapes("fwd") == [(3, 6, 8), (3, 6, 6), (3, 4, 6)]
    assert shapes("dgrad") == [(3, 6, 6), (3, 6, 4)]
    assert shapes("wgrad") == [(6, 8, 3), (6, 6, 3), (4, 6, 3)]
    assert shapes("update") == [(6, 8, 3)]
    assert tuple(tune.KINDS) == configs.GEMM_KINDS


@pytest.mark.execute
@pytest.mark.parametrize("kind", tune.KINDS)
def test_the_fastest_right_tile_wins(kind, monkeypatch, cache):
    """The clock of a simulated GPU prefers the last candidate, then the candidate before it if the last is wrong."""
    with SimulatedGPU(arch=80):
        from fastmlp.kernels.device import current_device

        device = current_device()
        tiles = list(configs.all_tiles(kind, torch.float32, device, wide=True))[-3:]
        monkeypatch.setattr(configs, "all_tiles", lambda *_, **__: tiles)
        asked: list[configs.Tile] = []
        price = tune._price

        def noted(product, tile, *rest):
            asked.append(tile)
            return price(product, tile, *rest)

        monkeypatch.setattr(tune, "_price", noted)

        def run(log):
            asked.clear()
            clock = lambda launch: 1.0 if asked[-1] not in tiles else 1 / (1 + tiles.index(asked[-1]))  # noqa: E731
            return tune.tune("cpu", ["float32"], [20], log, kinds=[kind], sizes=(24, 20, 6), clock=clock)

        lines: list[str] = []
        found = run(lines.append)
        assert found["triton"] == triton.__version__
        assert {tuple(entry["tile"]) for entry in found["entries"]} <= {tiles[-1]}
        assert all(entry["seconds"] * tune.GAIN < entry["rule_seconds"] for entry in found["entries"])
        assert not any("left out" in line for line in lines)

        # A tile whose result is off by a thousandth must not win, however fast it is.
        products = tune.products

        def with_a_bug(*args):
            def wrong(product):
                def results():
                    scale = 1.001 if asked[-1] == tiles[-1] else 1.0
                    return {name: value * scale for name, value in product.results().items()}

                return tune.Product(
                    product.kind, product.rows, product.cols, product.depth, product.launch, results, product.oracle
                )

            return [wrong(product) for product in products(*args)]

        monkeypatch.setattr(tune, "products", with_a_bug)
        found = run(lines.append)
        assert any("left out" in line and "over the" in line for line in lines)
        assert tiles[-1] not in {tuple(entry["tile"]) for entry in found["entries"]}
        path = tune.save_table(found)
        for entry in json.loads(path.read_text())["entries"]:
            shape = entry["rows"], entry["cols"], entry["depth"]
            assert list(configs.gemm_tile(kind, *shape, torch.float32, device, wide=True)[:5]) == entry["tile"]


def test_what_does_not_fit_is_infinitely_slow():
    from triton.runtime.errors import OutOfResources

    def launch():
        raise OutOfResources(300_000, 166_912, "shared memory")

    product = tune.Product("fwd", 1, 1, 1, launch, dict, lambda dtype: {})
    lines: list[str] = []
    tile = configs.Tile(128, 128, 16, 8, 4)
    assert tune._price(product, tile, torch.float32, lambda launch: 0.0, lines.append) == math.inf
    assert "left out" in lines[0]
