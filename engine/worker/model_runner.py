"""Runs the model on one device: launches steps without waiting for them."""

import logging
import time
from collections.abc import Iterable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from engine.attention import AttentionMetadata, tile_tokens
from engine.config import EngineConfig
from engine.errors import ModelLoadError
from engine.grammar.compiler import GrammarCompiler
from engine.input_processor import tokenizer_json
from engine.kernels import quick_gelu
from engine.models.linear import pack_weights
from engine.models.llava import LlavaForConditionalGeneration
from engine.models.loader import load_model
from engine.models.rotary import long_context_start
from engine.step import SchedulerOutput
from engine.summary import summary
from engine.worker.cpu_threads import use_cores
from engine.worker.decode_graphs import DecodeGraphs, decode_sizes
from engine.worker.grammar_masks import GrammarMasks
from engine.worker.input_batch import InputBatch, StepLayout
from engine.worker.kv_scales import check_fp8, find_kv_scales
from engine.worker.layer_caches import block_bytes, make_caches
from engine.worker.memory_budget import GpuBudget, cpu_bytes, peak_bytes
from engine.worker.pending import Logprobs, PendingStep, SampledLogprobs
from engine.worker.sampler import Sampler, gather_logprobs, profile_sampling
from engine.worker.step_graphs import StepGraphs, step_sizes
from engine.worker.timer import DeviceTimer
from engine.worker.vision import GRAPH_SIZES as VISION_SIZES
from engine.worker.vision import VisionEncoder

logger = logging.getLogger(__name__)

_GRAPH_BYTES_PER_LAYER = 72 << 10
"""What the driver keeps for one CUDA graph: on an H100 132 MiB for the 62 graphs of a 7B model, which has 32 layers."""
_MOST_IN_GRAPH = 512
"""Requests; larger steps keep the GPU busy while their kernels are launched one by one."""
_LOGPROB_ROWS = 256
"""Prompt positions whose log probabilities are computed at once."""


class ModelRunner:
    """Owns the model, its cache, the running requests' slots and the encoded images."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.device = config.device
        self.max_model_len = config.max_model_len
        _make_exact()
        is_fp8 = config.kv_cache_dtype == torch.float8_e4m3fn
        if is_fp8:
            check_fp8(self.device)
        self._budget = GpuBudget(config.gpu_memory_utilization) if self.device.type == "cuda" else None
        if self._budget is None:
            use_cores()
        started = time.monotonic()
        self.model = load_model(config)
        if self._budget is None:
            pack_weights(self.model)
        logger.info("loaded %s in %.1f s", config.model_name, time.monotonic() - started)
        long_start = long_context_start(config.text_config)
        text = config.text_config
        self._tile_tokens = tile_tokens(text.num_attention_heads, text.num_key_value_heads, config.dtype)
        self._batch = InputBatch(
            config.max_num_seqs,
            config.max_model_len,
            config.block_size,
            self.device,
            long_start=long_start,
            tile_tokens=self._tile_tokens,
            finds_shared=self._finds_shared,
        )
        self.grammars = GrammarCompiler(partial(tokenizer_json, config), config.vocab_size, config.eos_token_ids)
        self._masks = GrammarMasks(self._batch, config.vocab_size)
        self._sampler = Sampler(self._batch, config.max_num_seqs, config.vocab_size, self._masks)
        self._vision: VisionEncoder | None = None
        if config.vision is not None:
            assert isinstance(self.model, LlavaForConditionalGeneration)
            self._vision = VisionEncoder(self.model, config.vision, self._batch)
        self._decodes: DecodeGraphs | None = None
        self._steps: StepGraphs | None = None
        if is_fp8:
            self.model.set_kv_scales(find_kv_scales(self.model, config, self._batch))
        if self._budget is None:
            self._warm_up()
        self.num_blocks = self._count_blocks()
        # One block more than the scheduler knows of: what pads a batch is written there.
        self._caches = make_caches(config, self.num_blocks + 1, config.kv_cache_dtype)
        self._batch.block_table[self._batch.padding_slot] = self.num_blocks
        if self._uses_graphs:
            self._capture()
        logger.info("%s", summary(config, self.num_blocks))

    @property
    def _uses_graphs(self) -> bool:
        return self.device.type == "cuda" and not self.config.enforce_eager

    @property
    def _finds_shared(self) -> bool:
        """Whether attention is to read shared beginnings once: a window would cut them off."""
        windowed = getattr(self.config.text_config, "sliding_window", None) is not None
        return self._uses_graphs and self.config.enable_prefix_caching and not windowed

    def execute(self, step: SchedulerOutput) -> PendingStep:
        """Launch a step. Nothing here waits for the device."""
        with torch.inference_mode():
            if self._vision is not None:
                self._vision.free(step.freed_images)
            self._change_requests(step)
            encoding = self._encode_images(step)
            layout = self._batch.lay_out(step)
            if self._decodes is not None and self._decodes.fits(layout):
                rows, logits, tokens = self._decodes(layout)
                if self._sampler.is_plain(layout.sample_slots):
                    return self._pending(layout, tokens, None, [], encoding)
                tokens, logprobs = self._sample(layout, logits, rows[:, 0], rows[:, 1])
                return self._pending(layout, tokens, logprobs, [], encoding)
            tokens, hidden = self._forward(layout)
            prompt_logprobs = self._prompt_logprobs(layout, hidden)
            chosen, logprobs = torch.zeros(0, dtype=torch.int64), None
            if len(layout.sample_rows):
                rows = self._batch.upload(layout.sample_rows)
                last = tokens[rows]
                chosen, logprobs = self._sample(layout, self.model.logits(hidden[rows]), last[:, 0], last[:, 1])
            return self._pending(layout, chosen, logprobs, prompt_logprobs, encoding)

    def recover(self) -> None:
        """Give back what a failed step may have left on the device; raises where the device itself is broken."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def _change_requests(self, step: SchedulerOutput) -> None:
        self._remove(step.finished_ids)
        for new in step.new_requests:
            self._sampler.add(self._batch.add(new), new.token_ids, new.matcher)

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

    def _forward(self, layout: StepLayout) -> tuple[Tensor, Tensor]:
        """The step's tokens (T or more, 3), on the device, and their last states (T, hidden)."""
        size = None if self._steps is None else self._steps.padded_size(layout)
        if self._steps is None or size is None:
            tokens = self._batch.upload(layout.tokens)
            metadata = self._batch.metadata(layout, tokens)
            return tokens, self.model.language_model(self._embed(layout, tokens), self._caches, metadata)
        tokens = self._batch.upload(self._batch.padded(layout, size))
        return tokens, self._steps(layout, tokens, self._embed(layout, tokens))

    def _embed(self, layout: StepLayout, tokens: Tensor) -> Tensor:
        hidden = self._look_up(tokens[:, 0], tokens[:, 1])
        if self._vision is not None:
            for row, part, slot in zip(layout.query_start.tolist(), layout.parts, layout.slots, strict=False):
                if part.start < slot.images_end:
                    end = part.start + part.num_tokens
                    self._vision.merge(hidden, row, part.start, end, slot.request.images)
        return hidden

    def _look_up(self, token_rows: Tensor, positions: Tensor) -> Tensor:
        """Embeddings (T, hidden) of the tokens at these positions of these slots."""
        return self.model.language_model.embed_tokens(self._batch.token_table[token_rows, positions])  # type: ignore[no-any-return]

    def _sample(
        self, layout: StepLayout, logits: Tensor, slots: Tensor, positions: Tensor
    ) -> tuple[Tensor, SampledLogprobs | None]:
        """Choose a token for each row of logits, which are changed, and write it behind the last one of its slot.

        Args:
            layout: of the step.
            logits: (S, vocabulary).
            slots: (S) of the rows, on the device.
            positions: (S) of the tokens that were last read.
        """
        wanted = self._sampler.logprobs_wanted(layout.sample_slots)
        indices = np.flatnonzero(wanted >= 0)
        raw = logits[self._batch.upload(indices)] if len(indices) else None
        num_outputs = np.array([part.num_output_tokens for part in layout.parts if part.samples], np.int64)
        chosen = self._sampler.sample(logits, layout.sample_slots, layout.sample_positions, num_outputs)
        self._batch.write_sampled(slots, positions + 1, chosen)
        if raw is None:
            return chosen, None
        names = [part.request_id for part in layout.parts if part.samples]
        taken = chosen[self._batch.upload(indices)]
        logprobs = self._download_logprobs(gather_logprobs(raw, taken, int(wanted.max())))
        return chosen, SampledLogprobs([(names[i], int(wanted[i])) for i in indices], logprobs)

    def _pending(
        self,
        layout: StepLayout,
        tokens: Tensor,
        logprobs: SampledLogprobs | None,
        prompt_logprobs: list[tuple[str, int, Tensor, Logprobs]],
        encoding: DeviceTimer | None,
    ) -> PendingStep:
        """Start the tokens' way to the host."""
        tokens, done = self._download(tokens), None
        if self.device.type == "cuda":
            done = torch.cuda.Event()
            done.record()
        names = [part.request_id for part in layout.parts if part.samples]
        step = PendingStep(names, tokens, logprobs, prompt_logprobs, encoding, done, failed=self._masks.take_failed())
        self._masks.launched(layout.sample_slots, step)
        return step

    def _prompt_logprobs(self, layout: StepLayout, hidden: Tensor) -> list[tuple[str, int, Tensor, Logprobs]]:
        found = []
        for row, part, slot in zip(layout.query_start.tolist(), layout.parts, layout.slots, strict=False):
            request = slot.request
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
        config = self.config
        # Looked up in any case: it also compiles the kernels, which a request should not wait for.
        free = cpu_bytes() if self._budget is None else self._free_gpu_bytes(self._budget)
        if config.num_blocks is not None:
            return config.num_blocks
        bytes_each = block_bytes(config)
        available = free if config.kv_cache_memory_bytes is None else config.kv_cache_memory_bytes
        most = config.max_num_seqs * -(-config.max_model_len // config.block_size)
        if config.kv_cache_memory_bytes is None:
            available -= bytes_each  # of the block that pads
        num_blocks = min(available // bytes_each, most)
        if num_blocks < 1 and config.kv_cache_memory_bytes is not None:
            raise ModelLoadError(
                f"--kv-cache-memory-bytes is {config.kv_cache_memory_bytes}: one block of {config.block_size} tokens "
                f"takes {bytes_each}, and there must be room for a request's"
            )
        if num_blocks < 1:
            raise ModelLoadError(
                "no memory is left for the KV cache: raise --gpu-memory-utilization, or lower --max-num-batched-tokens"
            )
        tokens = num_blocks * config.block_size
        size = num_blocks * bytes_each / 2**30
        kind = str(config.kv_cache_dtype).removeprefix("torch.")
        logger.info("KV cache: %d tokens in %d blocks of %s, %.2f GiB", tokens, num_blocks, kind, size)
        return num_blocks

    def _warm_up(self) -> None:
        """Compile what steps on a CPU need, lest the first request wait for it."""
        started = time.monotonic()
        with torch.inference_mode():
            self._profile_step(1)
            if self._vision is not None:
                quick_gelu(self._zeros(1))
        logger.info("compiled kernels in %.1f s", time.monotonic() - started)

    def _free_gpu_bytes(self, budget: GpuBudget) -> int:
        """Memory that remains of the budget when the largest step runs."""
        started, most = time.monotonic(), self.config.max_num_batched_tokens
        vision, steps, sampling = self._profile()
        logger.info("compiled kernels and measured the largest step in %.1f s", time.monotonic() - started)
        free = budget.left() - self._later_bytes()
        if not self._uses_graphs:
            return free - max(vision, steps, sampling)
        # Graphs keep the memory of their activations to themselves; what is launched without them needs its own.
        launched = max(vision, sampling, 0 if step_sizes(most)[-1] == most else steps)
        return free - self._graph_bytes() - max(vision, steps) - launched

    def _later_bytes(self) -> int:
        """What is allocated later: encoded images and the sampler's tables of penalties."""
        config = self.config
        images = config.encoder_cache_tokens * config.text_config.hidden_size * config.dtype.itemsize
        penalties = config.max_num_seqs * config.vocab_size * (torch.int32.itemsize + torch.bool.itemsize)
        return int(images + penalties)

    def _graph_bytes(self) -> int:
        """What CUDA graphs take beside their activations."""
        config, text = self.config, self.config.text_config
        decodes, steps = decode_sizes(self._most_in_graph), step_sizes(config.max_num_batched_tokens)
        count = 2 * len(decodes) + len(steps) + len(VISION_SIZES) * (self._vision is not None)
        kept = count * text.num_hidden_layers * _GRAPH_BYTES_PER_LAYER
        logits = decodes[-1] * config.vocab_size * torch.float32.itemsize
        return int(kept + logits + 2 * steps[-1] * text.hidden_size * config.dtype.itemsize)

    @property
    def _most_in_graph(self) -> int:
        return min(self.config.max_num_seqs, self.config.max_num_batched_tokens, _MOST_IN_GRAPH)

    def _profile(self) -> tuple[int, int, int]:
        """Bytes that the largest batch of images, the largest step and the sampler take at most."""
        most = self.config.max_num_batched_tokens
        rows = max(self.config.max_num_seqs, _LOGPROB_ROWS)
        with torch.inference_mode():
            vision = 0 if self._vision is None else peak_bytes(self._vision.profile)
            # Small steps take kernels of their own, which no request should wait for to be compiled.
            sizes = sorted({min(tokens, most) for tokens in (1, 2, 32, 64, 128, most)})
            steps = max(peak_bytes(partial(self._profile_step, size)) for size in sizes)
            sampling = peak_bytes(lambda: profile_sampling(self.model.logits(self._zeros(rows))))
        return vision, steps, sampling

    def _zeros(self, rows: int) -> Tensor:
        size = self.config.text_config.hidden_size
        return torch.zeros(rows, size, dtype=self.config.dtype, device=self.device)

    def _profile_step(self, tokens: int) -> Tensor:
        """So many tokens in sequences as long as they may be, in one block, which changes nothing about memory."""
        longest = min(tokens, self.max_model_len)
        lengths = [longest] * (tokens // longest) + [tokens % longest] * (tokens % longest > 0)
        lengths.sort(key=lambda length: length > 1)  # as `InputBatch` puts them
        starts, decodes, slot = np.cumsum([0, *lengths]), lengths.count(1), self._batch.padding_slot
        prefills = np.array([starts[:-1], lengths, lengths, [slot] * len(lengths)], np.int32)[:, decodes:]
        zeros = torch.zeros(tokens, dtype=torch.int32, device=self.device)
        metadata = AttentionMetadata(
            num_decodes=decodes,
            query_start=starts.tolist(),
            seq_lens=lengths,
            rows=[slot] * len(lengths),
            token_rows=zeros + slot,
            positions=zeros,
            rotary_rows=zeros,
            block_table=self._batch.block_table,
            prefills=self._batch.upload(prefills),
            tiles=self._batch.upload(self._batch.tiles(*prefills[1:3].astype(np.int64))),
        )
        hidden = self._look_up(metadata.token_rows, metadata.positions)
        caches = make_caches(self.config, 1, self.config.kv_cache_dtype)
        return self.model.language_model(hidden, caches, metadata)  # type: ignore[no-any-return]

    def _capture(self) -> None:
        """Capture steps in which every request has one token, all other steps, and the vision tower."""
        started, config = time.monotonic(), self.config
        free, _ = torch.cuda.mem_get_info()
        decodes = DecodeGraphs(
            self.model, self._batch, self._caches, max_requests=self._most_in_graph, finds_shared=self._finds_shared
        )
        steps = StepGraphs(
            lambda hidden, metadata: self.model.language_model(hidden, self._caches, metadata),
            self._batch,
            hidden_size=config.text_config.hidden_size,
            dtype=config.dtype,
            max_tokens=config.max_num_batched_tokens,
            max_requests=config.max_num_seqs,
            tile_tokens=self._tile_tokens,
        )
        pool = torch.cuda.graph_pool_handle()
        with torch.inference_mode():
            steps.capture(pool)
            decodes.capture(pool)
            if self._vision is not None:
                self._vision.capture(pool)
        self._decodes, self._steps = decodes, steps
        taken = (free - torch.cuda.mem_get_info()[0]) / 2**20
        logger.info("captured CUDA graphs in %.1f s, %.0f MiB", time.monotonic() - started, taken)


def _make_exact() -> None:
    """Float32 products are float32 products: no TF32, which would cost three digits."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
