"""From a prompt and its images to the token ids and image inputs that the engine core takes."""

import random
from dataclasses import dataclass, field, replace
from itertools import count, groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from engine.config import EngineConfig, VisionConfig
from engine.errors import ModelLoadError, count_of, one_line
from engine.image_processor import image_hash, salted
from engine.messages import EngineRequest, ImageInput
from engine.multimodal import ImageFeatureData, ImagePixelData
from engine.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """An image that is ready for the engine but has no place in a prompt yet; fields as in `ImageInput`."""

    hash: bytes
    data: bytes
    shape: tuple[int, ...]
    kind: str


@dataclass(slots=True)
class ProcessedPrompt:
    """A prompt whose placeholders are expanded and whose length is checked."""

    token_ids: list[int]
    images: list[ImageInput] = field(default_factory=list)
    text: str | None = None

    @property
    def num_image_tokens(self) -> int:
        """Tokens that stand for images."""
        return sum(image.num_tokens for image in self.images)


class InputProcessor:
    """Holds the tokenizer. Methods may run in any thread, several at a time; all of them raise `ValueError` with a
    message for the user.
    """

    def __init__(self, config: EngineConfig, max_model_len: int) -> None:
        self.config = config
        self.max_model_len = max_model_len
        """The longest sequence that the engine serves, which may be less than the model's limit."""
        self.tokenizer = load_tokenizer(config)
        self._backend = self.tokenizer.backend_tokenizer
        self._longest_token = max(map(len, self._backend.get_vocab()), default=1)
        self._random = random.Random(config.seed)
        self._numbers = count()

    @property
    def image_token(self) -> str | None:
        """The text of the image placeholder; None for a text-only model."""
        if self.config.vision is None:
            return None
        return str(self.tokenizer.convert_ids_to_tokens(self.config.vision.image_token_id))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with one beginning-of-sequence token where the tokenizer adds one."""
        self.check_length(len(text))
        try:
            text.encode()
        except UnicodeEncodeError as error:  # the tokenizer would say that this is no string
            raise ValueError(f"the prompt holds half a surrogate pair at character {error.start}") from None
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        bos = self.tokenizer.bos_token_id
        if add_special_tokens and bos is not None and ids[:2] == [bos, bos]:
            return ids[1:]  # the template wrote one too
        return ids

    def check_length(self, characters: int) -> None:
        """Refuse a text that is too long whatever it says, before any work is spent on it."""
        most = self.most_characters
        if characters > most:
            raise ValueError(f"the prompt has {characters} characters: the context cannot hold more than {most}")

    @property
    def most_characters(self) -> int:
        """That the context could hold, whatever they say."""
        return self.max_model_len * self._longest_token

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids, no more than the context holds."""
        if len(token_ids) > self.max_model_len:
            raise ValueError(f"{len(token_ids)} token ids were given: the context is {self.max_model_len} tokens")
        self.check_token_ids(token_ids)
        return str(self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def check_token_ids(self, token_ids: list[int]) -> None:
        """Refuse ids that the model has no embedding for."""
        for token in token_ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < self.config.vocab_size:
                raise ValueError(f"token id {token!r} is not from 0 to {self.config.vocab_size - 1}")

    def check_image_count(self, number: int) -> None:
        """Refuse a number of images before any work is spent on them."""
        vision = self._vision() if number else self.config.vision
        if vision is not None and number > vision.max_images:
            raise ValueError(f"the prompt has {count_of(number, 'image')}: at most {vision.max_images} are allowed")

    def prepare_image(self, image: Any) -> PreparedImage:
        """Prepare a PIL image or an array; `ImagePixelData` and `ImageFeatureData` say which it must be."""
        vision = self._vision()
        if isinstance(image, ImageFeatureData):
            return _features(image, vision)
        if vision.input_type == "image_features":
            raise ValueError("the model was loaded for image_features, but pixels were given: use ImageFeatureData")
        if isinstance(image, ImagePixelData):
            image = image.image
        if isinstance(image, torch.Tensor) and image.dtype == torch.uint8:
            image = image.cpu().numpy()
        if isinstance(image, np.ndarray) and image.dtype == np.uint8:
            if not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))):
                raise ValueError(f"an image of uint8 has shape {image.shape}: it must be (height, width, 3)")
            image = Image.fromarray(image)
        if isinstance(image, np.ndarray | torch.Tensor):
            return _tensor(image, vision)
        if not isinstance(image, Image.Image):
            raise ValueError(f"an image is a {type(image).__name__}: it must be a PIL image or an array")
        if 0 in image.size:
            raise ValueError(f"an image has the size {image.width}x{image.height}: it must hold pixels")
        if vision.processor is None:
            raise ValueError("the image processor is disabled, so only prepared tensors are taken as images")
        pixels = vision.processor.prepare(image)
        return PreparedImage(image_hash(pixels, vision.processor.key), pixels.tobytes(), pixels.shape, "pixels")

    def process(
        self, token_ids: list[int], images: list[PreparedImage], *, text: str | None = None, truncate: int | None = None
    ) -> ProcessedPrompt:
        """Expand placeholders and check the prompt's length.

        Args:
            token_ids: the prompt, each image as one placeholder or as all of its tokens.
            images: in the order of their placeholders.
            text: what the ids were made of, if it was text.
            truncate: keep this many tokens from the end; text only.
        """
        self.check_token_ids(token_ids)
        self.check_image_count(len(images))
        if truncate is not None:
            if images:
                raise ValueError("truncate_prompt_tokens cannot be used with images")
            token_ids = token_ids[-truncate:]
        placed: list[ImageInput] = []
        if self.config.vision is not None:
            token_ids, placed = _expand(token_ids, images, self.config.vision)
        if not token_ids:
            raise ValueError("the prompt is empty")
        if len(token_ids) >= self.max_model_len:
            raise ValueError(
                f"the prompt has {len(token_ids)} tokens, but the context is {self.max_model_len} tokens, "
                "of which the answer needs at least one: shorten it"
            )
        return ProcessedPrompt(token_ids, placed, text)

    def expand_placeholders(self, token_ids: list[int]) -> list[int]:
        """Each image placeholder as many times as an image has tokens."""
        vision = self.config.vision
        if vision is None:
            return token_ids
        widths = ((token, vision.feature_size if token == vision.image_token_id else 1) for token in token_ids)
        return [token for token, width in widths for _ in range(width)]

    def default_params(self) -> SamplingParams:
        """Sampling parameters as the checkpoint's generation_config.json suggests them."""
        return SamplingParams(**self.config.sampling_defaults)

    def max_tokens(self, prompt: ProcessedPrompt, wanted: int | None) -> int:
        """How long the answer may be; `ValueError` when prompt and wanted answer exceed the context."""
        room = self.max_model_len - len(prompt.token_ids)
        if wanted is not None and wanted > room:
            raise ValueError(
                f"max_tokens is {wanted}, but the context is {self.max_model_len} tokens, "
                f"of which the prompt takes {len(prompt.token_ids)}: {max(room, 0)} are left"
            )
        return room if wanted is None else wanted

    def bad_words(self, params: SamplingParams) -> list[list[int]]:
        """Token ids of each bad word, at a text's beginning and inside it where they differ."""
        found: list[list[int]] = []
        for word in params.bad_words:
            for text in (word, " " + word.lstrip()):
                ids = self.encode(text, add_special_tokens=False)
                if ids and ids not in found and max(ids) < self.config.vocab_size:  # others cannot be sampled
                    found.append(ids)
        return found

    def grammar(self, params: SamplingParams) -> str | None:
        """What the answer must look like, in the words of `engine.grammar`."""
        if params.structured_outputs is None:
            return None
        if not self.config.eos_token_ids:
            raise ValueError("structured_outputs: the model has no end-of-sequence token, so that nothing would end")
        try:
            return params.structured_outputs.source()
        except ValueError as error:
            raise ValueError(f"structured_outputs: {error}") from None

    def make_requests(
        self,
        prompt: ProcessedPrompt,
        params: SamplingParams,
        *,
        max_tokens: int,
        arrival_time: float,
        bad_words: list[list[int]] | None = None,
        grammar: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        request_id: str | None = None,
    ) -> list[EngineRequest]:
        """One engine request for each of the `n` answers, with names and seeds of their own."""
        params.check_vocab(self.config.vocab_size)
        grammar = self.grammar(params) if grammar is None else grammar
        params = replace(params, structured_outputs=None)  # which may be large, and is not needed any more
        if params.min_tokens > max_tokens:
            raise ValueError(f"min_tokens is {params.min_tokens}: at most {max_tokens} tokens can be generated")
        bad_words = self.bad_words(params) if bad_words is None else bad_words
        seed = self._random.getrandbits(62) if params.seed is None else params.seed
        name = request_id or f"request-{next(self._numbers)}"
        images = [replace(image, hash=salted(image.hash, cache_salt)) for image in prompt.images]
        return [
            EngineRequest(
                request_id=f"{name}/{index}",
                prompt_token_ids=prompt.token_ids,
                params=params,
                max_tokens=max_tokens,
                seed=(seed + index + 2**63) % 2**64 - 2**63,
                eos_token_ids=self.config.eos_token_ids,
                images=images,
                priority=priority,
                arrival_time=arrival_time,
                cache_salt=cache_salt,
                bad_words=bad_words,
                grammar=grammar,
            )
            for index in range(params.n)
        ]

    def _vision(self) -> VisionConfig:
        if self.config.vision is None:
            raise ValueError("this is a text-only model: it takes no images")
        return self.config.vision


def load_tokenizer(config: EngineConfig) -> Any:
    """The checkpoint's tokenizer, in its fast form.

    Raises:
        ModelLoadError: it is missing, broken or has no fast form.
    """
    from transformers import AutoTokenizer  # which takes seconds to import; the engine process mostly does without

    try:
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_path)
    except Exception as error:  # transformers raises many kinds on files that it does not like
        raise ModelLoadError(f"the tokenizer in {config.tokenizer_path} cannot be loaded: {one_line(error)}") from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ModelLoadError(f"the tokenizer in {config.tokenizer_path} has no fast form (tokenizer.json)")
    if config.vision is not None:
        _check_image_token(tokenizer, config)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def tokenizer_json(config: EngineConfig) -> str:
    """The checkpoint's tokenizer as JSON."""
    return str(load_tokenizer(config).backend_tokenizer.to_str())


def _check_image_token(tokenizer: Any, config: EngineConfig) -> None:
    assert config.vision is not None
    wanted = config.vision.image_token_id
    token = tokenizer.convert_ids_to_tokens(wanted)
    if token is None or tokenizer.backend_tokenizer.encode(token, add_special_tokens=False).ids != [wanted]:
        raise ModelLoadError(
            f"the tokenizer in {config.tokenizer_path} has no special token of id {wanted}, the image placeholder"
        )


def _features(image: ImageFeatureData, vision: VisionConfig) -> PreparedImage:
    if vision.input_type != "image_features":
        raise ValueError("the model was loaded for pixel_values, but image features were given: use ImagePixelData")
    features = _to_float32(image.image_features)
    wanted = (1, vision.feature_size, vision.feature_dim)
    if features.shape != wanted:
        raise ValueError(f"image features have shape {features.shape}: {wanted} is expected")
    return PreparedImage(image_hash(features[0], b"features"), features[0].tobytes(), features[0].shape, "features")


def _tensor(image: npt.NDArray[Any] | torch.Tensor, vision: VisionConfig) -> PreparedImage:
    pixels = _to_float32(image)
    if pixels.shape != vision.input_shape:
        raise ValueError(f"image pixels have shape {pixels.shape}: {vision.input_shape} is expected")
    return PreparedImage(image_hash(pixels[0], b"tensor"), pixels[0].tobytes(), pixels[0].shape, "tensor")


def _to_float32(value: Any) -> npt.NDArray[np.float32]:
    try:
        # Torch takes neither negative strides nor what nobody may write to.
        tensor = torch.as_tensor(np.array(value) if isinstance(value, np.ndarray) else value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"an image is a {type(value).__name__}: it must be a float tensor or array") from None
    if not tensor.is_floating_point():
        raise ValueError(f"an image tensor is of {tensor.dtype}: it must be a float type")
    return np.ascontiguousarray(tensor.detach().to("cpu", torch.float32).numpy())


def _expand(
    token_ids: list[int], images: list[PreparedImage], vision: VisionConfig
) -> tuple[list[int], list[ImageInput]]:
    """Give each image `feature_size` placeholder tokens, unless the prompt has them already."""
    token, size = vision.image_token_id, vision.feature_size
    found = token_ids.count(token)
    runs = [len(list(run)) for is_image, run in groupby(token_ids, lambda t: t == token) if is_image]
    if found == len(images) * size and all(run % size == 0 for run in runs):
        width = 1
    elif found == len(images):
        width = size
    elif not images:
        raise ValueError(f"the prompt has {count_of(found, 'image placeholder token')}, but no image was given")
    else:
        raise ValueError(
            f"the prompt has {count_of(found, 'image placeholder token')} for {count_of(len(images), 'image')}: "
            f"{len(images)} (one for each) or {len(images) * size} ({size} for each) are expected"
        )
    expanded: list[int] = []
    offsets: list[int] = []
    for current in token_ids:
        if current == token:
            offsets.append(len(expanded))
            expanded += [token] * width
        else:
            expanded.append(current)
    starts = offsets if width == size else offsets[::size]
    placed = [
        ImageInput(image.hash, start, size, image.data, image.shape, image.kind)
        for image, start in zip(images, starts, strict=True)
    ]
    return expanded, placed
