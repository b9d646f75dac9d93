"""Llama-style byte-fallback BPE tokenizers, trained here."""

import json
import string
from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

UNK, BOS, EOS, IMAGE, PAD = "<unk>", "<s>", "</s>", "<image>", "<pad>"
BYTE_TOKENS = [f"<0x{value:02X}>" for value in range(256)]
BOS_ID, EOS_ID = 1, 2


def special_ids(base: int) -> dict[str, int]:
    """Ids of the special tokens, two of which follow `base` ordinary ones."""
    return {UNK: 0, BOS: BOS_ID, EOS: EOS_ID, IMAGE: base, PAD: base + 1}


def train_tokenizer(texts: Iterable[str], base: int, phrases: Iterable[str] = ()) -> Tokenizer:
    """A tokenizer of `base` tokens, then `<image>`, `<pad>`, and the `phrases`, each of which is one token.

    Raises:
        ValueError: the texts do not give that many tokens.
    """
    trained = Tokenizer(models.BPE(byte_fallback=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    trainer = trainers.BpeTrainer(
        vocab_size=base,
        special_tokens=[UNK, BOS, EOS, *BYTE_TOKENS],
        initial_alphabet=list(string.ascii_letters + string.digits + string.punctuation),
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    model = json.loads(trained.to_str())["model"]
    if len(model["vocab"]) != base:
        raise ValueError(f"the texts give {len(model['vocab'])} tokens, not {base}")
    merges = [(left, right) for left, right in model["merges"]]

    # From here on the same parts as transformers' LlamaTokenizer, which rebuilds them from vocabulary and merges.
    tokenizer = Tokenizer(
        models.BPE(model["vocab"], merges, unk_token=UNK, fuse_unk=True, byte_fallback=True, dropout=None)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, BOS_ID)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special_ids(base)])
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    return tokenizer
