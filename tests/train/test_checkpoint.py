"""Checkpoints: what is saved comes back, and every damaged or mismatched pair is refused."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from fastmlp.base.atomic import atomic_write
from fastmlp.train import checkpoint
from fastmlp.train.checkpoint import (
    CheckpointError,
    checkpoint_paths,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)

CONFIG = {"sizes": [5, 4, 3], "activation": "relu", "bias": True}


def make_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3)).to(dtype)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The stem of a sound checkpoint."""
    save_checkpoint(tmp_path / "mlp", make_model(), CONFIG, {"test_accuracy": 0.5})
    return tmp_path / "mlp"


def edit(stem: Path, **changes: Any) -> None:
    """Change top-level entries of the JSON; None removes one."""
    path = stem.with_suffix(".json")
    document = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
    def test_bitwise(self, tmp_path: Path, dtype: torch.dtype) -> None:
        model = make_model(dtype=dtype)
        metrics = {"test_accuracy": 0.891, "epochs": 10, "losses": [0.5, 0.25]}
        assert save_checkpoint(tmp_path / "mlp", model, CONFIG, metrics) == tmp_path / "mlp.safetensors"
        state_dict, config = load_checkpoint(tmp_path / "mlp")
        assert config == {**CONFIG, "dtype": str(dtype).removeprefix("torch.")}
        assert set(state_dict) == set(model.state_dict())
        for name, tensor in model.state_dict().items():
            assert state_dict[name].dtype == dtype
            assert torch.equal(state_dict[name], tensor)
        other = make_model(seed=1, dtype=dtype)
        other.load_state_dict(state_dict)
        x = torch.randn(2, 5, dtype=dtype)
        assert torch.equal(other(x), model(x))
        assert read_checkpoint(tmp_path / "mlp").metrics == metrics

    def test_loaded_tensors_are_writable_and_independent(self, saved: Path) -> None:
        first, _ = load_checkpoint(saved)
        for tensor in first.values():
            tensor.zero_()
        second, _ = load_checkpoint(saved)
        assert second["0.weight"].abs().sum() > 0

    @pytest.mark.parametrize("value", ["mlp", "mlp.safetensors", "mlp.json"])
    def test_names_of_one_checkpoint(self, saved: Path, value: str) -> None:
        _, config = load_checkpoint(saved.parent / value)
        assert config["sizes"] == [5, 4, 3]

    def test_strings_and_home(self, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(saved.parent))
        monkeypatch.setenv("USERPROFILE", str(saved.parent))
        assert load_checkpoint("~/mlp")[1] == load_checkpoint(str(saved))[1]

    def test_dots_in_the_name(self, tmp_path: Path) -> None:
        save_checkpoint(tmp_path / "lr-0.5", make_model(), CONFIG)
        save_checkpoint(tmp_path / "lr-0.25.safetensors", make_model(), CONFIG)
        assert sorted(p.name for p in tmp_path.iterdir()) == [
            "lr-0.25.json",
            "lr-0.25.safetensors",
            "lr-0.5.json",
            "lr-0.5.safetensors",
        ]

    def test_folder(self, tmp_path: Path) -> None:
        save_checkpoint(tmp_path, make_model(), CONFIG)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["model.json", "model.safetensors"]
        assert load_checkpoint(tmp_path)[1]["activation"] == "relu"

    def test_parents_are_made_and_old_files_replaced(self, tmp_path: Path) -> None:
        path = tmp_path / "a" / "b" / "mlp"
        save_checkpoint(path, make_model(seed=1), {**CONFIG, "epoch": 1})
        save_checkpoint(path, make_model(seed=2), {**CONFIG, "epoch": 2})
        state_dict, config = load_checkpoint(path)
        assert config["epoch"] == 2
        assert torch.equal(state_dict["0.weight"], make_model(seed=2).state_dict()["0.weight"])
        assert sorted(p.name for p in path.parent.iterdir()) == ["mlp.json", "mlp.safetensors"]

    def test_json_is_for_people_and_scripts(self, saved: Path) -> None:
        document = json.loads(saved.with_suffix(".json").read_text())
        weights = saved.with_suffix(".safetensors").read_bytes()
        assert document == {
            "format": "fastmlp checkpoint",
            "format_version": 1,
            "config": {**CONFIG, "dtype": "float32"},
            "metrics": {"test_accuracy": 0.5},
            "weights": {
                "file": "mlp.safetensors",
                "nbytes": len(weights),
                "sha256": hashlib.sha256(weights).hexdigest(),
            },
        }

    def test_plain_safetensors(self, saved: Path) -> None:
        """Other programs read the weights without fastmlp."""
        tensors = safetensors.torch.load_file(saved.with_suffix(".safetensors"))
        assert torch.equal(tensors["2.bias"], make_model().state_dict()["2.bias"])

    def test_shared_strided_and_odd_tensors(self, tmp_path: Path) -> None:
        model = torch.nn.Module()
        base = torch.arange(12.0).reshape(3, 4)
        model.register_buffer("base", base)
        model.register_buffer("same", base)
        model.register_buffer("row", base[1])
        model.register_buffer("transposed", base.t())
        model.register_buffer("expanded", torch.ones(1).expand(4))
        model.register_buffer("scalar", torch.tensor(7, dtype=torch.int64))
        model.register_buffer("empty", torch.empty(0, 3))
        model.register_buffer("empty_too", torch.empty(2, 0))
        model.register_parameter("weight", torch.nn.Parameter(torch.ones(2)))
        save_checkpoint(tmp_path / "m", model, {})
        state_dict, _ = load_checkpoint(tmp_path / "m")
        assert set(state_dict) == set(model.state_dict())
        for name, tensor in model.state_dict().items():
            assert state_dict[name].shape == tensor.shape
            assert state_dict[name].dtype == tensor.dtype
            assert torch.equal(state_dict[name], tensor)

    def test_module_without_parameters(self, tmp_path: Path) -> None:
        save_checkpoint(tmp_path / "m", torch.nn.Identity(), {})
        assert load_checkpoint(tmp_path / "m") == ({}, {})

    def test_mixed_dtypes_are_named(self, tmp_path: Path) -> None:
        model = make_model()
        model[2].half()  # type: ignore[index]
        save_checkpoint(tmp_path / "m", model, CONFIG)
        assert load_checkpoint(tmp_path / "m")[1]["dtype"] == "float16, float32"

    def test_given_dtype_is_kept(self, tmp_path: Path) -> None:
        save_checkpoint(tmp_path / "m", make_model(), {"dtype": "bfloat16"})
        assert load_checkpoint(tmp_path / "m")[1] == {"dtype": "bfloat16"}

    def test_json_types(self, tmp_path: Path) -> None:
        config = {"sizes": (784, 10), "nested": {"a": [None, True, 1.5, "ü"]}}
        save_checkpoint(tmp_path / "m", torch.nn.Identity(), config)
        assert load_checkpoint(tmp_path / "m")[1] == {"sizes": [784, 10], "nested": {"a": [None, True, 1.5, "ü"]}}

    def test_diverged_run_can_be_saved(self, tmp_path: Path) -> None:
        metrics = {"loss": float("nan"), "all": [1.0, float("inf")]}
        save_checkpoint(tmp_path / "m", make_model(), CONFIG, metrics)
        assert read_checkpoint(tmp_path / "m").metrics == {"loss": None, "all": [1.0, None]}
        assert "NaN" not in (tmp_path / "m.json").read_text()

    def test_device(self, saved: Path) -> None:
        assert load_checkpoint(saved, device="cpu")[0]["0.weight"].device.type == "cpu"
        assert load_checkpoint(saved, device=torch.device("meta"))[0]["0.weight"].device.type == "meta"
        with pytest.raises(RuntimeError, match="Expected one of cpu, cuda"):
            load_checkpoint(saved, device="gpu")

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_gpu(self, tmp_path: Path) -> None:
        save_checkpoint(tmp_path / "m", make_model().cuda(), CONFIG)
        on_gpu, _ = load_checkpoint(tmp_path / "m", device="cuda")
        assert all(tensor.is_cuda for tensor in on_gpu.values())
        assert torch.equal(on_gpu["0.weight"].cpu(), make_model().state_dict()["0.weight"])


class TestRefusals:
    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(
            FileNotFoundError, match=r"there is no checkpoint .*none: expected .*none\.json and none\.s"
        ):
            load_checkpoint(tmp_path / "none")

    def test_folder_without_checkpoint(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"expected .*model\.json and model\.safetensors"):
            load_checkpoint(tmp_path)

    def test_json_missing(self, saved: Path) -> None:
        saved.with_suffix(".json").unlink()
        with pytest.raises(FileNotFoundError, match=r"mlp\.safetensors alone is not enough"):
            load_checkpoint(saved.with_suffix(".safetensors"))

    def test_weights_missing(self, saved: Path) -> None:
        saved.with_suffix(".safetensors").unlink()
        with pytest.raises(FileNotFoundError, match=r"weights of the checkpoint are missing: expected .*mlp\.safet"):
            load_checkpoint(saved)

    @pytest.mark.parametrize("keep", [0, 4, 100, -1])
    def test_truncated_weights(self, saved: Path, keep: int) -> None:
        path = saved.with_suffix(".safetensors")
        weights = path.read_bytes()
        path.write_bytes(weights[:keep])
        message = rf"mlp\.safetensors has {len(weights[:keep])} bytes, expected {len(weights)}: it is truncated"
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(saved)

    @pytest.mark.parametrize("position", [0, 20, -1])
    def test_altered_weights(self, saved: Path, position: int) -> None:
        path = saved.with_suffix(".safetensors")
        weights = bytearray(path.read_bytes())
        expected = hashlib.sha256(weights).hexdigest()
        weights[position] ^= 1
        path.write_bytes(weights)
        found = hashlib.sha256(weights).hexdigest()
        with pytest.raises(CheckpointError, match=f"SHA-256 {found}, expected {expected}: it is altered"):
            load_checkpoint(saved)

    def test_files_of_two_checkpoints(self, saved: Path) -> None:
        save_checkpoint(saved.with_name("other"), make_model(seed=1), CONFIG)
        saved.with_name("other.json").replace(saved.with_suffix(".json"))
        with pytest.raises(CheckpointError, match=r"not the file its \.json was written for"):
            load_checkpoint(saved)

    def test_weights_that_are_not_safetensors(self, saved: Path) -> None:
        content = b"PK\x03\x04 a pickle in a zip file, say"
        saved.with_suffix(".safetensors").write_bytes(content)
        edit(saved, weights={"nbytes": len(content), "sha256": hashlib.sha256(content).hexdigest()})
        with pytest.raises(CheckpointError, match=r"mlp\.safetensors is not a safetensors file"):
            load_checkpoint(saved)

    @pytest.mark.parametrize("content", [b"", b"{", b'{"format": "fastmlp che', b"\xff\xfe\x00", b"[" * 100_000])
    def test_damaged_json(self, saved: Path, content: bytes) -> None:
        saved.with_suffix(".json").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"mlp\.json is damaged: it is not JSON"):
            load_checkpoint(saved)

    @pytest.mark.parametrize("content", ["[1, 2]", "null", '{"format": "other"}', '{"sizes": [784, 10]}'])
    def test_json_of_something_else(self, saved: Path, content: str) -> None:
        saved.with_suffix(".json").write_text(content)
        with pytest.raises(CheckpointError, match=r"mlp\.json is not the configuration of a checkpoint: expected"):
            load_checkpoint(saved)

    @pytest.mark.parametrize("version", [2, 0, "1", None])
    def test_other_format_version(self, saved: Path, version: object) -> None:
        edit(saved, format_version=version)
        with pytest.raises(CheckpointError, match=f"format version {version!r}, this fastmlp reads 1"):
            load_checkpoint(saved)

    @pytest.mark.parametrize("key", ["config", "metrics", "weights"])
    @pytest.mark.parametrize("value", [None, [], "x"])
    def test_incomplete_json(self, saved: Path, key: str, value: object) -> None:
        edit(saved, **{key: value})
        with pytest.raises(CheckpointError, match="lacks config, metrics or weights"):
            load_checkpoint(saved)

    @pytest.mark.parametrize("weights", [{}, {"nbytes": 5}, {"nbytes": "5", "sha256": "0"}, {"nbytes": 5, "sha256": 0}])
    def test_incomplete_weights_entry(self, saved: Path, weights: dict[str, object]) -> None:
        edit(saved, weights=weights)
        with pytest.raises(CheckpointError, match="lacks the size and SHA-256"):
            load_checkpoint(saved)

    def test_checkpoint_error_is_a_runtime_error(self) -> None:
        assert issubclass(CheckpointError, RuntimeError)


@pytest.mark.skipif(os.name != "posix", reason="files of POSIX")
class TestHostileFiles:
    """Loading reads no more than a header promises, and takes no memory before the shapes are checked."""

    @pytest.fixture(autouse=True)
    def in_time(self) -> Iterator[None]:
        def too_late(*_: object) -> None:
            raise AssertionError("loading waits or reads too much")

        before = signal.signal(signal.SIGALRM, too_late)
        signal.alarm(20)
        yield
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)

    @pytest.mark.parametrize("suffix", [".json", ".safetensors"])
    @pytest.mark.parametrize("kind", ["FIFO", "/dev/zero", "/dev/full", "folder"])
    def test_no_regular_file(self, saved: Path, suffix: str, kind: str) -> None:
        path = saved.with_suffix(suffix)
        path.unlink()
        if kind == "FIFO":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        else:
            path.symlink_to(kind)
        with pytest.raises(OSError, match=r"expected a regular file|Is a directory"):
            load_checkpoint(saved)

    @pytest.mark.parametrize("suffix", [".json", ".safetensors"])
    def test_sparse(self, saved: Path, suffix: str) -> None:
        with saved.with_suffix(suffix).open("r+b") as stream:
            if suffix == ".safetensors":
                stream.write(bytes(100))
            stream.truncate(20 << 30)
        if suffix == ".safetensors":
            edit(saved, weights={"nbytes": 20 << 30, "sha256": "0" * 64})
        with pytest.raises((OSError, CheckpointError), match=r"larger file|header promises|header is damaged"):
            load_checkpoint(saved)

    @pytest.mark.parametrize(
        "header",
        [
            (1 << 63).to_bytes(8, "little"),
            (8 << 30).to_bytes(8, "little"),
            (2).to_bytes(8, "little") + b"[]",
            (30_000).to_bytes(8, "little") + b"[" * 30_000,
            b"\x10" + bytes(7) + b'{"a":{"shape":1}',
            b"",
        ],
    )
    def test_header(self, saved: Path, header: bytes) -> None:
        with saved.with_suffix(".safetensors").open("wb") as stream:
            stream.write(header)
            stream.truncate(9 << 30)
        edit(saved, weights={"nbytes": 9 << 30, "sha256": "0" * 64})
        with pytest.raises(CheckpointError, match="is not a safetensors file: its header"):
            load_checkpoint(saved)

    def test_check_comes_before_the_tensors(self, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(config: dict[str, Any], shapes: checkpoint.Shapes) -> None:
            assert config["sizes"] == [5, 4, 3]
            assert shapes == {"0.weight": (4, 5), "0.bias": (4,), "2.weight": (3, 4), "2.bias": (3,)}
            raise CheckpointError("not these")

        monkeypatch.setattr(checkpoint, "load_tensors", None)
        with pytest.raises(CheckpointError, match="not these"):
            load_checkpoint(saved, check=refuse)

    @pytest.mark.parametrize("digest", ["../../x", "0" * 63, "G" * 64])
    def test_a_digest_that_is_none(self, saved: Path, digest: str) -> None:
        edit(saved, weights={"nbytes": 5, "sha256": digest})
        with pytest.raises(CheckpointError, match="lacks the size and SHA-256"):
            load_checkpoint(saved)


class TestBadInput:
    @pytest.mark.parametrize(
        ("config", "error", "message"),
        [
            ({"dtype": torch.float32}, TypeError, r"config\['dtype'\] is a dtype, which JSON cannot hold"),
            ({"a": [{"b": torch.ones(1)}]}, TypeError, r"config\['a'\]\[0\]\['b'\] is a Tensor"),
            ({"lr": float("nan")}, ValueError, r"config\['lr'\] is nan; expected a finite number"),
            ({"a": {1: 2}}, ValueError, r"config\['a'\] has the key 1; expected strings only"),
        ],
    )
    def test_config(self, tmp_path: Path, config: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            save_checkpoint(tmp_path / "m", make_model(), config)
        assert list(tmp_path.iterdir()) == []

    def test_metrics(self, tmp_path: Path) -> None:
        with pytest.raises(TypeError, match=r"metrics\['loss'\] is a Tensor.*pass \.item\(\)"):
            save_checkpoint(tmp_path / "m", make_model(), CONFIG, {"loss": torch.tensor(1.0)})
        assert list(tmp_path.iterdir()) == []

    def test_state_that_is_no_tensor(self, tmp_path: Path) -> None:
        class Odd(torch.nn.Module):
            def get_extra_state(self) -> dict[str, int]:
                return {"steps": 3}

        with pytest.raises(TypeError, match=r"state_dict\(\)\['_extra_state'\] is a dict"):
            save_checkpoint(tmp_path / "m", Odd(), CONFIG)

    def test_parent_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(OSError, match="file"):
            save_checkpoint(tmp_path / "file" / "m", make_model(), CONFIG)


class TestAtomic:
    @pytest.mark.parametrize("failing", ["fsync", "replace"])
    def test_failed_write_leaves_the_old_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
    ) -> None:
        def fail(*arguments: object) -> None:
            raise OSError(28, "No space left on device")

        target = tmp_path / "file"
        atomic_write(target, b"old")
        monkeypatch.setattr(os, failing, fail)
        with pytest.raises(OSError, match="No space left"):
            atomic_write(target, b"new")
        assert target.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [target]

    @pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
    def test_permissions_are_those_of_open(self, tmp_path: Path) -> None:
        (tmp_path / "plain").write_bytes(b"")
        atomic_write(tmp_path / "atomic", b"")
        assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_paths() -> None:
    for name in ("runs/a", "runs/a.json", "runs/a.safetensors"):
        assert checkpoint_paths(name) == (Path("runs/a.safetensors"), Path("runs/a.json"))
    assert checkpoint_paths("a.pt")[0] == Path("a.pt.safetensors")


def test_loading_never_unpickles() -> None:
    program = """
import pickle, tempfile, torch
from fastmlp.train.checkpoint import load_checkpoint, save_checkpoint
pickle.load = pickle.loads = pickle.dump = pickle.dumps = pickle.Pickler = pickle.Unpickler = None
torch.load = torch.save = None
with tempfile.TemporaryDirectory() as folder:
    save_checkpoint(folder, torch.nn.Linear(2, 1), {})
    print(*sorted(load_checkpoint(folder)[0]))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert (result.stdout, result.returncode) == ("bias weight\n", 0), result.stderr
