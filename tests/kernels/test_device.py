"""kernels/device.py: how float32 is multiplied under each of torch's settings."""

from __future__ import annotations

import pytest
import torch

from fastmlp.kernels.configs import Tile, gemm_tile
from fastmlp.kernels.device import Device, input_precision, tf32_allowed
from tests.support.precision import SETTINGS


@pytest.mark.usefixtures("default_precision")
@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_of_float32(name):
    steps, allowed = SETTINGS[name]
    for set_to, value in steps:
        set_to(value)
    assert tf32_allowed() == allowed == (torch.backends.cuda.matmul.fp32_precision == "tf32")
    for arch, exact in ((75, "ieee"), (80, "tf32x3"), (90, "tf32x3"), (120, "tf32x3")):
        expected = "tf32" if allowed and arch >= 80 else exact
        assert input_precision(Device("cuda", arch, 80, 1 << 16), torch.float32) == expected
    assert input_precision(Device("hip", "gfx942", 304, 1 << 16), torch.float32) == "ieee"
    assert input_precision(Device("cuda", 80, 108, 1 << 16), torch.bfloat16) == "ieee"


@pytest.mark.usefixtures("default_precision")
def test_float32_gradients_outside_of_the_matrix_units():
    """Where the split into three tf32 products would take longer: not the forward product, not pixels, not tf32."""

    def tile(kind: str, arch: int, **options: bool) -> Tile:
        return gemm_tile(kind, 4096, 512, 512, torch.float32, Device("cuda", arch, 128, 99 << 10), wide=True, **options)

    for kind in ("dgrad", "wgrad", "update"):
        assert [tile(kind, arch).fma for arch in (80, 86, 89, 90, 100, 120)] == [False, True, True, False, False, True]
    assert not tile("fwd", 89).fma
    assert not tile("update", 89, pixels=True).fma
    assert not tile("update", 89, tf32=True).fma
    assert input_precision(Device("cuda", 89, 128, 99 << 10), torch.float32, fma=True) == "ieee"
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert not tile("update", 89).fma
    assert input_precision(Device("cuda", 89, 128, 99 << 10), torch.float32, fma=True) == "tf32"
