"""Images, masks and data sets: layouts on disk, reading, checked downloads, and the demo set that draws itself."""

from rcp.data.download import REGISTRY, Source, download
from rcp.data.images import IMAGE_SUFFIXES, Transform, load_images
from rcp.data.layouts import Dataset, Split, categories, load_dataset

__all__ = [
    "IMAGE_SUFFIXES", "REGISTRY", "Dataset", "Source", "Split", "Transform", "categories", "download", "load_dataset", "load_images",
]  # fmt: skip
