"""Contact sheets: a picture with a few frames of each clip in a row, and its caption above."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

GAP, CAPTION_HEIGHT = 4, 14
PAPER, INK = (255, 255, 255), (40, 40, 40)


def contact_sheet(
    clips: Sequence[np.ndarray],
    path: str | Path,
    captions: Sequence[str] | None = None,
    columns: int = 2,
    frames_per_clip: int = 6,
) -> None:
    """Write uint8 clips [F, H, W, 3] of one size, `columns` of them side by side."""
    height, width = clips[0].shape[1:3]
    shown = min(frames_per_clip, min(len(clip) for clip in clips))
    above = CAPTION_HEIGHT if captions else 0
    cell_width, cell_height = shown * (width + GAP) + GAP, above + height + 2 * GAP
    rows = -(-len(clips) // columns)
    sheet = Image.new("RGB", (columns * cell_width, rows * cell_height), PAPER)
    pen = ImageDraw.Draw(sheet)
    for i, clip in enumerate(clips):
        left, top = (i % columns) * cell_width + GAP, (i // columns) * cell_height + GAP
        if captions:
            pen.text((left, top), captions[i], fill=INK)
        for k, f in enumerate(np.linspace(0, len(clip) - 1, shown).round().astype(int)):
            sheet.paste(Image.fromarray(clip[f]), (left + k * (width + GAP), top + above))
    sheet.save(path)
