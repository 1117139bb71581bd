"""The contenders of the time to accuracy: each trains 784-512-512-10 on FashionMNIST in its own way.

A learner builds a ``Session``, which trains a part of an epoch per call, so that the clock can stop for a look at the
accuracy. All start from nn.Linear's own starting values for a seed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import fastmlp
from bench.presets import REFERENCE
from bench.rivals.jax_step import import_jax
from bench.rivals.protocol import OK, Availability, installed, needs
from fastmlp.train.schedules import lr_factors

__all__ = ["LEARNERS", "Data", "Learner", "Session", "Settings"]


@dataclass(frozen=True)
class Settings:
    """The settings of a training run: ReLU, plain or Nesterov SGD, a constant or falling learning rate."""

    lr: float
    batch: int = 64
    momentum: float = 0.0
    schedule: str = "constant"
    epochs: int = 10

    def most_epochs(self, asked: int | None) -> int:
        """The epochs to train: ``asked``, or those of the settings. A schedule that falls to 0 cannot be prolonged."""
        if asked is None or self.schedule == "constant":
            return asked or self.epochs
        return min(asked, self.epochs)

    def __str__(self) -> str:
        momentum = f"Nesterov momentum {self.momentum:g}, " if self.momentum else ""
        over = "" if self.schedule == "constant" else f" over {self.epochs} epochs"
        return f"ReLU, batch {self.batch}, SGD, {momentum}lr {self.lr:g} ({self.schedule}{over})"


#: The tutorial's batch size and optimizer, with a constant learning rate. The rate was found by a search in the
#: tutorial's order of the images, with seed 0, at most 20 epochs and four looks per epoch. These were the epochs to a
#: test accuracy; 90 % was never reached.
#:
#:     lr        0.03    0.05    0.1     0.2     0.3     0.5     1.0
#:     88.33 %   19.25   12.25    9.5    10.25   10.25   never   never
#:     89 %      never   19.25   14.25   never   never   never   never
TUTORIAL = Settings(lr=0.1)
#: What ``fastmlp train --activation relu`` trains with.
OWN = Settings(lr=0.1, batch=128, momentum=0.9, schedule="linear", epochs=10)


@dataclass(frozen=True, eq=False)
class Data:
    """Images uint8 [N, 784] and labels int64 [N] of training and test data, on the device."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    source: str

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        return self.images.device


class Session(Protocol):
    """A model in training."""

    def reset(self, seed: int) -> None:
        """Return to the starting values of a seed."""

    def train(self, epoch: int, part: int, parts: int) -> None:
        """Train the part-th of ``parts`` of an epoch; parts and epochs come in order."""

    def warm_up(self) -> None:
        """Do everything that happens once: compilation, measurements, capture; ``reset`` undoes the training."""

    def finish(self) -> None:
        """Wait for what was started."""

    def accuracy(self) -> float:
        """Share of the test data classified rightly, 0 to 1."""


class Learner(Protocol):
    """One contender: how it trains, and with which settings."""

    @property
    def name(self) -> str:
        """One word, as in the results."""

    @property
    def label(self) -> str:
        """A few words, as in tables."""

    @property
    def settings(self) -> Settings:
        """Its settings."""

    def available(self, device: torch.device) -> Availability:
        """Whether it runs here."""

    def build(self, data: Data) -> Session:
        """A session, before its first ``reset``."""


def _network() -> nn.Sequential:
    layers: list[nn.Module] = []
    for k, n in itertools.pairwise(REFERENCE):
        layers += [nn.Linear(k, n), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *layers[:-1])


def _start(seed: int) -> list[Tensor]:
    """nn.Linear's starting values for a seed: W_1, b_1, ..."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return [p.detach() for p in _network().parameters()]


class _TorchSession:
    """What sessions with torch tensors as parameters share: the order of an epoch, and the test."""

    def __init__(self, data: Data, settings: Settings) -> None:
        self.data, self.settings = data, settings
        self.model = _network().to(data.device)
        self.seed = 0
        self.order = torch.empty(0, dtype=torch.int64)

    def reset(self, seed: int) -> None:
        self.seed = seed
        with torch.no_grad():
            for p, value in zip(self.model.parameters(), _start(seed), strict=True):
                p.copy_(value)

    def rows(self, epoch: int, part: int, parts: int) -> Tensor:
        """The rows of a part, in the order of the epoch; all parts but the last are whole batches."""
        n, batch = len(self.data.labels), self.settings.batch
        if part == 0:
            generator = torch.Generator().manual_seed(1000 * self.seed + epoch)
            self.order = torch.randperm(n, generator=generator).to(self.data.device)
        steps = -(-n // batch)
        return self.order[batch * (steps * part // parts) : batch * (steps * (part + 1) // parts)]

    def finish(self) -> None:
        if self.data.device.type == "cuda":
            torch.cuda.synchronize()

    @torch.no_grad()
    def accuracy(self) -> float:
        images, labels = self.data.test_images, self.data.test_labels
        right = sum(
            int((self.model(x.float() / 255).argmax(1) == y).sum())
            for x, y in zip(images.split(2500), labels.split(2500), strict=True)
        )
        return right / len(labels)


class _QuickstartSession(_TorchSession):
    """Dataset and DataLoader as in the tutorial: the images in order, ToTensor for one image at a time."""

    def __init__(self, data: Data, settings: Settings) -> None:
        super().__init__(data, settings)
        from torchvision.datasets import FashionMNIST, VisionDataset
        from torchvision.transforms import ToTensor

        class InMemory(FashionMNIST):
            def __init__(self) -> None:
                VisionDataset.__init__(self, "", transform=ToTensor())
                self.data, self.targets = data.images.cpu().view(-1, 28, 28), data.labels.cpu()

        self.loader: Any = torch.utils.data.DataLoader(InMemory(), batch_size=settings.batch)
        self.batches: Iterator[Any] = iter(())
        self.loss = nn.CrossEntropyLoss()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=settings.lr)

    def step(self, x: Tensor, y: Tensor) -> None:
        x, y = x.to(self.data.device), y.to(self.data.device)
        loss = self.loss(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def train(self, epoch: int, part: int, parts: int) -> None:
        if part == 0:
            self.batches = iter(self.loader)
        steps = len(self.loader)
        for x, y in itertools.islice(self.batches, steps * (part + 1) // parts - steps * part // parts):
            self.step(x, y)

    def warm_up(self) -> None:
        for x, y in itertools.islice(iter(self.loader), 3):
            self.step(x, y)


class _ResidentSession(_TorchSession):
    """Data on the device, shuffled; module, autograd and optimizer as in the tutorial, or compiled."""

    def __init__(self, data: Data, settings: Settings, *, compiled: bool) -> None:
        super().__init__(data, settings)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=settings.lr)
        loss = nn.CrossEntropyLoss()

        def loss_of(x: Tensor, y: Tensor) -> Tensor:
            return loss(self.model(x.float() / 255), y)

        self.loss_of: Any = torch.compile(loss_of) if compiled else loss_of
        self.update: Any = torch.compile(self.optimizer.step) if compiled else self.optimizer.step

    def train(self, epoch: int, part: int, parts: int) -> None:
        for rows in self.rows(epoch, part, parts).split(self.settings.batch):
            self.step(rows)

    def step(self, rows: Tensor) -> None:
        self.loss_of(self.data.images[rows], self.data.labels[rows]).backward()
        self.update()
        self.optimizer.zero_grad()

    def warm_up(self) -> None:
        n, batch = len(self.data.labels), self.settings.batch
        every = torch.arange(n, device=self.data.device)
        for rows in (every[:batch], every[:batch], every[: n % batch or batch], every[:batch]):
            self.step(rows)


class _FastSession(_TorchSession):
    """fastmlp.TrainStep.epoch: the step gathers and scales the pixels itself."""

    def __init__(self, data: Data, settings: Settings) -> None:
        super().__init__(data, settings)
        self.mlp = fastmlp.MLP.from_torch(self.model)
        self.factors = lr_factors(settings.schedule, settings.epochs * -(-len(data.labels) // settings.batch))
        self.fresh()

    def fresh(self) -> None:
        """A new optimizer."""
        momentum = self.settings.momentum
        self.step = fastmlp.TrainStep(self.mlp, lr=self.settings.lr, momentum=momentum, nesterov=momentum > 0)
        self.taken = 0

    def reset(self, seed: int) -> None:
        super().reset(seed)
        self.fresh()

    def train(self, epoch: int, part: int, parts: int) -> None:
        rows = self.rows(epoch, part, parts)
        steps = -(-len(rows) // self.settings.batch)
        factors = self.factors[self.taken : self.taken + steps]
        self.step.epoch(self.data.images, self.data.labels, self.settings.batch, rows, factors)
        self.taken += steps

    def warm_up(self) -> None:
        n, batch = len(self.data.labels), self.settings.batch
        rows = torch.arange(2 * batch + n % batch, device=self.data.device) % n
        self.step.epoch(self.data.images, self.data.labels, batch, rows)


class _JaxSession:
    """Gather, scaling, loss, gradient and update in one jit with donated parameters."""

    def __init__(self, data: Data, settings: Settings) -> None:
        self.jax = jax = import_jax()
        jnp = jax.numpy
        self.settings, self.n, self.seed = settings, len(data.labels), 0
        self.images, self.labels = jnp.array(data.images.cpu().numpy()), jnp.array(data.labels.cpu().numpy())
        self.test_images = jnp.array(data.test_images.cpu().numpy())
        self.test_labels = jnp.array(data.test_labels.cpu().numpy())

        def logits(params: Any, x: Any) -> Any:
            a = x.astype(jnp.float32) / 255
            for i in range(0, len(params), 2):
                a = jax.lax.dot_general(a, params[i], (((1,), (1,)), ((), ()))) + params[i + 1]
                a = jax.nn.relu(a) if i < len(params) - 2 else a
            return a

        def loss_of(params: Any, images: Any, labels: Any, rows: Any) -> Any:
            log_p = jax.nn.log_softmax(logits(params, images[rows]))
            return -jnp.take_along_axis(log_p, labels[rows][:, None], 1).mean()

        def step(params: Any, images: Any, labels: Any, rows: Any) -> Any:
            grads = jax.grad(loss_of)(params, images, labels, rows)
            return [p - settings.lr * g for p, g in zip(params, grads, strict=True)]

        self.step = jax.jit(step, donate_argnums=0)
        self.right = jax.jit(lambda params, x, y: (logits(params, x).argmax(1) == y).mean())
        self.params: Any = None
        self.order: Any = None

    def reset(self, seed: int) -> None:
        self.seed = seed
        self.params = [self.jax.numpy.array(p.numpy()) for p in _start(seed)]

    def take(self, rows: Any) -> None:
        self.params = self.step(self.params, self.images, self.labels, rows)

    def train(self, epoch: int, part: int, parts: int) -> None:
        batch = self.settings.batch
        if part == 0:
            generator = torch.Generator().manual_seed(1000 * self.seed + epoch)
            self.order = torch.randperm(self.n, generator=generator).numpy()
        steps = -(-self.n // batch)
        for i in range(steps * part // parts, steps * (part + 1) // parts):
            self.take(self.order[batch * i : batch * (i + 1)])

    def warm_up(self) -> None:
        self.reset(0)
        batch = self.settings.batch
        every = torch.arange(self.n).numpy()
        for rows in (every[:batch], every[: self.n % batch or batch], every[:batch]):
            self.take(rows)

    def finish(self) -> None:
        self.jax.block_until_ready(self.params)

    def accuracy(self) -> float:
        return float(self.right(self.params, self.test_images, self.test_labels))


@dataclass
class _Quickstart:
    name: str = "quickstart"
    label: str = "PyTorch quickstart as written, tuned learning rate"
    settings: Settings = TUTORIAL

    def available(self, device: torch.device) -> Availability:
        return OK

    def build(self, data: Data) -> Session:
        return _QuickstartSession(data, self.settings)


@dataclass
class _Resident:
    name: str
    label: str
    compiled: bool
    settings: Settings = TUTORIAL

    def available(self, device: torch.device) -> Availability:
        return OK

    def build(self, data: Data) -> Session:
        return _ResidentSession(data, self.settings, compiled=self.compiled)


@dataclass
class _Jax:
    name: str = "jax"
    label: str = "JAX jit, data on the device"
    settings: Settings = TUTORIAL

    def available(self, device: torch.device) -> Availability:
        here = installed("jax")
        if not here.ok:
            return here
        platform = import_jax().default_backend()
        return needs(((platform == "gpu") == (device.type == "cuda"), f"this JAX computes on the {platform}"))

    def build(self, data: Data) -> Session:
        return _JaxSession(data, self.settings)


@dataclass
class _Fast:
    name: str = "fastmlp"
    label: str = "fastmlp TrainStep"
    settings: Settings = field(default=TUTORIAL)

    def available(self, device: torch.device) -> Availability:
        return OK

    def build(self, data: Data) -> Session:
        return _FastSession(data, self.settings)


LEARNERS: tuple[Learner, ...] = (
    _Quickstart(),
    _Resident("resident", "PyTorch eager, data on the device", compiled=False),
    _Resident("compile", "torch.compile, data on the device", compiled=True),
    _Jax(),
    _Fast(),
    _Fast("fastmlp_own_recipe", "fastmlp with its own settings", OWN),
)
