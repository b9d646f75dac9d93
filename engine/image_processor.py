"""Image preparation of CLIP-type vision towers as a preprocessor_config.json asks for it, without torch.

``ImageProcessor.prepare`` stops at uint8 pixels; rescaling and normalizing are left to the device, which gets a quarter
of the bytes that way. The pixels equal those of Hugging Face's PIL backend bit for bit, save where a tiny file would
make that backend build an image of gigabytes (see ``_WORKING_PIXELS``).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from engine.image_decode import to_rgb

_KEY_VERSION = b"clip-pixels-1"
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_CLIP_TYPES = frozenset({"CLIPImageProcessor", "CLIPFeatureExtractor"})
_LLAVA_TYPES = frozenset({"LlavaImageProcessor"})

# Fields that change pixels in ways that are not served here. They are refused even where the named processor type
# would ignore them: their presence says that the model expects something else.
_REFUSED_FIELDS = (
    "image_grid_pinpoints",
    "aspect_ratio_setting",
    "image_aspect_ratio",
    "max_image_size",
    "max_patches",
    "min_patches",
    "max_pixels",
    "min_pixels",
    "pad_size",
    "size_divisor",
    "crop_pct",
)
_SERVED_SWITCHES = frozenset({"do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb", "do_pad"})

# A 64000x1 image scaled by its short edge, or padded to a square, holds billions of pixels. Beyond this many the
# work is confined to what the result shows, which may differ from the full computation by one grey level.
_WORKING_PIXELS = 1 << 26
_LONGEST_SIDE = 1 << 16
_LONGEST_PADDED_SIDE = math.isqrt(_WORKING_PIXELS)


@dataclass(frozen=True, slots=True)
class ImageProcessor:
    """Turns an RGB image of any size into the fixed uint8 pixels that a vision tower takes."""

    do_resize: bool
    shortest_edge: int | None
    height: int | None
    width: int | None
    resample: int
    do_center_crop: bool
    crop_height: int
    crop_width: int
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    do_convert_rgb: bool
    do_pad: bool = False

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> ImageProcessor:
        """Parse the content of a preprocessor_config.json; a ``ValueError`` names any field that cannot be served."""
        is_llava = _is_llava_type(d)
        _refuse_foreign_fields(d)
        do_pad = _flag(d, "do_pad", False)
        if do_pad and not is_llava:
            raise ValueError("image processor: do_pad is only supported for LlavaImageProcessor")
        shortest_edge, height, width = _target_size(d)
        crop_height, crop_width = _crop_size(d)
        processor = cls(
            do_resize=_flag(d, "do_resize", True),
            shortest_edge=shortest_edge,
            height=height,
            width=width,
            resample=_resample(d),
            do_center_crop=_flag(d, "do_center_crop", True),
            crop_height=crop_height,
            crop_width=crop_width,
            do_rescale=_flag(d, "do_rescale", True),
            rescale_factor=_number("rescale_factor", _get(d, "rescale_factor", 1 / 255)),
            do_normalize=_flag(d, "do_normalize", True),
            image_mean=_per_channel(d, "image_mean", _CLIP_MEAN),
            image_std=_per_channel(d, "image_std", _CLIP_STD),
            do_convert_rgb=_flag(d, "do_convert_rgb", True),
            do_pad=do_pad,
        )
        if processor.do_normalize and 0.0 in processor.image_std:
            raise ValueError("image processor: image_std must not be zero")
        processor._check_output_is_fixed()
        return processor

    def _check_output_is_fixed(self) -> None:
        """A vision tower takes one size; a configuration whose result follows the input's size cannot be served."""
        squashed = self.do_resize and self.shortest_edge is None
        padded_square = self.do_resize and self.do_pad
        if not (self.do_center_crop or squashed or padded_square):
            raise ValueError(
                "image processor: without do_center_crop the output has no fixed size; size must hold height and width"
            )

    @property
    def output_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what the vision tower receives."""
        if self.do_center_crop:
            return 3, self.crop_height, self.crop_width
        if self.shortest_edge is not None:
            return 3, self.shortest_edge, self.shortest_edge
        assert self.height is not None and self.width is not None
        return 3, self.height, self.width

    @property
    def key(self) -> bytes:
        """Names the preprocessing; images prepared under different keys never share a hash."""
        return _KEY_VERSION + repr(astuple(self)).encode()

    def prepare(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """Resize and crop to a new C-contiguous uint8 array (height, width, 3).

        An image that is not RGB is converted with ``to_rgb``, which flattens transparency on white.
        """
        if image.mode != "RGB":
            if not self.do_convert_rgb:
                raise ValueError(f"the image processor takes RGB images only (do_convert_rgb is off), not {image.mode}")
            image = to_rgb(image)
        if self.do_pad:
            image = self._pad_to_square(image)
        if self.do_resize:
            image = self._resize(image)
        if self.do_center_crop:
            image = _center_crop(image, self.crop_height, self.crop_width)
        return np.array(image, dtype=np.uint8, order="C")

    def normalize(self, array: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Reference for the device code: uint8 (height, width, 3) to float32 (3, height, width)."""
        pixels = array.astype(np.float32)
        if self.do_rescale:
            pixels = (array.astype(np.float64) * self.rescale_factor).astype(np.float32)
        if self.do_normalize:
            mean = np.array(self.image_mean, dtype=np.float32)
            std = np.array(self.image_std, dtype=np.float32)
            pixels = (pixels - mean) / std
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def _pad_to_square(self, image: Image.Image) -> Image.Image:
        """Centre the image on a square of the mean colour, as LLaVA's original code does."""
        image = _shrink_below(image, _LONGEST_PADDED_SIDE)
        if image.width == image.height:
            return image
        side = max(image.size)
        red, green, blue = (int(mean * 255) for mean in self.image_mean)
        square = Image.new("RGB", (side, side), (red, green, blue))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square

    def _resize(self, image: Image.Image) -> Image.Image:
        if self.shortest_edge is None:
            assert self.height is not None and self.width is not None
            return _shrink_below(image, _LONGEST_SIDE).resize((self.width, self.height), self.resample)
        width, height = _scaled_size(image.size, self.shortest_edge)
        if self.do_center_crop and width * height > _WORKING_PIXELS:
            window = (min(width, self.crop_width), min(height, self.crop_height))
            return _resize_center(image, (width, height), window, self.resample)
        return image.resize((width, height), self.resample)


def image_hash(array: npt.NDArray[Any], key: bytes) -> bytes:
    """Identity of prepared pixels or features: SHA-256 over the preprocessing key, dtype, shape and every byte."""
    header = repr((key, array.dtype.str, array.shape)).encode()
    digest = hashlib.sha256(len(header).to_bytes(8, "little"))
    digest.update(header)
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.digest()


def salted(digest: bytes, cache_salt: str) -> bytes:
    """Identity of an image among those of a salt: who has another must not find by its speed that it was here."""
    return hashlib.sha256(digest + cache_salt.encode("utf-8", "surrogatepass")).digest() if cache_salt else digest


def _scaled_size(size: tuple[int, int], shortest_edge: int) -> tuple[int, int]:
    """Width and height once the shorter side is ``shortest_edge``; the longer one is truncated, as in the reference."""
    width, height = size
    if width <= height:
        return shortest_edge, int(shortest_edge * height / width)
    return int(shortest_edge * width / height), shortest_edge


def _center_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """Cut or zero-pad around the centre; floor division also puts the odd pixel of padding where the reference does."""
    left = (image.width - width) // 2
    top = (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _resize_center(image: Image.Image, size: tuple[int, int], window: tuple[int, int], resample: int) -> Image.Image:
    """The centre ``window`` of ``image`` resized to ``size``, without building the rest of it."""
    cut_from, cut_to, box_from, box_to = [], [], [], []
    for source, target, shown in zip(image.size, size, window, strict=True):
        scale = source / target
        first = (target - shown) // 2
        margin = math.ceil(3 * max(scale, 1.0)) + 1  # the widest filter reaches 3 pixels
        start = max(0, math.floor(first * scale) - margin)
        cut_from.append(start)
        cut_to.append(min(source, math.ceil((first + shown) * scale) + margin))
        box_from.append(max(0.0, first * scale - start))
        box_to.append(min(float(cut_to[-1] - start), (first + shown) * scale - start))
    cut = image.crop((cut_from[0], cut_from[1], cut_to[0], cut_to[1]))
    return cut.resize(window, resample, box=(box_from[0], box_from[1], box_to[0], box_to[1]))


def _shrink_below(image: Image.Image, longest: int) -> Image.Image:
    factor = math.ceil(max(image.size) / longest)
    return image.reduce(factor) if factor > 1 else image


def _is_llava_type(d: dict[str, Any]) -> bool:
    name = d.get("image_processor_type") or d.get("feature_extractor_type") or "CLIPImageProcessor"
    base = str(name).removesuffix("Fast").removesuffix("Pil")
    if base not in _CLIP_TYPES | _LLAVA_TYPES:
        raise ValueError(f"image processor: image_processor_type {name!r} is not supported")
    return base in _LLAVA_TYPES


def _refuse_foreign_fields(d: dict[str, Any]) -> None:
    for name, value in d.items():
        unknown_switch = name.startswith("do_") and name not in _SERVED_SWITCHES
        if (unknown_switch or name in _REFUSED_FIELDS) and value not in (None, False):
            raise ValueError(f"image processor: {name} is not supported")


def _get(d: dict[str, Any], name: str, default: Any) -> Any:
    value = d.get(name)
    return default if value is None else value


def _flag(d: dict[str, Any], name: str, default: bool) -> bool:
    value = _get(d, name, default)
    if not isinstance(value, bool):
        raise ValueError(f"image processor: {name} must be true or false, not {value!r}")
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"image processor: {name} must be a number, not {value!r}")
    return float(value)


def _side(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"image processor: {name} must be a positive integer, not {value!r}")
    return value


def _resample(d: dict[str, Any]) -> int:
    value = _get(d, "resample", int(Image.Resampling.BICUBIC))
    if isinstance(value, bool) or not isinstance(value, int) or value not in list(Image.Resampling):
        raise ValueError(f"image processor: resample must be one of PIL's filters 0 to 5, not {value!r}")
    return value


def _per_channel(d: dict[str, Any], name: str, default: tuple[float, ...]) -> tuple[float, float, float]:
    value = _get(d, name, default)
    values = list(value) if isinstance(value, list | tuple) else [value] * 3
    if len(values) != 3:
        raise ValueError(f"image processor: {name} must have 3 values, not {len(values)}")
    red, green, blue = (_number(name, v) for v in values)
    return red, green, blue


def _target_size(d: dict[str, Any]) -> tuple[int | None, int | None, int | None]:
    """The three size fields: shortest edge, or height and width."""
    size = _get(d, "size", {"shortest_edge": 224})
    if isinstance(size, int):
        return _side("size", size), None, None
    if isinstance(size, list | tuple):
        height, width = _pair("size", size)
        return None, height, width
    given = _given_sides("size", size)
    if set(given) == {"shortest_edge"}:
        return given["shortest_edge"], None, None
    if set(given) == {"height", "width"}:
        return None, given["height"], given["width"]
    raise ValueError(f"image processor: size must hold shortest_edge, or height and width, not {sorted(given)}")


def _crop_size(d: dict[str, Any]) -> tuple[int, int]:
    size = _get(d, "crop_size", 224)
    if isinstance(size, int):
        side = _side("crop_size", size)
        return side, side
    if isinstance(size, list | tuple):
        return _pair("crop_size", size)
    given = _given_sides("crop_size", size)
    if set(given) != {"height", "width"}:
        raise ValueError(f"image processor: crop_size must hold height and width, not {sorted(given)}")
    return given["height"], given["width"]


def _pair(name: str, size: list[Any] | tuple[Any, ...]) -> tuple[int, int]:
    if len(size) != 2:
        raise ValueError(f"image processor: {name} must hold height and width, not {len(size)} values")
    return _side(name, size[0]), _side(name, size[1])


def _given_sides(name: str, size: Any) -> dict[str, int]:
    if not isinstance(size, dict):
        raise ValueError(f"image processor: {name} must be an integer or an object, not {size!r}")
    return {str(k): _side(f"{name}.{k}", v) for k, v in size.items() if v is not None}
