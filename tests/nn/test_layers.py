"""fastmlp/nn/layers.py: the layers of an MLP as nn.Linear modules, and the activations of their places.

Tools take an nn.Linear for an affine map. Whatever they make of the layers of an MLP must be what they make of the
layers of ``to_torch()``, which is the twin in these tests.
"""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, stateless

import fastmlp
from fastmlp import reference
from fastmlp.activations import ACTIVATIONS
from fastmlp.nn.layers import Affine, LayerList

SIZES = (4, 8, 8, 3)
NAMES = ("tanh", "gelu", "relu")


def pair(activation: object = NAMES) -> tuple[fastmlp.MLP, nn.Sequential, Tensor]:
    """An MLP, its twin with parameters of its own, and an input."""
    torch.manual_seed(0)
    model = fastmlp.MLP(SIZES, activation, dtype=torch.float64)
    return model, copy.deepcopy(model).to_torch(), torch.randn(5, 4, dtype=torch.float64)


def assert_alike(model: nn.Module, twin: nn.Module, x: Tensor) -> None:
    """Output, dX and the gradients of all parameters, in order."""
    results = []
    for network in (model, twin):
        inputs = x.clone().requires_grad_()
        out = network(inputs)
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
        results.append([out, inputs.grad, *(p.grad for p in network.parameters() if p.requires_grad)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


class LoRA(nn.Module):
    """W x + B A x, as peft has it; ``merge`` adds B A to W."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        generator = torch.Generator().manual_seed(base.in_features)
        rows = torch.randn(base.out_features + base.in_features, 2, generator=generator, dtype=torch.float64)
        self.b, self.a = nn.Parameter(rows[: base.out_features]), nn.Parameter(rows[base.out_features :].T.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T

    def merge(self) -> nn.Linear:
        with torch.no_grad():
            self.base.weight += self.b @ self.a
        return self.base


def equal_linear(old: nn.Linear) -> nn.Linear:
    new = nn.Linear(old.in_features, old.out_features, old.bias is not None, device="meta")
    new.weight, new.bias = old.weight, old.bias
    return new


class Rounded(nn.Linear):
    """Quantization-aware training: the weight is rounded in the forward pass, as torchao's fake quantization."""

    @classmethod
    def of(cls, old: nn.Linear) -> Rounded:
        new = cls(old.in_features, old.out_features, device="meta")
        new.weight, new.bias = old.weight, old.bias
        return new

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight + ((self.weight * 8).round() / 8 - self.weight).detach(), self.bias)


def by_setattr(parent: nn.Module, name: str, new: nn.Module) -> None:
    setattr(parent, name, new)


def by_add_module(parent: nn.Module, name: str, new: nn.Module) -> None:
    parent.add_module(name, new)


def by_index(parent: nn.Module, name: str, new: nn.Module) -> None:
    parent[int(name)] = new  # type: ignore[index]


def by_dict(parent: nn.Module, name: str, new: nn.Module) -> None:
    parent._modules[name] = new


def replace_linears(root: nn.Module, make, put=by_setattr) -> nn.Module:
    """The loop of all such tools."""
    for path, module in list(root.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, name = path.rpartition(".")
            put(root.get_submodule(parent), name, make(module))
    return root


class TestTools:
    @pytest.mark.parametrize("put", [by_setattr, by_add_module, by_index, by_dict])
    @pytest.mark.parametrize("make", [LoRA, equal_linear, Rounded.of])
    def test_replaced_layers(self, make, put):
        model, twin, x = pair()
        assert_alike(replace_linears(model, make, put), replace_linears(twin, make, put), x)

    @pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "step"])
    def test_every_activation(self, activation):
        model, twin, x = pair([activation] * 3)
        assert_alike(replace_linears(model, LoRA), replace_linears(twin, LoRA), x)

    def test_step_keeps_its_gradient_of_zero(self):
        model, x = fastmlp.MLP(SIZES, "step"), torch.randn(5, 4)
        replace_linears(model, equal_linear)
        model(x).sum().backward()
        assert not model.layers[0].weight.grad.any()
        z = torch.tensor([-1.0, 0.0, 2.0, float("nan"), float("inf")])
        assert torch.equal(ACTIVATIONS["step"].new(z), reference.activate(z, "step"))

    def test_softmax_layer(self):
        model, twin, x = pair(["softmax", "tanh", "softmax"])
        assert_alike(replace_linears(model, LoRA), replace_linears(twin, LoRA), x)

    def test_merging_gives_the_mlp_back(self):
        model, _, x = pair()
        layers = list(model.layers)
        wrapped = replace_linears(model, LoRA)(x)
        for i, wrapper in enumerate(model.layers):
            model.layers[i] = wrapper.merge()
        torch.testing.assert_close(model(x), wrapped)
        assert all(a is b for a, b in zip(model.layers, layers, strict=True))
        fastmlp.TrainStep(model, lr=0.1)

    def test_activation_of_a_wrapped_layer(self):
        """The wrapped layer and its place share the name, before and after it was wrapped."""
        model, twin, x = pair(["relu", "relu", "identity"])
        model.layers[0].activation = "tanh"
        replace_linears(model, LoRA)
        model.layers[1].base.activation = "gelu"
        assert model.activations == ("tanh", "gelu", "identity")
        twin[2], twin[4] = nn.Tanh(), nn.GELU()
        assert_alike(model, replace_linears(twin, LoRA), x)

    def test_pixels_reach_another_module_as_numbers(self):
        model, _, _ = pair()
        pixels = torch.randint(0, 256, (5, 4), dtype=torch.uint8)
        expected = model(pixels)
        torch.testing.assert_close(replace_linears(model, equal_linear)(pixels), expected)

    def test_autocast(self):
        model, twin, x = pair()
        x = x.float()
        model, twin = replace_linears(model.float(), equal_linear), replace_linears(twin.float(), equal_linear)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model(x).dtype == torch.bfloat16
            torch.testing.assert_close(model(x), twin(x))

    def test_copies_of_a_wrapped_network(self):
        model, _, x = pair()
        replace_linears(model, LoRA)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(x), model(x))
            twin.layers[0].base.activation = "relu"
            assert twin.activations == ("relu", *NAMES[1:])
            assert model.activations == NAMES

    @pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
    def test_torchs_dynamic_quantization_leaves_it_alone(self):
        model, _, x = pair("relu")
        model, x = model.float(), x.float()
        assert torch.equal(torch.ao.quantization.quantize_dynamic(model, {nn.Linear})(x), model(x))

    def test_initialization(self):
        model, twin, x = pair()

        def constant(module: nn.Module) -> None:
            if isinstance(module, nn.Linear):
                nn.init.constant_(module.weight, 0.1)

        assert_alike(model.apply(constant), twin.apply(constant), x)

    def test_peft(self):
        peft = pytest.importorskip("peft", exc_type=ImportError)
        model, twin, x = pair()
        for network, names in ((model, ["layers.0", "layers.1"]), (twin, ["1", "3"])):
            peft.inject_adapter_in_model(peft.LoraConfig(target_modules=names, r=2), network)
            torch.manual_seed(1)
            for name, parameter in network.named_parameters():
                if "lora" in name:
                    nn.init.normal_(parameter.requires_grad_(), 0, 0.3)
        network = network.double()
        assert_alike(model.double(), twin, x)

    def test_torchao(self):
        torchao = pytest.importorskip("torchao.quantization", exc_type=ImportError)
        qat = pytest.importorskip("torchao.quantization.qat", exc_type=ImportError)
        model, twin, x = pair()
        weight = qat.IntxFakeQuantizeConfig(torch.int8, "per_channel")
        for network in (model.float(), twin.float()):
            torchao.quantize_(network, qat.QATConfig(weight_config=weight, step="prepare"))
        assert_alike(model, twin, x.float())


class TestCalls:
    def test_a_layer_is_the_affine_map(self):
        model, twin, x = pair()
        torch.testing.assert_close(model.layers[0](x), twin[1](x))

    def test_hooks_see_what_they_see_in_the_twin(self):
        model, twin, x = pair()
        seen: list[list[Tensor]] = [[], []]
        for layers, into in ((model.layers, seen[0]), ((twin[1], twin[3], twin[5]), seen[1])):
            for layer in layers:
                layer.register_forward_hook(lambda module, args, out, into=into: into.extend((args[0], out)))
                layer.register_full_backward_hook(lambda module, dx, dz, into=into: into.extend((dx[0], dz[0])))
        assert_alike(model, twin, x)
        assert len(seen[0]) == 12
        for ours, theirs in zip(*seen, strict=True):
            torch.testing.assert_close(ours, theirs)

    def test_activation_changed(self):
        model, twin, x = pair()
        model(x)
        model.layers[0].activation = "silu"
        twin[2] = nn.SiLU()
        assert_alike(model, twin, x)
        model.layers[0].register_forward_hook(lambda *args: None)
        assert_alike(model, twin, x)
        layer = fastmlp.Linear(4, 3)
        layer.activation = "relu"
        assert (layer(x.float()) >= 0).all()

    @pytest.mark.parametrize("layer", [fastmlp.Linear(4, 3), fastmlp.MLP((4, 3)).layers[0]])
    def test_activation_unknown(self, layer):
        with pytest.raises(ValueError, match="unknown activation 'Tanh'; expected one of identity"):
            layer.activation = "Tanh"
        assert layer.activation == "identity"

    def test_functional_call(self):
        model, twin, x = pair()
        halves = {name: p.detach() / 2 for name, p in model.named_parameters()}
        for wrap in (lambda m: m, lambda m: replace_linears(m, equal_linear)):
            out = torch.func.functional_call(wrap(model), halves, (x,))
            with torch.no_grad():
                expected = stateless._functional_call(
                    twin, dict(zip(dict(twin.named_parameters()), halves.values(), strict=True)), (x,)
                )
            torch.testing.assert_close(out, expected)

    @pytest.mark.parametrize(
        "change",
        [
            parametrizations.weight_norm,
            parametrizations.orthogonal,
            lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
            nn.utils.weight_norm,
        ],
    )
    @pytest.mark.filterwarnings("ignore::FutureWarning")
    def test_changed_weights(self, change):
        model, twin, x = pair()
        for layer in (model.layers[1], twin[3]):
            torch.manual_seed(0)
            change(layer)
        assert_alike(model, twin, x)

    def test_repr(self):
        text = repr(fastmlp.MLP((3, 2, 1), "tanh"))
        assert "(0): Affine(in_features=3, out_features=2, bias=True, activation='tanh')" in text


class TestList:
    """The methods of nn.ModuleList move activations with their modules."""

    def test_own_activation(self):
        model, _, x = pair()
        model.layers[0] = fastmlp.Linear(4, 8, activation="silu", dtype=torch.float64)
        assert model.activations == ("silu", *NAMES[1:])
        z = model.layers[2](F.gelu(model.layers[1](model.layers[0](x))))
        torch.testing.assert_close(model(x), torch.relu(z))
        model.layers[1].register_forward_hook(lambda *args: None)
        torch.testing.assert_close(model(x), torch.relu(z))
        fastmlp.MLP.from_torch(fastmlp.MLP((4, 3)))

    @pytest.mark.parametrize("wrapped", [False, True])
    def test_append_extend_insert_delete_pop(self, wrapped):
        model, twin, x = pair()
        model.layers[0].activation = "silu"
        if wrapped:
            replace_linears(model, LoRA)
        model.layers.append(fastmlp.Linear(3, 3, dtype=torch.float64))
        model.layers.extend([nn.Linear(3, 3, dtype=torch.float64), fastmlp.Linear(3, 3, activation="tanh")])
        assert model.activations == ("silu", "gelu", "relu", "identity", "identity", "tanh")
        model.layers.insert(1, nn.Linear(8, 8))
        assert model.activations[:4] == ("silu", "identity", "gelu", "relu")
        del model.layers[1]
        model.layers.pop(-1)
        del model.layers[3:]
        assert model.activations == ("silu", "gelu", "relu")
        twin[2] = nn.SiLU()
        assert_alike(model, replace_linears(twin, LoRA) if wrapped else twin, x)
        model.layers += [nn.Linear(3, 2, dtype=torch.float64)]
        assert isinstance(model.layers, LayerList)
        assert model(x).shape == (5, 2)

    @pytest.mark.parametrize("wrapped", [False, True])
    def test_shorter_list(self, wrapped):
        model, twin, x = pair()
        if wrapped:
            replace_linears(model, LoRA)
            replace_linears(twin, LoRA)
        model.layers = model.layers[:-1]
        assert_alike(model, twin[:5], x)

    def test_swapped_layers_bring_their_activations(self):
        model, _, x = pair()
        model.layers.insert(1, Affine(8, 8, activation="silu", dtype=torch.float64))
        model.layers[1], model.layers[2] = model.layers[2], model.layers[1]
        assert model.activations == ("tanh", "gelu", "silu", "relu")
        replaced = replace_linears(copy.deepcopy(model), equal_linear)
        torch.testing.assert_close(replaced(x), model(x))

    def test_list_replaced(self):
        model, twin, x = pair()
        model.layers = nn.ModuleList(LoRA(layer) for layer in model.layers)
        assert_alike(model, replace_linears(twin, LoRA), x)
        with pytest.raises(RuntimeError, match="expected 3 modules in place of the 3 layers, got 2"):
            model.layers = nn.ModuleList([nn.Linear(4, 8), nn.Linear(8, 3)])
        model.layers = nn.Sequential(fastmlp.Linear(4, 3, activation="relu"), fastmlp.Linear(3, 3))
        assert model.activations == ("relu", "identity")
        with pytest.raises(TypeError, match="cannot assign"):
            model.layers = [nn.Linear(4, 8)]

    @pytest.mark.parametrize("assign", [lambda m: m.layers, lambda m: nn.ModuleList(m.layers), lambda m: m.layers[:]])
    def test_a_linear_is_wrapped_after_the_list_was_assigned(self, assign):
        """A Linear applies its activation itself, so its place has none."""
        model, _, x = pair()
        linear = fastmlp.Linear(4, 8, activation="gelu", dtype=x.dtype)
        model.layers[0] = linear
        expected = model(x)
        model.layers = assign(model)
        model.layers[0] = nn.Sequential(linear)
        torch.testing.assert_close(model(x), expected)

    @pytest.mark.parametrize("change", [lambda m: m.pop("1"), lambda m: m.update({"3": nn.Linear(3, 3)})])
    def test_changes_past_the_list_are_refused(self, change):
        model, _, x = pair()
        model.layers[0].register_forward_hook(lambda *args: None)
        change(model.layers._modules)
        with pytest.raises(RuntimeError, match=r"added and deleted with the methods of nn\.ModuleList"):
            model(x)

    def test_modules_added_again_under_their_names(self):
        """SyncBatchNorm.convert_sync_batchnorm does this to every module."""
        model, twin, x = pair()
        assert_alike(nn.SyncBatchNorm.convert_sync_batchnorm(model), twin, x)

    def test_pickles_of_the_time_before(self):
        """The name was an attribute of a layer, and the list an nn.ModuleList."""
        model, _, x = pair()
        expected = model(x)
        old = nn.ModuleList()
        for layer in model.layers:
            linear = fastmlp.Linear(layer.in_features, layer.out_features, device="meta")
            linear.weight, linear.bias = layer.weight, layer.bias
            state = {key: value for key, value in linear.__dict__.items() if key != "_slot"}
            old.append(fastmlp.Linear.__new__(fastmlp.Linear))
            old[-1].__setstate__({**state, "activation": layer.activation})
        back = fastmlp.MLP.__new__(fastmlp.MLP)
        back.__setstate__({**model.__dict__, "_modules": {"layers": old}})
        torch.testing.assert_close(back(x), expected)
        assert back.activations == NAMES


class TestConversion:
    def test_replaced_layers_to_torch(self):
        model, _, x = pair()
        model.layers[0].register_forward_hook(lambda module, args, out: 2 * out)
        model.layers[1] = LoRA(model.layers[1])
        model.layers[2] = fastmlp.Linear(8, 3, activation="silu", dtype=torch.float64)
        torch.testing.assert_close(model.to_torch()(x), model(x))
        model.layers[2].register_forward_hook(lambda module, args, out: 2 * out)
        torch.testing.assert_close(model.to_torch()(x), model(x))

    def test_from_an_mlp(self):
        model, _, x = pair()
        both = nn.Sequential(nn.Flatten(), model, nn.Linear(3, 2, dtype=torch.float64), nn.Softmax(-1))
        torch.testing.assert_close(fastmlp.MLP.from_torch(both)(x), both(x))
        layers = nn.Sequential(*model.layers)
        torch.testing.assert_close(fastmlp.MLP.from_torch(layers)(x), layers(x))

    def test_from_an_mlp_that_is_more(self):
        class Scaled(fastmlp.MLP):
            def forward(self, x: Tensor) -> Tensor:
                return 3 * super().forward(x)

        with pytest.raises(TypeError, match="Scaled has another forward than MLP"):
            fastmlp.MLP.from_torch(Scaled(SIZES))
        for change in (lambda m: m.layers.append(LoRA(nn.Linear(3, 3))), lambda m: m.layers.append(nn.ReLU())):
            model, _, _ = pair()
            change(model)
            with pytest.raises(TypeError, match="no place for the replaced layer"):
                fastmlp.MLP.from_torch(model)
        for change in (
            lambda m: m.register_forward_hook(lambda *args: None),
            lambda m: m[0].register_forward_pre_hook(lambda *args: None),
            lambda m: setattr(m, "forward", lambda x: x),
        ):
            outer = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
            change(outer)
            with pytest.raises(ValueError, match=r"has hooks .* or a patched forward"):
                fastmlp.MLP.from_torch(outer)

    def test_compiled_modules(self):
        class Compiled(nn.Module):
            """As torch.compile's, whose import takes seconds."""

            def __init__(self, module: nn.Module) -> None:
                super().__init__()
                self._orig_mod = module
                self.forward = module.forward

        model, twin, x = pair()
        torch.testing.assert_close(fastmlp.MLP.from_torch(Compiled(twin))(x), model(x))


_PARALLEL = """
import tempfile, torch, torch.distributed as dist, fastmlp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

with tempfile.TemporaryDirectory() as folder:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    def sharded(model):
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    wraps = nn.parallel.DistributedDataParallel, sharded, lambda model: fully_shard(model, mesh=mesh), nn.DataParallel
    x = torch.randn(6, 4)
    for wrap in wraps:
        torch.manual_seed(0)
        model = fastmlp.MLP((4, 8, 3), "tanh")
        model(x).square().sum().backward()
        expected = [(name, p.grad) for name, p in model.named_parameters()]
        model.zero_grad()
        wrapped = wrap(model)
        wrapped(x).square().sum().backward()
        for (name, grad), (got, p) in zip(expected, wrapped.named_parameters(), strict=True):
            assert got.removeprefix("module.") == name
            torch.testing.assert_close(p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad, grad)
        try:
            fastmlp.MLP.from_torch(wrapped)
        except TypeError as error:
            assert "communicates when it is called" in str(error)
        else:
            raise AssertionError("from_torch unwrapped it")
        if not isinstance(wrapped, fastmlp.MLP):
            try:
                fastmlp.TrainStep(wrapped)
            except TypeError as error:
                assert "from_torch" not in str(error) and "autograd" in str(error)
    dist.destroy_process_group()
"""


def test_parallel_modules():
    """DistributedDataParallel and FSDP2 train an MLP, and nothing unwraps them silently."""
    run = subprocess.run([sys.executable, "-c", _PARALLEL], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


def test_what_wraps_a_linear_applies_its_activation_once():
    class Wrapper(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    model, x = fastmlp.MLP((4, 4, 4)), torch.randn(3, 4)
    model.layers[0] = fastmlp.Linear(4, 4, activation="tanh")
    expected = model(x)
    model.layers[0] = Wrapper(model.layers[0])
    torch.testing.assert_close(model(x), expected)
