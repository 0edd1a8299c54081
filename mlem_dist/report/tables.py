"""Tables and sentences for the terminal."""

from collections.abc import Sequence

from mlem_dist.ladder.ladder import Ladder
from mlem_dist.runtime.placement import Candidate


def ladder_table(ladder: Ladder) -> str:
    """The levels of a ladder: parameters, measured milliseconds per sample by device, and denoising error."""
    devices = sorted(ladder.levels[0].seconds)
    rows = [["", "level", "kind", "parameters", *(f"ms/sample {device}" for device in devices), "denoising error"]]
    for number, level in enumerate(ladder.levels, 1):
        error = sum(level.denoising_error) / len(level.denoising_error) if level.denoising_error else None
        costs = [f"{level.seconds[device] * 1e3:.3f}" for device in devices]
        shown = "-" if error is None else f"{error:.4f}"
        rows.append([str(number), level.name, level.kind, f"{level.parameters:,}", *costs, shown])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    head = (
        f"{ladder.name}: {'x'.join(map(str, ladder.sample_shape))}, "
        f"{', '.join(ladder.labels) or 'unconditional'}, digest {ladder.digest[:12]}"
    )
    return "\n".join([head, *lines])


def placement_reason(found: Sequence[Candidate], devices: int) -> str:
    """Why the first of the placements that fit is taken: its predicted rate beside that of the most divided one."""
    best, divided = found[0], max(found, key=lambda candidate: len(candidate.pools))
    text = f"Placement {best}: predicted {_predicted(best, devices)}"
    return text if best is divided else f"{text}; {divided} would make {_predicted(divided, devices)}."


def _predicted(candidate: Candidate, devices: int) -> str:
    share = candidate.lost / candidate.seconds
    return f"{devices / candidate.seconds:.1f} images/s, {share:.0%} of the device time spent between pools"
