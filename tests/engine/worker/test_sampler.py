import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.messages import EngineRequest
from engine.sampling_params import SamplingParams
from engine.step import NewRequest
from engine.worker import random_noise
from engine.worker.grammar_masks import GrammarMasks
from engine.worker.input_batch import InputBatch, Slot
from engine.worker.random_noise import gumbel_noise, noise_keys
from engine.worker.sampler import Sampler, gather_logprobs, keep_top

VOCAB = 24
EOS = 3
SLOTS = 8
MASK = 2**64 - 1
NEVER = float("-inf")


def splitmix(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def naive_noise(seed: int, position: int, column: int) -> float:
    golden = 0x9E3779B97F4A7C15
    key = splitmix((splitmix(seed & MASK) + position * golden) & MASK)
    bits = splitmix((key + column * golden) & MASK)
    return -math.log(-math.log(((bits >> 41) + 0.5) / 2**23))


@dataclass
class Row:
    """One sequence: what a sampler may look at."""

    params: SamplingParams
    prompt: list[int]
    output: list[int] = field(default_factory=list)
    seed: int = 0
    bad_words: list[list[int]] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.output


def naive_rules(logits: Sequence[float], sequence: Row) -> list[float]:
    """Logits after rules about tokens and penalties."""
    params, output = sequence.params, sequence.output
    scores = [float(x) for x in logits]
    for token in range(VOCAB):
        banned = params.allowed_token_ids is not None and token not in params.allowed_token_ids
        ends = {*params.stop_token_ids, *([] if params.ignore_eos else [EOS])}
        banned |= len(output) < params.min_tokens and token in ends
        for word in sequence.bad_words:
            beginning = word[:-1]
            banned |= token == word[-1] and (not beginning or output[-len(beginning) :] == beginning)
        scores[token] = NEVER if banned else scores[token] + (params.logit_bias or {}).get(token, 0)
    if max(scores) == NEVER:
        scores[EOS] = 0.0  # nothing is allowed: the answer ends
    for token in range(VOCAB):
        if token in sequence.tokens:
            factor = params.repetition_penalty
            scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
        count = output.count(token)
        scores[token] -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
    return scores


def naive_filter(scores: list[float], params: SamplingParams) -> list[float]:
    """Logits after temperature, min_p, top_k and top_p."""
    scores = [score / params.temperature for score in scores]
    best = max(scores)
    if params.min_p:
        scores = [score if math.exp(score - best) >= params.min_p else NEVER for score in scores]
    order = sorted(range(VOCAB), key=lambda token: (-scores[token], token))
    if params.top_k > 0:
        order = order[: params.top_k]
    total = sum(math.exp(scores[token] - best) for token in order)
    kept: set[int] = set()
    mass = 0.0
    for token in order:
        if kept and mass / total >= params.top_p:
            break
        kept.add(token)
        mass += math.exp(scores[token] - best)
    return [score if token in kept else NEVER for token, score in enumerate(scores)]


def naive_token(logits: Sequence[float], sequence: Row) -> int:
    scores = naive_rules(logits, sequence)
    if not sequence.params.is_greedy:
        position = len(sequence.tokens)
        scores = [
            score + naive_noise(sequence.seed, position, token)
            for token, score in enumerate(naive_filter(scores, sequence.params))
        ]
    return max(range(VOCAB), key=lambda token: (scores[token], -token))


class Bench:
    """A sampler with its slots, worked as the model runner does."""

    def __init__(self, num_slots: int = SLOTS, vocab: int = VOCAB) -> None:
        self.batch = InputBatch(num_slots, 256, 16, torch.device("cpu"), long_start=None)
        self.sampler = Sampler(self.batch, num_slots, vocab, GrammarMasks(self.batch, vocab))
        self._number = 0

    def add(self, sequence: Row) -> Slot:
        self._number += 1
        request = EngineRequest(
            str(self._number), sequence.prompt, sequence.params, 100, seed=sequence.seed, eos_token_ids=[EOS],
            bad_words=sequence.bad_words,
        )  # fmt: skip
        slot = self.batch.add(NewRequest(request, sequence.tokens, []))
        self.sampler.add(slot, sequence.tokens)
        return slot

    def remove(self, slot: Slot) -> None:
        index = self.batch.remove(slot.request.request_id)
        assert index == slot.index
        self.sampler.remove(index)

    def sample(self, logits: Tensor, slots: list[Slot], sequences: list[Row]) -> list[int]:
        """Sample once for each row; the tokens are appended to the sequences."""
        indices = np.array([slot.index for slot in slots], np.int64)
        positions = np.array([len(sequence.tokens) for sequence in sequences], np.int64)
        counts = np.array([len(sequence.output) for sequence in sequences], np.int64)
        tokens = self.sampler.sample(logits.clone(), indices, positions, counts)
        assert tokens.dtype == torch.int64
        self.batch.token_table[torch.from_numpy(indices), torch.from_numpy(positions)] = tokens.int()
        for sequence, token in zip(sequences, tokens.tolist(), strict=True):
            sequence.output.append(token)
        return tokens.tolist()


def once(logits: Tensor, *sequences: Row) -> list[int]:
    bench = Bench()
    return bench.sample(logits, [bench.add(sequence) for sequence in sequences], list(sequences))


def random_logits(rows: int, seed: int, scale: float = 2.0, vocab: int = VOCAB) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


token_ids = st.integers(0, VOCAB - 1)
all_params: st.SearchStrategy[SamplingParams] = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.0, 0.3, 1.0, 1.7]),
    top_k=st.sampled_from([-1, 0, 1, 2, 5, VOCAB, 1000]),
    top_p=st.sampled_from([1.0, 1.0, 0.01, 0.35, 0.9]),
    min_p=st.sampled_from([0.0, 0.0, 0.03, 0.4, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 0.7, 1.9]),
    presence_penalty=st.sampled_from([0.0, 0.0, -1.1, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.0, -0.6, 0.9]),
    logit_bias=st.none() | st.dictionaries(token_ids, st.sampled_from([-100.0, -1.5, 2.5, 100.0]), max_size=4),
    allowed_token_ids=st.none() | st.lists(token_ids, min_size=1, max_size=6),
    stop_token_ids=st.lists(st.integers(4, 8), max_size=2),
    min_tokens=st.sampled_from([0, 0, 1, 4]),
    ignore_eos=st.booleans(),
)
all_sequences = st.builds(
    Row,
    params=all_params,
    prompt=st.lists(token_ids, min_size=1, max_size=6),
    output=st.lists(st.integers(0, 5), max_size=5),
    seed=st.integers(-(2**63), 2**63 - 1),
    bad_words=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3), max_size=4),
)


@settings(derandomize=True, deadline=None, max_examples=250)
@given(sequences=st.lists(all_sequences, min_size=1, max_size=5), seed=st.integers(0, 2**20), data=st.data())
def test_against_naive_rows(sequences: list[Row], seed: int, data: st.DataObject) -> None:
    """Some requests start with earlier output, as after preemption; rows come in any order, not all in each step."""
    bench = Bench()
    for other in data.draw(st.lists(all_sequences, max_size=2)):
        bench.remove(bench.add(other))  # leaves its parameters behind
    slots = [bench.add(sequence) for sequence in sequences]
    for step in range(3):
        rows = data.draw(st.permutations(range(len(sequences))))[: data.draw(st.integers(1, len(sequences)))]
        # Distinct enough that float32 decides as float64 does.
        logits = random_logits(len(rows), seed + step)
        expected = [naive_token(logits[i].tolist(), sequences[row]) for i, row in enumerate(rows)]
        found = bench.sample(logits, [slots[row] for row in rows], [sequences[row] for row in rows])
        assert found == expected


def test_every_parameter_alone() -> None:
    """Parameters one at a time, over many draws."""
    cases: list[dict[str, Any]] = [
        {"temperature": 0.5},
        {"temperature": 3},
        {"top_k": 1},
        {"top_k": 3},
        {"top_p": 0.5},
        {"top_p": 1e-6},
        {"min_p": 0.2},
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 0.5},
        {"presence_penalty": 2},
        {"frequency_penalty": 2},
        {"frequency_penalty": -2},
        {"logit_bias": {4: 5, 5: -100}},
        {"allowed_token_ids": [1, 5]},
        {"min_tokens": 6},
        {"min_tokens": 6, "stop_token_ids": [1, 2]},
        {"min_tokens": 6, "stop_token_ids": [1, 2], "ignore_eos": True},
        {"bad_words": [[1], [2, 2], [1, 2, 4]]},
    ]
    for number, case in enumerate(cases):
        for temperature in (0.0, 1.0):
            words = case.get("bad_words", [])
            params = SamplingParams(**{"temperature": temperature} | {k: case[k] for k in case.keys() - {"bad_words"}})
            sequence = Row(params, [1, 2, 2, 8], [2, 2], seed=number, bad_words=words)
            bench = Bench()
            slot = bench.add(sequence)
            for draw in range(12):
                logits = random_logits(1, 100 * number + draw, scale=1.0)
                logits[0, [2, 4, EOS]] += 1.5
                expected = naive_token(logits[0].tolist(), sequence)
                assert bench.sample(logits, [slot], [sequence]) == [expected], (case, draw)


def test_top_k_and_top_p_keep_the_smallest_set() -> None:
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    for k, p, kept in [
        (4, 0.4, {1}),
        (4, 0.41, {1, 3}),
        (4, 1.0, {0, 1, 2, 3}),
        (2, 1.0, {1, 3}),
        (3, 0.5, {1, 3}),
    ]:
        found = keep_top(logits, torch.tensor([[k]]), torch.tensor([[p]]))
        assert set(torch.isfinite(found[0]).nonzero().flatten().tolist()) == kept
        assert torch.equal(found[torch.isfinite(found)], logits[torch.isfinite(found)])


def test_ties_go_to_the_lower_id() -> None:
    found = keep_top(torch.zeros(1, 5), torch.tensor([[2]]), torch.tensor([[1.0]]))
    assert torch.isfinite(found[0]).tolist() == [True, True, False, False, False]
    assert once(torch.zeros(1, VOCAB), Row(SamplingParams(temperature=0), [1])) == [0]


def test_greedy_rows_are_not_touched_by_random_ones() -> None:
    logits = random_logits(6, 1)
    kinds = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=2, top_k=3),
        SamplingParams(temperature=0, top_k=3, top_p=0.1, min_p=0.9, seed=1),
        SamplingParams(temperature=1, repetition_penalty=2),
        SamplingParams(temperature=0),
        SamplingParams(temperature=1, logit_bias={1: 50}, min_p=0.5),
    ]
    tokens = once(logits, *(Row(params, [1, 2], seed=i) for i, params in enumerate(kinds)))
    assert [tokens[row] for row in (0, 2, 4)] == [int(logits[row].argmax()) for row in (0, 2, 4)]


@settings(derandomize=True, deadline=None, max_examples=40)
@given(sequence=all_sequences, others=st.lists(all_sequences, max_size=6), data=st.data())
def test_token_does_not_depend_on_the_batch(sequence: Row, others: list[Row], data: st.DataObject) -> None:
    row = random_logits(1, 5)
    alone = Bench()
    expected = alone.sample(row, [alone.add(sequence)], [sequence])
    sequence.output.pop()
    place = data.draw(st.integers(0, len(others)))
    sequences = [*others[:place], sequence, *others[place:]]
    logits = random_logits(len(sequences), 6)
    logits[place] = row
    assert once(logits, *sequences)[place] == expected[0]


def test_seeds_and_positions_give_other_tokens() -> None:
    def draw(seed: int, length: int) -> int:
        sequence = Row(SamplingParams(), [1] * length, seed=seed)
        return once(torch.zeros(1, VOCAB), sequence)[0]

    assert draw(7, 3) == draw(7, 3)
    assert len({draw(seed, 3) for seed in range(40)}) > 15
    assert len({draw(7, length) for length in range(1, 41)}) > 15


@pytest.mark.parametrize("params", [{}, {"temperature": 2.0}, {"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.1}])
def test_distribution(params: dict[str, Any]) -> None:
    """Chi-square over seeds; the fixed seeds make it one number."""
    draws, count = 20, 1000
    logits = random_logits(1, 3, scale=1.0)
    sampling = SamplingParams(**params)
    scores = naive_filter(logits[0].tolist(), sampling)
    weights = [math.exp(score) for score in scores]
    expected = [draws * count * weight / sum(weights) for weight in weights]
    bench = Bench(count)
    sequences = [Row(sampling, [1], seed=row - count // 2) for row in range(count)]
    slots = [bench.add(sequence) for sequence in sequences]
    found = [0] * VOCAB
    for _ in range(draws):
        for token in bench.sample(logits.expand(count, -1), slots, sequences):
            found[token] += 1
    assert all(number == 0 for number, mean in zip(found, expected, strict=True) if mean == 0)
    degrees = sum(mean > 0 for mean in expected) - 1
    chi = sum((number - mean) ** 2 / mean for number, mean in zip(found, expected, strict=True) if mean > 0)
    assert chi < degrees + 4.5 * math.sqrt(2 * degrees)


def test_bad_word_does_not_begin_in_the_prompt() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 5] = 1
    params = SamplingParams(temperature=0)
    both = [[7, 5], [8, 7, 5]]
    assert once(logits, Row(params, [8, 7], bad_words=both)) == [5]
    assert once(logits, Row(params, [8], [7], bad_words=both)) == [0]
    only_long = [[8, 7, 5]]
    assert once(logits, Row(params, [8], [7], bad_words=only_long)) == [5]
    assert once(logits, Row(params, [1], [8, 7], bad_words=only_long)) == [0]


def test_logprobs_and_ranks() -> None:
    logits = random_logits(5, 9)
    taken = torch.tensor([0, 3, 5, int(logits[3].argmax()), int(logits[4].argmin())])
    found = gather_logprobs(logits, taken, 4)
    for row in range(5):
        values = logits[row].double()
        reference = values - values.exp().sum().log()
        token = int(taken[row])
        assert found.taken[row] == pytest.approx(float(reference[token]), abs=1e-5)
        assert found.rank[row] == 1 + sum(float(x) > float(values[token]) for x in values)
        order = sorted(range(VOCAB), key=lambda t: -float(values[t]))
        assert found.top_ids[row].tolist() == order[:4]
        assert found.top_values[row].tolist() == pytest.approx([float(reference[t]) for t in order[:4]], abs=1e-5)
    assert found.rank[3:].tolist() == [1, VOCAB]
    assert gather_logprobs(logits, taken, 0).top_ids.shape == (5, 0)


def test_logprobs_wanted() -> None:
    bench = Bench()
    slots = [bench.add(Row(SamplingParams(logprobs=wanted), [1])) for wanted in (None, 0, 7)]
    indices = np.array([slot.index for slot in slots], np.int64)
    assert bench.sampler.logprobs_wanted(indices).tolist() == [-1, 0, 7]


words = st.integers(-(2**63), 2**63 - 1)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(values=st.lists(words, min_size=1, max_size=8))
def test_mixing_is_splitmix64(values: list[int]) -> None:
    expected = [splitmix(value & MASK) for value in values]
    host = random_noise._mix_host(np.array(values, np.int64).astype(np.uint64))
    assert host.tolist() == expected
    device = random_noise._mix_device(torch.tensor(values))
    assert [value & MASK for value in device.tolist()] == expected


@settings(derandomize=True, deadline=None, max_examples=100)
@given(seed=words, position=st.integers(0, 2**31))
def test_noise_is_that_of_big_integers(seed: int, position: int) -> None:
    keys = noise_keys(np.array([seed, 5]), np.array([position, 1]))
    noise = gumbel_noise(torch.from_numpy(keys), 5)
    assert noise.dtype == torch.float32
    for row, (s, p) in enumerate(((seed, position), (5, 1))):
        expected = [naive_noise(s, p, column) for column in range(5)]
        assert noise[row].tolist() == pytest.approx(expected, abs=1e-4, rel=2e-2)


@pytest.mark.parametrize("bits", [0, -1, 2**63 - 1, -(2**63)])
def test_noise_is_finite_for_all_bits(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    """Infinite noise would let any token win, even a forbidden one."""
    monkeypatch.setattr(random_noise, "_mix_device", lambda x: torch.full_like(x, bits))
    noise = gumbel_noise(torch.zeros(1, dtype=torch.int64), 4)
    assert torch.isfinite(noise).all()
    assert noise.abs().max() < 20


def test_noise_has_the_moments_of_gumbel() -> None:
    keys = noise_keys(np.arange(50), np.arange(50))
    noise = gumbel_noise(torch.from_numpy(keys), 4000).double()
    assert float(noise.mean()) == pytest.approx(0.57722, abs=0.01)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.03)
    assert abs(float(torch.corrcoef(noise[:2])[0, 1])) < 0.06


def test_forbidden_tokens_never_come() -> None:
    sequences = [Row(SamplingParams(temperature=100, allowed_token_ids=[2, 5]), [1], seed=i) for i in range(8)]
    bench = Bench()
    slots = [bench.add(sequence) for sequence in sequences]
    for step in range(40):
        assert set(bench.sample(random_logits(8, step), slots, sequences)) <= {2, 5}


def test_a_bad_word_longer_than_the_sequence() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 5] = 1
    assert once(logits, Row(SamplingParams(temperature=0), [8], bad_words=[[5], [1] * 40 + [5]])) == [0]


def test_equal_logprobs_stand_in_the_order_of_ids() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [4, 9, 7]] = 2
    taken = logits.argmax(-1)
    assert gather_logprobs(logits, taken, 4).top_ids.tolist() == [[4, 7, 9, 0]]
