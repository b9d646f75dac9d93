"""Runs the model on one device: launches steps without waiting for them."""

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from engine.attention import AttentionMetadata
from engine.config import EngineConfig
from engine.errors import ModelLoadError
from engine.messages import PositionLogprobs
from engine.models.llama import head_dim
from engine.models.llava import LlavaForConditionalGeneration
from engine.models.loader import load_model
from engine.models.rotary import long_context_start
from engine.step import ModelRunnerOutput, SchedulerOutput
from engine.worker.input_batch import InputBatch, StepInputs
from engine.worker.random_noise import gumbel_noise
from engine.worker.sampler import Logprobs, Sampler, gather_logprobs, keep_top
from engine.worker.timer import DeviceTimer
from engine.worker.vision import VisionEncoder

logger = logging.getLogger(__name__)

_CPU_CACHE_BYTES = 4 << 30
_CPU_CACHE_SHARE = 0.25
_LOGPROB_ROWS = 256
"""Prompt positions whose log probabilities are computed at once."""


@dataclass(slots=True)
class PendingStep:
    """A launched step. Its results are on their way to the host."""

    request_ids: list[str]
    """Of the requests that sample, in the order of `tokens`."""
    tokens: Tensor
    logprob_rows: list[tuple[str, int]]
    """Request and number of log probabilities wanted, in the order of the rows of `logprobs`."""
    logprobs: Logprobs | None
    prompt_logprobs: list[tuple[str, int, Tensor, Logprobs]]
    """Request, number wanted, target ids, log probabilities."""
    encoding: DeviceTimer | None
    """Of the step's images, if it has any."""
    done: Any
    """CUDA event behind the last copy; None on the CPU."""

    def result(self) -> ModelRunnerOutput:
        """Wait for the step and read what it brought."""
        if self.done is not None:
            self.done.synchronize()
        output = ModelRunnerOutput(dict(zip(self.request_ids, self.tokens.tolist(), strict=True)))
        output.encoder_seconds = 0.0 if self.encoding is None else self.encoding.seconds
        if self.logprobs is not None:
            taken = [output.sampled[request_id] for request_id, _ in self.logprob_rows]
            rows = _positions(taken, [count for _, count in self.logprob_rows], self.logprobs)
            output.logprobs = {name: row for (name, _), row in zip(self.logprob_rows, rows, strict=True)}
        for request_id, count, targets, logprobs in self.prompt_logprobs:
            ids = targets.tolist()
            rows = _positions(ids, [count] * len(ids), logprobs)
            output.prompt_logprobs.setdefault(request_id, []).extend(rows)
        return output


class ModelRunner:
    """Owns the model, its cache, the running requests' slots and the encoded images."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self.device = config.device
        self.max_model_len = config.max_model_len
        _make_exact()
        started = time.monotonic()
        self.model = load_model(config)
        logger.info("loaded %s in %.1f s", config.model_name, time.monotonic() - started)
        long_start = long_context_start(config.text_config)
        self._batch = InputBatch(
            config.max_num_seqs, config.max_model_len, config.block_size, self.device, long_start=long_start
        )
        self._sampler = Sampler(self._batch, config.max_num_seqs, config.vocab_size)
        self._vision: VisionEncoder | None = None
        if config.vision is not None:
            assert isinstance(self.model, LlavaForConditionalGeneration)
            self._vision = VisionEncoder(self.model, config.vision, self._batch)
        self.num_blocks = self._count_blocks()
        self._caches = self._make_caches(self.num_blocks)

    def execute(self, step: SchedulerOutput) -> PendingStep:
        """Launch a step. Nothing here waits for the device."""
        with torch.inference_mode():
            if self._vision is not None:
                self._vision.free(step.freed_images)
            self._change_requests(step)
            encoding = self._encode_images(step)
            inputs = self._batch.prepare(step)
            hidden = self._embed(step, inputs)
            hidden = self.model.language_model(hidden, inputs.rotary_rows, self._caches, inputs.metadata)
            return self._sample(step, inputs, hidden, encoding)

    def recover(self) -> None:
        """Give back what a failed step may have left on the device; raises where the device itself is broken."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def _change_requests(self, step: SchedulerOutput) -> None:
        self._remove(step.finished_ids)
        for new in step.new_requests:
            self._sampler.add(self._batch.add(new), new.token_ids)

    def _remove(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            index = self._batch.remove(request_id)
            if index is not None:
                self._sampler.remove(index)

    def _encode_images(self, step: SchedulerOutput) -> DeviceTimer | None:
        if self._vision is None or not step.encode_images:
            return None
        with DeviceTimer(self.device) as timer:
            self._vision.encode(step.encode_images)
        return timer

    def _embed(self, step: SchedulerOutput, inputs: StepInputs) -> Tensor:
        hidden = self.model.language_model.embed_tokens(inputs.input_ids)
        if self._vision is not None:
            for row, part in zip(inputs.metadata.query_start, step.requests, strict=False):
                slot = self._batch.slots[part.request_id]
                if part.start < slot.images_end:
                    end = part.start + part.num_tokens
                    self._vision.merge(hidden, row, part.start, end, slot.request.images)
        return hidden  # type: ignore[no-any-return]

    def _sample(
        self, step: SchedulerOutput, inputs: StepInputs, hidden: Tensor, encoding: DeviceTimer | None
    ) -> PendingStep:
        parts = [part for part in step.requests if part.samples]
        prompt_logprobs = self._prompt_logprobs(step, inputs, hidden)
        tokens, logprobs, logprob_rows = torch.zeros(0, dtype=torch.int64), None, []
        if parts:
            logits = self.model.logits(hidden[inputs.sample_rows])
            wanted = self._sampler.logprobs_wanted(inputs.sample_slots)
            rows = np.flatnonzero(wanted >= 0)
            raw = logits[self._batch.upload(rows)] if len(rows) else None
            num_outputs = np.array([part.num_output_tokens for part in parts], np.int64)
            chosen = self._sampler.sample(logits, inputs.sample_slots, inputs.sample_positions, num_outputs)
            self._batch.write_sampled(inputs, chosen)
            if raw is not None:
                logprob_rows = [(parts[row].request_id, int(wanted[row])) for row in rows]
                taken = chosen[self._batch.upload(rows)]
                logprobs = self._download_logprobs(gather_logprobs(raw, taken, int(wanted.max())))
            tokens = self._download(chosen)
        done = None
        if self.device.type == "cuda":
            done = torch.cuda.Event()
            done.record()
        names = [part.request_id for part in parts]
        return PendingStep(names, tokens, logprob_rows, logprobs, prompt_logprobs, encoding, done)

    def _prompt_logprobs(
        self, step: SchedulerOutput, inputs: StepInputs, hidden: Tensor
    ) -> list[tuple[str, int, Tensor, Logprobs]]:
        found = []
        for row, part in zip(inputs.metadata.query_start, step.requests, strict=False):
            request = self._batch.slots[part.request_id].request
            count = request.params.prompt_logprobs
            last = min(part.start + part.num_tokens, len(request.prompt_token_ids) - 1)
            if count is None:
                continue
            for start in range(part.start, last, _LOGPROB_ROWS):
                end = min(start + _LOGPROB_ROWS, last)
                targets = self._batch.upload(np.array(request.prompt_token_ids[start + 1 : end + 1], np.int64))
                logits = self.model.logits(hidden[row + start - part.start : row + end - part.start])
                logprobs = self._download_logprobs(gather_logprobs(logits, targets, count))
                found.append((part.request_id, count, self._download(targets), logprobs))
        return found

    def _download(self, tensor: Tensor) -> Tensor:
        """Start a copy to the host."""
        if self.device.type == "cpu":
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def _download_logprobs(self, logprobs: Logprobs) -> Logprobs:
        values = (logprobs.taken, logprobs.rank, logprobs.top_values, logprobs.top_ids)
        return Logprobs(*(self._download(value) for value in values))

    def _count_blocks(self) -> int:
        """How many cache blocks to make: what was asked for, or what memory allows and the requests could fill."""
        config = self._config
        # Looked up in any case: it also compiles the kernels, which a request should not wait for.
        free = self._free_gpu_bytes() if self.device.type == "cuda" else _free_cpu_bytes()
        if config.num_blocks is not None:
            return config.num_blocks
        block_bytes = self._block_bytes()
        available = free if config.kv_cache_memory_bytes is None else config.kv_cache_memory_bytes
        most = config.max_num_seqs * -(-config.max_model_len // config.block_size)
        num_blocks = min(available // block_bytes, most)
        if num_blocks < 1 and config.kv_cache_memory_bytes is not None:
            raise ModelLoadError(
                f"--kv-cache-memory-bytes is {config.kv_cache_memory_bytes}: one cache block takes {block_bytes}"
            )
        if num_blocks < 1:
            raise ModelLoadError(
                "no memory is left for the KV cache: raise --gpu-memory-utilization, or lower --max-num-batched-tokens"
            )
        tokens = num_blocks * config.block_size
        size = num_blocks * block_bytes / 2**30
        logger.info("KV cache: %d tokens in %d blocks, %.2f GiB", tokens, num_blocks, size)
        return num_blocks

    def _block_bytes(self) -> int:
        text, config = self._config.text_config, self._config
        per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim(text) * config.dtype.itemsize
        return int(per_token * config.block_size)

    def _free_gpu_bytes(self) -> int:
        """Memory that remains below the utilization limit when the largest step runs."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self._profile()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        others = total - free - torch.cuda.memory_reserved()
        return int(total * self._config.gpu_memory_utilization) - others - peak - self._later_bytes()

    def _later_bytes(self) -> int:
        """What is allocated as requests ask for it: encoded images, and the sampler's tables of penalties."""
        config = self._config
        images = config.encoder_cache_tokens * config.text_config.hidden_size * config.dtype.itemsize
        penalties = config.max_num_seqs * config.vocab_size * (torch.int32.itemsize + torch.bool.itemsize)
        return int(images + penalties)

    def _profile(self) -> None:
        """Run the largest step and the largest batch of images on a cache of one block."""
        with torch.inference_mode():
            if self._vision is not None:
                self._vision.profile()
            for tokens in (1, self._config.max_num_batched_tokens):
                hidden = self._profile_step(tokens)
            rows = self._config.max_num_seqs
            logits = self.model.logits(hidden[:1].expand(rows, -1))
            gather_logprobs(logits, torch.zeros(rows, dtype=torch.int64, device=self.device), 1)
            limits = torch.ones(rows, 1, dtype=torch.int64, device=self.device)
            keep_top(logits, limits, limits.float())
            gumbel_noise(limits.squeeze(1), logits.shape[1])

    def _profile_step(self, tokens: int) -> Tensor:
        """One sequence of this many tokens, all in one block, which changes nothing about the memory it takes."""
        config = self._config
        zeros = torch.zeros(tokens, dtype=torch.int64, device=self.device)
        blocks = torch.zeros(1, -(-tokens // config.block_size), dtype=torch.int32, device=self.device)
        ends = torch.tensor([0, tokens], dtype=torch.int32, device=self.device)
        metadata = AttentionMetadata([0, tokens], [tokens], ends, ends[1:], blocks, zeros)
        hidden = self.model.language_model.embed_tokens(zeros)
        return self.model.language_model(hidden, zeros, self._make_caches(1), metadata)  # type: ignore[no-any-return]

    def _make_caches(self, num_blocks: int) -> list[Tensor]:
        text = self._config.text_config
        shape = (2, num_blocks, self._config.block_size, text.num_key_value_heads, head_dim(text))
        dtype = self._config.dtype
        return [torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(text.num_hidden_layers)]


def _make_exact() -> None:
    """Float32 products are float32 products: no TF32, which would cost three digits."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def _free_cpu_bytes() -> int:
    return min(_CPU_CACHE_BYTES, int(psutil.virtual_memory().available * _CPU_CACHE_SHARE))


def _positions(taken: list[int], counts: list[int], logprobs: Logprobs) -> list[PositionLogprobs]:
    """A position's entry has the token taken first, then the best."""
    values, ranks = logprobs.taken.tolist(), logprobs.rank.tolist()
    top_values, top_ids = logprobs.top_values.tolist(), logprobs.top_ids.tolist()
    return [
        PositionLogprobs([token, *top_ids[i][:count]], [values[i], *top_values[i][:count]], ranks[i])
        for i, (token, count) in enumerate(zip(taken, counts, strict=True))
    ]
