"""``Tile.resident`` of the weight gradients' tiles, from which splits are computed, is true of the compiled code."""

from __future__ import annotations

import pytest

from bench.static.occupancy import occupancy

from .cases import covering
from .machine_code import resources

pytestmark = pytest.mark.compile


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_as_many_programs_are_resident_as_the_table_says(target: str) -> None:
    wrong = []
    for case in covering():
        if case.target.name == target and case.kernel == "wgrad_update" and case.tile.resident > 1:
            (launch, *_) = case.run()
            needs = resources(launch)
            found = occupancy(target, needs.registers, needs.shared, launch.num_warps).programs
            if found < case.tile.resident:
                wrong.append(f"{case.name}: {found} of {case.tile.resident}, {needs.registers} registers")
    assert not wrong, "\n".join(wrong)
