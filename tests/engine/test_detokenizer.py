from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer

from engine.detokenizer import Detokenizer, StopMatcher, TokenBytes
from engine.messages import EngineOutput, EngineRequest, PositionLogprobs
from engine.output_processor import OutputProcessor
from engine.outputs import Delta
from engine.sampling_params import SamplingParams
from tests.random_checkpoint import CheckpointSpec, build_checkpoint
from tests.random_tokenizer import BASE_VOCAB, BOS_ID, EOS_ID

FIRST_BYTE = 3  # the id of <0x00>
FIRST_WORD = FIRST_BYTE + 256
QUICK = settings(
    derandomize=True,
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Bytes as tokens of their own, words with their space before them."""
    folder: Path = build_checkpoint(tmp_path_factory.mktemp("tokenizer") / "llama", CheckpointSpec(kind="llama"))
    return AutoTokenizer.from_pretrained(folder)


class ByteLevel:
    """Tokens of any bytes: byte-level BPE as in GPT-2. Ids 0 to 255 are the bytes, the others two or three of them."""

    PIECES = (b" hello", b"\xa0 ", b"\xf0\x9f", b"\x98\x80!", b"\xe4\xbd", b"\xa0\xe5\xa5", b"\xbd")

    def __init__(self) -> None:
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in printable]
        names = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
        vocab = {names[byte]: byte for byte in range(256)}
        for i, piece in enumerate(self.PIECES):
            vocab["".join(names[byte] for byte in piece)] = vocab.get("".join(names[b] for b in piece), 256 + i)
        self.backend_tokenizer = Tokenizer(models.BPE(vocab, []))
        self.backend_tokenizer.decoder = decoders.ByteLevel()


byte_level = ByteLevel()
# Two, three and four bytes in UTF-8; no replacement character and no surrogates.
characters = st.one_of(
    st.sampled_from("éß你好世界😀🧪\u200d\n"),
    st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"),
)


def byte_ids(text: str) -> list[int]:
    return [FIRST_BYTE + byte for byte in text.encode()]


pieces = st.one_of(
    st.integers(FIRST_WORD, BASE_VOCAB - 1).map(lambda token: [token]),
    characters.map(byte_ids),
    st.sampled_from([[EOS_ID], [BOS_ID]]),
)
sequences = st.lists(pieces, max_size=20).map(lambda found: [token for piece in found for token in piece])


def deltas(tokenizer: Any, prompt: list[int], ids: list[int], *, skip: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt, skip_special_tokens=skip)
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


@QUICK
@given(prompt=sequences, ids=sequences, skip=st.booleans())
def test_deltas_join_to_the_text(tokenizer: Any, prompt: list[int], ids: list[int], skip: bool) -> None:
    prompt = [BOS_ID, FIRST_WORD + 100, *prompt]
    decode = tokenizer.backend_tokenizer.decode
    before = decode(prompt, skip_special_tokens=skip)
    whole = decode(prompt + ids, skip_special_tokens=skip)
    found = deltas(tokenizer, prompt, ids, skip=skip)
    assert before + "".join(found) == whole
    assert not any("\ufffd" in delta for delta in found)


@QUICK
@given(text=st.text(characters, max_size=20))
def test_text_comes_with_the_last_byte_of_each_character(tokenizer: Any, text: str) -> None:
    expected = [part for character in text for part in [""] * (len(character.encode()) - 1) + [character]]
    assert deltas(tokenizer, [BOS_ID, FIRST_WORD + 100], byte_ids(text)) == [*expected, ""]
    assert deltas(byte_level, [65], list(text.encode())) == [*expected, ""]


@QUICK
@given(ids=st.lists(st.integers(0, 255 + len(ByteLevel.PIECES) - 1), max_size=16))
def test_invalid_bytes_are_replaced_once_and_lose_nothing_else(ids: list[int]) -> None:
    found = "".join(deltas(byte_level, [65], ids))
    whole = byte_level.backend_tokenizer.decode([65, *ids])[1:]
    assert found.replace("\ufffd", "") == whole.replace("\ufffd", "")


@pytest.mark.parametrize("tail", ["😀😀", "你好你", "éé", "a😀é😀"])
def test_prompt_that_ends_in_byte_tokens(tokenizer: Any, tail: str) -> None:
    prompt = [BOS_ID, FIRST_WORD + 100, *byte_ids(tail)]
    assert "".join(deltas(tokenizer, prompt, byte_ids("你😀"))) == "你😀"


@pytest.mark.parametrize("count", [1, 11, 12, 13, 40])
def test_many_special_tokens_change_nothing(tokenizer: Any, count: int) -> None:
    backend = tokenizer.backend_tokenizer
    word = backend.token_to_id("▁the")
    assert "".join(deltas(tokenizer, [BOS_ID, word], [word, *[EOS_ID] * count, word])) == " the the"
    assert "".join(deltas(tokenizer, [BOS_ID, word], [*[EOS_ID] * count, *byte_ids("😀")])) == "😀"


def test_bytes_that_never_become_a_character_do_not_wait_for_ever(tokenizer: Any) -> None:
    found = deltas(tokenizer, [BOS_ID, FIRST_WORD + 100], [FIRST_BYTE + 0xFF] * 40)
    assert "\ufffd" in "".join(found[:20])
    assert len("".join(found)) == 40
    assert deltas(tokenizer, [BOS_ID, FIRST_WORD + 100], byte_ids("😀")[:3])[-1] == "\ufffd" * 3


def first_stop(stops: list[str], text: str) -> tuple[str, int] | None:
    """The stop string that ends first, the longest if several do, and where it ends."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            return max(ended, key=len), end
    return None


def longest_beginning(stops: list[str], text: str) -> int:
    lengths = [n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
    return max(lengths, default=0)


@settings(QUICK, max_examples=600)
@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=7), max_size=4),
    chunks=st.lists(st.text("ab", max_size=6), max_size=10),
)
def test_stop_matcher(stops: list[str], chunks: list[str]) -> None:
    matcher = StopMatcher(stops)
    text = ""
    for chunk in chunks:
        found = matcher.push(chunk)
        expected = first_stop(stops, text + chunk)
        if expected is not None:
            assert found == (expected[0], expected[1] - len(text))
            return
        assert found is None
        text += chunk
        assert matcher.held_back == longest_beginning(stops, text)


def run(
    tokenizer: Any,
    ids: list[int],
    *,
    finish_reason: str = "length",
    stop_reason: int | None = None,
    prompt: list[int] | None = None,
    **params: Any,
) -> tuple[Delta, list[str], bool]:
    """All deltas merged, their texts, and whether the engine was told to stop."""
    processor = OutputProcessor(tokenizer)
    prompt = [BOS_ID, FIRST_WORD + 100] if prompt is None else prompt
    request = EngineRequest("r", prompt, SamplingParams(logprobs=0, **params), len(ids), seed=0)
    processor.add([request])
    merged, texts, told = Delta(0), [], False
    for i, token in enumerate(ids):
        output = EngineOutput("r", [token], logprobs=[PositionLogprobs([token], [-float(i)], i + 1)])
        if i == len(ids) - 1:
            output.finish_reason, output.stop_reason = finish_reason, stop_reason
        processed = processor.process(output, 1.0)
        if processed is None:
            assert merged.finish_reason is not None
            break
        delta, told = processed
        texts.append(delta.text)
        merged.merge(delta)
    assert merged.finish_reason is not None
    return merged, texts, told


def check_logprobs(delta: Delta) -> None:
    assert "".join(entry.text for entry in delta.logprobs) == delta.text
    assert b"".join(entry.raw for entry in delta.logprobs) == delta.text.encode("utf-8", "replace")
    assert [entry.rank for entry in delta.logprobs] == sorted({entry.rank for entry in delta.logprobs})
    assert all(entry.logprob == 1 - entry.rank for entry in delta.logprobs)


@settings(QUICK, max_examples=300)
@given(data=st.data(), ids=sequences.filter(bool), include=st.booleans())
def test_answer_ends_at_the_first_stop_string(
    tokenizer: Any, data: st.DataObject, ids: list[int], include: bool
) -> None:
    text = "".join(deltas(tokenizer, [BOS_ID, FIRST_WORD + 100], ids))
    stops = [data.draw(st.text("eatn .😀你", min_size=1, max_size=3))]
    if text:
        start = data.draw(st.integers(0, len(text) - 1))
        stops.append(text[start : start + data.draw(st.integers(1, 5))])
        stops.append(stops[-1] + "?")
    found = first_stop(stops, text)
    merged, texts, told = run(tokenizer, ids, stop=stops, include_stop_str_in_output=include)
    if found is None:
        assert (merged.text, merged.finish_reason, merged.stop_reason, told) == (text, "length", None, False)
        assert merged.token_ids == ids
    else:
        stop, end = found
        assert (merged.text, merged.finish_reason, merged.stop_reason) == (
            text[: end if include else end - len(stop)],
            "stop",
            stop,
        )
        assert told == (len(texts) < len(ids))
    check_logprobs(merged)
    # All but what may become a stop string is let out at once.
    so_far, sent = "", ""
    detokenizer = Detokenizer(tokenizer, [BOS_ID, FIRST_WORD + 100])
    for token, delta in zip(ids[: len(texts) - 1], texts, strict=False):
        so_far += detokenizer.push(token)
        sent += delta
        assert sent == so_far[: len(so_far) - longest_beginning(stops, so_far)]


@QUICK
@given(ids=st.lists(st.integers(0, 255 + len(ByteLevel.PIECES) - 1), min_size=1, max_size=12), cut=st.booleans())
def test_logprobs_join_to_any_text(tokenizer: Any, ids: list[int], cut: bool) -> None:
    stop = ["\ufffd!", "o"] if cut else []
    check_logprobs(run(byte_level, ids, prompt=[65], stop=stop)[0])
    check_logprobs(run(tokenizer, [token + FIRST_BYTE for token in ids], stop=stop)[0])


def test_each_byte_token_has_its_own_byte(tokenizer: Any) -> None:
    merged, _, _ = run(tokenizer, byte_ids("a😀"))
    assert [entry.raw for entry in merged.logprobs] == [bytes([byte]) for byte in "a😀".encode()]
    assert [entry.text for entry in merged.logprobs] == ["a", "", "", "", "😀"]


def test_end_token_is_no_text(tokenizer: Any) -> None:
    word = tokenizer.backend_tokenizer.token_to_id("▁the")
    merged, _, told = run(tokenizer, [word, EOS_ID], finish_reason="stop", skip_special_tokens=False)
    assert (merged.text, merged.finish_reason, merged.stop_reason, told) == (" the", "stop", None, False)
    assert merged.token_ids == [word, EOS_ID]


@pytest.mark.parametrize("before", ["", "😀"])
@pytest.mark.parametrize("include", [False, True])
def test_stop_token(tokenizer: Any, include: bool, before: str) -> None:
    word = tokenizer.backend_tokenizer.token_to_id("▁the")
    ids = [word, *byte_ids(before)[:3], word]
    merged, _, _ = run(
        tokenizer,
        ids,
        finish_reason="stop",
        stop_reason=word,
        stop_token_ids=[word],
        include_stop_str_in_output=include,
    )
    assert merged.text == " the" + "\ufffd" * 3 * bool(before) + " the" * include
    assert (merged.finish_reason, merged.stop_reason) == ("stop", word)
    check_logprobs(merged)


def test_stop_strings_wait_for_min_tokens(tokenizer: Any) -> None:
    word = tokenizer.backend_tokenizer.token_to_id("▁the")
    merged, _, _ = run(tokenizer, [word] * 5, stop=["the"], min_tokens=2)
    assert (merged.text, merged.token_ids, merged.stop_reason) == (" the the ", [word] * 3, "the")


def test_held_text_is_let_out_at_the_end(tokenizer: Any) -> None:
    merged, texts, _ = run(tokenizer, byte_ids("abca"), stop=["ab!", "a?"])
    assert texts == ["", "", "abc", "a"]
    assert merged.finish_reason == "length"


def test_stop_string_in_what_the_end_lets_out(tokenizer: Any) -> None:
    merged, _, told = run(tokenizer, [*byte_ids("a"), *byte_ids("😀")[:2]], stop=["\ufffd"])
    assert (merged.text, merged.finish_reason, merged.stop_reason, told) == ("a", "stop", "\ufffd", False)


def test_error_and_removal(tokenizer: Any) -> None:
    processor = OutputProcessor(tokenizer)
    params = SamplingParams(stop=["the!"])
    word = tokenizer.backend_tokenizer.token_to_id("▁the")
    processor.add([EngineRequest(name, [BOS_ID, word], params, 9, seed=0) for name in ("r/0", "r/1")])
    for name in ("r/0", "r/1"):
        assert processor.process(EngineOutput(name, [word]), 1.0) is not None
    processed = processor.process(EngineOutput("r/1", [], finish_reason="error", error="broken"), 2.0)
    assert processed is not None
    delta, told = processed
    assert (delta.index, delta.text, delta.finish_reason, delta.error, told) == (
        1,
        "the",
        "error",
        "broken",
        False,
    )
    assert (delta.metrics.first_token_time, delta.metrics.finished_time) == (1.0, 2.0)
    processor.remove("r/0")
    assert processor.process(EngineOutput("r/0", [word]), 3.0) is None
    assert processor.process(EngineOutput("r/1", [word]), 3.0) is None


def test_prompt_logprobs(tokenizer: Any) -> None:
    processor = OutputProcessor(tokenizer)
    ids = tokenizer.backend_tokenizer.encode("The image shows 😀 a house").ids
    processor.add([EngineRequest("r", ids, SamplingParams(prompt_logprobs=0), 9, seed=0)])
    positions = [PositionLogprobs([token], [-0.5], 1) for token in ids[1:]]
    processed = processor.process(EngineOutput("r", [ids[-1]], prompt_logprobs=positions), 1.0)
    assert processed is not None
    entries = processed[0].prompt_logprobs
    assert entries is not None
    assert entries[0] is None
    assert [entry.token_id for entry in entries[1:] if entry is not None] == ids[1:]
    assert "".join(entry.text for entry in entries[1:] if entry is not None) == "The image shows 😀 a house"


@QUICK
@given(text=st.text(characters, max_size=12))
def test_token_bytes_join(tokenizer: Any, text: str) -> None:
    for some, ids in ((tokenizer, byte_ids(text)), (byte_level, list(text.encode()))):
        token_bytes = TokenBytes(some)
        assert b"".join(token_bytes.of(token, "?") for token in ids) == text.encode()


def test_bytes_of_words(tokenizer: Any) -> None:
    word = tokenizer.backend_tokenizer.token_to_id("▁the")
    assert TokenBytes(tokenizer).of(word, " the") == b" the"
    assert TokenBytes(tokenizer).of(10**6, "") == b""
    assert TokenBytes(byte_level).of(256, "?") == b" hello"


def test_stop_strings_are_read_once_for_all_answers() -> None:
    """A thousand characters take a millisecond, and a request may have thousands of answers."""
    stop = "ab" * 500
    one, other = StopMatcher([stop]), StopMatcher([stop])
    assert one._failures[0] is other._failures[0]
    assert one.push("ab" * 499) is None and other.push("x" + stop) == (stop, 1001)
