"""784-512-512-10 at batch 64 through the public API on every target: the kernels, their grids and warps.

The simulated GPU records and computes nothing; all of Triton but the driver is real. A change to a tile table or to
the order of the passes fails here. If the change is meant, the printed row replaces the old one.
"""

from __future__ import annotations

import pytest
import torch

import fastmlp
from tests.compile.targets import TARGETS, Target
from tests.ptxsim import Launch

pytestmark = pytest.mark.launch

SIZES, BATCH = (784, 512, 512, 10), 64

# One node of the tape for the network and one for the loss. Each dgrad multiplies by the derivative of the layer
# below; the first layer's is never launched. One launch makes the weight gradients of all layers.
SEQUENCE = (
    "_linear_fwd_kernel",  # layer 1
    "_linear_fwd_kernel",  # layer 2
    "_linear_fwd_kernel",  # layer 3
    "_cross_entropy_kernel",
    "_cross_entropy_bwd_kernel",
    "_linear_dgrad_kernel",  # layer 3
    "_linear_dgrad_kernel",  # layer 2
    "_wgrad_update_kernel",
)

# Programs / warps of each launch, in that order; the 16-bit dtypes where they differ.
TABLE = """
          fwd1   fwd2   fwd3   loss  dloss dgrad3 dgrad2  wgrad
sm_75     32/4   32/4    4/2    1/4    1/4   32/4   32/4  353/4
sm_80    128/4  128/4    4/4    1/4    1/4   64/2  128/4  185/4
sm_86     64/4   64/4    4/4    1/4    1/4   64/2   64/4  353/4
sm_89    128/4  128/4    4/4    1/4    1/4   64/2  128/4  353/4
sm_90    128/4  128/4    4/4    1/4    1/4   64/2  128/4  353/4
sm_100   128/4  128/4    4/4    1/4    1/4   64/2  128/4  353/4
sm_120   128/4  128/4    4/4    1/4    1/4   64/2  128/4 1337/2
gfx90a   128/4  128/4    4/4    1/4    1/4   64/2  128/4  353/2
gfx942   128/4  128/4    4/4    1/4    1/4   64/2  128/4  681/1
gfx1100   32/4   32/4    4/2    1/4    1/4   32/4   32/4  353/4
"""
TABLE_16_BIT = """
          fwd1   fwd2   fwd3   loss  dloss dgrad3 dgrad2  wgrad
sm_80    128/4  128/4    4/4    1/4    1/4   64/2  128/4  185/8
sm_100   128/4  128/4    4/4    1/4    1/4   64/2  128/4  681/4
sm_120   128/4  128/4    4/4    1/4    1/4   64/2  128/4  681/4
gfx90a   128/4  128/4    4/4    1/4    1/4   64/2  128/4  185/4
gfx1100   32/4   32/4    4/2    1/4    1/4   32/4   32/4  185/8
"""


def _row(target: Target, launches: list[Launch]) -> str:
    return f"{target.name:<8}" + " ".join(f"{launch.grid[0]}/{launch.num_warps}".rjust(6) for launch in launches)


def _table(text: str) -> dict[str, str]:
    _, *rows = text.strip().splitlines()
    return {row.split()[0]: row for row in rows}


def run(target: Target, dtype: torch.dtype, *, pixels: bool = False) -> list[Launch]:
    """Forward, loss and backward."""
    model, loss = fastmlp.MLP(SIZES, dtype=dtype), fastmlp.CrossEntropyLoss()
    x = torch.zeros((BATCH, SIZES[0]), dtype=torch.uint8 if pixels else dtype)
    with target.simulated() as gpu, fastmlp.use_backend("triton"):
        loss(model(x), torch.zeros(BATCH, dtype=torch.int64)).backward()
    return gpu.launches


@pytest.mark.parametrize("size", [4, 2], ids=["float32", "16-bit"])
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_training_pass(target: Target, size: int) -> None:
    dtype = [dtype for dtype in target.dtypes if dtype.itemsize == size][-1]
    launches = run(target, dtype)
    assert tuple(launch.name for launch in launches) == SEQUENCE
    assert all(launch.grid[1:] == (1, 1) for launch in launches), "64 samples are too few to split"
    assert all(launch.arch == target.arch for launch in launches)
    expected = {**_table(TABLE), **(_table(TABLE_16_BIT) if size == 2 else {})}
    assert _row(target, launches) == expected.get(target.name)


def test_pixels_are_scaled_in_the_first_kernel() -> None:
    """uint8 images cost no launch: the first layer's forward kernel and the weight gradients' kernel read them."""
    target = TARGETS["sm_90"]
    launches = run(target, torch.bfloat16, pixels=True)
    assert tuple(launch.name for launch in launches) == SEQUENCE
    assert [i for i, launch in enumerate(launches) if launch.constexprs.get("PIXELS")] == [0]
    assert launches[-1].arguments["operands"][0].x_ptr.dtype == torch.uint8


def test_frozen_layers_cost_nothing() -> None:
    """With a frozen first layer, the dgrad before it is not launched, and the weight gradients have no tiles of it."""
    model = fastmlp.MLP(SIZES)
    model.layers[0].requires_grad_(False)
    with TARGETS["sm_80"].simulated() as gpu, fastmlp.use_backend("triton"):
        fastmlp.CrossEntropyLoss()(
            model(torch.zeros(BATCH, SIZES[0])), torch.zeros(BATCH, dtype=torch.int64)
        ).backward()
    assert tuple(launch.name for launch in gpu.launches) == (*SEQUENCE[:6], SEQUENCE[-1])
    assert len(gpu.launches[-1].arguments["operands"]) == 2


def test_inference_launches_one_kernel_a_layer() -> None:
    with TARGETS["sm_80"].simulated() as gpu, fastmlp.use_backend("triton"), torch.no_grad():
        fastmlp.MLP(SIZES)(torch.zeros(BATCH, SIZES[0]))
    assert tuple(launch.name for launch in gpu.launches) == SEQUENCE[:3]


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "gfx942"])
def test_a_long_batch_is_split(name: str) -> None:
    """At 8,192 samples each layer has a weight gradient of its own, which is split over the batch, and reduced."""
    model, loss = fastmlp.MLP(SIZES), fastmlp.CrossEntropyLoss()
    with TARGETS[name].simulated() as gpu, fastmlp.use_backend("triton"):
        loss(model(torch.zeros(8192, SIZES[0])), torch.zeros(8192, dtype=torch.int64)).backward()
    names = [launch.name for launch in gpu.launches]
    wgrads = [launch for launch in gpu.launches if launch.name == "_linear_wgrad_kernel"]
    assert [launch.grid[1] > 1 for launch in wgrads] == [True] * 3
    assert names.count("_wgrad_reduce_kernel") == 3
    assert names.count("_reduce_kernel") == 1, "the mean of the loss takes one program more"
