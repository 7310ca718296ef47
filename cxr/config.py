"""The declaration of every parameter: default, help, choices, bounds and search range."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields, replace
from typing import Any, ClassVar, Self, TypeVar

from cxr.errors import UserError
from cxr.families import FAMILIES
from cxr.parameters import Spec, check, option_name, param, parse, spec_of, text_of, types_of
from cxr.strategies import STRATEGIES, Phase
from cxr.threshold_rule import ThresholdRule

ARCHS = tuple(FAMILIES)
C = TypeVar("C", bound="CommandConfig")
SYNTHETIC = "synthetic"
MAX_SEED = 1_000_000_000  # torch and Philox accept at most 64 bits


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The parameters of one training run.

    Raises `UserError` naming the option if a value is not among its choices or is out of bounds.
    """

    strategy: str = param(
        "partial",
        "fine-tuning strategy: which stages are trained in which phase",
        choices=tuple(STRATEGIES),
        commands=("train", "tune", "crossval"),
    )
    arch: str = param("resnet18", "backbone, by its name in torchvision", choices=ARCHS)
    weights: str = param(
        "auto",
        "initial weights: auto (ImageNet, or random with a warning if unavailable), imagenet (fail if unavailable), "
        "random, or a .pth/.safetensors file",
    )
    data_dir: str = param(
        SYNTHETIC,
        "the images: the Kaggle folder, another folder of class folders (with or without train/, val/ and test/ above "
        "them), a CSV, TSV or JSON list, or 'synthetic' for phantoms",
    )
    labels: str = param(
        "class",
        "what is classified: class, or subtype (of the Kaggle set: NORMAL, BACTERIA, VIRUS; of a list: its column)",
        choices=("class", "subtype"),
        before="class",
    )
    classes: str = param(
        "auto", "names of the classes in order, comma-separated; auto takes those found, sorted", before="auto"
    )
    positive: str = param("auto", "the positive one of two classes; auto is the second", before="auto")
    columns: str = param(
        "auto",
        "columns of a list, such as path=Image,label=Finding,patient=Subject,split=Set,subtype=Kind; auto knows the "
        "usual names",
        before="auto",
    )
    patient_pattern: str = param(
        "auto",
        "regular expression with one group that finds the patient in the path of an image, where no column tells; auto "
        "knows the names of the Kaggle set",
        before="auto",
    )
    splits: str = param(
        "auto",
        "the splits: auto (those of the source, else made), or a CSV with the columns digest and split, such as "
        "data/manifest.csv of a run",
        before="auto",
    )
    test_fraction: float = param(
        0.2, "fraction held out as test, by patient, if the source has no test split", above=0, high=0.9, before=0.2
    )
    paths: str = param(
        "auto",
        "what stands for an image in logs and messages: plain (its path) or hashed (the start of the sha256 of its "
        "bytes); auto is hashed if any file is DICOM, else plain",
        choices=("auto", "plain", "hashed"),
        before="plain",
    )
    depth: str = param(
        "auto",
        "bits of grey in 16-bit PNG files; auto is the fewest that hold every such file of the data set",
        choices=("auto", "8", "10", "12", "14", "16"),
        before="16",
    )
    image_size: int = param(224, "side length of the square input in pixels", low=32, high=1024)
    resize: str = param(
        "squash",
        "how images are made square: squash (ignore the aspect ratio), crop (to the centre), pad (with black)",
        choices=("squash", "crop", "pad"),
    )
    val_split: str = param(
        "grouped",
        "validation split: grouped (a fraction of train+val, by patient) or official (the val folder)",
        choices=("grouped", "official"),
    )
    val_fraction: float = param(0.1, "fraction of train+val held out by the grouped split", above=0, high=0.5)
    split_seed: int = param(
        0,
        "seed of the grouped split; separate from `seed`, so that runs with different seeds share one split",
        low=0,
        high=MAX_SEED,
    )
    fold: str = param(
        "none",
        "evaluate on fold k of n of train+val, split by patient, instead of the test split: k/n, such as 2/5, or none",
        commands=("train",),
    )
    views: int = param(
        6,
        "augmented versions of each training image, cycled over the epochs; 0 trains without augmentation",
        low=0,
        high=1000,
    )
    augment: str = param(
        "crops-2",
        "recipe of the augmented versions: crops-2 (random resized crops, mirroring, exposure, blur, JPEG), crops-1 "
        "(the same, cropped and degraded more) or mild-1 (slight zoom, rotation and shift, exposure, blur, JPEG)",
        choices=("crops-2", "crops-1", "mild-1"),
        before="mild-1",
    )
    batch_size: int = param(32, "training batch size", low=2, high=4096, search=(16, 128), log=True)
    epochs: int = param(10, "maximum epochs per phase", low=1, high=10000)
    lr_head: float = param(
        1e-3, "learning rate of the phase that trains the head", above=0, high=10, search=(1e-5, 1e-1), log=True
    )
    lr_top: float = param(
        1e-4,
        "learning rate of the phase that trains the last stage and the head",
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
    step_size: int = param(5, "StepLR: epochs between reductions of the learning rate", low=1, high=10000)
    gamma: float = param(0.5, "StepLR: multiplicative factor of each reduction", above=0, high=1, search=(0.1, 1.0))
    patience: int = param(
        5, "early stopping: epochs without a lower validation loss before a phase ends", low=1, high=10000
    )
    seed: int = param(0, "seed of the head's initial weights, of shuffling and of augmentation", low=0, high=MAX_SEED)
    device: str = param(
        "auto",
        "device; auto is the first available of cuda, mps and cpu",
        choices=("auto", "cpu", "cuda", "mps"),
    )
    threads: int = param(
        0,
        "CPU threads of a run; the last bits of its numbers may depend on them. 0 is all cores, shared out evenly "
        "among the runs of a comparison or cross-validation",
        low=0,
        high=1024,
        before=0,
    )
    precision: str = param(
        "auto",
        "training precision; auto is bf16 on GPUs that support it, fp16 with loss scaling on other GPUs, "
        "fp32 on the CPU. The final evaluation is in fp32",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    average: str = param(
        "none",
        "average of the weights and BatchNorm statistics over the steps from the second epoch of the last phase on, "
        "which is then validated, tested and registered: sma (simple mean) or none",
        choices=("sma", "none"),
        before="none",
    )
    compile: str = param(
        "auto",
        "make training steps faster: graphs (CUDA graphs), inductor (torch.compile) or none; auto is "
        "graphs on one GPU, else none",
        choices=("auto", "none", "inductor", "graphs"),
        same=("none", "auto", "graphs"),  # graphs run the kernels that run without them (experiments/gpu_check.py)
    )
    select: str = param(
        "val_loss",
        "criterion for the best epoch and the champion: the validation loss, or its mean over perturbed copies of the "
        "validation images (`stresses`)",
        choices=("val_loss", "stressed_val_loss"),
    )
    stresses: str = param(
        "stresses-2",
        "perturbations of the validation images: stresses-1 (contrast, blur, scale, compression) or stresses-2 (also "
        "stretching and a corner marker)",
        choices=("stresses-2", "stresses-1"),
        before="stresses-1",
    )
    calibration: str = param(
        "temperature",
        "calibration of the probabilities, fitted on validation: temperature scaling, Platt scaling, or none",
        choices=("temperature", "platt", "none"),
    )
    threshold: str = param(
        "youden",
        "decision threshold: a rule applied to validation (youden, f1, sensitivity>=0.95, or cost 5:1 for "
        "false negative : false positive), or a number",
    )
    abstain: float = param(
        0.1,
        "fraction of validation images, the least certain, that sets the certainty below which a prediction abstains; "
        "0 never abstains",
        low=0,
        high=0.9,
        before=0.0,
    )
    on_bad_image: str = param(
        "stop",
        "unreadable images: stop (and list them all) or skip (and count them)",
        choices=("stop", "skip"),
    )
    strict: bool = param(
        False, "treat leakage as an error: patients, identical files or near duplicates in more than one split"
    )
    reuse_gb: float = param(
        8.0,
        "space in GB for reused activations of the frozen stages, or reused views; 0 disables reuse",
        low=0,
        high=1e6,
    )
    bootstrap: int = param(1000, "bootstrap resamples for each 95% interval; 0 for none", low=0, high=100000)
    figures: str = param(
        "all",
        "figures of a run: all, or few, for many runs (learning curves, Grad-CAM, and of the held-out split the "
        "confusion matrix and the ROC curve)",
        choices=("all", "few"),
        before="all",
    )
    register: str = param(
        "cxr-pneumonia",
        "registered model to which the best checkpoint is added as a new version, or none. Folds are never registered",
    )
    tracking_patience: float = param(
        30.0,
        "minutes to wait for an MLflow server that stops answering; training itself goes on meanwhile",
        low=0,
        high=1e6,
        before=30.0,
    )
    cache_dir: str = param(
        "auto",
        "folder for decoded images, activations (by far the largest), phantoms and checkpoints; auto is CXR_CACHE or "
        "the user's cache folder",
    )

    def __post_init__(self) -> None:
        _check_fields(self)
        require_model_name(self.register, "--register")
        ThresholdRule.parse(self.threshold)
        self.fold_numbers()
        if self.image_size % (multiple := FAMILIES[self.arch].multiple):
            raise UserError(f"--image-size {self.image_size}: --arch {self.arch} takes multiples of {multiple}")

    def fold_numbers(self) -> tuple[int, int] | None:
        """(k, n) of `fold`, k from 1; None for none."""
        if self.fold == "none":
            return None
        match = re.fullmatch(r"(\d{1,2})/(\d{1,2})", self.fold)
        if not match or not 1 <= int(match[1]) <= int(match[2]) or int(match[2]) < 2:
            raise UserError(f"--fold {self.fold}: use k/n, such as 2/5, or none")
        return int(match[1]), int(match[2])

    @property
    def threshold_rule(self) -> ThresholdRule:
        """The rule that chooses the decision threshold."""
        return ThresholdRule.parse(self.threshold)

    @property
    def kept_split(self) -> str:
        """`val_split`, or `official` where a file gives the splits."""
        return self.val_split if self.splits == "auto" else "official"

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The strategy's phases, in order."""
        return FAMILIES[self.arch].phases(self.strategy)

    def rates(self) -> tuple[float, ...]:
        """The learning rate of each phase, in order."""
        return tuple(float(getattr(self, phase.lr)) for phase in self.phases)


def require_model_name(name: str, option: str) -> None:
    """Raise `UserError` for a name that a registered model cannot have."""
    if not re.fullmatch(r"[\w .-]+", name) or not name.strip():
        raise UserError(f"{option} {name}: use only letters, digits, spaces, _ . and -")


def _check_fields(config: Any) -> None:
    """Raise `UserError` for a value that is not among its choices or is out of bounds."""
    for item in fields(config):
        if "spec" in item.metadata:
            check(item.name, getattr(config, item.name), spec_of(item))


@dataclass(frozen=True, kw_only=True, slots=True)
class CommandConfig:
    """The parameters of a command that trains: those of its runs, and in subclasses its own."""

    command: ClassVar[str]

    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        _check_fields(self)
        accepted = {item.name for item in parameters_of(type(self))}
        for item in fields(TrainConfig):
            value = getattr(self.train, item.name)
            if item.name not in accepted and value != item.default:
                raise _no_option(self.command, item.name, value)

    def replace(self, **parameters: Any) -> Self:
        """A copy with some parameters changed, its own or those of its runs."""
        own = {item.name for item in own_fields(type(self))}
        shared = {name: value for name, value in parameters.items() if name not in own}
        mine = {name: parameters[name] for name in parameters.keys() & own}
        return replace(self, train=replace(self.train, **shared), **mine)


@dataclass(frozen=True, kw_only=True, slots=True)
class Resumable(CommandConfig):
    """A command that can continue an interrupted run or study."""

    resume: str = param(
        "none",
        "ID of an interrupted run to continue with its recorded parameters; for tune, name of an existing study",
    )

    @property
    def resumed(self) -> str | None:
        """The run ID or study name to continue; None to start a new one."""
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

    study: str = param("auto", "study name; auto is tune-STRATEGY. An existing study is continued")
    storage: str = param(
        "sqlite:///optuna.db",
        "Optuna storage: a database URL; a relative path is relative to the current folder",
    )
    trials: int = param(
        30, "total number of trials over all workers; the first uses the default values", low=1, high=100000
    )
    sampler: str = param(
        "TPESampler",
        "Optuna sampler",
        choices=("TPESampler", "RandomSampler", "QMCSampler", "GPSampler"),
    )
    pruner: str = param(
        "MedianPruner",
        "Optuna pruner; WilcoxonPruner requires --seeds 2 or more",
        choices=("MedianPruner", "HyperbandPruner", "SuccessiveHalvingPruner", "WilcoxonPruner", "NopPruner"),
    )
    search: str = param(
        "lr",
        f"parameters to search, comma-separated, of {', '.join(SEARCHABLE)}; lr means that of every phase",
    )
    objective: str = param(
        "val_loss", "objective of a trial, taken at its best epoch", choices=("val_loss", "val_roc_auc")
    )
    seeds: int = param(1, "seeds per trial, counted from `seed`; the objective is their mean", low=1, high=100)
    refit: bool = param(True, "train the best parameters as `train` does, evaluate on the test split, register")
    heartbeat: int = param(
        10, "seconds between a worker's heartbeats; after six missed ones its trial is requeued", low=1, high=3600
    )

    def __post_init__(self) -> None:
        Resumable.__post_init__(self)
        if self.pruner == "WilcoxonPruner" and self.seeds == 1:
            raise UserError("--pruner WilcoxonPruner: needs several seeds per trial; use --seeds 2 or more")
        unknown = [name for name in self.search.split(",") if name not in SEARCHABLE]
        if unknown:
            raise UserError(
                f"--search {self.search}: {', '.join(unknown)} unknown; list some of {', '.join(SEARCHABLE)}"
            )

    def searched(self) -> tuple[str, ...]:
        """The fields to search: `lr` stands for the learning rate of every phase of the strategy."""
        names = self.search.split(",")
        rates = [phase.lr for phase in self.train.phases] if "lr" in names else []
        return (*rates, *(name for name in SEARCHABLE if name in names and name != "lr"))


@dataclass(frozen=True, kw_only=True, slots=True)
class FamilyConfig(CommandConfig):
    """A command that makes several runs, which may be at work side by side."""

    jobs: str = param(
        "auto",
        "how many runs are at work side by side, each in a process of its own: a number, or auto, which is one for "
        "each GPU, or on a CPU as many as its cores and memory allow; with Ray as many as the cluster takes",
    )
    engine: str = param(
        "local",
        "where the runs are at work: local (this machine) or ray (the cluster at RAY_ADDRESS, else this machine)",
        choices=("local", "ray"),
    )

    def __post_init__(self) -> None:
        CommandConfig.__post_init__(self)
        if not re.fullmatch(r"auto|[1-9]\d{0,3}", self.jobs):
            raise UserError(f"--jobs {self.jobs}: use a number from 1, or auto")


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareConfig(FamilyConfig):
    """The parameters of a comparison: those of the runs it makes, and its own."""

    command: ClassVar[str] = "compare"

    strategies: str = param("all", "comma-separated strategies to compare, or all")
    archs: str = param("same", "comma-separated backbones to compare under one strategy, or same (only `arch`)")
    seeds: int = param(3, "seeds per strategy, counted from `seed`", low=1, high=1000)
    margin: float = param(0.01, "non-inferiority margin in ROC-AUC", above=0, high=0.5)
    epochs_each: str = param(
        "same", "epochs of individual strategies, such as full=3,gradual=2; the others use `epochs`"
    )
    ensemble: bool = param(False, "also register the seeds of each strategy as one model, an ensemble")

    def __post_init__(self) -> None:
        FamilyConfig.__post_init__(self)
        unknown = [name for name in self.chosen() if name not in STRATEGIES]
        if unknown or len(set(self.chosen())) < len(self.chosen()):
            known = ", ".join(STRATEGIES)
            raise UserError(
                f"--strategies {self.strategies}: list each of {known} at most once, comma-separated, or use all"
            )
        self._check_backbones()
        self.epochs_of()
        if self.ensemble and self.seeds < 2:
            raise UserError("--ensemble true: needs two or more seeds; use --seeds 2 or more")

    def chosen(self) -> tuple[str, ...]:
        """The strategies to compare."""
        return tuple(STRATEGIES) if self.strategies == "all" else tuple(self.strategies.split(","))

    def _check_backbones(self) -> None:
        """Each of them also takes the other parameters. Raises `UserError` otherwise."""
        backbones = self.backbones()
        if len(set(backbones)) < len(backbones):
            raise UserError(f"--archs {self.archs}: list each backbone at most once, comma-separated, or use same")
        if len(backbones) > 1 and len(self.chosen()) > 1:
            raise UserError(
                f"--archs {self.archs}: backbones are compared under one strategy, not several "
                f"(--strategies {self.strategies}); name one, such as --strategies partial"
            )
        if unknown := [arch for arch in backbones if arch not in FAMILIES]:
            raise UserError(f"--archs {self.archs}: {', '.join(unknown)} unknown; list some of {', '.join(ARCHS)}")
        for arch in backbones:
            replace(self.train, arch=arch)

    def backbones(self) -> tuple[str, ...]:
        """The backbones to compare; only one when strategies are compared."""
        return (self.train.arch,) if self.archs == "same" else tuple(self.archs.split(","))

    def epochs_of(self) -> dict[str, int]:
        """Strategy -> epochs of each phase."""
        every = dict.fromkeys(STRATEGIES, self.train.epochs)
        if self.epochs_each == "same":
            return every
        for part in self.epochs_each.split(","):
            match = re.fullmatch(rf"({'|'.join(STRATEGIES)})=([1-9]\d{{0,3}})", part)
            if not match:
                raise UserError(f"--epochs-each {self.epochs_each}: use the form full=3,gradual=2")
            every[match[1]] = int(match[2])
        return every


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossvalConfig(FamilyConfig):
    """The parameters of a cross-validation: those of the runs it makes, and its own."""

    command: ClassVar[str] = "crossval"

    folds: int = param(5, "number of folds of the training and validation images, split by patient", low=2, high=50)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """The parameters of `cxr models serve`; the limits hold for each request.

    Raises `UserError` as `TrainConfig` does.
    """

    command: ClassVar[str] = "serve"

    host: str = param("127.0.0.1", "address to listen on; 0.0.0.0 for all of this machine")
    port: int = param(5001, "port to listen on", low=1, high=65535)
    workers: int = param(1, "processes that answer", low=1, high=256)
    max_mb: float = param(64.0, "size of a request in MB; a larger one is refused before it is read", above=0, high=1e5)
    max_images: int = param(64, "images in a request", low=1, high=100000)
    max_megapixels: float = param(120.0, "pixels of all images of a request, in millions", above=0, high=1e5)
    max_seconds: float = param(30.0, "seconds in which a request must have arrived", above=0, high=3600)

    def __post_init__(self) -> None:
        _check_fields(self)


def search_range(name: str) -> Spec:
    """The `Spec` of a searchable field; its `search` is set."""
    return next(spec_of(item) for item in fields(TrainConfig) if item.name == name)


# Parameters that do not determine the result, so that workers and repeated calls of one comparison may differ in them.
# (Data and weights are identified by other means.) Runs of earlier versions also recorded `resume`.
NEUTRAL = {
    *("data_dir", "paths", "depth", "weights", "device", "threads", "reuse_gb", "cache_dir", "resume", "register"),
    *("bootstrap", "abstain", "figures", "tracking_patience"),
}


_SAME = {item.name: spec_of(item).same for item in fields(TrainConfig)}


def result_parameters(config: TrainConfig) -> dict[str, str]:
    """The parameters that determine the result, in the form of `flatten`.

    One that has the value of runs from before it existed is left out, so that their studies and comparisons are found.
    """
    before = before_they_existed()
    return {
        key: same_result(key, value)
        for key, value in flatten(config).items()
        if key.removeprefix("train.") not in NEUTRAL and before.get(key) != value
    }


def same_result(key: str, value: str) -> str:
    """The value of a parameter, in the form of `flatten`, that stands for all that give the same bits."""
    same = _SAME.get(key.removeprefix("train."), ())
    return same[0] if value in same else value


def before_they_existed(prefix: str = "train") -> dict[str, str]:
    """In the form of `flatten`: the values of younger parameters in runs that did not record them yet."""
    return {
        f"{prefix}.{item.name}": text_of(spec_of(item).before)
        for item in fields(TrainConfig)
        if spec_of(item).before is not None
    }


def parameters_of(cls: type[CommandConfig | ServeConfig]) -> list[Field[Any]]:
    """The parameters that a command accepts: those of its runs, if it makes any, then its own."""
    trains = issubclass(cls, CommandConfig)
    shared = [item for item in fields(TrainConfig) if cls.command in (spec_of(item).commands or (cls.command,))]
    return [*(shared if trains else ()), *own_fields(cls)]


def own_fields(cls: type[CommandConfig | ServeConfig]) -> list[Field[Any]]:
    """The parameters that a command adds to those of its runs."""
    return [item for item in fields(cls) if item.name != "train"]


def configure(cls: type[C], parameters: Mapping[str, Any]) -> C:
    """The configuration of a command from its parameters by name; those not given have their defaults.

    Raises `UserError` for an invalid value, or a parameter that the command does not accept.
    """
    own = {item.name for item in own_fields(cls)}
    shared = {name: value for name, value in parameters.items() if name not in own}
    for name in shared.keys() - {item.name for item in parameters_of(cls)}:
        raise _no_option(cls.command, name, shared[name])
    return cls(train=TrainConfig(**shared), **{name: parameters[name] for name in parameters.keys() & own})


def _no_option(command: str, name: str, value: Any) -> UserError:
    return UserError(f"{option_name(name)} {text_of(value)}: not an option of {command}; leave it out")


def without_password(url: str) -> str:
    """A URL with its password masked, for output and logs."""
    return re.sub(r"(://[^:/@\s]*):[^@/\s]*@", r"\1:***@", url)


def own_parameters(config: CommandConfig) -> dict[str, str]:
    """The parameters that a command adds to those of its runs, under dotted keys such as `tune.trials`."""
    own = sorted(item.name for item in own_fields(type(config)) if item.name != "resume")
    return {f"{config.command}.{name}": without_password(text_of(getattr(config, name))) for name in own}


def flatten(config: TrainConfig, prefix: str = "train") -> dict[str, str]:
    """The resolved parameters as `train.lr_head` -> `'0.001'`: dotted keys, one spelling for each value.

    Dotted, because `mlflow run` has already logged the raw text under the undotted keys.
    """
    return {f"{prefix}.{name}": text_of(value) for name, value in asdict(config).items()}


def unflatten(params: Mapping[str, str], prefix: str = "train") -> TrainConfig:
    """The inverse of `flatten`; keys with another prefix, and parameters of other versions, are ignored. Missing
    parameters get the value of runs from before they existed.

    Raises ValueError for text that cannot be parsed, `UserError` for a value out of bounds.
    """
    types = types_of(TrainConfig)
    known = before_they_existed(prefix) | dict(params)
    texts = {key.removeprefix(f"{prefix}."): text for key, text in known.items() if key.startswith(f"{prefix}.")}
    return TrainConfig(**{name: parse(text, types[name]) for name, text in texts.items() if name in types})
