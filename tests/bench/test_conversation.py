"""The bodies of a conversation's requests."""

import json

from bench.conversation import conversations, follow_up
from bench.load import Load, message

LOAD = Load(sizes=((16, 16), None), prompt_words=3, seed=4)


def test_each_request_holds_what_was_said_before() -> None:
    for index, talk in enumerate(conversations({"model": "m"}, LOAD, 2, count=6, turns=3)):
        said = [message(LOAD, 2, index)]
        body = talk.first
        assert talk.turns == 3 and json.loads(body) == {"model": "m", "messages": said}
        for turn, answer in ((1, 'a "quoted"\n]} answer'), (2, "ü")):
            body = follow_up(body, answer, talk.questions[turn - 1])
            said += [{"role": "assistant", "content": answer}, message(LOAD, 2, index, turn)]
            assert json.loads(body) == {"model": "m", "messages": said}


def test_one_turn() -> None:
    (talk,) = conversations({"model": "m"}, LOAD, 2, count=1, turns=1)
    assert talk.turns == 1 and talk.questions == ()
