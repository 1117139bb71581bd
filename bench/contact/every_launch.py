"""Every kernel once, for a tool that watches the process: ``python -m bench.contact.every_launch``."""

from __future__ import annotations

import sys

import torch

from tests.kernels.launches import LAUNCHES

from .device import opened


def main() -> None:
    """Launch and wait; a rehearsal takes the kernels that stage 1 has compiled."""
    rehearsal = "--rehearse" in sys.argv
    with opened(rehearsal=rehearsal) as device:
        for name in list(LAUNCHES)[:: 3 if rehearsal else 1]:
            LAUNCHES[name](torch.device(device.name))
            device.synchronize()
            print(name, flush=True)


if __name__ == "__main__":
    main()
