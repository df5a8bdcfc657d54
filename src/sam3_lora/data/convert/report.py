"""What a conversion has to say: problems that stop it, and notes about what is not as it was in the source."""

from __future__ import annotations

from dataclasses import dataclass, field

from sam3_lora.data.problems import Findings, Kind, describe
from sam3_lora.errors import DataError

ARCHIVE = Kind("unsafe archive entry", "do not trust this file: make the archive again, or download it again")
UNREADABLE = Kind("unreadable label file", "export it again, or copy the file again")
UNKNOWN_CLASS = Kind(
    "label of a class that has no name", "add the name to the list of classes, or correct the label"
)
NO_CLASS = Kind("label without a class", "label it, or name the class of all such labels with --class-name")
BAD_SHAPE = Kind("unusable shape", "correct it in the labelling tool, or delete it there")
OUTSIDE = Kind(
    "shape far outside its image",
    "check the size of the image, and whether coordinates are in pixels or in shares of 1",
)
MISSING_IMAGE = Kind(
    "labels of an image that is not there", "put the image below the source folder, or delete its labels"
)
SAME_NAME = Kind(
    "name that fits several images", "name the image with its folder, or convert the folders one by one"
)
BROKEN_IMAGE = Kind("unreadable image", "replace the file, or delete it and its labels")
IMAGE_SIZE = Kind(
    "image of another size than its labels say", "take the image that was labelled, or label this one"
)
MASK_SIZE = Kind(
    "mask of another size than its image", "save masks in the size of the image, without resizing"
)
MASK_VALUE = Kind(
    "mask with values that have no class",
    "add them to the list of classes, or say what masks are with --from",
)
EMPTY_NAME = Kind("class without a name", "name it: the name is the prompt that SAM3 is asked")

BOX_MASK = Kind(
    "box written as a mask",
    "the source has boxes only, so the mask is the whole rectangle: good for finding objects, wrong for outlines",
)
CUT = Kind("shape cut at the edge of its image", "nothing to do; it is kept as run lengths")
NO_PIXEL = Kind("label that covers no pixel, left out", "nothing to do, unless it is a mistake of the labels")
NO_AREA = Kind("line, point or track without an area, left out", "draw a polygon or a mask where it matters")
REPEATED = Kind("label that stands there twice, written once", "nothing to do")
ORPHAN = Kind("labels without an image, left out", "add the image if it matters")
UNLABELLED = Kind("image without labels, left out", "label it, or leave it")
SAME_PROMPT = Kind(
    "classes with the same name joined", "nothing to do: SAM3 sees no difference between their prompts"
)
PARENT = Kind("class that only groups others, left out", "nothing to do: it labels nothing")
RENAMED = Kind("image file renamed", "nothing to do: two had one name, or the name was not portable")
UPRIGHT = Kind(
    "image turned upright", "nothing to do: the labels follow its EXIF rotation, which the trainer ignores"
)
JOINED = Kind("image listed in several label files", "nothing to do: its labels were joined")
IGNORED = Kind("file not used", "convert it alone if it matters")
LOST = Kind("part of a label that COCO cannot say, left out", "nothing to do")
NO_VALID = Kind("no validation split", "label more images: one image cannot be shared out")


def printable(text: str) -> str:
    """Return a text that can be printed, whatever bytes the file names in it have."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


@dataclass
class Report:
    """Problems and notes, gathered one by one, also in other processes."""

    problems: Findings = field(default_factory=Findings)
    notes: Findings = field(default_factory=Findings)

    def problem(self, kind: Kind, place: str) -> None:
        self.problems.add(kind, place)

    def note(self, kind: Kind, place: str) -> None:
        self.notes.add(kind, place)

    def raise_problems(self, title: str) -> None:
        """Do nothing if no problem was found.

        Raises:
            DataError: With all of them.
        """
        if problems := self.problems.problems():
            raise DataError(describe(title, problems))

    def merge(self, other: Report) -> None:
        """Add what another report holds."""
        self.problems.update(other.problems)
        self.notes.update(other.notes)
