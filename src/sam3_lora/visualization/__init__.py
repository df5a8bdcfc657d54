"""Pictures of objects on images, one at a time or as a sheet that sets columns of results side by side."""

from sam3_lora.visualization.drawing import Instance, draw_objects, label_colours
from sam3_lora.visualization.sheet import (
    COLUMNS,
    GROUND_TRUTH,
    SheetRow,
    choose_images,
    comparison_sheet,
    rows_from_results,
)

__all__ = [
    "COLUMNS",
    "GROUND_TRUTH",
    "Instance",
    "SheetRow",
    "choose_images",
    "comparison_sheet",
    "draw_objects",
    "label_colours",
    "rows_from_results",
]
