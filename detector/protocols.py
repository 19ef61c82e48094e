"""What the parts of a detector promise each other: any module that keeps one of these promises can take its place.

All of them are nn.Modules. Dimensions: N images, R RoIs, D detections, C channels, L levels, P proposals, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from detector.structures import Batch, Detections, Proposals, RoIFeatures, Targets


class Backbone(Protocol):
    """From images to maps, finest first."""

    out_channels: Sequence[int]  # C of each map
    strides: Sequence[int]  # of each map, in image pixels
    # one that takes images of other than three channels says so as `in_channels`

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Maps [N, C, H / stride, W / stride] of normalised images [N, in_channels, H, W]."""


@runtime_checkable
class Published(Protocol):
    """A backbone whose library publishes weights: `model.backbone.weights` may be one of their names."""

    def published(self, name: str) -> dict[str, Tensor]:
        """The weights of that name under the backbone's own keys, maybe with more stages than it has. May download.

        Raises ValueError for a name that is not known.
        """


@runtime_checkable
class Named(Protocol):
    """A backbone that reads files of its library by the library's own names."""

    def named(self, state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """The tensors of a file under the backbone's own keys; None where they do not have the library's names.

        Raises ValueError where they are of another model of the library.
        """


@runtime_checkable
class Layered(Protocol):
    """A backbone that tells its layers apart, for `training.layer_decay`."""

    def layers(self) -> dict[str, int]:
        """The layer of each parameter, by the backbone's own keys; those nearest to the images are 0."""


class Neck(Protocol):
    """From the backbone's maps to the levels that RPN and heads read, finest first."""

    out_channels: int  # C of all levels
    strides: Sequence[int]  # of all levels
    roi_levels: int  # how many of them, the finest, RoIs are assigned to

    def __call__(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Levels [N, C, Hl, Wl] of the backbone's maps."""


class Trunk(Protocol):
    """From RoI features to what a head's predictor reads."""

    out_channels: int

    def __call__(self, features: Tensor) -> Tensor:
        """[R, out_channels], or [R, out_channels, h, w] in heads that predict maps, of RoI features [R, C, h, w]."""


class Prediction(Protocol):
    """What a head predicts for R RoIs."""

    @property
    def roi_features(self) -> RoIFeatures | None: ...  # None of a head that looks at the maps alone


class Head(Protocol):
    """A head over RoIs [R, 5] = (batch_index, x1, y1, x2, y2)."""

    @property
    def stages(self) -> Sequence[Any]:
        """The heads that it is made of: a plain one of itself alone, a cascade of several."""

    def __call__(self, features: Sequence[Tensor], rois: Tensor) -> Prediction: ...

    def losses(self, prediction: Any, sampled: Any, targets: Targets) -> dict[str, Tensor]:
        """Scalar losses of the predictions for sampled RoIs, with the same keys for every batch."""


class BoxHead(Head, Protocol):
    """A head that makes detections of proposals."""

    def sample(self, proposals: Proposals, batch: Batch, targets: Targets) -> tuple[Any, Any]:
        """RoIs for a training step, all of them and the positives alone: two `heads.box.SampledRoIs`."""

    def candidates(self, features: Sequence[Tensor], rois: Tensor, image_sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes [R, K or 1, 4], not clipped, and scores [R, K]."""

    def detect(self, features: Sequence[Tensor], proposals: Proposals, batch: Batch) -> Detections:
        """Detections [N, D] of the proposals."""


class DetectionHead(Head, Protocol):
    """A head that adds a field to detections, such as their masks."""

    def detect(self, features: Sequence[Tensor], detections: Detections) -> Detections:
        """The detections [N, D] with one field more."""


class ExtraHead(Protocol):
    """A head of a user's own over the box head's RoIs and detections: `model.extra_heads` gives it a name.

    Two attributes may say more of it. `negatives: bool`: in training it sees all sampled RoIs as the box head does, not
    those of objects alone. `writers: Mapping[str, Callable[[np.ndarray], Any]]`: what predictions.json says of a
    detection's value of a field, by the field's name; without one it is the number, or the list of numbers.
    """

    def __call__(self, features: Sequence[Tensor], rois: Tensor) -> Prediction:
        """From levels [N, C, Hl, Wl] and RoIs [R, 5] = (batch_index, x1, y1, x2, y2), in training and inference."""

    def losses(self, prediction: Any, sampled: Any, targets: Targets) -> dict[str, Tensor]:
        """Scalar losses for the RoIs, a `heads.box.SampledRoIs`: the same names for every batch, none of others'."""

    def detect(self, features: Sequence[Tensor], detections: Detections) -> Mapping[str, Tensor]:
        """Fields [N, D, ...] of the detections by name, in units that do not depend on the size of the image."""
