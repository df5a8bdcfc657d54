"""Every kind of problem that a dataset can have, with what to do about it."""

from __future__ import annotations

from sam3_lora.data.coco import ANNOTATION_FILE
from sam3_lora.data.problems import Kind

LAYOUT = f"a dataset is a folder with train/ and valid/, each with its images and {ANNOTATION_FILE!r}"
_DELETE = "or delete the image and its annotations from the file"

# The file

SPLIT = Kind("missing split", LAYOUT)
ANNOTATIONS = Kind(
    "unusable annotation file", "export the dataset again as 'COCO Segmentation', or copy the file again"
)
NO_IMAGES = Kind("split without images", "list the images in 'images'; a split needs at least one")
NO_OBJECTS = Kind(
    "split without annotations", "annotate some images: without objects nothing is learned or measured"
)
NO_CATEGORIES = Kind("split without categories", 'add {"id": 1, "name": "..."} for each kind of object')
FIELD = {
    "id": Kind(
        "entry without a whole number as 'id'", "number the images, annotations and categories from 1"
    ),
    "file_name": Kind(
        "image without 'file_name'", "name the file, relative to the folder of the annotation file"
    ),
    "size": Kind("image without 'width' and 'height'", "add both as whole numbers of pixels"),
    "iscrowd": Kind(
        "annotation without 'iscrowd'",
        'add "iscrowd": 0 to each annotation, or 1 where a mask covers a crowd; the official loader reads it always',
    ),
    "bbox": Kind(
        "annotation without 'bbox'", 'add "bbox": [x, y, width, height] in pixels, from the top left corner'
    ),
    "segmentation": Kind(
        "annotation without 'segmentation'",
        "add polygons or RLE, or export as 'COCO Segmentation'; to train on boxes alone set "
        "training.enable_segmentation=false",
    ),
    "area": Kind(
        "annotation without 'area'", "add the number of pixels of the mask: the evaluation sorts by it"
    ),
}
UNREAD_AREA = Kind(
    "annotation without 'area' to train on",
    "add the number of pixels of the mask, if anything else than the training is to read the file",
    "warning",
)
BAD_AREA = Kind("bad area", "write the number of pixels of the mask")
DUPLICATE_ID = Kind("id used twice", "give each its own: the loader keeps one of them only")
UNKNOWN_IMAGE = Kind(
    "annotation of an unknown image", "correct its 'image_id', add the image or delete the annotation"
)
UNKNOWN_CATEGORY = Kind(
    "annotation of an unknown category",
    "correct its 'category_id', add the category or delete the annotation",
)

# Names

NAME = Kind(
    "category without a name", "name it: the name is the prompt that SAM3 is asked, such as 'red car'"
)
DUPLICATE_NAME = Kind(
    "category name used twice",
    "merge the two, or delete the unused one: the name is the prompt, and one prompt cannot mean both",
)
POOR_NAME = Kind(
    "name that makes a poor prompt",
    "name the thing as a person would: the name is the prompt, such as 'red car' or 'broken window'",
    "warning",
)
OTHER_CATEGORIES = Kind(
    "category that the other splits lack",
    "give all splits the same categories: what is not trained cannot be measured, and the reverse",
    "warning",
)

# Boxes and masks

BOX = Kind("bad bbox", "boxes are four numbers [x, y, width, height] in pixels of the image")
BOX_NAN = Kind(
    "bbox with NaN or an infinite number", "draw the box again, or make it from the mask; losses become NaN"
)
FLAT_BOX = Kind("bbox of no size", "draw the box again, make it from the mask or delete the annotation")
BOX_OUTSIDE = Kind(
    "bbox outside the image", "cut it at the edges; if many are, the labels are for another size of the image"
)
XYXY = Kind(
    "bbox with x2, y2 (xyxy) instead of width, height (xywh)",
    "write [x1, y1, x2 - x1, y2 - y1]; probably all boxes of the file are so",
)
NORMALISED = Kind(
    "normalised coordinates, shares of 1 instead of pixels",
    "multiply by width and height of the image; 'sam3-lora data check --fix' does",
)
SEGMENTATION = Kind(
    "bad segmentation",
    "it is polygons [[x1, y1, x2, y2, x3, y3, ...], ...] in pixels, or RLE of the image's size",
)
FEW_POINTS = Kind("polygon of fewer than three points", "draw it again, or delete it")
ODD_POLYGON = Kind("polygon of odd length", "a number is missing or too many: draw it again, or delete it")
POLYGON_NAN = Kind("polygon with NaN or an infinite number", "draw it again, or delete it")
POLYGON_OUTSIDE = Kind(
    "polygon outside the image",
    "cut it at the edges; if many are, the labels are for another size of the image",
)
EMPTY_MASK = Kind("mask without pixels", "draw it again, or delete the annotation")
RLE_SIZE = Kind(
    "RLE of another size than the image", "RLE has the size [height, width] of its image: export again"
)
RLE_COUNTS = Kind(
    "RLE with bad counts",
    "counts are run lengths, column by column, that add up to height x width: export again",
)
DISAGREE = Kind(
    "mask that disagrees with its box",
    "one of the two is wrong: make the box from the mask, or draw them again",
)
TINY = Kind(
    "tiny object",
    "it is smaller than 8 pixels at SAM3's 1008: cut large images into tiles, or leave it out",
    "warning",
)

# Images

MISSING_IMAGE = Kind("missing image file", f"copy it there, {_DELETE}")
BROKEN_IMAGE = Kind("unreadable image file", f"it is damaged, truncated or no image: replace it, {_DELETE}")
IMAGE_SIZE = Kind(
    "image of another size than its file",
    "write the size of the file; if the image was resized or turned after labelling, its labels must be too",
)
TURNED_LABELS = Kind(
    "image that was labelled turned by its EXIF rotation",
    "save it upright: the trainer ignores EXIF, so labels and picture do not meet",
)
EXIF = Kind(
    "image with an EXIF rotation",
    "see whether the labels lie right on the picture as it is stored: the trainer ignores EXIF, 'predict' and most "
    "viewers turn it; save it upright, labels too",
    "warning",
)
SIXTEEN_BITS = Kind(
    "image of 16 bits or floats",
    "save it with 8 bits: the trainer clips values over 255 to white, 'predict' scales them",
    "warning",
)
CMYK = Kind("CMYK image", "save it as RGB: colours are converted without its profile", "warning")
ALPHA = Kind(
    "image with an alpha channel",
    "save it without: transparency is left out, and the colours below it are seen",
    "warning",
)
OUTSIDE_PATH = Kind(
    "image path that is absolute or leaves the split by '..'",
    "put the file beside the annotation file: the dataset cannot be moved as it is",
    "warning",
)
SYMLINK = Kind(
    "image behind a symbolic link", "copy the file there: zip files and other machines lose it", "warning"
)
SAME_BUT_CASE = Kind(
    "names that differ only by case", "rename one: on Windows and macOS they are the same file", "warning"
)
LISTED_TWICE = Kind(
    "image listed twice", "merge the entries: each is trained without the objects of the other", "warning"
)
NO_OBJECTS_IN_IMAGE = Kind(
    "image without objects",
    "fine where there is nothing to find; else label it, or it teaches the opposite",
    "warning",
)
IN_BOTH = Kind(
    "same image in two splits",
    "delete one: what was trained on measures nothing",
    "warning",
)

# Balance

UNUSED_CATEGORY = Kind(
    "category without objects",
    "label some, or delete it, such as the parent category of some exports: it is asked of every image in vain",
    "warning",
)
IMBALANCE = Kind(
    "imbalance of the categories",
    "label more of the rare ones, or expect them to be found less",
    "warning",
)
