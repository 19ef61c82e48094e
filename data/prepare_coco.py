"""Download COCO 2017: `detector coco` in a checkout. `python data/prepare_coco.py --help` says how."""

from detector.commands.prepare_coco import main

if __name__ == "__main__":
    main()
