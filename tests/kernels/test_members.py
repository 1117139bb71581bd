"""A member axis in front of every kernel's tensors: the members of one launch against a launch per member.

Both compute the same bits wherever they take the same tile, which is always so in the interpreter, and for the shapes
here on the simulated GPUs. Everything between the members is poisoned.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from fastmlp import kernels
from fastmlp.kernels import row_weights
from fastmlp.kernels.before_update import LossScaleState, before_update
from fastmlp.kernels.column_sums import ColumnSums
from fastmlp.kernels.configs import all_tiles, gemm_tile
from fastmlp.kernels.device import INTERPRETER, Device
from fastmlp.kernels.layout import SEGMENT, Layer, Layout
from fastmlp.kernels.members import MOST, count_of
from fastmlp.kernels.reduce_update import reduce_update
from fastmlp.kernels.wgrad_update import wgrad_update, workspace
from tests.conftest import INTERPRETING, UNSIMULATED
from tests.support.harness import FLOATS

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

E = 3


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def apart(values: Tensor, lane: torch.device, *, gap: int = 7) -> Tensor:
    """Values [E, ...] whose members lie in larger storage with NaN, or the largest integer, between them."""
    fill = math.nan if values.is_floating_point() else torch.iinfo(values.dtype).max
    each = values[0].numel() + gap
    storage = torch.full((values.shape[0] * each,), fill, dtype=values.dtype)
    strides = (each, *values.stride()[1:])
    view = storage.as_strided(values.shape, strides)
    view.copy_(values)
    return storage.to(lane).as_strided(values.shape, strides)


def nans(*shape: int, dtype: torch.dtype = torch.float32, lane: torch.device) -> Tensor:
    return torch.full(shape, math.nan, dtype=dtype, device=lane)


def mask(lane: torch.device, *flags: bool) -> Tensor:
    return torch.tensor(flags, device=lane)


def same(member: Tensor, single: Tensor) -> bool:
    """Equal bits; NaN equals NaN."""
    return member.dtype == single.dtype and torch.equal(member.isnan(), single.isnan()) and torch.equal(
        member.nan_to_num(), single.nan_to_num()
    )  # fmt: skip


def assert_members(of_members: list[Tensor | None], singles: list[list[Tensor | None]]) -> None:
    for e, single in enumerate(singles):
        for i, (got, want) in enumerate(zip(of_members, single, strict=True)):
            assert (got is None) == (want is None)
            if got is not None:
                assert same(got[e], want), f"output {i} of member {e}: {(got[e] - want).abs().max()}"


@pytest.mark.parametrize(
    ("dtype", "shared"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)], ids=str
)
def test_linear_fwd(lane, dtype, shared):
    """Each member reads its own W, b and X, or all the same X."""
    x, w, b = draw(E, 17, 20, dtype=dtype), draw(E, 17, 20, seed=1, dtype=dtype), draw(E, 17, seed=2, dtype=dtype)
    if shared:
        x = x[1]
    given = x.to(lane) if shared else apart(x, lane)
    outputs = kernels.linear_fwd(given, apart(w, lane), apart(b, lane), "silu", save_z=True)
    singles = [
        list(kernels.linear_fwd((x if shared else x[e]).to(lane), w[e].to(lane), b[e].to(lane), "silu", save_z=True))
        for e in range(E)
    ]
    assert_members(list(outputs), singles)


@UNSIMULATED
@pytest.mark.parametrize("own", [(True, False), (False, True)], ids=str)
def test_gathered_pixels(unsimulated, own):
    """Own images or the same ones, own rows or the same ones."""
    own_images, own_rows = own
    g = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (E, 50, 20), generator=g, dtype=torch.uint8)
    rows = torch.randint(0, 50, (E, 21), generator=g)
    w = draw(E, 17, 20)
    given = apart(images, unsimulated) if own_images else images[0].to(unsimulated)
    picked = apart(rows, unsimulated) if own_rows else rows[0].to(unsimulated)
    a, _ = kernels.linear_fwd(given, w.to(unsimulated), None, "sigmoid", rows=picked)
    singles = []
    for e in range(E):
        x, taken = images[e if own_images else 0].to(unsimulated), rows[e if own_rows else 0].to(unsimulated)
        singles.append([kernels.linear_fwd(x, w[e].to(unsimulated), None, "sigmoid", rows=taken)[0]])
    assert_members([a], singles)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_linear_dgrad(lane, dtype):
    """With f' of the layer below and the sums of the rows."""
    dz, w, a = draw(E, 17, 17, dtype=dtype), draw(E, 17, 40, seed=1, dtype=dtype), draw(E, 17, 40, seed=2, dtype=dtype)
    sums = ColumnSums(17, 40, lane, members=E)
    dx = kernels.linear_dgrad(apart(dz, lane), apart(w, lane), a.to(lane), "tanh", sums=sums)
    singles = []
    for e in range(E):
        of = ColumnSums(17, 40, lane)
        single = kernels.linear_dgrad(dz[e].to(lane), w[e].to(lane), a[e].to(lane), "tanh", sums=of)
        singles.append([single, of.values[: of.blocks, :40]])
    assert_members([dx, sums.values[:, : sums.blocks, :40]], singles)


@UNSIMULATED
@pytest.mark.parametrize(("m", "shared"), [(17, True), (150, False)], ids=["one x", "own x, split"])
def test_linear_wgrad(unsimulated, m, shared):
    """A split batch has partial sums of every member. Members share the GPU, so that the splits may differ."""
    dz, x = draw(E, m, 17), draw(E, m, 20, seed=1)
    if shared:
        x = x[1]
    dw, db = kernels.linear_wgrad(apart(dz, unsimulated), x.to(unsimulated) if shared else apart(x, unsimulated))
    for e in range(E):
        want, want_b = kernels.linear_wgrad(dz[e].to(unsimulated), (x if shared else x[e]).to(unsimulated))
        if m == 17:
            assert same(dw[e], want)
            assert same(db[e], want_b)
        torch.testing.assert_close(dw[e], want, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(db[e], want_b, atol=1e-4, rtol=1e-4)


@UNSIMULATED
def test_activation_bwd(unsimulated):
    """Also for a dA that is expanded."""
    da, a = draw(E, 17, 20), draw(E, 17, 20, seed=1)
    for given in (da.to(unsimulated), apart(da, unsimulated), da[:, :1].to(unsimulated).expand(E, 17, 20)):
        dz = kernels.activation_bwd(given, a.to(unsimulated), "tanh")
        assert_members([dz], [[kernels.activation_bwd(given[e], a[e].to(unsimulated), "tanh")] for e in range(E)])


@pytest.mark.parametrize(("own", "rows"), [(True, True), (False, False)], ids=["own targets", "one target"])
def test_losses(lane, own, rows):
    """Every loss of a step: a factor per member, and targets of each member or of all."""
    count = 50 if rows else 17
    a, factor = draw(E, 17, 10).sigmoid(), torch.tensor([1.0, 2.0, 0.5])
    taken = torch.randint(0, count, (E, 17), generator=torch.Generator().manual_seed(1)) if rows else None
    labels = torch.randint(0, 10, (E, count), generator=torch.Generator().manual_seed(2))
    values = draw(E, count, 10, seed=3).sigmoid()
    for y in (labels, values):
        given = y.to(lane) if own else y[0].to(lane)
        picked = None if taken is None else taken.to(lane)
        options = {"scale": 0.25, "rows": picked}
        launches = [("softmax_squared_error", lambda z, t, **o: kernels.softmax_squared_error(z, t, **o))]
        if y is values:
            launches += [(n, lambda z, t, n=n, **o: kernels.elementwise_loss(z, t, n, **o)) for n in ("mse", "nllm")]
        for name, launch in launches:
            got = launch(a.to(lane), given, factor=factor.to(lane), **options)
            singles = []
            for e in range(E):
                of = {"scale": 0.25, "rows": None if picked is None else picked[e], "factor": factor[e].to(lane)}
                singles.append(
                    [
                        t.view(got[i][e].shape)
                        for i, t in enumerate(launch(a[e].to(lane), given[e] if own else given, **of))
                    ]
                )
            assert_members(list(got), singles), name
    given = labels.to(lane) if own else labels[0].to(lane)
    got = kernels.cross_entropy_of_members(a.to(lane), given, factor=factor.to(lane), **options)
    singles = []
    for e in range(E):
        of = {"scale": 0.25, "rows": None if picked is None else picked[e], "factor": factor[e].to(lane)}
        singles.append(list(kernels.cross_entropy(a[e].to(lane), given[e] if own else given, **of)))
    assert_members(list(got), singles)


#: Options of cross-entropy, classes, and how many rows a program adds the weights of; 0: another launch adds them.
LOSS_OPTIONS = {
    "labels": ({"ignore_index": 3}, 10, 16),
    "smoothing, class weight": ({"ignore_index": 3, "smoothing": 0.2, "weight": True}, 10, 0),
    "probabilities": ({"smoothing": 0.1, "weight": True}, 10, 16),
    "many classes": ({"ignore_index": 3, "smoothing": 0.2, "weight": True}, 40, 0),
    "many probabilities": ({}, 40, 16),
}


@pytest.mark.parametrize("own", [True, False], ids=["own", "one"])
@pytest.mark.parametrize("case", LOSS_OPTIONS)
@pytest.mark.covering
def test_options_of_cross_entropy(lane, monkeypatch, case, own):
    """Targets, sample weights and row numbers of each member or of all; the weight of each member's batch."""
    options, classes, block = LOSS_OPTIONS[case]
    monkeypatch.setattr(row_weights, "SUMMED_HERE", 2048 if block else 8)
    for constant in ("SHORT", "LONG", "BLOCK"):
        monkeypatch.setattr(row_weights, constant, 16)
    if classes > 10:
        monkeypatch.setattr("fastmlp.kernels.softmax_tiles.WHOLE_ROW", 8)
    z, count = 4 * draw(E, 17, classes), 50
    g = torch.Generator().manual_seed(1)
    rows, y = (torch.randint(0, n, (E, m), generator=g) for n, m in ((count, 17), (classes, count)))
    if "probabilities" in case:
        y = draw(E, count, classes, seed=2).softmax(-1)
    sample, factor = draw(E, count, seed=3).abs(), torch.tensor([1.0, 2.0, 0.5]).to(lane)
    shared = {"smoothing": options.get("smoothing", 0.0), "ignore_index": options.get("ignore_index", -100)}
    if "weight" in options:
        shared["weight"] = (draw(classes, seed=4).abs() + 0.1).to(lane)
    # A gap of 16 elements leaves the rows as aligned as those of one member: a lane adds as many at a time.
    of_members = [apart(t, lane, gap=16) if own else t[1].to(lane) for t in (y, sample, rows)]
    active, divisor = mask(lane, True, False, True), nans(E, lane=lane)
    loss, dz = nans(E, 17, lane=lane), nans(E, 17, classes, lane=lane)
    kernels.cross_entropy_of_members(
        apart(z, lane, gap=16), of_members[0], sample_weight=of_members[1], rows=of_members[2], divisor=divisor,
        factor=factor, loss=loss, dz=dz, active=active, **shared,
    )  # fmt: skip
    assert loss[1].isnan().all()
    assert dz[1].isnan().all()
    for e in (0, 2):
        target, weights, picked = (t[e if own else 1].to(lane) for t in (y, sample, rows))
        total = nans(lane=lane)
        single = kernels.cross_entropy(
            z[e].to(lane), target, sample_weight=weights, rows=picked, divisor=total, factor=factor[e], **shared
        )
        for got, want in ((loss[e], single[0]), (dz[e], single[1]), (divisor[e], total)):
            if INTERPRETING:
                assert same(got, want), f"member {e}: {(got - want).abs().max()}"
            # The threads of a compiled program may add in another order, by what is known of the pointers.
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shared", [False, True], ids=["own h", "one h"])
def test_head(lane, shared):
    """All outputs; labels of each member and rows of each member, a factor per member."""
    h, w, b = draw(E, 50, 40), draw(E, 10, 40, seed=1), draw(E, 10, seed=2)
    g = torch.Generator().manual_seed(3)
    labels, rows = torch.randint(0, 10, (E, 50), generator=g), torch.randint(0, 50, (E, 17), generator=g)
    factor = torch.tensor([1.0, 2.0, 0.5])
    if shared:
        h, labels = h[0], labels[0]

    def run(h, w, b, labels, rows, factor, leading, members):
        extra = {"logits": nans(*leading, 17, 10, lane=lane), "correct": torch.full((*leading, 17), 9, device=lane)}
        sums, prev = (ColumnSums(17, n, lane, members=members) for n in (10, 40))
        out = kernels.head(
            h, w, b, labels, activation="tanh", saved=saved(h, leading), scale=0.25, factor=factor, rows=rows,
            gather_h=True, sums=sums, prev_sums=prev, **extra
        )  # fmt: skip
        return [*out, *extra.values(), sums.values[..., : sums.blocks, :10], prev.values[..., : prev.blocks, :40]]

    def saved(h, leading):
        return h[..., :17, :].expand(*leading, 17, 40)

    given = h.to(lane) if shared else apart(h, lane)
    got = run(given, apart(w, lane), apart(b, lane), labels.to(lane), apart(rows, lane), factor.to(lane), (E,), E)
    singles = []
    for e in range(E):
        own = [t.to(lane) for t in ((h if shared else h[e]), w[e], b[e], labels if shared else labels[e], rows[e])]
        singles.append(run(*own, factor[e].to(lane), (), None))
    assert_members(got, singles)


SIZES = (20, 17, 5)


def problem(lane: torch.device, m: int, dtype: torch.dtype = torch.float32, *, bias: bool = True):
    """(layers' tensors of all members, dzs, xs)."""
    weights = [draw(E, n, k, seed=n).to(lane) / k**0.5 for k, n in itertools.pairwise(SIZES)]
    biases = [draw(E, n, seed=k).to(lane) if bias else None for k, n in itertools.pairwise(SIZES)]
    dzs = [draw(E, m, n, seed=n + 1, dtype=dtype).to(lane) for n in SIZES[1:]]
    xs = [draw(E, m, k, seed=k + 2, dtype=dtype).to(lane) for k in SIZES[:-1]]
    return weights, biases, dzs, xs


def of_member(e: int, tensors):
    return [None if t is None else t[e].clone() for t in tensors]


@pytest.mark.parametrize(("optimizer", "m"), [("adamw", 17), ("momentum", 150)], ids=["direct", "split"])
def test_wgrad_update(lane, optimizer, m):
    """Parameters, states and loss of each member, with settings of its own; the second member is not active."""
    active = mask(lane, True, False, True)
    updates = torch.tensor([4, 5, 6], dtype=torch.int32, device=lane)
    hyper = draw(E, 8, seed=9).abs().to(lane) * 0.1
    weights, biases, dzs, xs = problem(lane, m)
    loss_rows = draw(E, m, seed=4).to(lane)
    states_of, layout = [], Layout([Layer(*t) for t in zip(weights, biases, strict=True)])
    singles = []
    for e in range(E):
        w, b = of_member(e, weights), of_member(e, biases)
        single = Layout([Layer(*t) for t in zip(w, b, strict=True)])
        states, loss = torch.ones(2, single.total, device=lane), nans(lane=lane)
        partial = workspace(layout, m, torch.float32, lane, direct=True)
        if active[e]:
            wgrad_update(
                single, of_member(e, dzs), of_member(e, xs), optimizer, hyper[e], states=states,
                loss_rows=loss_rows[e], loss=loss,
                partial=None if partial is None else partial[:, e].contiguous(),
            )  # fmt: skip
        singles.append((*w, *b, loss))
        states_of.append(states)
    states, loss = torch.ones(2, E, layout.total, device=lane), torch.zeros(E, device=lane)
    wgrad_update(
        layout, dzs, xs, optimizer, hyper, states=list(states), loss_rows=loss_rows, loss=loss, active=active,
        updates=updates,
    )  # fmt: skip
    got = [*weights, *biases, loss]
    if m == 17:
        assert_members(got, [list(single) for single in singles])
        assert all(same(states[:, e], states_of[e]) for e in range(E))
    for e in range(E):
        for t, want in zip(got, singles[e], strict=True):
            torch.testing.assert_close(t[e], want, atol=1e-4, rtol=1e-4, equal_nan=True)
        torch.testing.assert_close(states[:, e], states_of[e], atol=1e-3, rtol=1e-3)
    assert updates.tolist() == [5, 5, 7]


def test_gathered_pixels_of_an_update(lane):
    """The first layer reads the same images for all members, by each member's own rows; sums of its own producers."""
    g = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (50, SIZES[0]), generator=g, dtype=torch.uint8).to(lane)
    rows = torch.randint(0, 50, (E, 17), generator=g).to(lane)
    weights, biases, dzs, xs = problem(lane, 17)
    made = []
    for dz in dzs:
        of = ColumnSums(17, dz.shape[-1], lane, members=E)
        of.values.fill_(math.nan)
        of.written(2)[:, :2, : dz.shape[-1]] = torch.stack([dz[:, :16].sum(1), dz[:, 16:].sum(1)], 1)
        made.append(of)
    hyper = torch.full((8,), 0.1, device=lane)
    singles = []
    for e in range(E):
        w, b = of_member(e, weights), of_member(e, biases)
        sums = []
        for of, dz in zip(made, dzs, strict=True):
            sums.append(ColumnSums(17, dz.shape[-1], lane))
            sums[-1].written(2).copy_(of.values[e])
        layout = Layout([Layer(*t) for t in zip(w, b, strict=True)])
        wgrad_update(layout, of_member(e, dzs), [images, xs[1][e]], "sgd", hyper, rows=rows[e], sums=sums)
        singles.append([*w, *b])
    layout = Layout([Layer(*t) for t in zip(weights, biases, strict=True)])
    wgrad_update(layout, dzs, [images, xs[1]], "sgd", hyper, rows=rows, sums=made)
    assert_members([*weights, *biases], singles)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_late_update(lane, dtype):
    """Gradients, their squares and overflows, the loss scale and the count, each member's; one member is not active."""
    active = mask(lane, True, True, False)
    weights, biases, dzs, xs = problem(lane, 17, dtype)
    if dtype == torch.float16:
        dzs[0][1, 3, 5] = math.inf
    hyper = draw(E, 8, seed=9).abs().to(lane) * 0.1
    decays = torch.tensor([0.9, 0.99], dtype=torch.float64, device=lane)

    def run(weights, biases, dzs, xs, hyper, leading, **active):
        layout = Layout([Layer(*t) for t in zip(weights, biases, strict=True)])
        grads, states = torch.ones(*leading, layout.total, device=lane), torch.zeros(2, *leading, layout.total)
        squares = torch.zeros(*leading, 16, device=lane)
        good, overflow, skip, count = torch.zeros(4, *leading, dtype=torch.int32, device=lane)
        good += 7
        scale, factor, row = (torch.full((*leading, *more), 8.0, device=lane) for more in ((), (), (8,)))
        states = [state.to(lane) for state in states]
        scales = LossScaleState(scale, 1 / scale, good, overflow, skip, 2000, 2.0, 0.5, 1.0)
        half = torch.full(leading, 0.5, device=lane)
        wgrad_update(
            layout, dzs, xs, "none", hyper, grads=grads, unscale=half, accumulate=True, squares=squares,
            overflow=overflow, **active,
        )  # fmt: skip
        before_update(
            "adamw", hyper, factor, squares=squares, loss_scale=scales if dtype == torch.float16 else None,
            count=count, decays=decays, counted_row=row, **active,
        )  # fmt: skip
        reduce_update(
            layout, grads[None], 1, "adamw", hyper, states=states, unscale=factor, skip=skip, **active
        )  # fmt: skip
        return [*weights, *biases, grads, squares, *states, good, overflow, skip, count, scale, factor, row]

    singles = []
    for e in range(E):
        w, b = of_member(e, weights), of_member(e, biases)
        singles.append(run(w, b, of_member(e, dzs), of_member(e, xs), hyper[e], ()))
    before = [t[2].clone() for t in (*weights, *biases)]
    got = run(weights, biases, dzs, xs, hyper, (E,), active=active)
    assert_members(got, singles[:2])
    assert all(torch.equal(t[2], was) for t, was in zip(got, before, strict=False))
    count, skip = got[-4], got[-5]
    assert count.tolist() == ([1, 0, 0] if dtype == torch.float16 else [0, 0, 0])
    assert skip.tolist() == ([0, 1, 0] if dtype == torch.float16 else [0, 0, 0])


@UNSIMULATED
def test_network(unsimulated):
    """Forward and backward passes of whole networks, X the same for all members; dX is each member's."""
    x = draw(17, SIZES[0]).to(unsimulated)
    weights, biases, *_ = problem(unsimulated, 1)
    activations, saves_z = ("silu", "tanh"), (True, False)
    params = [t for pair in zip(weights, biases, strict=True) for t in pair]
    outputs = kernels.network_fwd(x, params, activations, saves_z)
    assert outputs is not None
    a1, z1, a2 = outputs
    dz = draw(E, 17, SIZES[-1], seed=7).to(unsimulated)
    of_network = activations, ("z", "a"), (True,) * 5
    gradients = kernels.network_bwd(dz, [x, a1, a2, *weights, z1, None], *of_network)
    assert gradients is not None
    singles = []
    for e in range(E):
        single = kernels.network_fwd(x, of_member(e, params), activations, saves_z)
        assert single is not None
        own_a1, own_z1, own_a2 = single
        tensors = [x, own_a1, own_a2, *of_member(e, weights), own_z1, None]
        back = kernels.network_bwd(dz[e].clone(), tensors, *of_network)
        assert back is not None
        singles.append([*single, *back[:5]])
    assert_members([*outputs, *gradients[:5]], singles)


def test_inactive_members_are_not_written(lane):
    """Every launcher of a step leaves the outputs of such members as they were."""
    active = mask(lane, False, True, False)
    x, w = draw(E, 17, 20).to(lane), draw(E, 10, 20, seed=1).to(lane)
    labels, values = torch.zeros(17, dtype=torch.int64, device=lane), draw(E, 17, 10, seed=2).to(lane)
    outputs = [nans(E, 17, n, lane=lane) for n in (10, 20, 10, 20, 10, 10, 10, 10)]
    a, dx, dz, dz_prev, ce, sse, mse, act = outputs
    losses = [nans(E, 17, lane=lane) for _ in range(3)] + [nans(E, 17, 10, lane=lane)]
    kernels.linear_fwd(x, w, None, "tanh", a=a, active=active)
    kernels.linear_dgrad(values, w, dx=dx, active=active)
    kernels.head(x, w, None, labels, loss=losses[0], dz=dz, dz_prev=dz_prev, active=active)
    kernels.cross_entropy_of_members(values, labels, loss=losses[1], dz=ce, active=active)
    kernels.softmax_squared_error(values, labels, loss=losses[2], dz=sse, active=active)
    kernels.elementwise_loss(values, values, "mse", loss=losses[3], da=mse, active=active)
    kernels.activation_bwd(values, values, "tanh", dz=act, active=active)
    for t in (*outputs, *losses):
        assert t[0].isnan().all()
        assert t[2].isnan().all()
        assert not t[1].isnan().any()


def test_more_members_than_a_grid_has():
    with pytest.raises(ValueError, match=r"at most 65,535 members.*got 65,536"):
        count_of(torch.empty(MOST + 1, 1, 1))


@pytest.mark.parametrize("kind", ["fwd", "dgrad", "update"])
def test_tiles_count_all_members(kind):
    """One member has the tile of a single model; many small ones have tiles that fit their outputs."""
    h100 = Device("cuda", 90, 132, 227 * 1024)
    one, single = (gemm_tile(kind, 64, 64, 64, torch.float32, h100, wide=True, **o) for o in ({"members": 1}, {}))
    assert one == single
    many = gemm_tile(kind, 64, 64, 64, torch.float32, h100, wide=True, members=1000)
    few = gemm_tile(kind, 64, 64, 64, torch.float32, h100, wide=True, members=10)
    assert many.rows * many.cols >= few.rows * few.cols
    assert many.rows <= 64
    assert many.cols <= 64
    for dtype, wide in itertools.product(FLOATS, (True, False)):
        for members, rows, cols, depth in itertools.product((2, 1000), (1, 100), (1, 100), (1, 100)):
            tile = gemm_tile(kind, rows, cols, depth, dtype, h100, wide=wide, members=members)
            assert tile in list(all_tiles(kind, dtype, h100, wide=wide))


def test_interpreted_tiles_are_those_of_one_member():
    """So that the interpreter compares members with single models bit by bit."""
    for kind in ("fwd", "dgrad", "wgrad"):
        tile = gemm_tile(kind, 17, 17, 20, torch.float32, INTERPRETER, wide=False, members=E)
        assert tile == gemm_tile(kind, 17, 17, 20, torch.float32, INTERPRETER, wide=False)
    assert Layout([Layer(torch.empty(E, 5, 7), None)]).total == SEGMENT
