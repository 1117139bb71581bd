"""Every kernel once, for a tool that watches the process: ``python -m bench.contact.every_launch``."""

from __future__ import annotations

import sys

import torch

from tests.kernels.launches import LAUNCHES

from .device import opened


def main() -> None:
    """Launch and wait."""
    with opened(rehearsal="--rehearse" in sys.argv) as device:
        for name, launch in LAUNCHES.items():
            launch(torch.device(device.name))
            device.synchronize()
            print(name, flush=True)


if __name__ == "__main__":
    main()
