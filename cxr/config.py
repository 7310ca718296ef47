"""Every parameter once: default, help, choices, bounds and search range; all else is derived from here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields, replace
from typing import Any, ClassVar, Self, TypeVar

from cxr.errors import UserError
from cxr.parameters import Spec, check, option_name, param, parse, spec_of, text_of, types_of
from cxr.strategies import STRATEGIES, Phase

ARCHS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)
C = TypeVar("C", bound="CommandConfig")
SYNTHETIC = "synthetic"
MAX_SEED = 1_000_000_000  # torch and Philox take no more than 64 bits


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The parameters of one training run.

    Raises `UserError` naming the option to change when a value is out of its choices or bounds.
    """

    strategy: str = param(
        "partial",
        "which stages are trained, and when",
        choices=tuple(STRATEGIES),
        commands=("train", "tune", "crossval"),
    )
    arch: str = param("resnet18", "torchvision ResNet", choices=ARCHS)
    weights: str = param(
        "auto",
        "start from: auto (ImageNet, else random with a warning), imagenet (or fail), random, "
        "or a .pth/.safetensors file",
    )
    data_dir: str = param(
        SYNTHETIC, "folder holding train/ and test/ with NORMAL/ and PNEUMONIA/, or 'synthetic' phantoms"
    )
    image_size: int = param(224, "side of the square input, pixels", low=32, high=1024)
    resize: str = param(
        "squash",
        "how a rectangle becomes a square: squash (ignore the aspect), crop (the centre), pad (with black)",
        choices=("squash", "crop", "pad"),
    )
    val_split: str = param(
        "grouped",
        "validation images: grouped (a share of train+val, whole patients) or official (the val folder)",
        choices=("grouped", "official"),
    )
    val_fraction: float = param(0.1, "share of train+val that the grouped split holds out", above=0, high=0.5)
    split_seed: int = param(
        0, "seed of the grouped split; apart from `seed`, so that seeds share it", low=0, high=MAX_SEED
    )
    fold: str = param(
        "none",
        "hold out part k of n of train+val, by patient, in place of the test split: k/n, such as 2/5; or none",
        commands=("train",),
    )
    views: int = param(
        3,
        "augmented versions of each training image, cycled over the epochs; 0 trains without augmentation",
        low=0,
        high=1000,
    )
    batch_size: int = param(32, "images in a training step", low=2, high=4096, search=(16, 128), log=True)
    epochs: int = param(10, "maximum epochs per phase", low=1, high=10000)
    lr_head: float = param(
        1e-3, "learning rate of the phase that trains fc", above=0, high=10, search=(1e-5, 1e-1), log=True
    )
    lr_top: float = param(
        5e-4,
        "learning rate of the phase that trains layer4 and fc",
        above=0,
        high=10,
        search=(1e-6, 1e-2),
        log=True,
    )
    lr_all: float = param(
        1e-4,
        "learning rate of the phase that trains everything",
        above=0,
        high=10,
        search=(1e-6, 1e-2),
        log=True,
    )
    weight_decay: float = param(0.0, "Adam's L2 penalty", low=0, high=1, search=(0.0, 1e-2))
    step_size: int = param(5, "epochs after which StepLR lowers the learning rate", low=1, high=10000)
    gamma: float = param(0.5, "factor by which StepLR lowers it", above=0, high=1, search=(0.1, 1.0))
    patience: int = param(5, "epochs without a better validation loss before a phase stops", low=1, high=10000)
    seed: int = param(0, "seed of the head's initial weights, the order of images and the views", low=0, high=MAX_SEED)
    device: str = param(
        "auto",
        "where to compute; auto takes cuda, then mps, then cpu",
        choices=("auto", "cpu", "cuda", "mps"),
    )
    precision: str = param(
        "auto",
        "training arithmetic; auto is bf16 on a GPU that has it, fp16 with loss scaling on other GPUs, "
        "fp32 on the CPU. The result is evaluated in fp32",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    compile: str = param(
        "none",
        "make training steps faster, where the run is long enough to pay for it: inductor (torch.compile), graphs "
        "(CUDA graphs), or none",
        choices=("none", "inductor", "graphs"),
    )
    select: str = param(
        "val_loss",
        "what picks the best epoch and the champion: the validation loss, or its mean over stressed copies "
        "(contrast, blur, scale, compression)",
        choices=("val_loss", "stressed_val_loss"),
    )
    calibration: str = param(
        "temperature",
        "how logits become probabilities, fitted on validation: temperature scaling, Platt's method, or none",
        choices=("temperature", "platt", "none"),
    )
    threshold: str = param(
        "youden",
        "rule that chooses the decision threshold on validation: youden, f1, sensitivity>=0.95, "
        "cost 5:1 (missed : false alarm), or a number",
    )
    on_bad_image: str = param(
        "stop",
        "an unreadable image: stop (naming them all) or skip (and count them)",
        choices=("stop", "skip"),
    )
    strict: bool = param(
        False, "whether leakage across splits is an error: patients, files or near duplicates in two splits"
    )
    reuse_gb: float = param(
        4.0,
        "space for what is computed once for each view and reused, the frozen prefix's outputs or the views, GB; "
        "0 reuses nothing",
        low=0,
        high=1e6,
    )
    bootstrap: int = param(1000, "bootstrap resamples behind each 95% interval; 0 for none", low=0, high=100000)
    register: str = param(
        "cxr-pneumonia",
        "registered model that gets the best checkpoint as a new version; none registers nothing, nor do folds",
    )
    cache_dir: str = param(
        "auto",
        "where decoded images, activations (by far the most), phantoms and checkpoints are kept; auto is CXR_CACHE or "
        "the user's cache folder",
    )

    def __post_init__(self) -> None:
        _check_fields(self)
        if not re.fullmatch(r"[\w .-]+", self.register) or not self.register.strip():
            raise UserError(f"--register {self.register}: a model's name is made of letters, digits, spaces, _ . and -")
        check_rule(self.threshold)
        self.fold_numbers()

    def fold_numbers(self) -> tuple[int, int] | None:
        """(k, n) of `fold`, k from 1; None for none."""
        if self.fold == "none":
            return None
        match = re.fullmatch(r"(\d{1,2})/(\d{1,2})", self.fold)
        if not match or not 1 <= int(match[1]) <= int(match[2]) or int(match[2]) < 2:
            raise UserError(f"--fold {self.fold}: write it as k/n, as in 2/5, or none")
        return int(match[1]), int(match[2])

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The strategy's phases, in order."""
        return STRATEGIES[self.strategy]

    def rates(self) -> tuple[float, ...]:
        """The learning rate of each phase, in order."""
        return tuple(float(getattr(self, phase.lr)) for phase in self.phases)


def _check_fields(config: Any) -> None:
    """Raise `UserError` for a parameter that is not among its choices or out of bounds."""
    for item in fields(config):
        if "spec" in item.metadata:
            check(item.name, getattr(config, item.name), spec_of(item))


@dataclass(frozen=True, kw_only=True, slots=True)
class CommandConfig:
    """What every long command holds: the parameters of the runs that it makes."""

    command: ClassVar[str]

    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        _check_fields(self)
        taken = {item.name for item in parameters_of(type(self))}
        for item in fields(TrainConfig):
            value = getattr(self.train, item.name)
            if item.name not in taken and value != item.default:
                raise _no_option(self.command, item.name, value)

    def replace(self, **parameters: Any) -> Self:
        """A copy with other values of some parameters, its own or those of its runs."""
        own = {item.name for item in own_fields(type(self))}
        shared = {name: value for name, value in parameters.items() if name not in own}
        mine = {name: parameters[name] for name in parameters.keys() & own}
        return replace(self, train=replace(self.train, **shared), **mine)


@dataclass(frozen=True, kw_only=True, slots=True)
class Resumable(CommandConfig):
    """A command that can continue what an earlier one began."""

    resume: str = param(
        "none",
        "continue an interrupted run (its id) with the parameters that it recorded; with tune, an existing study "
        "(its name)",
    )

    @property
    def resumed(self) -> str | None:
        """The id or name to continue; None for a new one."""
        return None if self.resume == "none" else self.resume


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainCommand(Resumable):
    """The parameters of `cxr train`."""

    command: ClassVar[str] = "train"


SEARCHABLE = ("lr", "weight_decay", "gamma", "batch_size")


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneConfig(Resumable):
    """The parameters of a search: those of the runs it makes, and its own."""

    command: ClassVar[str] = "tune"

    study: str = param("auto", "name of the study; auto is tune-STRATEGY. One that exists is continued")
    storage: str = param(
        "sqlite:///optuna.db",
        "where studies are kept: a database URL that Optuna takes; a relative path is under the current folder",
    )
    trials: int = param(30, "trials of the study, whoever runs them; the first takes the defaults", low=1, high=100000)
    sampler: str = param(
        "TPESampler",
        "Optuna's sampler",
        choices=("TPESampler", "RandomSampler", "QMCSampler", "GPSampler"),
    )
    pruner: str = param(
        "MedianPruner",
        "Optuna's pruner; WilcoxonPruner is for seeds above 1",
        choices=("MedianPruner", "HyperbandPruner", "SuccessiveHalvingPruner", "WilcoxonPruner", "NopPruner"),
    )
    search: str = param("lr", f"what to search, of {', '.join(SEARCHABLE)}, joined by commas; lr is that of each phase")
    objective: str = param(
        "val_loss", "what a trial is judged by, at its best epoch", choices=("val_loss", "val_roc_auc")
    )
    seeds: int = param(1, "seeds that a trial's objective is averaged over, from `seed` on", low=1, high=100)
    refit: bool = param(True, "train the winner as `train` does, evaluate it on test, register it")
    heartbeat: int = param(
        10, "seconds between a worker's heartbeats; after six missed ones its trial is taken over", low=1, high=3600
    )

    def __post_init__(self) -> None:
        Resumable.__post_init__(self)
        if self.pruner == "WilcoxonPruner" and self.seeds == 1:
            raise UserError("--pruner WilcoxonPruner: compares seeds; use it with --seeds above 1")
        unknown = [name for name in self.search.split(",") if name not in SEARCHABLE]
        if unknown:
            raise UserError(
                f"--search {self.search}: {', '.join(unknown)} unknown; join some of {', '.join(SEARCHABLE)}"
            )

    def searched(self) -> tuple[str, ...]:
        """The fields that the search decides: `lr` stands for the rate of each of the strategy's phases."""
        names = self.search.split(",")
        rates = [phase.lr for phase in self.train.phases] if "lr" in names else []
        return (*rates, *(name for name in SEARCHABLE if name in names and name != "lr"))


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareConfig(CommandConfig):
    """The parameters of a comparison: those of the runs it makes, and its own."""

    command: ClassVar[str] = "compare"

    strategies: str = param("all", "strategies to compare, joined by commas, or all")
    seeds: int = param(3, "seeds of each strategy, from `seed` on", low=1, high=1000)
    margin: float = param(0.01, "a strategy within this ROC-AUC of another is non-inferior to it", above=0, high=0.5)
    epochs_each: str = param("same", "epochs of single strategies, as in full=3,gradual=2; the others take `epochs`")

    def __post_init__(self) -> None:
        CommandConfig.__post_init__(self)
        unknown = [name for name in self.chosen() if name not in STRATEGIES]
        if unknown or len(set(self.chosen())) < len(self.chosen()):
            known = ", ".join(STRATEGIES)
            raise UserError(f"--strategies {self.strategies}: join different ones of {known}, or use all")
        self.epochs_of()

    def chosen(self) -> tuple[str, ...]:
        """The strategies to compare."""
        return tuple(STRATEGIES) if self.strategies == "all" else tuple(self.strategies.split(","))

    def epochs_of(self) -> dict[str, int]:
        """Strategy -> epochs of each phase."""
        every = dict.fromkeys(STRATEGIES, self.train.epochs)
        if self.epochs_each == "same":
            return every
        for part in self.epochs_each.split(","):
            match = re.fullmatch(rf"({'|'.join(STRATEGIES)})=([1-9]\d{{0,3}})", part)
            if not match:
                raise UserError(f"--epochs-each {self.epochs_each}: write it as full=3,gradual=2")
            every[match[1]] = int(match[2])
        return every


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossvalConfig(CommandConfig):
    """The parameters of a cross-validation: those of the runs it makes, and its own."""

    command: ClassVar[str] = "crossval"

    folds: int = param(5, "parts that the training and validation images are split into, by patient", low=2, high=50)


def search_range(name: str) -> Spec:
    """The `Spec` of a field that can be searched; its `search` is there."""
    return next(spec_of(item) for item in fields(TrainConfig) if item.name == name)


THRESHOLD_RULES = "youden, f1, sensitivity>=0.95, cost 5:1 (a missed pneumonia : a false alarm), or a number"


def check_rule(rule: str) -> None:
    """Raise `UserError` for what is no threshold rule."""
    match = re.fullmatch(r"youden|f1|sensitivity>=([\d.]+)|cost (\d+(?:\.\d+)?):(\d+(?:\.\d+)?)|(0?\.\d+)", rule)
    if not match:
        raise UserError(f"--threshold {rule}: unknown; use {THRESHOLD_RULES}")
    if match[1] and not (re.fullmatch(r"\d*\.?\d+", match[1]) and 0 < float(match[1]) <= 1):
        raise UserError(f"--threshold {rule}: a sensitivity lies above 0 and is at most 1")
    if match[2] and float(match[2]) + float(match[3]) == 0:
        raise UserError(f"--threshold {rule}: one of the two must cost something")


# Parameters that do not determine the result (the data and weights in use have names of their own), so that workers and
# the attempts at one comparison may differ in them. Runs of earlier versions also recorded `resume`.
NEUTRAL = {"data_dir", "weights", "device", "reuse_gb", "cache_dir", "resume", "register", "bootstrap"}


def result_parameters(config: TrainConfig) -> dict[str, str]:
    """The parameters, as `flatten` gives them, that determine the result."""
    return {key: value for key, value in flatten(config).items() if key.removeprefix("train.") not in NEUTRAL}


def parameters_of(cls: type[CommandConfig]) -> list[Field[Any]]:
    """The parameters that a command takes: those of its runs, then its own."""
    shared = [item for item in fields(TrainConfig) if cls.command in (spec_of(item).commands or (cls.command,))]
    return [*shared, *own_fields(cls)]


def own_fields(cls: type[CommandConfig]) -> list[Field[Any]]:
    """The parameters that a command adds to those of its runs."""
    return [item for item in fields(cls) if item.name != "train"]


def configure(cls: type[C], parameters: Mapping[str, Any]) -> C:
    """The configuration of a command from its parameters by name; those not given have their defaults.

    Raises `UserError` for a wrong value, or a parameter that the command does not take.
    """
    own = {item.name for item in own_fields(cls)}
    shared = {name: value for name, value in parameters.items() if name not in own}
    for name in shared.keys() - {item.name for item in parameters_of(cls)}:
        raise _no_option(cls.command, name, shared[name])
    return cls(train=TrainConfig(**shared), **{name: parameters[name] for name in parameters.keys() & own})


def _no_option(command: str, name: str, value: Any) -> UserError:
    return UserError(f"{option_name(name)} {text_of(value)}: not an option of {command}; leave it out")


def without_password(url: str) -> str:
    """A URL as it may be shown and logged."""
    return re.sub(r"(://[^:/@\s]*):[^@/\s]*@", r"\1:***@", url)


def own_parameters(config: CommandConfig) -> dict[str, str]:
    """What a command adds to the parameters of its runs, under dotted keys such as `tune.trials`."""
    own = sorted(item.name for item in own_fields(type(config)) if item.name != "resume")
    return {f"{config.command}.{name}": without_password(text_of(getattr(config, name))) for name in own}


def flatten(config: TrainConfig, prefix: str = "train") -> dict[str, str]:
    """The resolved parameters as `train.lr_head` -> `'0.001'`: dotted keys, one spelling for each value.

    Dotted, because `mlflow run` has already logged the raw text of the undotted ones.
    """
    return {f"{prefix}.{name}": text_of(value) for name, value in asdict(config).items()}


def unflatten(params: Mapping[str, str], prefix: str = "train") -> TrainConfig:
    """The inverse of `flatten`; keys with another prefix, and parameters of other versions, are ignored.

    Raises ValueError for a text that is no value of its parameter, `UserError` for a value out of bounds.
    """
    types = types_of(TrainConfig)
    texts = {key.removeprefix(f"{prefix}."): text for key, text in params.items() if key.startswith(f"{prefix}.")}
    return TrainConfig(**{name: parse(text, types[name]) for name, text in texts.items() if name in types})
