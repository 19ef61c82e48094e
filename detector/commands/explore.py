"""See what each RoI method reads in an image: write the explorer's page.

detector explore checkpoint=runs/quickstart/best.pt image=photo.jpg
detector explore checkpoint=... image=... output=page.html head=mask_head
detector explore checkpoint=... image=... trust=my_package           a model with parts of your own

Exit codes: 0 done, 2 a setting cannot work.
"""

from __future__ import annotations

from pathlib import Path

from detector.config import as_program, config_errors
from detector.explorer import write_page
from detector.inference.load import load
from detector.runtime import start_ranks
from detector.settings import Runtime


def explore(
    checkpoint: str,
    image: str,
    *,
    output: str = "explorer.html",
    head: str = "box_head",
    max_mb: float = 8,
    device: str = "auto",
    trust: str | list[str] | None = None,
) -> Path:
    """Write the explorer's page; returns its path. configs/explorer.yaml says what the arguments mean."""
    with config_errors("device"):
        world = start_ranks(Runtime(device=device))
    detector = load(checkpoint, world.device, trust=trust)
    with config_errors("image"):
        pixels = detector.pictures.read(image)
    page = write_page(detector, pixels, output, image, str(checkpoint), head, max_mb)
    print(f"{page}: {page.stat().st_size / 1e6:.1f} MB, opens in any browser")
    return page


main = as_program("explorer", explore, __doc__)
