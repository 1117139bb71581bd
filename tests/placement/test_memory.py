"""The memory that a TrainStep holds on a GPU does not grow with the number of batch sizes, epochs or data sets."""

from __future__ import annotations

import random

import pytest
import torch

import fastmlp
from fastmlp import TrainStep

pytestmark = pytest.mark.placement

SIZES = (64, 48, 10)


def new_step(products=None):
    model = fastmlp.MLP(SIZES, "relu", device="cuda:0")
    return TrainStep(model, dtype=products, lr=0.1, momentum=0.9)


def rows_of(n, *, pixels=False):
    x = torch.empty((n, SIZES[0]), device="cuda:0", dtype=torch.uint8 if pixels else torch.float32)
    return x, torch.empty(n, dtype=torch.int64, device="cuda:0")


def one_size(machine, rows):
    """The bytes that a step of a single batch size holds, its graph included."""
    before = machine.held()
    step = new_step()
    for _ in range(4):
        step(*rows_of(rows))
    return machine.held() - before


@pytest.mark.parametrize("graph", [True, False], ids=["graphs", "launches"])
def test_100_batch_sizes(machine, graph):
    allowed = 24 * one_size(machine, 1300)
    step = TrainStep(fastmlp.MLP(SIZES, "relu", device="cuda:0"), lr=0.1, momentum=0.9, cuda_graph=graph)
    before = machine.held()
    sizes = random.Random(0).sample(range(1001, 1301), 100)
    for rows in sizes:
        for _ in range(3):
            step(*rows_of(rows))
    held = machine.held() - before
    assert held <= allowed, f"{held:,} bytes after 100 sizes, {allowed // 24:,} for one"


def test_60_batch_sizes_of_epochs(machine):
    images, labels = rows_of(1300, pixels=True)
    step = new_step()
    for _ in range(3):
        step.epoch(images, labels, 1300)
    one = machine.held()
    for batch_size in random.Random(0).sample(range(1001, 1300), 59):
        for _ in range(3):
            step.epoch(images, labels, batch_size)
    held = machine.held()
    assert held <= 24 * one, f"{held:,} bytes after 60 sizes, {one:,} for one"


@pytest.mark.parametrize("products", [None, torch.bfloat16, torch.float16], ids=str)
def test_40_epochs_over_float_images(machine, products):
    """There is one copy in the products' dtype, kept or made anew, and one capture per size of a batch."""
    images, labels = rows_of(2000)
    step = new_step(products)
    before = machine.held()
    for _ in range(4):
        step.epoch(images, labels, 256)
    early, captures = machine.held() - before, len(machine.captures)
    for _ in range(36):
        step.epoch(images, labels, 256)
    held = machine.held() - before
    assert held <= early * 1.01, f"{held:,} bytes after 40 epochs, {early:,} after 4"
    assert len(machine.captures) == captures <= 4, "the same epoch is captured over and over again"


@pytest.mark.parametrize("products", [None, torch.bfloat16], ids=str)
def test_40_data_sets(machine, products):
    """Data sets that the caller has given up are not held without bound."""
    step = new_step(products)
    for i in range(40):
        images, labels = rows_of(2000)
        for _ in range(2):
            step.epoch(images, labels, 256)
        del images, labels
        if i == 20:
            early = machine.held()
    assert machine.held() <= early * 1.2


def test_40_orders_and_rates(machine):
    """Orders and rates are not kept, and neither needs another graph."""
    images, labels = rows_of(2000, pixels=True)
    step = new_step()
    held = {}
    for i in range(40):
        step.lr = 0.1 / (i + 1)
        order = torch.randperm(2000, device="cuda:0")
        step.epoch(images, labels, 256, order, [1 / (i + j + 1) for j in range(8)])
        step(images[:100], labels[:100])
        if i in (4, 9, 20, 30, 39):
            held[i] = machine.held()
    assert max(held[20], held[30], held[39]) <= max(held[4], held[9])
    assert len(machine.captures) <= 4


def test_a_step_that_is_gone_holds_nothing(machine):
    before = machine.held()
    step = new_step(torch.bfloat16)
    for rows in (10, 20, 30):
        for _ in range(3):
            step(*rows_of(rows))
            step.epoch(*rows_of(60), rows)
    del step
    assert machine.held() == before
