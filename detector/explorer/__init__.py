"""The explorer: one HTML page that shows what each RoI method reads, for a checkpoint and an image.

The page carries the image, the feature maps of a head and, if its method predicts offsets, the predictor's weights, and
computes everything from them in JavaScript (methods.js follows detector/roi). It needs nothing else and opens offline.
"""

from detector.explorer.page import write_page

__all__ = ["write_page"]
