"""How does sharing work in practice? Workers share one model; the demo shows their real memory, and that of copies."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from zerocopy._cli.cluster import joined_or_started, own_address_option
from zerocopy._cli.saving import Taken, bars_of, chart_of, data_of, table_of
from zerocopy._cli.show import format_option, show, units_option
from zerocopy._cli.sizing import Weights, store_bytes
from zerocopy._publish.verify import plan
from zerocopy._store.object_store import arguments_fraction
from zerocopy._tables import format_bytes

SEARCH_STORE = 500_000_000  # bytes: MiniLM, the vectors, and blocks of Ray Data


@click.command()
@click.option(
    "--model",
    type=click.Choice(["minilm", "large"], case_sensitive=False),
    default="minilm",
    show_default=True,
    help="MiniLM (91 MB, pretrained) searches texts; the large one has 1 GB of random weights, and shows memory.",
)
@click.option("--workers", type=click.IntRange(1), default=4, show_default=True, help="Processes that run the model.")
@click.option("--compare", is_flag=True, help="Run it again with a copy in each worker, and measure that, too.")
@click.option("--query", "queries", multiple=True, help="Text that MiniLM searches for; can be repeated.")
@click.option(
    "--file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Search the lines of this file, not the standard library.",
)
@click.option("--limit", type=click.IntRange(1), help="Embed only this many texts, evenly spread. Default: all.")
@own_address_option("to run it on")
@format_option
@units_option
def demo(
    model: str,
    workers: int,
    compare: bool,
    queries: tuple[str, ...],
    file: Path | None,
    limit: int | None,
    address: str | None,
    shown_as: str,
) -> None:
    """See it work: workers that share one model.

    By default MiniLM searches the docstrings of the standard library. Its libraries take more than it does; `--model large` is
    a model whose copies hurt. Memory is measured for the workers that ran, and computed from that for 4 and 8; each bar
    says which.
    Needs zerocopy-ray[demo].

    \b
    Examples:
      zerocopy demo
      zerocopy demo --model large
      zerocopy demo --model large --workers 2 --compare
      zerocopy demo --query "parse a date from a string" --limit 1000
    """
    if model == "large":
        if queries or file or limit:
            raise click.UsageError(
                "--query, --file and --limit are for --model minilm: the large one has random weights."
            )
        data, text, taken, weights = _large(workers, compare, address)
    else:
        data, text, taken, weights = _search(workers, compare, list(queries), file, limit, address)
    bars = bars_of(taken[0], taken[1] if compare else None, weights)
    texts = [*([text] if text else []), table_of(taken), chart_of(bars)]
    show(shown_as, {**data, **data_of(taken, bars)}, lambda: "\n\n".join(texts))


def _large(workers: int, compare: bool, address: str | None) -> tuple[dict[str, Any], str, list[Taken], int]:
    from zerocopy._cli import encoder

    _tell("Making an encoder of 1 GB with random weights")
    model = encoder.encoder()
    planned = plan(model)
    weights = Weights(planned.shared_bytes, planned.copied_bytes)
    with joined_or_started(address, store_bytes(weights, workers, arguments_fraction()), os.cpu_count()):
        _tell(f"{workers} workers share it")
        runs = [encoder.run_shared(model, workers)]
        if compare:
            _tell(f"{workers} workers, each with a copy of its own: Ray pickles it, which takes a while")
            runs.append(encoder.run_copies(model, workers))
    seconds = [(run.taken.way, run.seconds) for run in runs]
    text = f"A model of {format_bytes(weights.shared)}. " + " ".join(
        f"With {way} {workers} workers had run it after {taken:.0f} s." for way, taken in seconds
    )
    data = {"model": "large", "weights_bytes": weights.shared, "workers": workers, "seconds": dict(seconds)}
    return data, text, [run.taken for run in runs], weights.shared


def _search(
    workers: int, compare: bool, queries: list[str], file: Path | None, limit: int | None, address: str | None
) -> tuple[dict[str, Any], str, list[Taken], int]:
    from zerocopy._cli import search

    documents = search.documents_of(file, limit)
    pipeline = search.load_search()
    weights = plan(pipeline).shared_bytes
    _tell(f"{len(documents):,} documents, a model of {format_bytes(weights)}")
    # For each actor of Ray Data, Ray prints an error although none occurred: https://github.com/ray-project/ray/issues/53727
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    with joined_or_started(address, SEARCH_STORE, os.cpu_count()):
        search.keep_quiet()
        run = search.embed_shared(pipeline, documents, workers, _tell)
        answers = search.answers_of(pipeline, search.Index(run.vectors, documents), queries or search.QUERIES)
        taken = [Taken.of("zerocopy", run.memory)]
        if compare:
            plain = search.embed_with_copies(pipeline, documents, workers, _tell)
            taken.append(Taken.of("plain copies", plain.memory))
    data = {
        "model": "minilm",
        "weights_bytes": weights,
        "workers": workers,
        "documents": len(documents),
        "answers": [
            {
                "query": query,
                "matches": [{"score": score, "name": match.name, "text": match.text} for score, match in matches],
            }
            for query, matches in answers
        ],
    }
    return data, search.text_of(answers), taken, weights


def _tell(line: str, end: str = "\n") -> None:
    """Print the progress on stderr."""
    click.echo(f"{line}{end}", nl=False, err=True)
    sys.stderr.flush()
