"""The tokenizer of the random checkpoints: Llama's kind, trained on a page of text."""

from tokenizers import Tokenizer

from demo.tokenizer import BOS_ID, EOS_ID, special_ids, train_tokenizer

BASE_VOCAB = 700
SPECIAL_IDS = special_ids(BASE_VOCAB)
IMAGE_ID, PAD_ID = BASE_VOCAB, BASE_VOCAB + 1
TOKENIZER_SIZE = BASE_VOCAB + 2

__all__ = ["BASE_VOCAB", "BOS_ID", "EOS_ID", "IMAGE_ID", "PAD_ID", "TOKENIZER_SIZE", "build_tokenizer"]

# What the tokenizer is trained on. Changing it changes every token id.
CORPUS = """\
USER: What is the content of this image? ASSISTANT: The image shows a small red house beside a quiet river.
USER: Describe the picture in one sentence. ASSISTANT: A woman with a yellow umbrella is walking across the street.
USER: How many people are there? ASSISTANT: There are three people: two children and an older man in a blue coat.
USER: What colour is the flower? ASSISTANT: The flower is white, with a bright yellow centre and dark green leaves.
USER: Is it day or night? ASSISTANT: It is evening, because the lamps are on and the sky behind the temple is orange.
USER: Where was this photo taken? ASSISTANT: It was probably taken in a garden in front of an old wooden palace.
USER: What is in the background? ASSISTANT: In the background there are mountains, a few clouds and a line of trees.
USER: Hello! Who are you? ASSISTANT: I am an assistant that looks at pictures and answers questions about them.
USER: Please write a short story about the sea. ASSISTANT: Once upon a time a little boat went out to find the wind.
USER: What could be dangerous here? ASSISTANT: The road looks wet, so a bicycle could slip near the corner.
The capital of France is Paris, and the largest city of China is Shanghai. Water boils at one hundred degrees.
A square is on the left of the circle, and a triangle is above both of them. The large shape is purple; the other is grey.
The first train leaves at 7:45, the second at 9:30, and the last one at 23:10. A ticket costs 12 dollars, or 6 for a child.
Some dogs are sleeping under the table while the cat sits on the chair and watches a bird outside the window.
Several plates of food have been placed on the kitchen counter: bread, cheese, apples, oranges and a bowl of soup.
This work is free: you may copy it, change it and share it with others, provided that this notice is kept with it.
If the server is not running, start it again and send the same request. The result should always be the same.
Every number from zero to ten: zero, one, two, three, four, five, six, seven, eight, nine, ten. Count them again.
Everything that happens in the morning happens before noon; something that nobody sees may still make a sound.
They would rather have gone with their brother, but he thought that he should wait until the rain had stopped.
"""


def build_tokenizer() -> Tokenizer:
    """A tokenizer over `CORPUS`, with `<image>` and `<pad>` as its last tokens."""
    return train_tokenizer(CORPUS.splitlines(), BASE_VOCAB)
