"""Classes that captions name, and a judge that reads them from pictures; for `eval.classes`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.pipeline import make_pipeline
from sklearn.svm import SVC

from mmgen.evaluate.extractors import Extractor
from mmgen.evaluate.words import share, words
from mmgen.train.estimate import Estimate

MOST = 6_000
"""Largest number of pictures on which the judge is trained."""
COMPONENTS = 64
UNKNOWN = -1


class Classes:
    """The class that a caption names: the only one of `names` in it, where a longer name hides a shorter one."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = sorted(names, key=lambda name: len(words(name)), reverse=True)
        if empty := [name for name in names if not words(name)]:
            raise ValueError(f"eval.classes has a name without letters: {empty[0]!r}")

    def of(self, caption: str) -> int:
        """The number of the class, or `UNKNOWN` if the caption names none or several."""
        text, found = f" {' '.join(words(caption))} ", list[int]()
        for number, name in enumerate(self.names):
            pattern = f" {re.escape(' '.join(words(name)))} "
            if re.search(pattern, text):
                found.append(number)
                text = re.sub(pattern, " | ", text)
        return found[0] if len(found) == 1 else UNKNOWN

    def of_all(self, captions: Sequence[str]) -> NDArray[np.int64]:
        """The class of each caption."""
        return np.array([self.of(caption) for caption in captions], dtype=np.int64)


class ClassJudge:
    """Names the class of a picture: a support vector classifier on principal components of features.

    Raises:
        ValueError: the captions name fewer than two classes.
    """

    def __init__(self, extractor: Extractor, images: Sequence[Image.Image], labels: NDArray[np.int64]) -> None:
        known = np.flatnonzero(labels != UNKNOWN)
        if len(np.unique(labels[known])) < 2:
            raise ValueError(
                "the captions of the judge's images (eval.judge, or data.train if that is empty) name fewer than two "
                "of eval.classes: correct the names, or name other shards"
            )
        chosen = np.random.default_rng(0).permutation(known)[:MOST]
        features = extractor([images[i] for i in chosen])
        self._extractor = extractor
        components = min(COMPONENTS, *features.shape)
        self._classifier = make_pipeline(PCA(components, random_state=0, whiten=False), SVC(C=10))
        self._classifier.fit(features, labels[chosen])

    def read(self, images: Sequence[Image.Image]) -> NDArray[np.int64]:
        """The class of each picture."""
        return np.asarray(self._classifier.predict(self._extractor(images)))


@dataclass(frozen=True)
class ClassScores:
    """How often the class that a caption names is drawn and written; captions that name none are left out."""

    drawn: Estimate
    drawn_shuffled: Estimate
    """Against the caption of the next picture: chance."""
    real: Estimate
    """Of real pictures: how well the judge reads."""
    written: Estimate
    """Captions of real pictures that name the right class."""

    def flat(self) -> dict[str, float]:
        """The values under their keys in `report.json`."""
        flat = self.drawn.flat("t2i_accuracy") | self.real.flat("t2i_ceiling")
        flat["t2i_accuracy_shuffled"] = self.drawn_shuffled.mean
        return flat | self.written.flat("i2t_accuracy")


def accuracy(found: NDArray[np.int64], wanted: NDArray[np.int64]) -> Estimate:
    """The share of equal classes among those that are wanted and known.

    Raises:
        ValueError: none is known.
    """
    known = wanted != UNKNOWN
    if not known.any():
        raise ValueError("no caption of eval.test names exactly one of eval.classes: correct the names")
    return share(list(found[known] == wanted[known]))
