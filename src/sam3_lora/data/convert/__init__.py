"""Datasets of other formats to the official layout: :func:`convert_dataset`, and pure functions for each format."""

from sam3_lora.data.convert.dataset import Conversion, convert_dataset

__all__ = ["Conversion", "convert_dataset"]
