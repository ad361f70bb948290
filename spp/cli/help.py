"""How the help of a command looks: its text, then a panel for each group of options, on a terminal of any width."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from typer.core import TyperCommand

from spp.configs.options import GROUPS, RUN

if TYPE_CHECKING:
    from rich.panel import Panel

ARGUMENTS = "Arguments"


class Command(TyperCommand):
    """A command whose help shows every option in full; a name that is cut off helps nobody."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help."""
        from rich.console import Console
        from rich.padding import Padding
        from rich.text import Text

        console = Console(highlight=False)
        console.print(Padding(Text(self.get_usage(ctx), style="bold"), (1, 1)))
        for paragraph in inspect.cleandoc(self.help or "").split("\n\n"):
            console.print(Padding(Text(" ".join(paragraph.split())), (0, 1, 1, 1)))
        panels: dict[str, list[Any]] = {name: [] for name in (ARGUMENTS, *GROUPS)}
        for parameter in self.get_params(ctx):
            usual = ARGUMENTS if parameter.param_type_name == "argument" else RUN
            panels[getattr(parameter, "rich_help_panel", None) or usual].append(parameter)
        for name, parameters in panels.items():
            if parameters:
                console.print(_panel(name, parameters))


def _panel(name: str, parameters: list[Any]) -> Panel:
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for parameter in parameters:
        table.add_row(Text(_names(parameter), style="bold cyan"), Text(_told(parameter)))
    return Panel(table, title=name, title_align="left", border_style="dim")


def _names(parameter: Any) -> str:
    """Return how an argument or option is typed, on a line of its own what switches it off."""
    if parameter.param_type_name == "argument":
        return str(parameter.metavar or parameter.name.upper())
    names = ", ".join(sorted(parameter.opts, key=len))
    names += f" {parameter.metavar}" if parameter.metavar else ""
    return "\n".join([names, *parameter.secondary_opts])


def _told(parameter: Any) -> str:
    required = parameter.required and parameter.param_type_name != "argument"
    return f"{parameter.help or ''}{' Required.' if required else ''}"
