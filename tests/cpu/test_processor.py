"""The processor's name."""

from __future__ import annotations

import io

import pytest

from fastmlp.cpu import processor


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        ("cpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n\nmodel\t\t: 2\n", "AMD EPYC family 25 model 17"),
        ("cpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC 9755\n\n", "AMD EPYC 9755"),
        ("model name\t: Cortex\n", "Cortex"),
        ("Processor\t: 0\n", "riscv"),
    ],
)
def test_processors_of_one_name_are_told_apart(monkeypatch, cpuinfo, name):
    monkeypatch.setattr(processor, "open", lambda *args, **kwargs: io.StringIO(cpuinfo), raising=False)
    monkeypatch.setattr(processor.platform, "processor", lambda: "riscv")
    assert processor.processor_name() == name
