"""Where samples come from: a file, or a source that a package registers under a name. May import:
numpy, Pillow and what stands above `data`.

Packages register sources as entry points of the group `lvr_lite.sources`: functions
(split, seed, count) -> Source, where split is "train" or "test" and a count of None stands for as
many as that source usually gives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from lvr_lite.data.sample_files import SampleFile
from lvr_lite.data.samples import LazySamples, Sample
from lvr_lite.errors import DataError
from lvr_lite.model.images import open_for_model, picture_size

if TYPE_CHECKING:
    from PIL.Image import Image

GROUP = "lvr_lite.sources"

Pictures = tuple["Image", ...]
Item = tuple[Sample, Pictures]
# height and width of each picture, in pixels
Sizes = tuple[tuple[int, int], ...]
OpenNamed = Callable[[str, int, "int | None"], "Source"]


class Source(ABC):
    """Samples with a way to their pictures, which are opened or drawn when they are asked for.

    A source can be pickled, so worker processes can take it over. It serves as a torch data set: it
    has a length and gives an item for each index.
    """

    samples: Sequence[Sample]

    @abstractmethod
    def pictures(self, index: int) -> Pictures:
        """The pictures of a sample, RGB and upright. Raises DataError."""

    @abstractmethod
    def sizes(self, index: int) -> Sizes:
        """The sizes of a sample's pictures, without opening them."""

    def place(self, index: int) -> str:
        """Where a sample stands, for errors: file and line, or else its id."""
        if isinstance(self.samples, LazySamples):
            return self.samples.place(index)
        return f"sample {self.samples[index].id}"

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Item:
        return self.samples[index], self.pictures(index)

    def items(self) -> Iterator[Item]:
        return (self[index] for index in range(len(self)))

    def answers(self) -> dict[str, str]:
        """The right answer to each sample by its id; no picture is opened."""
        return {sample.id: sample.answer for sample in self.samples}


class PickedSamples(LazySamples):
    """Those of `samples` at `places`."""

    def __init__(self, samples: Sequence[Sample], places: Sequence[int]) -> None:
        self._samples = samples
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    def read(self, index: int) -> Sample:
        return self._samples[int(self._places[index])]

    def place(self, index: int) -> str:
        if isinstance(self._samples, LazySamples):
            return self._samples.place(int(self._places[index]))
        return super().place(index)


class FileSource(Source):
    """Samples whose pictures are files."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples

    def pictures(self, index: int) -> Pictures:
        try:
            return tuple(open_for_model(path) for path in self.samples[index].images)
        except DataError as error:
            raise DataError(f"{self.place(index)}: image: {error}") from error

    def sizes(self, index: int) -> Sizes:
        return tuple(picture_size(path) for path in self.samples[index].images)


class JoinedSource(Source):
    """All of `first`, then `count` of `second`: from its first sample on, and over again where it
    has fewer.
    """

    def __init__(self, first: Source, second: Source, count: int) -> None:
        self.first = first
        self.second = second
        self.count = count
        self.samples = _JoinedSamples(self)

    def __len__(self) -> int:
        return len(self.first) + self.count

    def pictures(self, index: int) -> Pictures:
        source, place = self.at(index)
        return source.pictures(place)

    def sizes(self, index: int) -> Sizes:
        source, place = self.at(index)
        return source.sizes(place)

    def at(self, index: int) -> tuple[Source, int]:
        """The source of a sample, and its place in it."""
        if index < len(self.first):
            return self.first, index
        return self.second, (index - len(self.first)) % len(self.second)


class _JoinedSamples(LazySamples):
    def __init__(self, source: JoinedSource) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int) -> Sample:
        source, place = self._source.at(index)
        return source.samples[place]

    def place(self, index: int) -> str:
        source, place = self._source.at(index)
        return source.place(place)


def open_source(
    name: str,
    split: str = "test",
    seed: int = 0,
    count: int | None = None,
    registered: Sequence[str] | None = None,
) -> Source:
    """The source that is registered under a name, or the samples of a file.

    split, seed: of a registered source; a file has neither.
    count: at most so many samples. None: all of a file, as many as usual of a registered source.
    registered: the registered names that may be given; all by default. Any other name is a file's.

    Raises DataError where a file cannot be read or holds a bad sample, and what the registered
    source raises.
    """
    if registered is None or name in registered:
        for point in entry_points(group=GROUP, name=name):
            open_named: OpenNamed = point.load()
            return open_named(split, seed, count)
    samples = SampleFile(Path(name))
    if count is None or count >= len(samples):
        return FileSource(samples)
    return FileSource(PickedSamples(samples, range(count)))
