"""The command line: OpenCLIP's flags, parsed by OpenCLIP, and ours, made from the dataclasses of `settings`."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import types
import typing
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from jettclip import openclip
from jettclip.rules import (
    MOBILECLIP_FLAGS,
    combination_rules,
    flag_of,
    is_unlogged,
    name_of,
    range_rules,
    unsupported_flags,
)
from jettclip.settings import USUAL_LOSS, DataSettings, EvaluationSettings, LossSettings, ModelSettings

SETTINGS = (ModelSettings, DataSettings, LossSettings, EvaluationSettings)
S = TypeVar("S")


@dataclass(frozen=True)
class Options:
    """Everything the command line says."""

    args: Namespace  # OpenCLIP's flags, under OpenCLIP's names
    model: ModelSettings
    data: DataSettings
    loss: LossSettings
    evaluation: EvaluationSettings


def parse_args(argv: Sequence[str] | None = None, find_more: Callable[[Options], list[str]] | None = None) -> Options:
    """Parses the command line, and the file that ``--config`` names; the command line has the last word.

    Exits with status 2 for an unknown flag, a value of the wrong type, or mistakes in the settings, of which all are
    shown.

    Args:
        argv: the command line; this process's by default.
        find_more: finds mistakes that only other components can see.
    """
    parser = _parser()
    argv = list(sys.argv[1:] if argv is None else argv)
    config = _config_arguments(parser, argv)
    ours, rest = parser.parse_known_args([*config, *argv])
    args = openclip.trainer_arguments(rest)
    args.dataset_type = ours.dataset_type
    if args.dataset_type == "synthetic":  # which needs no name, as in OpenCLIP
        args.train_data = args.train_data or "synthetic"
    options = Options(
        args,
        read_flags(ModelSettings, ours),
        read_flags(DataSettings, ours),
        read_flags(LossSettings, ours),
        read_flags(EvaluationSettings, ours),
    )
    if not options.loss.loss:
        options = replace(options, loss=replace(options.loss, loss=_usual_loss(options)))
    problems = [
        *(
            f"--{flag}: {remedy}"
            for flag, remedy in MOBILECLIP_FLAGS.items()
            if getattr(ours, name_of(flag)) is not None
        ),
        *find_problems(options),
        *(find_more(options) if find_more else []),
    ]
    if problems:
        parser.error("\n  ".join([f"{len(problems)} mistakes in the configuration:", *problems]))
    return options


def _usual_loss(options: Options) -> str:
    """Returns the loss of the code whose flags are used, if ``--loss`` was not given."""
    if options.args.siglip:
        return "1*siglip@long + 1*kd@long" if options.args.distill_model else "siglip"
    if options.args.distill_model:
        return "1*clip@long + 1*kd@long"  # OpenCLIP's DistillClipLoss
    if options.data.dataset_reinforcement_mix_synthetic:
        return "1*kd@long"
    return "mobileclip-dr" if options.data.dataset_reinforcement else USUAL_LOSS


def find_problems(options: Options) -> list[str]:
    """Returns the mistakes in the options, each with value, rule and remedy."""
    args = options.args
    stretched = options.model.stretch != ModelSettings().stretch
    checks = [
        (
            stretched and not args.pretrained,
            "--position-keep, -ratio and -tail say how a checkpoint's positions are stretched; add --pretrained",
        ),
        (
            args.siglip and "siglip" not in options.loss.loss,
            f"--siglip asks for the sigmoid loss, and --loss {options.loss.loss!r} has no such term; "
            "leave one of them out, or add 1*siglip@long",
        ),
        (
            args.loss_dist_impl and "siglip" not in options.loss.loss,
            f"--loss-dist-impl {args.loss_dist_impl} is for the siglip term, which --loss {options.loss.loss!r} does "
            "not have; leave it out, or add --siglip",
        ),
        *range_rules(args),
        *combination_rules(args, options.data),
        *unsupported_flags(args),
    ]
    return [
        *options.model.problems(),
        *options.data.problems(),
        *options.loss.problems(),
        *options.evaluation.problems(),
        *(message for wrong, message in checks if wrong),
    ]


def save_config(options: Options, path: Path) -> None:
    """Writes all flags to a YAML file that repeats the run when given as ``--config``."""
    given = {name: value for name, value in all_settings(options).items() if value is not None}
    path.write_text(yaml.safe_dump(given, sort_keys=False))


def all_settings(options: Options) -> dict[str, Any]:
    """Returns all flags with their values, OpenCLIP's and ours."""
    values = dict(sorted(vars(options.args).items()))
    for settings in (options.model, options.data, options.loss, options.evaluation):
        values |= {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(settings).items()}
    return values


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("jettclip.main", add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action=_Help, nargs=0, help="show this message, and OpenCLIP's flags, and exit")
    help_config = "YAML file with any flags; the command line overrides it, but cannot unset a switch"
    parser.add_argument("--config", metavar="FILE", help=help_config)
    for cls in SETTINGS:
        add_flags(parser, cls)
    for flag in MOBILECLIP_FLAGS:
        parser.add_argument(f"--{flag}", nargs="*", help=argparse.SUPPRESS)
    return parser


def add_flags(parser: argparse.ArgumentParser, cls: type[Any]) -> None:
    """Adds a group with one flag a field of a settings dataclass; `read_flags` makes the dataclass of their values."""
    group = parser.add_argument_group((cls.__doc__ or "").split(":")[0], (cls.__doc__ or "").strip())
    hints = typing.get_type_hints(cls)
    for setting in fields(cls):
        _add_flag(group, setting.name, hints[setting.name], setting.default, setting.metadata)


def read_flags(cls: type[S], namespace: Namespace) -> S:
    """Makes a settings dataclass of the values of its flags."""
    values = {setting.name: getattr(namespace, setting.name) for setting in fields(cls)}  # type: ignore[arg-type]
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _add_flag(group: Any, name: str, hint: Any, default: Any, metadata: Any) -> None:
    if hint is bool:
        group.add_argument(flag_of(name), action="store_true", help=metadata["help"])
        return
    shown = "" if default in (None, (), "") else f" (default: {default})"
    options: dict[str, Any] = {"default": default, "help": metadata["help"].replace("%", "%%") + shown}
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        options |= {"type": inner[0], "nargs": "+"}
    elif isinstance(hint, types.UnionType):
        options["type"] = inner[0]
    else:
        options["type"] = hint
    options["metavar"] = name.upper().rsplit("_", 1)[-1] if metadata["choices"] is None else None
    group.add_argument(flag_of(name), choices=metadata["choices"], **options)


class _Help(argparse.Action):
    """Shows our flags by group, then OpenCLIP's."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        theirs = openclip.trainer_help().split("options:", 1)[-1]
        sys.stdout.write(f"{parser.format_help()}\nOpenCLIP's flags keep their names and meaning:\n{theirs}\n")
        parser.exit()


def _config_arguments(parser: argparse.ArgumentParser, argv: list[str]) -> list[str]:
    """Turns the file that ``--config`` names into flags."""
    file = parser.parse_known_args(argv)[0].config
    if file is None:
        return []
    try:
        values = yaml.safe_load(Path(file).read_text())
    except (OSError, yaml.YAMLError) as error:
        parser.error(f"--config {file} cannot be read: {error}")
    if not isinstance(values, dict):
        parser.error(f"--config {file} must hold one mapping of flags to values, such as 'batch_size: 256'")
    known = {*vars(openclip.trainer_arguments([])), *(setting.name for cls in SETTINGS for setting in fields(cls))}
    arguments = []
    for key, value in values.items():
        name = name_of(str(key))
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            parser.error(f"--config {file}: unknown flag {key!r}" + (f"; did you mean {near[0]}?" if near else ""))
        arguments += _arguments(name, value)
    return arguments


def _arguments(name: str, value: Any) -> list[str]:
    if value is None or value is False:
        return []
    if value is True:
        return [flag_of(name)]
    if isinstance(value, dict):
        return [flag_of(name), *(f"{key}={item!r}" for key, item in value.items())] if value else []
    if isinstance(value, list):
        return [flag_of(name), *map(str, value)] if value else []
    return [f"{flag_of(name)}={value}"]


def run_folder(args: Namespace, date: str) -> Path | None:
    """Returns the folder of a run: ``--logs`` / ``--name``, a name being made of date, model and settings if not given.

    Returns None for ``--logs none``.
    """
    if is_unlogged(args):
        return None
    model = args.model.replace("/", "-")
    name = args.name or f"{date}-model_{model}-lr_{args.lr}-b_{args.batch_size}-j_{args.workers}-p_{args.precision}"
    return Path(os.path.expanduser(args.logs)) / name


def is_saved(args: Namespace, epoch: int) -> bool:
    """Tells whether a checkpoint is written after an epoch: by ``--save-frequency``, and always after the last."""
    return args.save_most_recent or epoch == args.epochs or _is_due(args, epoch)


def is_kept(args: Namespace, epoch: int) -> bool:
    """Tells whether the checkpoint after an epoch stays when a later one is there."""
    return _is_due(args, epoch) and not args.delete_previous_checkpoint


def _is_due(args: Namespace, epoch: int) -> bool:
    return args.save_frequency > 0 and epoch % args.save_frequency == 0
