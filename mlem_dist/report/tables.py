"""Tables for the terminal."""

from mlem_dist.ladder.ladder import Ladder


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
