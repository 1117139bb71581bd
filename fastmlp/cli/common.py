"""What the commands share: options, devices, data and models, and the report of user errors."""

from __future__ import annotations

import math
import platform
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fastmlp.base.names import did_you_mean

if TYPE_CHECKING:
    import torch

    from fastmlp.data.load import Samples
    from fastmlp.nn import MLP

BACKENDS = ("auto", "triton", "torch")  # fastmlp.backend has the same, but importing it imports torch

INPUT_ERRORS = (OSError, RuntimeError, TypeError, ValueError)  # what fastmlp's functions raise for wrong input

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


class UserError(click.ClickException):
    """The input is wrong, or this machine lacks what was asked for: one line on stderr, exit code 2."""

    exit_code = 2


class Failure(click.ClickException):
    """The input was right and the work failed: one line on stderr, exit code 1."""

    exit_code = 1


@contextmanager
def user_errors(kinds: tuple[type[Exception], ...] = INPUT_ERRORS) -> Iterator[None]:
    """Report the given types of exception as user errors, in the words of the command line.

    Only calls that check the user's input belong inside, so that a bug still shows its traceback.
    """
    try:
        yield
    except kinds as error:
        raise UserError(in_options(str(error)) or type(error).__name__) from error


#: What the library's messages call an argument -> what the command line calls it.
_OPTIONS = (
    ("root=FOLDER in Python, --data FOLDER on the command line", "--data FOLDER"),
    ("eave root out", "eave --data out"),
    ("eave source out", "eave --data out"),
    ("rows that ignore_index leaves out", "rows that --ignore-index leaves out"),
    ("take a loss of values, such as mse", "use --loss mse for values"),
    ("name its folder, or ask for the quick form", "name its folder with --data, or use --quick"),
    ("use backend 'auto' or 'torch'", "use --backend auto or --backend torch"),
    ("move the tensors, ", ""),
    ("convert the tensors, or ", ""),
)


def in_options(text: str) -> str:
    """A message of the library in the words of the command line: options instead of arguments."""
    for argument, option in _OPTIONS:
        text = text.replace(argument, option)
    return text


def say(kind: str, text: str) -> None:
    """One line on stderr, of the ``kind`` "error" or "warning", in the words of the command line."""
    with suppress(OSError):
        click.echo(f"fastmlp: {kind}: {' '.join(in_options(text).split())}", err=True)


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch or Python found no memory: torch has a type of its own for this on GPUs only."""
    import torch

    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


class Terminated(KeyboardInterrupt):
    """SIGTERM, by which a scheduler or ``kill`` ends a process, has come."""


def _terminated(number: int, frame: object) -> None:
    raise Terminated


@contextmanager
def termination() -> Iterator[None]:
    """SIGTERM interrupts the work as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


class Stopping:
    """While its context lasts, the first Ctrl-C or SIGTERM asks the work to stop, and the second interrupts the work.

    Attributes:
        signal: the number of the signal that has come, or 0.
        asked: whether one has come.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether a signal has come."""
        return bool(self.signal)

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.getsignal(number)
                if callable(before):  # a shell starts its background jobs with SIGINT ignored
                    self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _ask(self, number: int, frame: Any) -> None:
        if self.signal:
            self._before[number](number, frame)
        self.signal = number

    def interrupt(self) -> None:
        """Interrupt the work now, if a signal has come."""
        if self.signal:
            raise Terminated if self.signal == signal.SIGTERM else KeyboardInterrupt


class Suggesting(click.Group):
    """A group that suggests the command that was probably meant."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's; the error for an unknown name has a suggestion."""
        suggestion = did_you_mean(args[0], self.list_commands(ctx))
        if suggestion and self.get_command(ctx, args[0]) is None:
            ctx.fail(f"No such command {args[0]!r}{suggestion}")
        return super().resolve_command(ctx, args)


class Choice(click.Choice[str]):
    """One of some names; the error for another name has a suggestion."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """As click's."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            if suggestion := did_you_mean(value, self.choices):
                self.fail(f"{error.message.rstrip('.')}{suggestion}", param, ctx)
            raise


class Folder(click.ParamType):
    """The name of a folder, which need not exist."""

    name = "folder"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name; a usage error if there is none. (An empty path would be the current folder.)"""
        if not value:
            self.fail("expected the name of a folder, got an empty text; '.' is the current folder", param, ctx)
        return str(value)


class Sizes(click.ParamType):
    """Layer sizes such as 784-512-512-10 (or with commas) as a tuple of ints."""

    name = "sizes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """The sizes as a tuple; a usage error if the value is no list of sizes."""
        if isinstance(value, tuple):
            return value
        try:
            sizes = tuple(int(part) for part in value.replace(",", "-").split("-"))
        except ValueError:
            sizes = ()
        if len(sizes) < 2 or min(sizes) < 1 or max(sizes) >= 2**31:
            self.fail(f"{value!r} is not two or more positive whole numbers such as 784-512-512-10", param, ctx)
        return sizes


class Number(click.ParamType):
    """A finite number in [least, below), or in (least, below) with ``least_is_open``."""

    name = "number"

    def __init__(self, least: float, below: float = math.inf, least_is_open: bool = False) -> None:
        self.least = least
        self.below = below
        self.least_is_open = least_is_open

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number; a usage error if the value is no number or outside the range."""
        relation = "above" if self.least_is_open else "of at least"
        upper = "" if self.below == math.inf else f" and below {self.below:g}"
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        least = number > self.least if self.least_is_open else number >= self.least
        if not (least and number < self.below):
            self.fail(f"{value!r} is not a finite number {relation} {self.least:g}{upper}", param, ctx)
        return number


class Numbers(click.ParamType):
    """Finite numbers such as 1,0.5,2 as a tuple of floats."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """The numbers; a usage error if the value is no list of numbers."""
        try:
            parts = value.split(",") if isinstance(value, str) else value
            numbers = tuple(float(part) for part in parts)
        except (TypeError, ValueError):
            numbers = ()
        if not numbers or not all(map(math.isfinite, numbers)):
            self.fail(f"{value!r} is not a list of finite numbers such as 1,0.5,2", param, ctx)
        return numbers


fashion_mnist_option = click.option(
    "--data",
    type=Folder(),
    metavar="FOLDER",
    help="Folder of the FashionMNIST files, or 'bundled' for the subset of 6,000 that comes with fastmlp.  "
    "[default: the cache, the system's folder, a download, the subset]",
)
data_option = click.option(
    "--data",
    type=Folder(),
    metavar="DATA",
    help="fashion-mnist; bundled, its subset of 6,000 that comes with fastmlp; torchvision:NAME; a folder of idx "
    "files, or of one subfolder of images per class; or FILE.npz with x and y.  [default: fashion-mnist]",
)
device_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="DEVICE",
    help="cpu, cuda or cuda:N; auto: cuda if there is one.",
)
backend_option = click.option(
    "--backend",
    type=Choice(BACKENDS),
    default="auto",
    show_default=True,
    help="What computes: the Triton kernels or plain torch; auto: Triton on a GPU.",
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object as the last line of standard output."
)


def machine_options(command: Decorated) -> Decorated:
    """``--device`` and ``--backend``."""
    return device_option(backend_option(command))


def select_device(name: str) -> torch.device:
    """The device that ``--device`` names; UserError if it is unknown or this machine does not have it."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    expected = "expected auto, cpu, cuda or cuda:N"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown device {name!r}; {expected}") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise UserError(f"device {name!r} is not supported; {expected}")
    if not torch.cuda.is_available():
        built = "torch finds no usable GPU" if torch.version.cuda or torch.version.hip else "torch is built for CPUs"
        raise UserError(f"device {name!r} is not available: {built}; use --device cpu, or see 'fastmlp doctor'")
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        raise UserError(f"device {name!r} is not available: this machine has cuda:0 to cuda:{count - 1}")
    return device


def select_backend(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Make ``name`` the backend of this process; returns the code that then runs on ``device``: "triton" or "torch"."""
    import torch

    from fastmlp import backend

    with user_errors():
        backend.set_backend(name)  # type: ignore[arg-type]
        return backend.resolve(torch.empty(0, device=device), dtype)


def load_data(source: str | None, device: torch.device, loss: str = "cross_entropy") -> tuple[Samples, Samples | None]:
    """(train, test) on ``device``, from what ``--data`` names; test is None where the data have no test set."""
    from fastmlp.data import load_data
    from fastmlp.train.scores import takes_values

    with user_errors():
        return load_data(source, device, values=takes_values(loss))


def load_model(path: str, device: torch.device) -> tuple[MLP, dict[str, Any]]:
    """The model of a checkpoint on ``device``, in evaluation mode, and the checkpoint's configuration."""
    import torch

    import fastmlp
    from fastmlp.train.checkpoint import CheckpointError, Shapes, load_checkpoint

    def model_of(config: dict[str, Any], on: torch.device) -> MLP:
        missing = [key for key in ("sizes", "activation", "dtype") if key not in config]
        if missing:
            raise UserError(f"the configuration of the checkpoint {path} lacks {', '.join(missing)}; train it anew")
        dtype = getattr(torch, str(config["dtype"]), None)
        if not isinstance(dtype, torch.dtype):
            raise UserError(f"the checkpoint {path} has dtype {config['dtype']!r}; expected one such as 'float32'")
        rest = {"device": on, "dtype": dtype, "dropout": config.get("dropout", 0.0)}
        return fastmlp.MLP(config["sizes"], config["activation"], config.get("bias", True), **rest)

    def check(config: dict[str, Any], found: Shapes) -> None:
        wrong = f"the weights of the checkpoint {path} do not fit its configuration"
        sizes = config.get("sizes")
        if isinstance(sizes, list) and len(sizes) > len(found) + 1:  # before a network of that size is made
            raise CheckpointError(f"{wrong}: {len(sizes)} sizes, but only {len(found)} tensors")
        # Tensors of the device "meta" have shapes and no memory.
        model = model_of(config, torch.device("meta"))
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        if shapes != found:
            name = min(set(shapes.items()) ^ set(found.items()))[0]
            raise CheckpointError(
                f"{wrong}: {name} is {found.get(name, 'missing')}, expected {shapes.get(name, 'none of that name')}"
            )

    with user_errors():
        state, config = load_checkpoint(path, device, check=check)
        model = model_of(config, device)
        model.load_state_dict(state)
    return model.eval(), config


def versions() -> dict[str, str | None]:
    """The versions of fastmlp, python, torch, triton and numpy; None for a package that is not installed."""
    from fastmlp import __version__

    found: dict[str, str | None] = {"fastmlp": __version__, "python": platform.python_version()}
    for package in ("torch", "triton", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found
