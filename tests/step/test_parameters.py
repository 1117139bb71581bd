"""fastmlp/step/parameters.py: which tensors are the same, and how masters, parameters and copies follow each other."""

from __future__ import annotations

import pytest
import torch

from fastmlp.step.parameters import Copies

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16


@pytest.mark.parametrize(
    ("param", "products", "master", "one"),
    [
        (F32, F32, F32, True),
        (F64, F64, F64, True),
        (F32, BF16, F32, False),
        (F16, F16, F32, False),
        (BF16, F32, F32, 0),
    ],
    ids=str,
)
def test_dtypes(param, products, master, one):
    copies = Copies(torch.nn.Parameter(torch.randn(3, 4).to(param)), products)
    assert (copies.data.dtype, copies.used.dtype, copies.master.dtype) == (param, products, master)
    assert (copies.is_one, copies.trained) == (bool(one), True)


def test_a_change_of_the_parameter_reaches_the_copies_and_an_update_the_parameter():
    param = torch.nn.Parameter(torch.zeros(3, dtype=BF16))
    copies = Copies(param, F16)
    with torch.no_grad():
        param.fill_(0.5)
    copies.follow()
    assert copies.master.tolist() == copies.used.tolist() == [0.5] * 3
    copies.master.fill_(1 + 2**-9)
    copies.publish()
    assert param.tolist() == [1.0] * 3
    copies.follow()  # the rounding that publish() made is no change
    assert copies.master.tolist() == copies.used.tolist() == [1 + 2**-9] * 3
    param.data[0] = 2.0  # raises no version
    copies.follow()
    assert copies.master.tolist() == copies.used.tolist() == [2.0, 1 + 2**-9, 1 + 2**-9]
