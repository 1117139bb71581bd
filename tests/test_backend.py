"""Which code runs: set_backend, use_backend, resolve, and every error that they raise."""

from __future__ import annotations

import subprocess
import sys
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import fastmlp
from fastmlp import backend, functional
from fastmlp.ops import Operations, torch_ops, triton_ops

pytestmark = pytest.mark.usefixtures("auto")


@pytest.fixture
def auto():
    """Every test starts from, and leaves behind, the default."""
    before = fastmlp.get_backend()
    fastmlp.set_backend("auto")
    yield
    fastmlp.set_backend(before)


def on_gpu(dtype: torch.dtype = torch.float32) -> SimpleNamespace:
    """The attributes of a CUDA tensor that ``resolve`` reads."""
    return SimpleNamespace(is_cuda=True, dtype=dtype, device=torch.device("cuda", 0))


def test_default_and_process_wide_choice():
    assert fastmlp.get_backend() == "auto"
    fastmlp.set_backend("torch")
    assert fastmlp.get_backend() == "torch"
    seen = []
    thread = threading.Thread(target=lambda: seen.append(fastmlp.get_backend()))
    thread.start()
    thread.join()
    assert seen == ["torch"]


def test_use_backend_nests_and_restores():
    fastmlp.set_backend("torch")
    with fastmlp.use_backend("auto"):
        assert fastmlp.get_backend() == "auto"
        with fastmlp.use_backend("torch"):
            assert fastmlp.get_backend() == "torch"
        assert fastmlp.get_backend() == "auto"
        fastmlp.set_backend("torch")  # of the process; the block goes on
        assert fastmlp.get_backend() == "auto"
    assert fastmlp.get_backend() == "torch"


def test_use_backend_restores_after_an_exception():
    with pytest.raises(KeyError), fastmlp.use_backend("torch"):
        raise KeyError
    assert fastmlp.get_backend() == "auto"


def test_use_backend_as_a_decorator():
    @fastmlp.use_backend("torch")
    def chosen() -> str:
        return fastmlp.get_backend()

    assert [chosen(), fastmlp.get_backend(), chosen()] == ["torch", "auto", "torch"]


def test_use_backend_is_of_its_thread():
    """Two threads have blocks of their own, which overlap in time, and a third thread has no block."""
    barrier = threading.Barrier(3, timeout=30)
    seen: dict[str, list[str]] = {}

    def work(name: str) -> None:
        barrier.wait()
        if name == "none":
            barrier.wait()
            seen[name] = [fastmlp.get_backend()]
            barrier.wait()
            return
        with fastmlp.use_backend(name):
            barrier.wait()
            seen[name] = [fastmlp.get_backend(), backend.resolve(torch.ones(1))]
            barrier.wait()

    threads = [threading.Thread(target=work, args=(name,)) for name in ("torch", "auto", "none")]
    fastmlp.set_backend("auto")
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"torch": ["torch", "torch"], "auto": ["auto", "torch"], "none": ["auto"]}


@pytest.mark.parametrize("name", ["cuda", "TRITON", "", None, 3])
def test_unknown_backend(name):
    expected = r"unknown backend .*; expected one of auto, triton, torch"
    with pytest.raises(ValueError, match=expected):
        fastmlp.set_backend(name)
    with pytest.raises(ValueError, match=expected), fastmlp.use_backend(name):
        pass
    assert fastmlp.get_backend() == "auto"


def test_triton_not_installed(monkeypatch):
    monkeypatch.setattr(backend, "_triton_installed", False)
    assert not backend.triton_available()
    with pytest.raises(RuntimeError, match=r"triton is not installed.*pip install triton.*backend 'torch'"):
        fastmlp.set_backend("triton")
    with pytest.raises(RuntimeError, match="triton is not installed"), fastmlp.use_backend("triton"):
        pass
    assert backend.resolve(on_gpu()) == "torch"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_auto_takes_kernels_on_a_gpu_only(monkeypatch, dtype):
    monkeypatch.setattr(backend, "_triton_installed", True)
    assert backend.resolve(on_gpu(dtype)) == "triton"
    assert backend.resolve(on_gpu(torch.uint8), dtype) == "triton"
    assert backend.resolve(torch.ones(1, dtype=dtype)) == "torch"
    assert backend.resolve(torch.ones(1, dtype=dtype, device="meta")) == "torch"
    with fastmlp.use_backend("torch"):
        assert backend.resolve(on_gpu(dtype)) == "torch"


def test_auto_takes_torch_for_other_dtypes():
    assert backend.resolve(on_gpu(torch.float64)) == "torch"
    assert backend.resolve(on_gpu(torch.uint8), torch.float64) == "torch"


class TestTriton:
    """The backend "triton" runs kernels or says why it cannot."""

    pytestmark = pytest.mark.skipif(not backend.triton_available(), reason="triton is not installed")

    def test_on_a_gpu(self):
        with fastmlp.use_backend("triton"):
            assert backend.resolve(on_gpu()) == "triton"

    def test_on_a_cpu_without_anything_that_runs_kernels_there(self, monkeypatch):
        monkeypatch.setattr(backend, "_kernels_take_cpu", lambda: False)
        expected = r"needs tensors on a GPU, got one on cpu; move the tensors, .*'torch', or .*TRITON_INTERPRET=1"
        with fastmlp.use_backend("triton"), pytest.raises(RuntimeError, match=expected):
            functional.linear_act(torch.ones(2, 3), torch.ones(4, 3))

    def test_on_another_device(self):
        with fastmlp.use_backend("triton"), pytest.raises(RuntimeError, match="got one on meta"):
            backend.resolve(torch.ones(2, device="meta"))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e5m2])
    def test_dtype_without_kernels(self, dtype):
        expected = rf"computes in float32, float16 and bfloat16, got {dtype}; convert"
        with fastmlp.use_backend("triton"), pytest.raises(TypeError, match=expected):
            backend.resolve(on_gpu(dtype))

    @pytest.mark.parametrize("interpret", ["0", "1"])
    def test_the_machine_is_asked(self, interpret):
        """On the CPU of a machine without a GPU, only the interpreter can run kernels."""
        code = (
            "import torch, fastmlp\n"
            "fastmlp.set_backend('triton')\n"
            "print(fastmlp.functional.linear_act(torch.ones(2, 3), torch.ones(4, 3)).tolist())"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={"PATH": "/usr/bin:/bin", "TRITON_INTERPRET": interpret, "CUDA_VISIBLE_DEVICES": ""},
        )
        if interpret == "1":
            assert done.stdout.strip() == str([[3.0] * 4] * 2), done.stderr
        else:
            assert "RuntimeError: backend 'triton' needs tensors on a GPU" in done.stderr


def test_backward_keeps_the_backend_of_its_forward(monkeypatch):
    """The backward pass keeps the backend outside the block too, whatever was chosen since."""
    seen = []
    for name in (name for name in dir(Operations) if not name.startswith("_")):

        def spy(*args, _name=name, **kwargs):
            seen.append(_name)
            return getattr(torch_ops, _name)(*args, **kwargs)

        monkeypatch.setattr(triton_ops, name, spy)
    for name in ("network_fwd", "network_bwd"):  # layers one by one
        monkeypatch.setattr(triton_ops, name, lambda *args: None)
    monkeypatch.setattr(backend, "_triton_installed", True)
    monkeypatch.setattr(backend, "_kernels_take_cpu", lambda: True)
    model = fastmlp.MLP((3, 4, 2))
    with fastmlp.use_backend("triton"):
        out = model(torch.ones(5, 3))
    out.sum().backward()
    expected = ["linear_fwd"] * 2 + ["activation_bwd", "linear_wgrad", "linear_dgrad", "linear_wgrad"]
    assert seen == expected


def test_launches_follow_the_tensors_device(monkeypatch):
    """A tensor on the second GPU is computed there, although the first GPU is the current device."""
    entered = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or nullcontext())
    for index in (0, 1):
        x = SimpleNamespace(is_cuda=True, get_device=lambda i=index: i, device=torch.device("cuda", index))
        with triton_ops.device_of(x):
            pass
    assert entered == [torch.device("cuda", 1)]
