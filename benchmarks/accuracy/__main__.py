"""`python -m benchmarks.accuracy`: write docs/accuracy.md, docs/step-time.md and their plots. For `make accuracy`."""

from __future__ import annotations

import click

from benchmarks.accuracy import document, grid, plots, step_time_page, t4


@click.command(name="benchmarks.accuracy")
@click.option("--trace", is_flag=True, help="First trace the forty rows of the T4 again, which takes minutes.")
@click.option("--grid", "grid_too", is_flag=True, help="First trace both grids of recipes again: twenty minutes.")
def command(trace: bool, grid_too: bool) -> None:
    """Write both pages and their plots from the measured data and the two models as they are now."""
    if trace:
        t4.run_trace()
    if grid_too:
        for name in grid.trace_all():
            click.echo(name, err=True)
    document.DOCUMENT.write_text(document.render())
    step_time_page.DOCUMENT.write_text(step_time_page.render())
    plots.draw_all(document.PLOTS)
    plots.draw_times(step_time_page.PLOTS)
    for page in (document, step_time_page):
        click.echo(f"Written: {page.DOCUMENT.relative_to(document.ROOT)} and {len(list(page.PLOTS.iterdir()))} plots")


if __name__ == "__main__":
    command()
