"""Pictures of simulations, drawn with matplotlib. Only this module needs it (extra `pictures`)."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mesh.cli.exits import CommandError, Exit
from mesh.cli.simulated import Row
from placement.simulator.run import hit_rate


def simulated(rows: Sequence[Row], path: Path, *, title: str) -> None:
    """Draws the hit rate over the memory for models, or over time if only one size of memory was simulated. Raises
    CommandError."""
    with drawing(path) as ((axes,), ticker):
        if len({round(row.room, 6) for row in rows}) > 1:
            _over_room(axes, rows)
            axes.set_xlabel("memory of all pods, as a share of what all models take")
            axes.xaxis.set_major_formatter(ticker.PercentFormatter(1.0))
        else:
            _over_time(axes, rows)
            axes.set_xlabel("hours")
        axes.yaxis.set_major_formatter(ticker.PercentFormatter(1.0))
        axes.set_ylabel("requests that find their model loaded")
        axes.set_title(title)
        axes.grid(alpha=0.3)
        axes.legend()


@contextlib.contextmanager
def drawing(
    path: Path, *, panels: int = 1, columns: int = 1, size: tuple[float, float] = (8, 4.5)
) -> Iterator[tuple[list[Any], Any]]:
    """Yields the axes of a picture, one for each panel, and `matplotlib.ticker`. Writes the picture when the block
    ends. Raises CommandError. `size` is in inches."""
    try:
        import matplotlib
    except ImportError:
        text = "--picture needs matplotlib: run `pip install '.[pictures]'` in a checkout of Mesh"
        raise CommandError(text, code=Exit.USAGE) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    rows = -(-panels // columns)
    figure, grid = pyplot.subplots(rows, columns, figsize=size, dpi=110, layout="constrained", squeeze=False)
    axes = [one for row in grid for one in row]
    for unused in axes[panels:]:
        unused.set_axis_off()
    try:
        yield axes[:panels], ticker
        figure.savefig(path, format="png", metadata={"Software": None})
    except OSError as error:
        raise CommandError(f"{path} cannot be written: {error.strerror}", code=Exit.USAGE) from error
    finally:
        pyplot.close(figure)


def _over_room(axes: Any, rows: Sequence[Row]) -> None:
    several = len({row.pods for row in rows}) > 1
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        name = row.policy if row.result is None or not several else f"{row.policy}, {row.pods} pods"
        lines.setdefault(name, []).append((row.room, hit_rate(row.counts)))
    for name, points in lines.items():
        known = row_style(name)
        axes.plot(*zip(*sorted(set(points)), strict=True), label=name, **known)


def _over_time(axes: Any, rows: Sequence[Row]) -> None:
    several = len({row.pods for row in rows}) > 1
    for row in rows:
        if row.result is None:
            axes.axhline(hit_rate(row.counts), label=row.policy, **row_style(row.policy, marker=False))
            continue
        name = f"{row.policy}, {row.pods} pods" if several else row.policy
        course = [(ms / 3_600_000, rate) for ms, rate in row.result.course]
        axes.plot(*zip(*course, strict=True), label=name)


def row_style(name: str, *, marker: bool = True) -> dict[str, Any]:
    """Returns the style of a line. The line of the clairvoyant, an upper bound, looks different from the lines of
    policies."""
    if name == "clairvoyant":
        return {"color": "black", "linestyle": "--"}
    return {"marker": "o", "markersize": 4} if marker else {}
