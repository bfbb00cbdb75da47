"""Pictures, masks and data sets: layouts on disk, reading, checked downloads, and the demo set that draws itself."""

from rcp.data.demo import draw_demo, draw_demo_btad, draw_demo_visa
from rcp.data.download import REGISTRY, Source, download
from rcp.data.layouts import Dataset, Split, categories, load_dataset
from rcp.data.pictures import PICTURES, Transform, load_images

__all__ = [
    "PICTURES",
    "REGISTRY",
    "Dataset",
    "Source",
    "Split",
    "Transform",
    "categories",
    "download",
    "draw_demo",
    "draw_demo_btad",
    "draw_demo_visa",
    "load_dataset",
    "load_images",
]
