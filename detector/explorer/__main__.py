"""See what each RoI method reads in an image: write the explorer's page.

    python -m detector.explorer checkpoint=runs/quickstart/best.pt image=photo.jpg
    python -m detector.explorer checkpoint=... image=... output=page.html head=mask_head

Exit codes: 0 done, 2 a setting cannot work.
"""

from __future__ import annotations

from dataclasses import dataclass

from detector.config import entry_point


@dataclass
class Keys:
    """The top level of configs/explorer.yaml."""

    checkpoint: str
    image: str
    output: str
    head: str
    max_mb: float
    device: str


@entry_point("explorer", Keys)
def main(cfg):
    from detector.explorer import explore

    explore(cfg)


if __name__ == "__main__":
    main()
