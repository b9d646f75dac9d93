"""From the engine core's tokens to text deltas: one state for each of a request's answers."""

from dataclasses import dataclass, field
from typing import Any

from engine.detokenizer import Detokenizer, StopMatcher, TokenBytes
from engine.messages import EngineOutput, EngineRequest, PositionLogprobs
from engine.outputs import Delta, RequestMetrics, TokenLogprobs
from engine.sampling_params import SamplingParams


@dataclass(slots=True)
class _Answer:
    """One sequence that is being generated."""

    index: int
    request: EngineRequest
    detokenizer: Detokenizer
    stops: StopMatcher
    metrics: RequestMetrics
    num_tokens: int = 0
    text: str = ""
    """All text so far, what is held back for a stop string included."""
    num_sent: int = 0
    """Characters of `text` that are out."""
    unresolved: list[TokenLogprobs] = field(default_factory=list)
    """Log probabilities of tokens that wait for the rest of their character."""
    waiting: list[tuple[int, TokenLogprobs]] = field(default_factory=list)
    """Log probabilities with the length of the text behind them; they leave with their text."""


class OutputProcessor:
    """Owns the answers that are under way. Not for use from several threads."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._bytes = TokenBytes(tokenizer)
        self._answers: dict[str, _Answer] = {}
        self._texts: dict[int, str] = {}
        """Of tokens outside any sequence, as far as asked for: at most one for each of the vocabulary."""

    def add(self, requests: list[EngineRequest]) -> None:
        """Expect output for the answers of one request."""
        for index, request in enumerate(requests):
            params = request.params
            detokenizer = Detokenizer(
                self._tokenizer, request.prompt_token_ids, skip_special_tokens=params.skip_special_tokens
            )
            stops = StopMatcher(stop_strings(params))
            metrics = RequestMetrics(arrival_time=request.arrival_time)
            self._answers[request.request_id] = _Answer(index, request, detokenizer, stops, metrics)

    def remove(self, request_id: str) -> None:
        """Forget an answer; output that still comes for it is ignored."""
        self._answers.pop(request_id, None)

    def process(self, output: EngineOutput, now: float) -> tuple[Delta, bool] | None:
        """Turn one output into a delta.

        Returns:
            The delta, and whether the core must be told to stop (a stop string was met); None for an answer that
            nobody expects any more.
        """
        answer = self._answers.get(output.request_id)
        if answer is None:
            return None
        delta = Delta(answer.index, metrics=answer.metrics, num_cached_tokens=output.num_cached_tokens)
        if output.scheduled_time:
            answer.metrics.first_scheduled_time = output.scheduled_time
        if output.prompt_logprobs is not None:
            delta.prompt_logprobs = self._prompt_logprobs(answer, output.prompt_logprobs)
        for i, token in enumerate(output.new_token_ids):
            answer.metrics.first_token_time = answer.metrics.first_token_time or now
            logprobs = output.logprobs[i] if output.logprobs else None
            self._push(answer, delta, token, output.finish_reason, logprobs)
            if delta.finish_reason is not None:
                break
        stopped = delta.finish_reason is not None
        if not stopped and output.finish_reason is not None:
            delta.finish_reason, delta.stop_reason = output.finish_reason, output.stop_reason
            delta.error = output.error
            self._flush(answer, delta)
        if delta.finish_reason is not None:
            answer.metrics.finished_time = now
            del self._answers[output.request_id]
        else:
            self._release(answer, delta, len(answer.text) - answer.stops.held_back)
        return delta, stopped and output.finish_reason is None

    def _push(
        self,
        answer: _Answer,
        delta: Delta,
        token: int,
        finish_reason: str | None,
        logprobs: PositionLogprobs | None,
    ) -> None:
        """Take in one token; sets the delta's finish reason when a stop string ends."""
        delta.token_ids.append(token)
        answer.num_tokens += 1
        params = answer.request.params
        if finish_reason == "stop" and not (params.include_stop_str_in_output and token in params.stop_token_ids):
            if logprobs is not None:
                answer.unresolved.append(self._token_logprobs(token, "", logprobs))
            return  # a token that ends the answer is not part of its text
        new = answer.detokenizer.push(token)
        before = len(answer.text)
        answer.text += new
        if logprobs is not None:
            answer.unresolved.append(self._token_logprobs(token, new, logprobs))
            if new:
                _resolve(answer, new)
        self._check_stops(answer, delta, before)

    def _check_stops(self, answer: _Answer, delta: Delta, before: int) -> None:
        params = answer.request.params
        found = answer.stops.push(answer.text[before:])
        while found is not None and answer.num_tokens <= params.min_tokens:
            before += found[1]  # too early to stop
            found = answer.stops.push(answer.text[before:])
        if found is None:
            return
        stop, characters = found
        end = before + characters
        answer.text = answer.text[: end if params.include_stop_str_in_output else end - len(stop)]
        delta.finish_reason, delta.stop_reason = "stop", stop
        self._release(answer, delta, len(answer.text))

    def _flush(self, answer: _Answer, delta: Delta) -> None:
        before = len(answer.text)
        answer.text += answer.detokenizer.flush()
        rest = answer.text[before:]
        if answer.unresolved:
            answer.unresolved[-1].text = rest
            _resolve(answer, rest)
        if delta.finish_reason != "error":
            reason, stop_reason = delta.finish_reason, delta.stop_reason
            self._check_stops(answer, delta, before)
            if delta.finish_reason != "stop" or delta.stop_reason is None:
                delta.finish_reason, delta.stop_reason = reason, stop_reason
        self._release(answer, delta, len(answer.text))

    def _release(self, answer: _Answer, delta: Delta, end: int) -> None:
        """Let the text up to `end` out, and the log probabilities of the tokens that made it."""
        if end > answer.num_sent:
            delta.text += answer.text[answer.num_sent : end]
            answer.num_sent = end
        last = delta.finish_reason is not None
        while answer.waiting and (answer.waiting[0][0] <= end or last):
            behind, entry = answer.waiting.pop(0)
            if behind > end:  # a stop string cut this token, or all of it
                entry.text = entry.text[: max(0, len(entry.text) - (behind - end))]
                entry.raw = entry.text.encode("utf-8", "replace")
            delta.logprobs.append(entry)

    def _token_logprobs(self, token: int, text: str, position: PositionLogprobs) -> TokenLogprobs:
        top = [
            (other, other_text, self._bytes.of(other, other_text), logprob)
            for other, logprob in zip(position.token_ids[1:], position.logprobs[1:], strict=True)
            for other_text in [text if other == token else self._alone(other)]
        ]
        raw = self._bytes.of(token, text)
        return TokenLogprobs(token, text, raw, position.logprobs[0], position.rank, top)

    def _prompt_logprobs(self, answer: _Answer, positions: list[PositionLogprobs]) -> list[TokenLogprobs | None]:
        entries: list[TokenLogprobs | None] = [None]
        skip = answer.request.params.skip_special_tokens
        first = answer.request.prompt_token_ids[:1]
        detokenizer = Detokenizer(self._tokenizer, first, skip_special_tokens=skip)
        for position in positions:
            token = position.token_ids[0]
            entries.append(self._token_logprobs(token, detokenizer.push(token), position))
        return entries

    def _alone(self, token: int) -> str:
        """A token's text outside any sequence, its leading space kept."""
        known = self._texts.get(token)
        if known is None:
            known = self._texts[token] = self._text_of(token)
        return known

    def _text_of(self, token: int) -> str:
        text = self._tokenizer.backend_tokenizer.decode([token], skip_special_tokens=False)
        piece = self._tokenizer.backend_tokenizer.id_to_token(token) or ""
        return f" {text}" if piece.startswith("▁") and not text.startswith(" ") else str(text)


def _resolve(answer: _Answer, text: str) -> None:
    """Tokens that made `text` together are complete: their bytes are its bytes, or, where they were no valid UTF-8, the
    last one has the bytes of what stands for them.
    """
    group, answer.unresolved = answer.unresolved, []
    if b"".join(entry.raw for entry in group) != text.encode("utf-8", "replace"):
        for entry in group:
            entry.raw = b""
        group[-1].raw = text.encode("utf-8", "replace")
    answer.waiting += [(len(answer.text), entry) for entry in group]


def stop_strings(params: SamplingParams) -> list[str]:
    """The stop strings as a list."""
    assert isinstance(params.stop, list)
    return params.stop
