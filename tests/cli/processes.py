"""A command in several processes, as torchrun starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys


def started(count: int, *argv: object) -> list[subprocess.Popen]:
    """The command in ``count`` processes, which have the variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(count):
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        variables = {name: str(value) for name, value in {**numbers, "MASTER_PORT": port, "OMP_NUM_THREADS": 1}.items()}
        env = {**os.environ, "MASTER_ADDR": "127.0.0.1", **variables}
        command = [sys.executable, "-m", "fastmlp", *map(str, argv)]
        processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    return processes


def ended(processes: list[subprocess.Popen]) -> list[subprocess.CompletedProcess]:
    """What the processes gave."""
    done = [process.communicate(timeout=300) for process in processes]
    return [
        subprocess.CompletedProcess((), process.returncode, *texts)
        for process, texts in zip(processes, done, strict=True)
    ]
