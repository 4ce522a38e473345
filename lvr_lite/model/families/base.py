"""What every family of models provides. May import: numpy, Pillow, `json_files`.

A family knows one architecture: how it resizes a picture and cuts it into patches, what stands for
a picture in the prompt, and which position every token has. It holds no state. A new one is one
file beside this one (docs/families.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from lvr_lite.model.json_files import check_number, check_whole

# Pixels that a picture may be resized to, far beyond what any model takes.
LARGEST_PICTURE = 10**9
# Pixels along the side of a patch, and patches along that of a visual token.
LARGEST_SIDE = 1 << 12


class Grid(NamedTuple):
    """Rows and columns: of patches, tiles or visual tokens, as the function that gives it says."""

    rows: int
    columns: int


@dataclass(frozen=True)
class ImageSpec:
    """How a model takes a picture: the manifest's `image` block.

    patch: side of a patch, pixels.
    merge: patches along the side of a visual token.
    temporal_patch: times that a still picture fills the patches' temporal axis.
    mean, std: by channel, of pixels scaled to 0 … 1.
    min_pixels, max_pixels: area that a picture is resized to at least and at most.
    resample: name of the filter that resizes, for readers of the manifest; a family has its own.
    own: what one family needs beside that, by its name in the manifest (`window`, `tile`, …).
    """

    patch: int
    merge: int
    temporal_patch: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    min_pixels: int
    max_pixels: int
    resample: str
    own: Mapping[str, int] = field(default_factory=dict)

    @property
    def token_side(self) -> int:
        """Pixels along the side of a visual token."""
        return self.patch * self.merge

    def check(self) -> None:
        """Raises ValueError, which names the field, for a value of another kind or beyond all use:
        the files of a model may say anything.
        """
        for name in ("patch", "merge", "temporal_patch"):
            check_whole(f"image.{name}", getattr(self, name), 1, LARGEST_SIDE)
        for name in ("min_pixels", "max_pixels"):
            check_whole(f"image.{name}", getattr(self, name), 1, LARGEST_PICTURE)
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != 3:
                raise ValueError(f"image.{name} must be three numbers")
            for value in values:
                check_number(f"image.{name}", value)
        for name, value in self.own.items():
            # A family may have switches among its sizes.
            if isinstance(value, bool):
                continue
            check_whole(f"image.{name}", value, 0, LARGEST_PICTURE)

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = asdict(self)
        own: dict[str, int] = data.pop("own")
        return data | own | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ImageSpec:
        """Raises KeyError for a missing field; fields that are not known here become `own`."""
        shared = [f.name for f in fields(cls) if f.name != "own"]
        values = {name: data[name] for name in shared}
        values["mean"] = tuple(data["mean"])
        values["std"] = tuple(data["std"])
        own = {name: value for name, value in data.items() if name not in shared}
        return cls(**values, own=own)


class Family(Protocol):
    """One architecture. Attributes:

    model_type: its name in config.json.
    architecture: the class of transformers that loads it.
    language_model: what transformers calls the part that reads embeddings.
    lora_targets: pattern (full match) of the modules that are adapted and held in 4 bits.
    keep_unquantized: modules that 4-bit loading must leave alone.
    image_token: the token in the place of each visual token.
    picture_tokens: further special tokens that `picture_text` writes.
    position_axes: 3 where positions are (time, row, column), 1 where they count on.
    vision_axes: {input of the vision graph beside pixels: "patches" or "tokens", its first axis}.
    tiled: whether the tower reads square tiles one by one, without inputs beside pixels.
    """

    @property
    def model_type(self) -> str: ...
    @property
    def architecture(self) -> str: ...
    @property
    def language_model(self) -> str: ...
    @property
    def lora_targets(self) -> str: ...
    @property
    def keep_unquantized(self) -> Sequence[str]: ...
    @property
    def image_token(self) -> str: ...
    @property
    def picture_tokens(self) -> Sequence[str]: ...
    @property
    def position_axes(self) -> int: ...
    @property
    def vision_axes(self) -> Mapping[str, str]: ...
    @property
    def tiled(self) -> bool: ...

    def image_spec(self, config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> ImageSpec:
        """From config.json and preprocessor_config.json. Raises KeyError for a missing field."""
        ...

    def default_max_pixels(self, image: ImageSpec) -> int:
        """Area in pixels that a recipe shrinks pictures to where it names none: of some 512 visual
        tokens."""
        ...

    def deepstack(self, vision_config: Mapping[str, Any]) -> Sequence[int]:
        """Blocks of the tower whose features are added after the first decoder layers, one each."""
        ...

    def grid_of(self, height: int, width: int, image: ImageSpec) -> Grid:
        """The grid of a picture of this size in pixels: of patches, or of tiles."""
        ...

    def frames(self, picture: Image.Image, image: ImageSpec) -> tuple[list[Image.Image], Grid]:
        """What the tower sees of an RGB picture, one after another, and the picture's grid."""
        ...

    def patches(self, pixels: np.ndarray, values: np.ndarray, image: ImageSpec) -> np.ndarray:
        """Pixels (H, W, 3) uint8 of a frame -> (N, 3 * temporal * patch**2) float32.

        values: (3, 256) float32, what each pixel becomes, by channel.
        """
        ...

    def vision_inputs(self, grids: Sequence[Grid], image: ImageSpec) -> dict[str, np.ndarray]:
        """What the vision graph needs beside the pixels of pictures, one after another."""
        ...

    def token_grid(self, grid: Grid, image: ImageSpec) -> Grid:
        """Rows and columns of the visual tokens that boxes select among."""
        ...

    def token_places(self, grid: Grid, image: ImageSpec) -> np.ndarray:
        """Places (rows * columns,) of the token grid's tokens among all of their picture."""
        ...

    def picture_text(self, grid: Grid, image: ImageSpec) -> str:
        """What stands in the prompt for a picture."""
        ...

    def positions(
        self, ids: np.ndarray, image_token: int, grids: Sequence[Grid], image: ImageSpec
    ) -> np.ndarray:
        """Position ids (3, S) int64 of one prompt (S,); the next one is their maximum + 1."""
        ...

    def rope_axes(self, sections: Sequence[int] | None, frequencies: int) -> np.ndarray:
        """Which of time, row, column (0, 1, 2) each rotary frequency (head_dim / 2,) follows."""
        ...

    def learned_places(self, side: int, merge: int) -> np.ndarray:
        """Of a tiled family: the learned position (side**2,) of each patch of a tile."""
        ...

    def image_inputs(self, pixel_values: Any, grid_thw: Any, config: Any) -> dict[str, Any]:
        """Tensors of patches (N, C) and grids (pictures, 3) -> arguments of transformers'
        get_image_features."""
        ...
