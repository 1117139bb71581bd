"""The search for the fastest tiles of the GEMM kernels on a real GPU.

For each kernel, dtype and product of the reference network's step, every tile that ``fastmlp.kernels.configs`` lists
for the device is judged and timed. Its result must pass the gate against float64; GPU events then time it with the L2
cache overwritten. No other tiles take part, because the tests compile for every target, and run, only the listed ones.
The winners go to ``fastmlp.kernels.tuned.table_path``, which ``configs.gemm_tile`` prefers.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench.measure.gate import worst
from bench.measure.timing import FLUSH_BYTES
from fastmlp import reference
from fastmlp.base.atomic import update_file

from .presets import REFERENCE
from .problems import Results, generator

if TYPE_CHECKING:
    from fastmlp.kernels.configs import Tile

__all__ = ["KINDS", "Product", "forced", "product", "products", "save_table", "tune"]

Log = Callable[[str], None]
#: Gives the seconds of a launch.
Clock = Callable[[Callable[[], object]], float]
#: Rounds the factors of a product.
Cut = Callable[[Tensor], Tensor]

#: How many times as fast as the rule's tile an entry must be.
GAIN = 1.03

#: ``configs.GEMM_KINDS`` -> the module whose launcher asks for a tile of that kind.
KINDS = {"fwd": "linear_fwd", "dgrad": "linear_dgrad", "wgrad": "linear_wgrad", "update": "wgrad_update"}


def _exactly(x: Tensor) -> Tensor:
    """The operand as it is."""
    return x


@dataclass(frozen=True)
class Product:
    """A product [rows, cols] over ``depth`` on a device: ``launch`` computes it, ``results`` gives its results.

    ``oracle(dtype, cut)`` is plain torch's result in ``dtype``, from factors to which ``cut`` was applied.
    """

    kind: str
    rows: int
    cols: int
    depth: int
    launch: Callable[[], object]
    results: Callable[[], Results]
    oracle: Callable[..., Results]


def products(
    kind: str, batch: int, dtype: torch.dtype, device: str, sizes: Sequence[int] = REFERENCE, *, bias: bool = True
) -> list[Product]:
    """The products of a kind in one step of a network with ``sizes``, each shape once.

    Without ``bias`` weight gradients come without bias gradients.
    """
    layers = list(itertools.pairwise(sizes))
    if kind == "update":
        return [_update(layers, batch, dtype, device, bias=bias)]
    shapes = {
        "fwd": [(batch, n, k) for k, n in layers],
        "dgrad": [(batch, k, n) for k, n in layers[1:]],
        "wgrad": [(n, k, batch) for k, n in layers],
    }[kind]
    return [product(kind, *shape, dtype, device, bias=bias) for shape in dict.fromkeys(shapes)]


def product(
    kind: str, rows: int, cols: int, depth: int, dtype: torch.dtype, device: str, *, bias: bool = True
) -> Product:
    """A product of this kind and shape."""
    if kind == "update":
        return _update([(cols, rows)], depth, dtype, device, bias=bias)
    if kind == "wgrad":
        return _wgrad(rows, cols, depth, dtype, device, bias=bias)
    return {"fwd": _fwd, "dgrad": _dgrad}[kind](rows, cols, depth, dtype, device)


def forced(kind: str, tile: Tile) -> AbstractContextManager[None]:
    """Launches of this kind take ``tile`` while the block lasts, whatever their shape."""
    return _replaced(KINDS[kind], "gemm_tile", lambda *_, **__: tile)


def _draw(dtype: torch.dtype, device: str, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Normal values of each shape, with all digits of the dtype."""
    return [torch.randn(*shape, generator=generator(i)).to(device, dtype) for i, shape in enumerate(shapes)]


def _fwd(rows: int, cols: int, depth: int, dtype: torch.dtype, device: str) -> Product:
    from fastmlp import kernels

    x, w, b = _draw(dtype, device, (rows, depth), (cols, depth), (cols,))
    a = x.new_empty(rows, cols)

    def oracle(used: torch.dtype, cut: Cut = _exactly) -> Results:
        return {"A": reference.linear_act(cut(x.to(used)), cut(w.to(used)), b.to(used), "sigmoid")}

    launch = functools.partial(kernels.linear_fwd, x, w, b, "sigmoid", a=a)
    return Product("fwd", rows, cols, depth, launch, lambda: {"A": a}, oracle)


def _dgrad(rows: int, cols: int, depth: int, dtype: torch.dtype, device: str) -> Product:
    from fastmlp import kernels

    dz, w, a = _draw(dtype, device, (rows, depth), (depth, cols), (rows, cols))
    dx = a.new_empty(rows, cols)

    def oracle(used: torch.dtype, cut: Cut = _exactly) -> Results:
        return {"dX": (cut(dz.to(used)) @ cut(w.to(used))) * (1 - a.to(used) ** 2)}

    launch = functools.partial(kernels.linear_dgrad, dz, w, a, "tanh", dx=dx)
    return Product("dgrad", rows, cols, depth, launch, lambda: {"dX": dx}, oracle)


def _wgrad(rows: int, cols: int, depth: int, dtype: torch.dtype, device: str, *, bias: bool) -> Product:
    from fastmlp import kernels

    dz, x = _draw(dtype, device, (depth, rows), (depth, cols))
    dw, db = x.new_empty(rows, cols), x.new_empty(rows)

    def oracle(used: torch.dtype, cut: Cut = _exactly) -> Results:
        sums = {"db": dz.to(used).sum(0)} if bias else {}
        return {"dW": cut(dz.to(used)).t() @ cut(x.to(used)), **sums}

    launch = functools.partial(kernels.linear_wgrad, dz, x, bias=bias, dw=dw, db=db if bias else None)
    return Product("wgrad", rows, cols, depth, launch, lambda: {"dW": dw} | ({"db": db} if bias else {}), oracle)


def _update(layers: list[tuple[int, int]], batch: int, dtype: torch.dtype, device: str, *, bias: bool) -> Product:
    """Gradient and plain SGD of all layers in one launch, as in a step; the largest layer determines the tile."""
    from fastmlp.kernels.column_sums import padded
    from fastmlp.kernels.layout import Layer, Layout
    from fastmlp.kernels.optimizer import HYPER_COLUMNS

    # The package's attribute of a launcher's module is the launcher.
    module: Any = importlib.import_module("fastmlp.kernels.wgrad_update")
    dzs = _draw(dtype, device, *((batch, padded(n)) for _, n in layers))
    xs = _draw(dtype, device, *((batch, k) for k, _ in layers))
    weights = [torch.zeros(n, k, device=device) for k, n in layers]
    biases = [torch.zeros(n, device=device) for _, n in layers] if bias else []
    layout = Layout([Layer(w, b) for w, b in itertools.zip_longest(weights, biases)])
    row = torch.tensor([1.0, *[0.0] * (HYPER_COLUMNS - 1)], device=device)  # a learning rate of 1: W - dW
    partial = torch.empty(0)

    def launch() -> object:
        nonlocal partial
        wanted = module.workspace(layout, batch, dtype, row.device, direct=True)
        if wanted is not None and wanted.shape != partial.shape:
            partial = wanted
        used = None if wanted is None else partial
        return module.wgrad_update(layout, dzs, xs, "sgd", row, partial=used)

    def results() -> Results:
        """dW and db of one launch, from parameters of zero."""
        for parameter in (*weights, *biases):
            parameter.zero_()
        launch()
        named = {f"dW {i}": -w for i, w in enumerate(weights)}
        return named | {f"db {i}": -b for i, b in enumerate(biases)}

    def oracle(used: torch.dtype, cut: Cut = _exactly) -> Results:
        # Gradients of float32 parameters keep float32's digits, whatever the dtype of the factors.
        used = torch.promote_types(used, torch.float32)
        pairs = [(dz[:, :n].to(used), x.to(used)) for dz, x, (_, n) in zip(dzs, xs, layers, strict=True)]
        named = {f"dW {i}": cut(dz).t() @ cut(x) for i, (dz, x) in enumerate(pairs)}
        return named | {f"db {i}": dz.sum(0) for i, (dz, _) in enumerate(pairs) if bias}

    k, n = max(layers, key=lambda layer: layer[0] * layer[1])
    return Product("update", n, k, batch, launch, results, oracle)


@contextmanager
def _replaced(module: str, name: str, value: object) -> Iterator[None]:
    """``fastmlp.kernels.<module>.<name>`` is ``value`` while the block lasts."""
    where = importlib.import_module(f"fastmlp.kernels.{module}")
    before = getattr(where, name)
    setattr(where, name, value)
    try:
        yield
    finally:
        setattr(where, name, before)


def _events(device: str) -> Clock:
    """Median seconds of a launch by GPU events, with the L2 cache overwritten before each launch."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def seconds(launch: Callable[[], object], repeats: int = 30) -> float:
        for _ in range(3):
            launch()
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for start, stop in events:
            flush.zero_()
            start.record()
            launch()
            stop.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(stop) for start, stop in events) / 1e3

    return seconds


def _price(product: Product, tile: Tile, dtype: torch.dtype, clock: Clock, log: Log) -> float:
    """Seconds of a launch with ``tile``; infinite, with a line in the log, if it is wrong or does not fit."""
    from triton.runtime.errors import OutOfResources

    with forced(product.kind, tile):
        try:
            product.launch()
            results = product.results()
        except OutOfResources as error:
            log(f"  {tuple(tile)} left out: {error}")
            return math.inf
        expected, own = (
            {name: value.cpu() for name, value in product.oracle(used).items()} for used in (torch.float64, dtype)
        )
        verdict = worst(results, expected, own, dtype=dtype, reduction=product.depth)
        if not verdict.passed:
            log(f"  {tuple(tile)} left out: {verdict}")
            return math.inf
        return clock(product.launch)


def tune(
    device: str,
    dtypes: Sequence[str],
    batches: Sequence[int],
    log: Log,
    *,
    kinds: Sequence[str] = tuple(KINDS),
    sizes: Sequence[int] = REFERENCE,
    clock: Clock | None = None,
) -> dict[str, Any]:
    """Time every tile for every product of a network's step; returns the table of ``fastmlp.kernels.tuned``.

    ``clock`` gives the seconds of a launch; the default is GPU events.
    """
    import triton

    from fastmlp.kernels import configs
    from fastmlp.kernels.device import current_device
    from fastmlp.kernels.tuned import device_key

    on_gpu = device.startswith("cuda")
    used: AbstractContextManager[object] = torch.cuda.device(device) if on_gpu else nullcontext()
    entries: list[dict[str, Any]] = []
    rule_is_best: list[list[Any]] = []
    with used:
        here = current_device()
        clock = _events(device) if clock is None else clock
        for name, kind, batch in itertools.product(dtypes, kinds, batches):
            dtype = getattr(torch, name)
            for product in products(kind, batch, dtype, device, sizes):
                shape = product.rows, product.cols, product.depth
                wide = all(length % 16 == 0 for length in shape)  # as the launcher finds for its operands
                with (
                    _replaced("configs", "tuned_tile", lambda *_: None),
                    _replaced("configs", "_chosen", configs._chosen.__wrapped__),
                ):
                    rule = configs.gemm_tile(kind, *shape, dtype, here, wide=wide)
                prices = {
                    tile: _price(product, tile, dtype, clock, log)
                    for tile in dict.fromkeys([rule, *configs.all_tiles(kind, dtype, here, wide=wide)])
                }
                tile = min(prices, key=lambda tile: prices[tile])
                times = f"{prices[rule] * 1e6:.1f} to {prices[tile] * 1e6:.1f} us"
                log(f"{kind} {name} [{shape[0]}, {shape[1]}] over {shape[2]}: {times}, {tuple(tile[:5])}")
                entry = {"kind": kind, "dtype": name, "rows": shape[0], "cols": shape[1], "depth": shape[2]}
                if prices[tile] * GAIN >= prices[rule]:
                    rule_is_best.append(_product_of(entry))
                else:
                    timed = {"seconds": prices[tile], "rule": list(rule[:5]), "rule_seconds": prices[rule]}
                    entries.append({**entry, "tile": list(tile[:5]), **timed})
        found = {"device": device_key(here), "triton": triton.__version__}
        return {**found, "entries": entries, "rule_is_best": rule_is_best}


def save_table(table: dict[str, Any]) -> Path:
    """Add a table to the one in the user's cache, and use the result from now on; returns the path.

    The entries of other products stay, as long as Triton has the same version.
    """
    from fastmlp.kernels.configs import use_new_table
    from fastmlp.kernels.tuned import MOST_BYTES, table_path

    def added(text: bytes) -> bytes:
        measured = [*map(_product_of, table["entries"]), *table.get("rule_is_best", [])]
        others = [entry for entry in _entries(text, table["triton"]) if _product_of(entry) not in measured]
        return (json.dumps({**table, "entries": others + table["entries"]}, indent=1) + "\n").encode()

    path = table_path(table["device"])
    update_file(path, MOST_BYTES, added)
    use_new_table()
    return path


def _product_of(entry: dict[str, Any]) -> list[Any]:
    return [entry[name] for name in ("kind", "dtype", "rows", "cols", "depth")]


def _entries(text: bytes, version: str) -> list[dict[str, Any]]:
    """The entries of the table that ``text`` is, if Triton has that version; none where it is anything else."""
    from fastmlp.kernels.tuned import MALFORMED, parsed

    def usable(entry: Any) -> bool:
        try:
            return bool(parsed(entry))
        except MALFORMED:
            return False

    try:
        found = json.loads(text)
        return list(filter(usable, found["entries"])) if found["triton"] == version else []
    except MALFORMED:
        return []
