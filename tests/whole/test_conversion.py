"""MLP.from_torch, to_torch, state dicts, copies and pickles."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fastmlp
from fastmlp.activations import ACTIVATIONS, LEAKY_SLOPE

SIZES = (12, 9, 7, 4)


class TestCopies:
    @pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_deepcopy_and_pickle(self, copier):
        """pickle is for processes that pass a model on (multiprocessing), not for files."""
        model = fastmlp.MLP(SIZES, ["gelu", "step"])
        twin = copier(model)
        x = torch.randn(5, 12)
        assert torch.equal(twin(x), model(x))
        assert twin.activations == model.activations
        assert twin.sizes == model.sizes
        with torch.no_grad():
            twin.layers[0].weight.zero_()
        assert model.layers[0].weight.any()

    def test_state_dict_round_trip(self):
        model, other = fastmlp.MLP(SIZES), fastmlp.MLP(SIZES)
        assert other.load_state_dict(model.state_dict()).missing_keys == []
        x = torch.randn(5, 12)
        assert torch.equal(other(x), model(x))

    def test_state_dict_of_torchs_layers(self):
        """nn.Linear's order and layout: the tensors go into a module of torch's and back."""

        class Plain(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(SIZES))

            def forward(self, x: Tensor) -> Tensor:
                for layer in self.layers[:-1]:
                    x = torch.sigmoid(layer(x))
                return self.layers[-1](x)

        plain, model = Plain(), fastmlp.MLP(SIZES)
        model.load_state_dict(plain.state_dict())
        x = torch.randn(5, 12)
        torch.testing.assert_close(model(x), plain(x))
        other = Plain()
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x), plain(x))

    def test_in_a_sequential(self):
        model = nn.Sequential(nn.Flatten(), fastmlp.MLP(SIZES, "relu"), nn.LogSoftmax(1))
        assert next(iter(model.state_dict())) == "1.layers.0.weight"
        assert model(torch.randn(5, 3, 4)).exp().sum().item() == pytest.approx(5, rel=1e-5)

    def test_weights_only_file(self):
        model, other = fastmlp.MLP(SIZES), fastmlp.MLP(SIZES)
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        buffer.seek(0)
        other.load_state_dict(torch.load(buffer, weights_only=True))
        assert torch.equal(other.layers[2].bias, model.layers[2].bias)

    def test_moving_keeps_the_parameters(self):
        model = fastmlp.MLP(SIZES)
        parameters = list(model.parameters())
        model.to(torch.float64)
        assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


class TestFromAndToTorch:
    def test_quickstart_network(self):
        """The network of PyTorch's quickstart: a Flatten, then a Sequential inside a module."""

        class NeuralNetwork(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.flatten = nn.Flatten()
                self.stack = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 4))

            def forward(self, x: Tensor) -> Tensor:
                return self.stack(self.flatten(x))

        theirs = NeuralNetwork()
        rng = torch.get_rng_state()
        ours = fastmlp.MLP.from_torch(theirs)
        assert torch.equal(torch.get_rng_state(), rng)
        assert ours.sizes == SIZES
        assert ours.activations == ("relu", "relu", "identity")
        assert all(a is b for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
        x = torch.randn(5, 3, 4)
        torch.testing.assert_close(ours(x), theirs(x))

    def test_an_optimizer_of_the_module_trains_the_mlp(self):
        theirs = nn.Sequential(nn.Linear(12, 4), nn.Sigmoid())
        optimizer = torch.optim.SGD(theirs.parameters(), lr=1.0)
        ours = fastmlp.MLP.from_torch(theirs)
        x = torch.randn(5, 12)
        before = ours(x)
        before.sum().backward()
        optimizer.step()
        torch.testing.assert_close(ours(x), theirs(x))
        assert not torch.equal(ours(x), before)

    def test_one_activation_module_used_twice(self):
        relu = nn.ReLU()
        theirs = nn.Sequential(nn.Linear(12, 9), relu, nn.Linear(9, 7), relu, nn.Linear(7, 4))
        ours = fastmlp.MLP.from_torch(theirs)
        assert ours.activations == ("relu", "relu", "identity")

    def test_one_layer_used_twice(self):
        linear = nn.Linear(6, 6)
        theirs = nn.Sequential(linear, nn.Tanh(), linear)
        ours = fastmlp.MLP.from_torch(theirs)
        assert len(list(ours.parameters())) == 2
        x = torch.randn(3, 6)
        torch.testing.assert_close(ours(x), theirs(x))

    def test_one_linear_layer(self):
        assert fastmlp.MLP.from_torch(nn.Linear(5, 3)).sizes == (5, 3)

    def test_identities_and_missing_biases(self):
        theirs = nn.Sequential(nn.Linear(12, 9, bias=False), nn.Identity(), nn.GELU(), nn.Identity(), nn.Linear(9, 4))
        ours = fastmlp.MLP.from_torch(theirs)
        assert ours.activations == ("gelu", "identity")
        assert ours.layers[0].bias is None
        x = torch.randn(5, 12)
        torch.testing.assert_close(ours(x), theirs(x))

    @pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a != "step"])
    def test_round_trip(self, activation):
        model = fastmlp.MLP(SIZES, [activation, "tanh", activation])
        theirs = model.to_torch()
        assert type(theirs[1]) is nn.Linear
        x = torch.randn(5, 3, 4)
        torch.testing.assert_close(theirs(x), model(x))
        back = fastmlp.MLP.from_torch(theirs)
        assert back.activations == model.activations
        assert back.sizes == model.sizes
        assert all(a is b for a, b in zip(back.parameters(), model.parameters(), strict=True))

    def test_own_layers(self):
        layers = nn.Sequential(fastmlp.Linear(12, 9, activation="silu"), nn.Linear(9, 4), nn.ReLU())
        assert fastmlp.MLP.from_torch(layers).activations == ("silu", "relu")

    @pytest.mark.parametrize(
        ("modules", "kind", "message"),
        [
            (
                [nn.Conv2d(1, 1, 3)],
                TypeError,
                r"no place for Conv2d.*expected nn.Linear, nn.Flatten or one of Identity",
            ),
            ([nn.Linear(5, 3), nn.Dropout1d(0.5)], TypeError, "no place for Dropout1d"),
            ([nn.Linear(5, 3), nn.Dropout(0.5)], ValueError, "after the last layer"),
            ([nn.Dropout(0.5), nn.Linear(5, 3)], ValueError, "before the first layer"),
            ([nn.Linear(5, 4), nn.Dropout(0.5), nn.Dropout(0.5), nn.Linear(4, 3)], ValueError, "after another one"),
            ([nn.Linear(5, 4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 3)], ValueError, "swap them"),
            ([nn.Linear(5, 4), nn.Dropout(1.0), nn.Linear(4, 3)], ValueError, "between 0 and 1"),
            ([nn.Linear(5, 3), nn.LeakyReLU(0.2)], TypeError, "no place for LeakyReLU.*slope 0.01, exact GELU"),
            ([nn.Linear(5, 3), nn.GELU(approximate="tanh")], TypeError, "no place for GELU"),
            ([nn.Linear(5, 3), nn.Softmax(0)], TypeError, "no place for Softmax"),
            ([nn.ReLU(), nn.Linear(5, 3)], ValueError, r"ReLU\(\) does not follow a linear layer"),
            ([nn.Linear(5, 3), nn.ReLU(), nn.Tanh()], ValueError, r"Tanh\(\) does not follow a linear layer"),
            ([nn.Linear(5, 3), nn.Linear(4, 2)], ValueError, "follows a layer with 3 outputs; expected in_features=3"),
            ([nn.Linear(5, 3), nn.Flatten()], ValueError, "after 1 linear layers: nn.Flatten is accepted only before"),
            ([nn.Flatten(0), nn.Linear(5, 3)], ValueError, "start_dim=1"),
            ([nn.Flatten(1, 2), nn.Linear(5, 3)], ValueError, "end_dim=-1"),
            ([nn.Flatten()], ValueError, "found no nn.Linear in Sequential"),
            ([parametrizations.weight_norm(nn.Linear(5, 3))], TypeError, "computed, not a parameter; remove"),
            ([prune.identity(nn.Linear(5, 3), "weight")], ValueError, "has hooks"),
            ([nn.Linear(5, 3), nn.Bilinear(3, 3, 2)], TypeError, "no place for Bilinear"),
        ],
        ids=str,
    )
    def test_modules_that_are_no_mlp(self, modules, kind, message):
        with pytest.raises(kind, match=message):
            fastmlp.MLP.from_torch(nn.Sequential(*modules))

    def test_subclass_with_its_own_forward(self):
        class Scaled(nn.Linear):
            def forward(self, input: Tensor) -> Tensor:
                return 2 * super().forward(input)

        with pytest.raises(TypeError, match="no place for Scaled"):
            fastmlp.MLP.from_torch(nn.Sequential(Scaled(5, 3)))

    def test_step_has_no_torch_module(self):
        with pytest.raises(ValueError, match="torch has no module for the activation 'step'"):
            fastmlp.MLP(SIZES, "step").to_torch()

    def test_every_other_activation_has(self):
        assert nn.LeakyReLU().negative_slope == LEAKY_SLOPE
        assert set(fastmlp.nn.mlp._TORCH_MODULES) == set(ACTIVATIONS) - {"step"}
