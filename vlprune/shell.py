"""Commands that are imported when they are called, and errors of usage in one line."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from vlprune.terminal import BAD_INPUT, print_error

HELP = "Visual-token pruning for Hugging Face models: fewer visual tokens, the same model. Example: vlprune methods"
UsageError: Any = typer.BadParameter.__bases__[0]
"""Typer's, or in older versions click's: what a command line that cannot be read raises."""


def application(commands: Mapping[str, tuple[str, str]]) -> typer.Typer:
    """The command line of ``commands``: name -> (``module:name`` of a function or a typer application, a line of help)."""

    class Group(_Group):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            self.commands = {name: _Later(name, where, summary) for name, (where, summary) in commands.items()}

    app = typer.Typer(cls=Group, help=HELP, no_args_is_help=True, pretty_exceptions_enable=False)
    app.callback()(lambda: None)
    return app


class _Group(TyperGroup):
    """Says in one line what is wrong with a command line, and where its help is."""

    def main(self, *args: Any, standalone_mode: bool = True, **settings: Any) -> Any:
        try:
            code = super().main(*args, standalone_mode=False, **settings)
        except UsageError as error:
            if type(error).__name__ == "NoArgsIsHelpError":
                error.show()
            else:
                command = error.ctx.command_path if error.ctx else "vlprune"
                what = error.format_message()
                print_error(f"{what}{'' if what.endswith(('.', '?')) else '.'} See '{command} --help'")
            code = BAD_INPUT
        if standalone_mode:
            raise SystemExit(code or 0)
        return code


class _Later(TyperCommand):
    """A command of which only name and summary are known until it is called."""

    def __init__(self, name: str, where: str, summary: str) -> None:
        super().__init__(name, help=summary)
        self.where = where

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        return self.load().make_context(info_name, args, parent=parent, **extra)

    def load(self) -> Any:
        """The command itself."""
        found = load(self.where)
        if isinstance(found, typer.Typer):
            return get_command(found)
        alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        alone.command(self.name)(found)
        return get_command(alone)


def every(commands: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """Words -> command, those of groups included: ``{"eval": ..., "bench model": ...}``."""
    found: dict[str, Any] = {}
    for name, (where, summary) in commands.items():
        command = _Later(name, where, summary).load()
        group = getattr(command, "commands", None)
        found |= {f"{name} {inner}": one for inner, one in group.items()} if group else {name: command}
    return found


def load(where: str) -> Any:
    """The object that ``module:name`` stands for."""
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(module), name)
