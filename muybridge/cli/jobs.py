"""Verbs that act on a model a config describes, through LightningCLI."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import muybridge
from callbacks.interruption import Interruption
from callbacks.progress_line import ProgressLine
from lightning_modules.checkpoints import WholeFiles
from muybridge import registry
from muybridge.cli import checkpoints, places
from muybridge.cli.environment import from_environment, with_environment
from muybridge.cli.files import Config, classes_beside, refuse_unreadable, syntax_error
from muybridge.cli.front import INTERRUPTED, rank
from muybridge.cli.leaving import leaving_at_sigterm
from muybridge.cli.parser import ShortErrors, causes, usage_error
from muybridge.cli.tools import verb_function
from muybridge.errors import UsageError

T = TypeVar("T")


class Trainer(pl.Trainer):
    """Lightning's Trainer, which can also do something else than a loop with a model it has set up."""

    _instead: Optional[Callable[[], Any]] = None

    def run_with(self, model: pl.LightningModule, function: Callable[[], T], ckpt_path: Optional[str] = None) -> T:
        """Set up strategy, callbacks and model, load the checkpoint, and call ``function`` in place of the loop.

        Args:
            model: What is set up.
            function: What is done with it. Under a strategy with several processes every one calls it.
            ckpt_path: Checkpoint to load first.
        """
        results: list[T] = []
        self._instead = lambda: results.append(function())
        try:
            self.predict(model, dataloaders=[], ckpt_path=ckpt_path, return_predictions=False)
        finally:
            self._instead = None
        return results[0]

    def _run_stage(self) -> Any:
        if self._instead is None:
            return super()._run_stage()
        with leaving_at_sigterm():
            return self._instead()


class Parser(ShortErrors, LightningArgumentParser):
    """LightningCLI's parser with short errors."""


class SaveConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into the run's folder: what was built, without the options of the verb.

    So the file serves every verb, and running it again does not load a checkpoint by itself.
    """

    def __init__(self, parser: LightningArgumentParser, config: Any, **kwargs: Any) -> None:
        config = config.clone()
        for key in [k for k in vars(config) if k not in ("seed_everything", "trainer", "model", "data")]:
            del config[key]
        super().__init__(parser, config, overwrite=True, **kwargs)


class Whereabouts(pl.Callback):
    """Says where a run's files go, when it starts and when it has come to its end."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Name the run's folder; every rank asks for it, since the first one tells the others."""
        pl.utilities.rank_zero_info(f"run folder: {trainer.log_dir or trainer.default_root_dir}")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Name the checkpoints."""
        lines = []
        for saver in trainer.checkpoint_callbacks:
            last, best = getattr(saver, "last_model_path", ""), getattr(saver, "best_model_path", "")
            if last:
                lines.append(f"  last: {last}")
            if best and best != last:
                monitor, score = getattr(saver, "monitor", None), getattr(saver, "best_model_score", None)
                value = f" ({monitor} {float(score):.5g})" if monitor and score is not None else ""
                lines.append(f"  {'best' if monitor else 'kept'}: {best}{value}")
        if lines:
            pl.utilities.rank_zero_info("\n".join(["checkpoints:", *dict.fromkeys(lines)]))
        else:
            pl.utilities.rank_zero_info("no checkpoint was written: none was asked for, or none was due yet")


class CLI(LightningCLI):
    """One verb of the command.

    Args:
        verb: Which.
        arguments: What follows it on the command line, with config names resolved.
        configs: The config files among them.
    """

    def __init__(self, verb: str, arguments: list[str], configs: Sequence[Config]) -> None:
        self.verb, self.configs, self.command = verb, configs, command_line(verb, arguments)
        self.is_loop = registry.VERBS[verb].kind == "loop"
        self.trainer_settings: dict[str, Any] = {}
        self.takes_data = True
        if not self.is_loop:
            function = verb_function(verb)
            self.takes_data = "datamodule" in inspect.signature(function).parameters
            self.trainer_settings = getattr(importlib.import_module(function.__module__), "TRAINER", {})
            setattr(Trainer, verb, function)
        super().__init__(
            pl.LightningModule,
            pl.LightningDataModule if self.takes_data else None,
            save_config_callback=SaveConfig if verb == "fit" else None,
            trainer_class=Trainer,
            # Jobs say in one line what they train.
            trainer_defaults={"enable_model_summary": False},
            seed_everything_default=0,
            parser_kwargs={"prog": "muybridge", "allow_abbrev": False, "default_env": True, "env_prefix": "MUYBRIDGE"},
            parser_class=Parser,
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=[verb, *arguments],
            auto_configure_optimizers=False,
        )

    def let_go(self) -> None:
        """Forget the job: a command that runs several would otherwise hold them all, with what they keep on a GPU."""
        for name in ("trainer", "model", "datamodule", "config_init"):
            setattr(self, name, None)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The one verb that was asked for: building the parsers of all takes four times as long."""
        return {self.verb: {"model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule"}}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser that knows the config files."""
        parser = super().init_parser(**kwargs, dump_header=[f"muybridge {muybridge.__version__}"])
        assert isinstance(parser, Parser)
        parser.configs = self.configs
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse: files, then the environment, then options; without Lightning's warning about arguments given by a caller."""
        verb, *arguments = args
        actions = self._parser(verb)._actions
        classes = [a.dest for a in actions if getattr(a, "_typehint", None) is not None]
        told = from_environment(verb, [a.dest for a in actions], classes, os.environ)
        try:
            self.config = parser.parse_args([verb, *with_environment(arguments, list(told.values()))])
        except UsageError as error:
            # It names the option, and what is to be mended is the variable.
            named = [name for name, argument in told.items() if spoken(argument) in error.given]
            if not named:
                raise
            raise UsageError(f"{error.given} (set by {', '.join(named)})", error.expected, error.todo) from error

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would let hyperparameters stored in a checkpoint win over the config and the command line."""

    def before_instantiate_classes(self) -> None:
        """A verb that takes no data builds none: an export needs no clips on the machine."""
        if not self.takes_data:
            self.config[self.verb].pop("data", None)

    def instantiate_classes(self) -> None:
        """Build everything; an error of a constructor comes out as it was raised.

        jsonargparse says it again in its own words, with the whole configuration.
        """
        try:
            super().instantiate_classes()
        except ValueError as error:
            said = usage_error(error)
            if said is not None:
                raise said from None
            *_, origin = causes(error)
            raise origin from None

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The Trainer; what it refuses is the user's to mend."""
        name = self._get(self.config_init, "trainer").get("strategy")
        if isinstance(name, str) and name in strategies():
            # The Trainer takes text for one of its own names before it is taken for a class.
            kwargs["strategy"] = strategies()[name]()
        chosen = list(self._get(self.config_init, "trainer").get("callbacks") or [])  # the Trainer adds to that list
        try:
            trainer = super().instantiate_trainer(**{**kwargs, **self.trainer_settings})
        except (MisconfigurationException, ValueError, TypeError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"trainer: {error}") from error
        strategy = trainer.strategy
        # A plugin of the config's stays, and so do strategies (XLA) that bring their own way to files.
        if strategy._checkpoint_io is None and type(strategy).checkpoint_io is Strategy.checkpoint_io:
            strategy.checkpoint_io = WholeFiles()
        watching: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        bar = trainer.progress_bar_callback
        if bar is not None and not any(bar is callback for callback in chosen):
            # Lightning's own counts batches of an epoch, which has no end here, and says nothing in a log.
            watching[watching.index(bar)] = ProgressLine()
        if self.verb == "fit":
            if not any(isinstance(c, Interruption) for c in watching):
                watching.append(Interruption(command=self.command))
            watching.append(Whereabouts())
        return trainer

    def after_instantiate_classes(self) -> None:
        """Everything that can be checked now is: before other processes start and before weights load."""
        check = getattr(self.model, "check", None)
        if callable(check):
            check()
        chosen = self.config_init[self.verb]
        if chosen.get("ckpt_path") is not None:
            runs = [checkpoints.run_of(config.path) for config in self.configs]
            run = next((run for run in reversed(runs) if run is not None), None)
            found = checkpoints.resolve(chosen["ckpt_path"], self.trainer, resuming=self.verb == "fit", run=run)
            if found is not None and self.is_loop:
                checkpoints.refuse_folder(found, self.trainer)
            chosen["ckpt_path"] = found

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if not self.takes_data:
            kwargs.pop("datamodule", None)
        return kwargs

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except MisconfigurationException as error:
            raise UsageError(str(error)) from error
        except SystemExit as leaving:
            # Lightning turns Ctrl-C into exit code 1, after saying so itself. callbacks.Preemption leaves with its own.
            if self.trainer.interrupted and leaving.code == 1:
                raise SystemExit(INTERRUPTED) from leaving
            raise


def _is_about_the_run(record: logging.LogRecord) -> bool:
    """Not Lightning's advice to install one of its other products, which it would give in every run."""
    return "litlogger" not in record.getMessage() and "litmodels" not in record.getMessage()


def strategies() -> dict[str, type[Strategy]]:
    """Strategies that are not Lightning's, by name: ours, and the user's where they are imported."""
    found, waiting = {}, list(Strategy.__subclasses__())
    while waiting:
        cls = waiting.pop()
        waiting.extend(cls.__subclasses__())
        if not cls.__module__.startswith("lightning."):
            found[cls.__name__] = cls
    return found


def command_line(verb: str, arguments: Sequence[str]) -> str:
    """What starts this run from anywhere, without the checkpoint that it began from."""
    typed, skip = ["muybridge", verb], False
    for argument in arguments:
        if not skip and not argument.startswith("--ckpt_path"):
            typed.append(argument)
        skip = not skip and argument == "--ckpt_path"
    return shlex.join(typed)


def run_job(verb: str, arguments: list[str]) -> int:
    """Parse and run."""
    # Lightning 2.6 asks torch 2.13's pytrees in a way that these call deprecated; nothing a user could change.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated", module="lightning.*")
    # Of jobs that update two roles; what they have learnt is just what a checkpoint is to hold.
    warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")
    if verb != "fit":
        # Which checkpoints an earlier run thought best matters where further ones are written only.
        warnings.filterwarnings("ignore", message="The dirpath has changed")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_about_the_run)
    arguments, files = resolve_configs(verb, arguments)
    places.append_to_path([*(f.parent for f in files), Path.cwd()])
    configs = [Config(f) for f in files]
    import_known()
    try:
        import_named(configs, arguments)
        CLI(verb, arguments, configs).let_go()
    except SyntaxError as error:
        # Of a file that one of the user's files imports; in ours, or in a library, it is a bug.
        ours = [places.home() / name for name in ("muybridge", *places.ROOMS)]
        file = Path(error.filename or ".").resolve()
        if "site-packages" in file.parts or any(
            file.is_relative_to(folder) for folder in (*ours, Path(os.__file__).parent)
        ):
            raise
        raise syntax_error(error, str(error.filename)) from error
    return 0


def resolve_configs(verb: str, arguments: list[str]) -> tuple[list[str], list[Path]]:
    """The arguments with every ``-c`` pointing at a file, and these files."""
    result, files = [], []
    variable = f"MUYBRIDGE_{verb.upper()}__CONFIG"
    if os.environ.get(variable):
        files.append(places.find_config(os.environ[variable]).resolve())
        os.environ[variable] = str(files[0])
    waiting, previous = iter(arguments), ""
    for argument in waiting:
        refuse_lone_file(verb, argument, previous)
        previous = argument
        match = re.fullmatch(r"(?:(?:-c|--config)|-c=?(.+)|--config=(.+))", argument, re.DOTALL)
        if not match or (argument.startswith("--") and not argument.startswith("--config")):
            result.append(argument)
            continue
        given = match.group(1) or match.group(2) or next(waiting, None)
        if given is None:
            raise UsageError(f"{argument} without a file", "-c FILE", "muybridge list configs")
        file = places.find_config(given)
        if file != Path(given).expanduser() and rank() == 0:
            print(f"config {given}: {file}", file=sys.stderr)
        files.append(file)
        result.append(f"--config={file}")
    return result, files


def spoken(argument: str) -> str:
    """The name of an option as errors say it."""
    return argument.removeprefix("--").partition("=")[0].replace(".init_args", "")


def refuse_lone_file(verb: str, argument: str, previous: str) -> None:
    """Say that ``-c`` was forgotten: a YAML file that is not the value of the option before it."""
    takes_value = previous.startswith("--") and "=" not in previous and not previous.startswith("--print_config")
    if argument.startswith("-") or Path(argument).suffix not in (".yaml", ".yml") or takes_value:
        return
    raise UsageError(f"{argument} stands without -c", "-c before every config file", f"muybridge {verb} -c {argument}")


def import_known() -> None:
    """Import every module of the registry: jsonargparse knows a short class name once its class exists."""
    for module in {module for table in registry.CLASSES for module in table.values()}:
        importlib.import_module(module)
    importlib.import_module("lightning_modules")


def import_named(configs: Sequence[Config], arguments: Sequence[str]) -> None:
    """Import the user's files that define a class that is named without its module.

    Only those: a folder may hold scripts that do things when imported. Names that ship mean what ships.
    """
    wanted = {name for config in configs for name in config.class_names()}
    wanted |= {m.group(1) for a in arguments if (m := re.fullmatch(r"(?:--[\w.+-]+=)?([A-Za-z_]\w*)", a))}
    wanted -= {name for table in registry.CLASSES for name in table}
    files = [config.path for config in configs]
    values = {argument.partition("=")[2] or argument for argument in arguments}
    refuse_unreadable(files, values.union(*(config.words() for config in configs)))
    for file, defined in classes_beside(files):
        if wanted.intersection(defined):
            importlib.import_module(file.stem)
