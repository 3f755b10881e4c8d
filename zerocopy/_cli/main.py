"""Which commands does `zerocopy` have?"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import click

from zerocopy._cli.bench import bench
from zerocopy._cli.demo import demo
from zerocopy._cli.doctor import doctor
from zerocopy._cli.failures import told
from zerocopy._cli.memory import memory
from zerocopy._cli.names import alias, list_names, publish, remove
from zerocopy._cli.plan import plan


class _Commands(click.Group):
    """A group that lists commands in the order in which they were added, and whose errors are sentences."""

    def list_commands(self, _: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        with told():
            return super().invoke(ctx)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(version("zerocopy-ray"), prog_name="zerocopy")
def cli() -> None:
    """Share PyTorch models between Ray workers without copying them.

    Each command has --help with examples. Exit status: 0 for success, 1 for a failure or a finding, 2 for wrong usage.

    \b
    Examples:
      zerocopy demo                                 see it work
      zerocopy plan my_models:build --workers 8     what would be shared, and which store it needs
      zerocopy doctor                               what is wrong on this machine, or in this cluster
    """


for _command in (plan, doctor, list_names, publish, remove, alias, memory, bench, demo):
    cli.add_command(_command)


def main() -> None:
    """The entry point of the script `zerocopy`."""
    cli(prog_name="zerocopy")
