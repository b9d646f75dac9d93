"""Image inputs of offline prompts."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image


@dataclass(slots=True)
class ImagePixelData:
    """An image as a PIL image (prepared by the image processor) or as a float tensor of
    `image_input_shape`, (1, 3, height, width), taken as it is.
    """

    image: Image.Image | torch.Tensor | np.ndarray[Any, Any]


@dataclass(slots=True)
class ImageFeatureData:
    """The vision tower's output before the projector: (1, image_feature_size, hidden)."""

    image_features: torch.Tensor
