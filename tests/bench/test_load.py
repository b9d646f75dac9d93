"""The same arguments give the same requests."""

import pytest

from bench.load import Load, image_size, messages, pictures


def test_seeded() -> None:
    load = Load(image=(64, 48), images=2, prompt_words=5, seed=3)
    assert messages(load, 1, 7) == messages(load, 1, 7)
    different = [messages(load, 1, 8), messages(load, 2, 7), messages(Load(load.image, 2, False, 5, 4), 1, 7)]
    assert all(other != messages(load, 1, 7) for other in different)
    content = messages(load, 1, 7)[0]["content"]
    assert [part["type"] for part in content] == ["image_url", "image_url", "text"]
    assert content[0] != content[1] and len(content[2]["text"].split()) == 5


def test_one_picture_for_all() -> None:
    load = Load(image=(32, 32), same_image=True)
    one, other = (messages(load, part, index)[0]["content"] for part, index in ((1, 0), (2, 9)))
    assert one[0] == other[0] and one[1] != other[1]
    assert pictures(load, 1, 0)[0].size == (32, 32)


def test_text_only() -> None:
    assert pictures(Load(image=None), 1, 0) == []
    assert [part["type"] for part in messages(Load(image=None), 1, 0)[0]["content"]] == ["text"]


def test_image_size() -> None:
    assert image_size("640x480") == (640, 480) and image_size("none") is None
    for bad in ("640", "0x5", "ax5", "1x2x3", ""):
        with pytest.raises(ValueError):  # noqa: PT011 (argparse makes its own message)
            image_size(bad)
