"""Tasks: how the captions and pictures of a data set are read. A new task is a file here and a line in `TASKS`."""

from mmgen.evaluate.tasks.digits import Digits
from mmgen.evaluate.tasks.interface import Mark, Object, Pixels, Task, Truth, resized
from mmgen.evaluate.tasks.scenes import COLOURS, PLACES, Scenes, paint

TASKS: dict[str, type[Task]] = {"digits": Digits, "scenes": Scenes}

__all__ = [
    "COLOURS",
    "PLACES",
    "TASKS",
    "Digits",
    "Mark",
    "Object",
    "Pixels",
    "Scenes",
    "Task",
    "Truth",
    "paint",
    "resized",
]
