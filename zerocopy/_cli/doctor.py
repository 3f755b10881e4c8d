"""What is wrong on this machine or in a cluster, and how can it be fixed?"""

from __future__ import annotations

import concurrent.futures
import functools
import os
import platform
from collections.abc import Mapping
from typing import Any

import attrs
import click
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from zerocopy._cli.checks import check_agreement, check_mapping, checks_of
from zerocopy._cli.cluster import joined_or_started, own_address_option
from zerocopy._cli.facts import Facts, facts_here, mapping_here, versions_here
from zerocopy._cli.findings import Finding, failure, has_failed, report_of, text_of
from zerocopy._cli.show import format_option, show, units_option
from zerocopy._compat.ray import LEAST_STORE
from zerocopy._store.lost import nodes_up
from zerocopy._words import first_line

SECONDS = 60.0  # the time limit for a node to start a worker and gather facts


@click.command()
@own_address_option("to look at")
@click.option("--report", is_flag=True, help="Print text to paste into an issue: no user names, no home folders.")
@format_option
@units_option
@click.pass_context
def doctor(context: click.Context, address: str | None, report: bool, shown_as: str) -> None:
    """Look for what is wrong here, or in a cluster.

    It starts a small cluster of its own, or looks at all nodes of the one at --address.

    It tries a private mapping for real. It looks at the store, /dev/shm, the container's memory limit, versions on all nodes,
    settings of Ray, and its memory monitor. Each finding has a remedy. The exit status is 1 if there is a failure, and 0 if there
    are only warnings.

    \b
    Examples:
      zerocopy doctor
      zerocopy doctor --address auto
      zerocopy doctor --report
    """
    is_own = address is None and not ray.is_initialized()
    with joined_or_started(address, LEAST_STORE, cpus=1):
        findings, versions = examine(is_own=is_own)
    if report:
        click.echo(report_of(findings, versions))
    else:
        show(shown_as, [attrs.asdict(one) for one in findings], lambda: text_of(findings))
    context.exit(int(has_failed(findings)))


def examine(*, is_own: bool) -> tuple[list[Finding], list[str]]:
    """All findings, and the versions on this machine as text."""
    here = check_mapping(mapping_here())
    facts, findings = _gathered()
    findings += [one for told in facts.values() for one in checks_of(told, is_own=is_own)]
    findings += [attrs.evolve(here, check=f"{here.check}, this process")] if here.level != "ok" else []
    installed = versions_here()
    findings += check_agreement({"here": installed, **{node: told.versions for node, told in facts.items()}})
    system = f"{platform.system()} {platform.release()} {platform.machine()}, {os.cpu_count()} CPUs, {len(facts)} nodes"
    return findings, [*(f"{name} {version}" for name, version in installed.items()), system]


def _gathered() -> tuple[Mapping[str, Facts], list[Finding]]:
    """The facts from a worker of each node, and a failure for each node that could not give any."""
    refs = {node: _task().options(scheduling_strategy=_on(node)).remote() for node in sorted(nodes_up())}
    futures = {node: ref.future() for node, ref in refs.items()}
    concurrent.futures.wait(futures.values(), SECONDS)
    facts: dict[str, Facts] = {}
    findings: list[Finding] = []
    for node, future in futures.items():
        try:
            facts[node] = future.result(0)
        except concurrent.futures.TimeoutError:
            ray.cancel(refs[node])
            findings.append(_silent(node, f"it did not answer within {SECONDS:g} s"))
        except Exception as error:  # for example, zerocopy is not installed there
            findings.append(
                _silent(node, str(error).strip().splitlines()[-1] if str(error).strip() else first_line(error))
            )
    return facts, findings


def _silent(node: str, why: str) -> Finding:
    what = f"A worker of node {node[:8]} could not look: {why}"
    return failure("node", what, "Install zerocopy there with the same versions, and see whether the node is up.")


@functools.cache
def _task() -> Any:
    return ray.remote(num_cpus=0, max_retries=0)(facts_here)


def _on(node: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node, soft=False)
