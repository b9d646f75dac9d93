"""The same arguments give the same requests."""

from bench.load import Load, message, pictures, size_name, size_of


def test_seeded() -> None:
    load = Load(sizes=((64, 48),), images=2, prompt_words=5, seed=3)
    assert message(load, 1, 7) == message(load, 1, 7)
    different = [message(load, 1, 8), message(load, 2, 7), message(Load(load.sizes, 2, False, 5, 4), 1, 7)]
    assert all(other != message(load, 1, 7) for other in different)
    content = message(load, 1, 7)["content"]
    assert [part["type"] for part in content] == ["image_url", "image_url", "text"]
    assert content[0] != content[1] and len(content[2]["text"].split()) == 5


def test_one_picture_for_all() -> None:
    load = Load(sizes=((32, 32),), same_image=True)
    one, other = (message(load, part, index)["content"] for part, index in ((1, 0), (2, 9)))
    assert one[0] == other[0] and one[1] != other[1]
    assert pictures(load, 1, 0)[0].size == (32, 32)


def test_one_picture_of_each_size() -> None:
    load = Load(sizes=((32, 32), (16, 16)), same_image=True)
    shown = [message(load, 1, index)["content"][0]["image_url"]["url"] for index in range(12)]
    assert len(set(shown)) == 2


def test_text_only() -> None:
    load = Load(sizes=(None,))
    assert pictures(load, 1, 0) == []
    assert [part["type"] for part in message(load, 1, 0)["content"]] == ["text"]


def test_sizes_are_drawn_alike_in_all_parts() -> None:
    load = Load(sizes=((64, 48), None, (64, 48), (16, 32)), seed=1)
    drawn = [size_of(load, index) for index in range(400)]
    for size, share in (((64, 48), 0.5), (None, 0.25), ((16, 32), 0.25)):
        assert abs(drawn.count(size) / 400 - share) < 0.08
    for index in range(20):
        found = {part: [image.size for image in pictures(load, part, index)] for part in (1, 2)}
        assert found[1] == found[2] == ([] if drawn[index] is None else [drawn[index]])
    assert [size_of(Load(load.sizes, seed=2), index) for index in range(400)] != drawn


def test_later_turns_ask_something_else() -> None:
    load = Load(sizes=((16, 16),), prompt_words=5)
    first, second, third = (message(load, 1, 0, turn)["content"] for turn in range(3))
    assert first[-1] != second[-1] != third[-1] != first[-1]
    assert [len(turn) for turn in (first, second, third)] == [2, 1, 1]


def test_names() -> None:
    assert [size_name(size) for size in ((640, 480), None)] == ["640x480", "none"]
