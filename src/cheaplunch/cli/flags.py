"""Flags ↔ settings: every setting of `config` can be a flag, and what was given goes in place of the method's own."""

from __future__ import annotations

import typing
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from pathlib import Path
from typing import Any

from cheaplunch.config import NAMES, RunConfig, build_config, read_yaml, setting_type, settings
from cheaplunch.errors import UserError


class Parser(ArgumentParser):
    """argparse, but a mistake is one line and leaves by `main`, like any other."""

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` lists what there is")


def add_settings(parser: ArgumentParser, names: list[str], required: bool = True) -> None:
    """Flags for settings of `config`; one that is not given is None and leaves the method's value alone."""
    for name in names:
        _, item = settings()[name]
        default = "" if item.default is None or name == "data" else f" (default: {item.default})"
        arguments = {"help": item.metadata["help"].replace("%", "%%") + default}
        kind = setting_type(name)
        if typing.get_origin(kind) is typing.Literal:
            arguments["choices"] = typing.get_args(kind)
        elif kind is bool:
            arguments |= {"action": BooleanOptionalAction}
        elif kind == NAMES:
            arguments |= {"nargs": "+", "metavar": "NAME"}
        elif typing.get_origin(kind) is tuple:
            arguments |= {"type": float, "nargs": 2, "metavar": ("LOW", "HIGH")}
        else:
            arguments |= {"type": kind, "metavar": {int: "N", float: "X", Path: "PATH", str: "NAME"}[kind]}
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, required=required and name == "data", default=None, **arguments)


def config_of(options: Namespace, method: str, **more: Any) -> RunConfig:
    """Settings of the method, then of --config, then of the flags that were given."""
    values: dict[str, Any] = {}
    if getattr(options, "config", None) is not None:
        values |= _settings_of(options.config)
        method = values.pop("method", method)
    given = given_settings(options)
    if "data" not in values | given:
        raise UserError("--data is missing; give the folder with the labelled images")
    return build_config(method, values | given | more)


def _settings_of(config: Path) -> dict[str, Any]:
    """A YAML file's, or those of a published row."""
    if not config.exists() and ":" in str(config):
        from cheaplunch.reproduction import published_settings

        return published_settings(str(config)) or read_yaml(config)
    return read_yaml(config)


def given_settings(options: Namespace) -> dict[str, Any]:
    """The settings that stood on the command line."""
    return {name: value for name, value in vars(options).items() if name in settings() and value is not None}
