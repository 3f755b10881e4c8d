"""How much memory do publications and processes of the cluster take? The report is printed once, or again and again."""

from __future__ import annotations

import itertools
import json
import time
from typing import Any

import attrs
import click
import ray

from zerocopy._cli.cluster import address_option, joined
from zerocopy._cli.show import JSON, format_option, sort_option, units_option
from zerocopy._seeing.nodes import NodeMemory
from zerocopy.memory import MemoryReport, memory_report

_ORDERS: dict[str, Any] = {
    "NAME": lambda one: (one.name, getattr(one, "version", None) or 0),
    "PRIVATE": lambda one: -one.private,
    "SHARED": lambda one: -getattr(one, "shared", getattr(one, "mapped", 0)),
    "SAVED": lambda one: -one.saved,
}


@click.command()
@click.option("--watch", is_flag=True, help="Measure again and again, until Ctrl-C.")
@click.option(
    "--interval",
    type=click.FloatRange(0.1),
    default=2.0,
    show_default=True,
    help="Seconds between two reports, with --watch.",
)
@click.option("--times", type=click.IntRange(1), help="With --watch, stop after this many reports.")
@click.option(
    "--plot", type=click.Path(dir_okay=False, writable=True), help="Draw to this file (needs zerocopy-ray[plot])."
)
@click.option(
    "--timeout", type=click.FloatRange(0), default=15.0, show_default=True, help="Seconds that nodes have to answer."
)
@address_option
@format_option
@sort_option(*_ORDERS)
@units_option
def memory(
    watch: bool,
    interval: float,
    times: int | None,
    plot: str | None,
    timeout: float,
    address: str,
    shown_as: str,
    sort_by: str,
) -> None:
    """Show what publications and processes take.

    The report covers all nodes of the cluster. Their kernels measure the memory.

    --watch prints one report after another; as JSON, one per line. --plot draws the last one. Rows are sorted within
    each node.

    \b
    Examples:
      zerocopy memory
      zerocopy memory --watch --sort-by PRIVATE
      zerocopy memory --plot memory.png
      zerocopy memory --format json | jq .together.saved
    """
    if times is not None and not watch:
        raise click.UsageError("--times is for --watch.")
    with joined(address):
        for number in itertools.count(1):
            report = _sorted(memory_report(timeout=timeout), sort_by)
            _print(report, shown_as, is_one_of_many=watch)
            if plot is not None:
                report.plot(plot)
            if not watch or number == times:
                return
            time.sleep(interval)


def _print(report: MemoryReport, shown_as: str, *, is_one_of_many: bool) -> None:
    if shown_as == JSON:
        click.echo(json.dumps(report.to_dict(), indent=None if is_one_of_many else 2))
        return
    if is_one_of_many:
        click.clear()  # clears a terminal, and does nothing elsewhere
        click.echo(time.strftime("%H:%M:%S"))
    click.echo(f"The cluster at {ray.get_runtime_context().gcs_address}:\n\n{report}")


def _sorted(report: MemoryReport, sort_by: str) -> MemoryReport:
    nodes = [_sorted_node(node, sort_by) for node in report.nodes]
    return MemoryReport.of_nodes(nodes, report.notes)


def _sorted_node(node: NodeMemory, sort_by: str) -> NodeMemory:
    key = _ORDERS[sort_by]
    return attrs.evolve(
        node,
        publications=tuple(sorted(node.publications, key=key)),
        processes=tuple(sorted(node.processes, key=key)),
    )
