"""fastmlp/reference/dropout.py against published vectors and against numpy's generator, and the statistics of masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastmlp.reference import dropout as oracle

#: Random123's known answers for philox4x64, 10 rounds: counter, key, output.
KNOWN = [
    (
        "0000000000000000 0000000000000000 0000000000000000 0000000000000000",
        "0000000000000000 0000000000000000",
        "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b",
    ),
    (
        "ffffffffffffffff ffffffffffffffff ffffffffffffffff ffffffffffffffff",
        "ffffffffffffffff ffffffffffffffff",
        "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0",
    ),
    (
        "243f6a8885a308d3 13198a2e03707344 a4093822299f31d0 082efa98ec4e6c89",
        "452821e638d01377 be5466cf34e90c6c",
        "a528f45403e61d95 38c72dbd566e9788 a5a1610e72fd18b5 57bd43b5e52b7fe6",
    ),
]


def words(text: str) -> torch.Tensor:
    return torch.from_numpy(np.array([int(word, 16) for word in text.split()], dtype=np.uint64).view(np.int64))


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN)
def test_philox_gives_the_known_answers(counter, key, output):
    assert torch.equal(oracle.philox(words(counter), words(key)), words(output))


def test_the_numbers_are_those_of_numpys_generator():
    seed, step, layer, stream = (1 << 63) - 12345, (1 << 40) + 7, 3, 2
    generator = np.random.Philox(key=[seed, 0], counter=[0, step, layer, stream])
    expected = generator.random_raw(5 * 3 * 4).view(np.uint16).reshape(5, 48)[:, :41].astype(np.int64)
    assert torch.equal(oracle.numbers(seed, step, layer, 5, 41, stream), torch.from_numpy(expected))


def test_members_are_rows():
    of_all = oracle.keep_mask(7, 1, 0, 3 * 4, 20, 0.3)
    other_width = oracle.keep_mask(7, 1, 0, 3 * 4, 32, 0.3)
    assert torch.equal(of_all, other_width[:, :20])
    assert torch.equal(oracle.keep_mask(7, 1, 0, 4, 20, 0.3), of_all[:4])


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9, 1 - 1e-9])
def test_the_rate_is_p(p):
    rows, columns = 512, 512
    dropped = 1 - oracle.keep_mask(3, 0, 1, rows, columns, p).double().mean().item()
    expected = min(max(p, 1 / 65536), 65535 / 65536)
    assert abs(dropped - expected) < 4.5 * (expected * (1 - expected) / (rows * columns)) ** 0.5
    assert abs(oracle.threshold(p) / 65536 - p) <= 1 / 65536


def test_no_dropout_keeps_everything():
    assert oracle.keep_mask(3, 0, 1, 4, 5, 0.0).all()


def chi_square(*masks: torch.Tensor) -> float:
    """Of the joint counts of two or more masks of rate 1/2, against independence; degrees of freedom 2^n - 1."""
    code = sum(mask.reshape(-1).long() << i for i, mask in enumerate(masks))
    counts = torch.bincount(code, minlength=1 << len(masks)).double()
    expected = counts.sum() / counts.numel()
    return float(((counts - expected) ** 2 / expected).sum())


#: 99.9 % of the chi-square distributions with 3 and 7 degrees of freedom lie below.
CHI3, CHI7 = 16.27, 24.32


def test_masks_of_other_steps_layers_seeds_and_streams_are_independent():
    first = oracle.keep_mask(11, 5, 0, 64, 512, 0.5)
    for other in [(11, 6, 0), (11, 5, 1), (12, 5, 0), (11, 5, 0, 1), (11, 0, 5)]:
        seed, step, layer, *stream = other
        assert chi_square(first, oracle.keep_mask(seed, step, layer, 64, 512, 0.5, *stream)) < CHI3, other


def test_elements_of_a_mask_are_independent():
    mask = oracle.keep_mask(11, 5, 0, 256, 512, 0.5)
    for rows, columns in [(0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (1, 0), (1, 1), (2, 0), (64, 0)]:
        shifted = mask[rows:, columns:], mask[: 256 - rows, : 512 - columns]
        assert chi_square(*shifted) < CHI3, (rows, columns)
    assert chi_square(mask[:, ::3][:, :170], mask[:, 1::3][:, :170], mask[:, 2::3][:, :170]) < CHI7


def test_numbers_are_uniform():
    drawn = oracle.numbers(1, 2, 3, 256, 512)
    counts = torch.bincount(drawn.reshape(-1) >> 8, minlength=256).double()
    expected = counts.sum() / 256
    assert float(((counts - expected) ** 2 / expected).sum()) < 330.5  # 99.9 % with 255 degrees of freedom
    low = torch.bincount(drawn.reshape(-1) & 255, minlength=256).double()
    assert float(((low - expected) ** 2 / expected).sum()) < 330.5


def test_dropout_scales_what_is_kept():
    a = torch.tensor([[1.0, 2.0, -3.0]], dtype=torch.float64)
    out = oracle.dropout(a, torch.tensor([[True, False, True]]), 0.25)
    assert out.tolist() == [[1 / 0.75, 0.0, -3 / 0.75]]


def test_a_dropped_nan_is_nan_as_torchs_is():
    a = torch.tensor([[float("nan"), float("inf"), 1.0]])
    out = oracle.dropout(a, torch.tensor([[False, False, False]]), 0.25)
    assert out[0].isnan().tolist() == [True, True, False]
