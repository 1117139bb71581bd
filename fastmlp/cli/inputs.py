"""How rows of data become a model's inputs, and what its outputs mean, for new models and those of checkpoints."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastmlp.base.losses import STEP_LOSSES
from fastmlp.data.described import numbers, shown
from fastmlp.data.fashion_mnist import CLASSES, IMAGE_SIZE
from fastmlp.train.scores import takes_values, tensors

from .common import UserError

if TYPE_CHECKING:
    import torch

    from fastmlp.data import Standardization
    from fastmlp.data.load import Samples

#: The share of the training rows that is held out where the data have no test set.
DEFAULT_SHARE = 0.2
HIDDEN = (512, 512)


def share_of(test: Samples | None, share: float | None) -> float:
    """The share of the training rows to hold out: ``share``, or what --validation's help says."""
    return share if share is not None else DEFAULT_SHARE if test is None else 0.0


def divided(train: Samples, share: float, seed: int) -> tuple[Samples, Samples | None]:
    """(training rows, validation rows): ``share`` of them; None for 0."""
    from fastmlp.train import held_out

    if share == 0:
        return train, None
    try:
        kept, held = held_out(tensors(train)[1], share, seed)
    except ValueError as error:
        raise UserError(f"--validation: {error}") from error
    return train.rows(kept, "train"), train.rows(held, "validation")


@dataclass(frozen=True)
class Format:
    """What a model takes and gives, kept in the configuration of its checkpoint.

    Attributes:
        inputs, outputs: the first and the last size.
        loss: the loss that it was trained with.
        classes: names of its outputs; None for values.
        shape: of one row of the data; None where it is not known.
        standardization: what floating-point features go through; None for uint8 pixels.
    """

    inputs: int
    outputs: int
    loss: str
    classes: tuple[str, ...] | None
    shape: tuple[int, ...] | None = None
    standardization: Standardization | None = None

    @classmethod
    def of(cls, train: Samples, loss: str) -> Format:
        """The format of a model for these training data; UserError if they are of one class only."""
        from fastmlp.data import Standardization

        x, y = tensors(train)
        if train.classes is not None and int(y.min()) == int(y.max()):
            name = train.classes[int(y[0])]
            raise UserError(f"the training data {train.source} have only one class, {name!r}; expected two or more")
        outputs = y.shape[1] if train.classes is None else len(train.classes)
        scale = Standardization.of(x) if x.is_floating_point() else None
        return cls(x.shape[1], outputs, loss, train.classes, train.shape, scale)

    @classmethod
    def of_checkpoint(cls, config: dict[str, Any], sizes: tuple[int, ...], path: str) -> Format:
        """The format in a checkpoint's configuration; FashionMNIST's where an older checkpoint has none."""
        from fastmlp.data import Standardization

        loss, scale, shape = config.get("loss", "cross_entropy"), config.get("standardization"), config.get("shape")
        wrong = f"the configuration of the checkpoint {path} is damaged"
        if not isinstance(loss, str) or loss not in STEP_LOSSES:
            raise UserError(f"{wrong}: its loss is {loss!r}; expected one of {', '.join(STEP_LOSSES)}")
        classes = None if takes_values(loss) else config.get("classes", list(CLASSES))
        if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
            raise UserError(f"{wrong}: expected classes to be a list of names")
        if classes is not None and "classes" in config and len(classes) != sizes[-1]:
            raise UserError(f"{wrong}: it has {len(classes)} names of classes and {sizes[-1]} outputs")
        if shape is not None:
            good = isinstance(shape, list) and all(isinstance(n, int) and n > 0 for n in shape)
            if not good or math.prod(shape) != sizes[0]:
                raise UserError(f"{wrong}: its rows have the shape {shape}, and the model takes {sizes[0]} inputs")
            shape = tuple(shape)
        try:
            scale = None if scale is None else Standardization.from_dict(scale, sizes[0])
        except ValueError as error:
            raise UserError(f"{wrong}: standardization: {error}") from error
        found = cls(sizes[0], sizes[-1], loss, None if classes is None else tuple(classes), shape, scale)
        if found.classes == CLASSES and shape is None and scale is None:  # a checkpoint of an older fastmlp
            check_sizes(sizes, f"the checkpoint {path} has sizes", FASHION_MNIST)
            found = dataclasses.replace(found, shape=IMAGE_SIZE)
        return found

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of a network of the default hidden layers."""
        return (self.inputs, *HIDDEN, self.outputs)

    @property
    def is_fashion_mnist(self) -> bool:
        """Whether the model takes the pictures of clothing, as `fastmlp.data.images.load_image` makes them."""
        return self.classes == CLASSES and self.shape == IMAGE_SIZE and self.standardization is None

    @property
    def is_of_images(self) -> bool:
        """Whether a row is the pixels of an image."""
        shape = self.shape or ()
        return self.standardization is None and (len(shape) == 2 or (len(shape) == 3 and shape[2] == 3))

    def as_config(self) -> dict[str, Any]:
        """The entries of a checkpoint's configuration."""
        entries: dict[str, Any] = {"loss": self.loss}
        if self.classes is not None:
            entries["classes"] = list(self.classes)
        if self.shape is not None:
            entries["shape"] = list(self.shape)
        if self.standardization is not None:
            entries["standardization"] = self.standardization.as_dict()
        return entries

    def transformed(self, x: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
        """Rows [N, features] as the model takes them; UserError for rows of another kind. ``name`` names them."""
        if x.shape[1] != self.inputs:
            raise UserError(f"{name} has {x.shape[1]} features, but the model takes {self.inputs}")
        if x.is_floating_point() != (self.standardization is not None):
            kinds = ("uint8 pixels", "floating-point numbers")
            raise UserError(
                f"{name} has {kinds[x.is_floating_point()]}, but the model was trained on "
                f"{kinds[not x.is_floating_point()]}"
            )
        return x if self.standardization is None else self.standardization(x, dtype)

    def fitted(self, data: Samples, dtype: torch.dtype) -> Samples:
        """The data as a model in ``dtype`` takes them; UserError for data of another kind or of other classes."""
        import torch

        from fastmlp.data import ImageDataset

        x, y = tensors(data)
        x = self.transformed(x, dtype, f"the data {data.source}")
        if self.classes is None:
            y = y.to(torch.promote_types(dtype, torch.float32))
            if y.shape[1] != self.outputs:
                raise UserError(f"{data.source} has {y.shape[1]} values per row, but the model gives {self.outputs}")
        else:
            y = self._renumbered(y, data)
        if isinstance(data, ImageDataset):
            return dataclasses.replace(data, labels=y, classes=self.classes or ())
        return dataclasses.replace(data, x=x, y=y, classes=self.classes)

    def _renumbered(self, y: torch.Tensor, data: Samples) -> torch.Tensor:
        """Class numbers of the data as class numbers of the model, by the names if both have names."""
        import torch

        theirs, ours = data.classes or (), self.classes or ()
        if theirs == ours:
            return y
        if numbers(len(theirs)) == theirs or numbers(len(ours)) == ours:
            if len(theirs) <= len(ours):
                return y
        elif set(theirs) <= set(ours):
            return torch.tensor([ours.index(name) for name in theirs], device=y.device)[y]
        raise UserError(
            f"{data.source} has the {len(theirs)} classes {shown(theirs)}, but the model has the {len(ours)} classes "
            f"{shown(ours)}"
        )


FASHION_MNIST = Format(math.prod(IMAGE_SIZE), len(CLASSES), "cross_entropy", CLASSES, IMAGE_SIZE)


def check_sizes(sizes: tuple[int, ...], what: str, wanted: Format) -> None:
    """UserError unless a model of ``sizes`` has the inputs and the outputs of the data."""
    if (sizes[0], sizes[-1]) == (wanted.inputs, wanted.outputs):
        return
    of = f"{' x '.join(map(str, wanted.shape))} pixels" if wanted.is_of_images and wanted.shape else "features"
    raise UserError(
        f"{what} {'-'.join(map(str, sizes))} must start with {wanted.inputs} ({of}) and end with {wanted.outputs} "
        f"{'values' if wanted.classes is None else 'classes'}, such as {'-'.join(map(str, wanted.sizes))}"
    )
