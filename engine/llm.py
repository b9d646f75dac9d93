"""Offline batches: the engine in this process."""

import gc
import os
import time
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from tqdm import tqdm

from engine.args import DEMO_MODEL, EngineArgs
from engine.chat_template import ChatTemplate, find_template, read_template
from engine.config import create_config
from engine.core.engine_core import EngineCore
from engine.input_processor import InputProcessor, ProcessedPrompt
from engine.messages import EngineRequest
from engine.multimodal import ImageFeatureData, ImagePixelData
from engine.offline_images import check_messages, images_of_messages
from engine.output_processor import OutputProcessor
from engine.outputs import CompletionOutput, Delta, Logprob, RequestOutput, TokenLogprobs
from engine.sampling_params import SamplingParams

Prompt = str | dict[str, Any]


class LLM:
    """A model that answers batches of prompts.

        llm = LLM(model="llava-hf/llava-1.5-7b-hf")
        prompt = "USER: <image> What is it? ASSISTANT:"
        outputs = llm.generate({"prompt": prompt, "multi_modal_data": {"image": image}})

    Takes every field of `EngineArgs` as a keyword.

    Raises:
        ValueError: a keyword is unknown, out of range, or contradicts another or the checkpoint.
        ModelLoadError: the checkpoint cannot be found, read or served.
    """

    def __init__(self, model: str | os.PathLike[str] = DEMO_MODEL, **kwargs: Any) -> None:
        known = {flag.name for flag in EngineArgs.flags()}
        unknown = sorted(kwargs.keys() - known)
        if unknown:
            raise ValueError(f"LLM takes no argument {unknown[0]!r}: it takes {', '.join(sorted(known))}")
        name: Any = os.fspath(model) if isinstance(model, os.PathLike) else model
        self.config = create_config(EngineArgs(model=name, **kwargs))
        self._core = EngineCore(self.config)
        self._inputs = InputProcessor(self.config, self._core.max_model_len)
        self._outputs = OutputProcessor(self._inputs.tokenizer)
        self._num_calls = 0
        self._closed = False

    def generate(
        self,
        inputs: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer one prompt or many; the results are in the order of the prompts.

        Args:
            inputs: a string, `{"prompt": text}` or `{"prompt_token_ids": ids}`, each of the latter with
                `multi_modal_data` if it has images; or a list of those.
            sampling_params: for all prompts, or one for each; by default as the checkpoint suggests.
            use_tqdm: whether to show a progress bar.

        Raises:
            ValueError: a prompt or parameter is wrong; nothing has run then.
        """
        if not isinstance(inputs, str | dict | list | tuple):
            raise ValueError(f"inputs is a {type(inputs).__name__}: it must be a prompt or a list of prompts")
        prompts = [inputs] if isinstance(inputs, str | dict) else inputs
        return self._run(prompts, sampling_params, use_tqdm)

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation (a list of OpenAI messages) or many (a list of such lists).

        Images are parts `{"type": "image_url", "image_url": {"url": …}}` (http, data or a local path), or
        `{"type": "image", "image": …}` with a path or a PIL image. Other arguments and errors as in `generate`.
        """
        many = isinstance(messages, list | tuple) and messages and not isinstance(messages[0], dict)
        conversations = messages if many else [messages]
        for conversation in conversations:
            check_messages(conversation)
        tokenizer = self._inputs.tokenizer
        given = None if chat_template is None else read_template(chat_template)
        found = find_template(self.config, given, tokenizer)
        template = ChatTemplate(tokenizer, found, self._inputs.image_token)
        prompts: list[Prompt] = []
        for conversation in conversations:
            text = template.render(
                conversation, add_generation_prompt=add_generation_prompt, **(chat_template_kwargs or {})
            )
            images = images_of_messages(conversation)
            prompts.append({"prompt": text, "multi_modal_data": {"image": images}})
        return self._run(prompts, sampling_params, use_tqdm)

    def get_tokenizer(self) -> Any:
        """The checkpoint's tokenizer, a Hugging Face one."""
        return self._inputs.tokenizer

    def close(self) -> None:
        """Free the model's memory; the object cannot be used any more."""
        self._closed = True
        core = self.__dict__.pop("_core", None)
        if core is not None:
            core.close()
        del core
        gc.collect()  # captured functions and their owner hold each other
        if self.config.device.type == "cuda":
            torch.cuda.empty_cache()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _process(self, prompt: Prompt, params: SamplingParams) -> ProcessedPrompt:
        if isinstance(prompt, str):
            prompt = {"prompt": prompt}
        if not isinstance(prompt, dict):
            raise ValueError(f"a prompt is a {type(prompt).__name__}: it must be a string or a dict")
        text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        unknown = sorted(prompt.keys() - {"prompt", "prompt_token_ids", "multi_modal_data"})
        if unknown:
            known = "prompt, prompt_token_ids and multi_modal_data"
            raise ValueError(f"a prompt has the key {unknown[0]!r}: {known} are known")
        if ids is None:
            if not isinstance(text, str):
                raise ValueError("a prompt needs `prompt` (a string) or `prompt_token_ids`")
            ids = self._inputs.encode(text)
        elif isinstance(ids, np.ndarray | torch.Tensor):
            ids = ids.tolist()
        if not isinstance(ids, list | tuple):
            raise ValueError(f"prompt_token_ids is a {type(ids).__name__}: it must be a list of integers")
        images = [self._inputs.prepare_image(image) for image in _images(prompt.get("multi_modal_data"))]
        return self._inputs.process(list(ids), images, text=text, truncate=params.truncate_prompt_tokens)

    def _run(
        self,
        prompts: Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        if self._closed:
            raise RuntimeError("this LLM is closed")
        params = self._params(sampling_params, len(prompts))
        processed = [self._process(prompt, param) for prompt, param in zip(prompts, params, strict=True)]
        self._num_calls += 1
        results: dict[str, tuple[RequestOutput, int]] = {}
        requests: list[EngineRequest] = []
        groups: list[list[EngineRequest]] = []
        outputs = []
        for number, (prompt, param) in enumerate(zip(processed, params, strict=True)):
            name = f"{self._num_calls}-{number}"
            made = self._make_requests(name, prompt, param)
            answers = [CompletionOutput(index) for index in range(len(made))]
            outputs.append(RequestOutput(name, prompt.text, prompt.token_ids, answers, finished=False))
            results |= {request.request_id: (outputs[-1], index) for index, request in enumerate(made)}
            groups.append(made)
            requests += made
        for request in requests:
            self._core.matcher(request)
        for made in groups:  # now that no request can be refused any more
            self._outputs.add(made)
        try:
            self._drive(requests, results, use_tqdm)
        except BaseException:  # an interrupt too must not leave requests behind for the next call
            self._core.abort([request.request_id for request in requests])
            for request in requests:
                self._outputs.remove(request.request_id)
            raise
        return outputs

    def _make_requests(self, name: str, prompt: ProcessedPrompt, params: SamplingParams) -> list[EngineRequest]:
        room = self._inputs.max_tokens(prompt, None)
        return self._inputs.make_requests(
            prompt,
            params,
            max_tokens=room if params.max_tokens is None else min(room, params.max_tokens),
            arrival_time=time.monotonic(),
            request_id=name,
        )

    def _params(self, given: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
        if given is None:
            return [self._inputs.default_params() for _ in range(count)]
        if isinstance(given, SamplingParams):
            return [given] * count
        if not isinstance(given, list | tuple) or not all(isinstance(one, SamplingParams) for one in given):
            raise ValueError("sampling_params must be SamplingParams or a list of them")
        if len(given) != count:
            raise ValueError(f"{count} prompts were given, but {len(given)} sampling parameters")
        return list(given)

    def _drive(
        self, requests: list[EngineRequest], results: dict[str, tuple[RequestOutput, int]], use_tqdm: bool
    ) -> None:
        unfinished = {request.request_id for request in requests}
        refused = [output for request in requests for output in self._core.add(request)]
        with tqdm(total=len(requests), desc="Generating", unit="answer", disable=not use_tqdm) as progress:
            started, num_tokens = time.monotonic(), 0
            while unfinished:
                new = refused or self._core.step().outputs
                refused = []
                for output in new:
                    processed = self._outputs.process(output, time.monotonic())
                    if processed is None:
                        continue
                    delta, must_abort = processed
                    if must_abort:
                        self._core.abort([output.request_id])
                    num_tokens += len(delta.token_ids)
                    _append(*results[output.request_id], delta)
                    if delta.finish_reason is not None:
                        unfinished.discard(output.request_id)
                        progress.update()
                progress.set_postfix_str(f"{num_tokens / (time.monotonic() - started):.0f} tok/s", refresh=False)


def _images(data: Any) -> list[Any]:
    """The images of a prompt's `multi_modal_data`."""
    if data is None:
        return []
    if isinstance(data, ImagePixelData | ImageFeatureData):
        return [data]
    if isinstance(data, list | tuple):
        return list(data)
    if not isinstance(data, dict) or set(data) - {"image"}:
        keys = f" and not {', '.join(map(str, data))}" if isinstance(data, dict) else ""
        raise ValueError(f"multi_modal_data must be ImagePixelData, ImageFeatureData or {{'image': …}}{keys}")
    image = data.get("image")
    return [] if image is None else list(image) if isinstance(image, list | tuple) else [image]


def _append(output: RequestOutput, index: int, delta: Delta) -> None:
    """Add a delta to the answer that it continues."""
    if delta.error is not None:
        raise RuntimeError(f"request {output.request_id} failed: {delta.error}")
    answer = output.outputs[index]
    answer.text += delta.text
    answer.token_ids += delta.token_ids
    answer.finish_reason, answer.stop_reason = delta.finish_reason, delta.stop_reason
    if delta.logprobs:
        answer.logprobs = (answer.logprobs or []) + [_logprob_table(entry) for entry in delta.logprobs]
        answer.cumulative_logprob = (answer.cumulative_logprob or 0.0) + sum(e.logprob for e in delta.logprobs)
    if delta.prompt_logprobs is not None:
        output.prompt_logprobs = [None if e is None else _logprob_table(e) for e in delta.prompt_logprobs]
    if index == 0:  # the others find what the first has just made
        output.num_cached_tokens = max(output.num_cached_tokens, delta.num_cached_tokens)
    output.metrics = delta.metrics
    output.finished = all(answer.finish_reason is not None for answer in output.outputs)


def _logprob_table(entry: TokenLogprobs) -> dict[int, Logprob]:
    table = {entry.token_id: Logprob(entry.logprob, entry.rank, entry.text)}
    for rank, (token, text, _, logprob) in enumerate(entry.top, start=1):
        table.setdefault(token, Logprob(logprob, rank, text))
    return table
