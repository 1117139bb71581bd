"""The samples with which PyTorch tests its own operators and modules, for tests/whole/test_torch_samples.py.

``python -m tests.support.torch_samples OUT NAMES...`` writes them. The command is a process of its own because the
modules with the samples change settings of the process that imports them: torch.backends is frozen afterwards.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


class Sample(NamedTuple):
    """A call. ``build`` has the arguments of the module's class; None for an operator."""

    build: tuple[tuple[Any, ...], dict[str, Any]] | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    wrong: bool = False  #: torch must raise an error


def _module_sample(given: Any, wrong: bool = False) -> Sample:
    build, call = given.constructor_input, given.forward_input
    args, kwargs = ((), {}) if call is None else (call.args, call.kwargs)
    return Sample((build.args, build.kwargs), args, kwargs, wrong)


def collect(names: set[str]) -> dict[tuple[str, torch.dtype], list[Sample]]:
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

    found: dict[tuple[str, torch.dtype], list[Sample]] = {}
    for op in op_db:
        if op.name not in names or op.variant_test_name:
            continue
        for dtype in DTYPES:
            samples = op.sample_inputs("cpu", dtype, requires_grad=True)
            found[op.name, dtype] = [Sample(None, (s.input, *s.args), s.kwargs) for s in samples]
        if op.error_inputs_func is not None:
            wrong = (e.sample_input for e in op.error_inputs("cpu"))
            found[op.name, torch.float32] += [Sample(None, (s.input, *s.args), s.kwargs, True) for s in wrong]
    options = {"device": "cpu", "requires_grad": True, "training": True}
    for module in module_db:
        if module.name not in names:
            continue
        for dtype in DTYPES:
            given = module.module_inputs_func(module, dtype=dtype, **options)
            found[module.name, dtype] = [_module_sample(s) for s in given]
        if module.module_error_inputs_func is not None:
            given = module.module_error_inputs_func(module, dtype=torch.float32, **options)
            found[module.name, torch.float32] += [_module_sample(e.module_error_input, True) for e in given]
    return found


if __name__ == "__main__":
    from tests.support import torch_samples  # a pickle names the class by its module, which must not be __main__

    torch.save(torch_samples.collect(set(sys.argv[2:])), sys.argv[1])
