"""COCO-format data sets: annotations, augmentation, sampling and batches."""

from detector.data.annotations import Annotations
from detector.data.dataset import CocoDataset, Sample, collate, collate_images
from detector.data.loader import EvaluationSampler, Loader, TrainingSampler, build_dataset, build_loader
from detector.data.picture_files import ARRAYS, image_suffixes
from detector.data.pictures import PictureError, Pictures, read_image, split_page
from detector.data.read_coco import read_coco
from detector.data.store import open_coco
from detector.data.transforms import Pipeline, ResizeShortestEdge, ScaleJitter

__all__ = [
    "ARRAYS",
    "Annotations",
    "CocoDataset",
    "EvaluationSampler",
    "Loader",
    "PictureError",
    "Pictures",
    "Pipeline",
    "ResizeShortestEdge",
    "Sample",
    "ScaleJitter",
    "TrainingSampler",
    "build_dataset",
    "build_loader",
    "collate",
    "collate_images",
    "open_coco",
    "read_coco",
    "image_suffixes",
    "read_image",
    "split_page",
]
