"""Dependent launches: in PTX and in machine code the wait comes before every access to global memory."""

from __future__ import annotations

import re

import pytest
import torch

from fastmlp.kernels import dependent
from tests.ptxsim import Launch

from .cases import Case, registry
from .machine_code import read_sass
from .targets import TARGETS

pytestmark = pytest.mark.compile

_GLOBAL_PTX = re.compile(r"\b(?:(?:ld|st|atom|red|prefetch|cp)\.[\w.:]*global|cp\.async|ld\.generic|st\.generic)")
_GLOBAL_SASS = ("LD", "LDG", "LDGSTS", "ST", "STG", "ATOM", "ATOMG", "RED", "REDG", "UBLKCP", "UTMALDG", "CCTL")


def launches(kernel: str, target: str, variant: str) -> list[Launch]:
    entry, of = registry()[kernel], TARGETS[target]
    return Case(kernel, of, torch.bfloat16, entry.tiles(torch.bfloat16, of.device, variant)[-1], variant).run()


@pytest.mark.parametrize(
    ("kernel", "target", "variant"),
    [
        ("linear_fwd", "sm_90", "k784-pixels-gather-tanh"),
        ("linear_dgrad", "sm_100", "sigmoid"),
        ("head", "sm_90", "sigmoid"),
        ("wgrad_update", "sm_90", "split-pixels-gather"),
        ("before_update", "sm_120", "clip-scale-adamw"),
    ],
)
def test_nothing_is_touched_before_the_wait(monkeypatch, kernel, target, variant):
    monkeypatch.setattr(dependent, "_wanted", True)
    for launch in launches(kernel, target, variant):
        assert launch.dependent
        lines = str(launch.asm["ptx"]).partition("\n{")[2].splitlines()
        waits = [i for i, line in enumerate(lines) if "griddepcontrol.wait" in line]
        touches = [i for i, line in enumerate(lines) if _GLOBAL_PTX.search(line)]
        assert len(waits) == 1
        assert touches
        assert waits[0] < touches[0]
        # The wait is in the first basic block, so that no program passes it by.
        assert not [line for line in lines[: waits[0]] if re.search(r"\b(?:bra|ret|exit)\b", line)]

        names = [name for name, _ in read_sass(launch)]
        assert names.count("ACQBULK") == names.count("PREEXIT") == 1
        before = names[: names.index("PREEXIT")]
        assert "ACQBULK" in before
        assert not {*before} & {"EXIT", "RET"}
        assert not {*names[: names.index("ACQBULK")]} & {*_GLOBAL_SASS, "BRA"}
        assert {*names} & {*_GLOBAL_SASS}
