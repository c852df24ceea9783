"""`python -m benchmarks.accuracy`: write docs/accuracy.md and its plots anew. `make accuracy` runs it."""

from __future__ import annotations

import click

from benchmarks.accuracy import document, grid, plots, t4


@click.command(name="benchmarks.accuracy")
@click.option("--trace", is_flag=True, help="First trace the forty rows of the T4 again, which takes minutes.")
@click.option("--grid", "grid_too", is_flag=True, help="First trace the grid of recipes again: ten minutes.")
def command(trace: bool, grid_too: bool) -> None:
    """Write docs/accuracy.md and its plots from the measured data and the memory model as they are now."""
    if trace:
        t4.run_trace()
    if grid_too:
        for name in grid.trace_all():
            click.echo(name, err=True)
    document.DOCUMENT.write_text(document.render())
    plots.draw_all(document.PLOTS)
    click.echo(
        f"Written: {document.DOCUMENT.relative_to(document.ROOT)} and {len(list(document.PLOTS.iterdir()))} plots"
    )


if __name__ == "__main__":
    command()
