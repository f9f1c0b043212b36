"""Tiny tokenizers of the kinds that encoders have, trained on a few sentences."""

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from unembed.tokenizer import TextTokenizer

WORDS = (
    "the nurse reads a letter thus file is closed both of them went home it was good day "
    "internationalisation committees unanimously recommended postponing electrification "
    "programmes don't 2023 3.50 e-mail naïve Straße 東京 です"
).split()
_LINES = [" ".join(WORDS), " ".join(word.capitalize() + "." for word in WORDS)] * 20
_ALPHABET = pre_tokenizers.ByteLevel.alphabet()


def word_piece():
    """BERT's: words apart before, spaces in no token."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return _trained(
        backend, trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"], **_QUIET)
    )


def byte_level():
    """GPT-2's: the space belongs to the word behind it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _byte_level(backend)


def single_digits():
    """Qwen3's: byte-level too, and each digit is a word to it."""
    backend = Tokenizer(models.BPE())
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return _byte_level(backend)


def trimmed_offsets():
    """RoBERTa's: byte-level, its offsets leave the spaces out."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return _byte_level(backend)


def metaspace():
    """BPE of SentencePiece."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return _trained(
        backend, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], **_QUIET)
    )


def unigram():
    """XLM-R's."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>"], unk_token="<unk>", **_QUIET
    )
    return _trained(backend, trainer)


def one_word():
    """Gemma 3's: a whole text is one word, and bytes stand for what has no token."""
    spaces = [word for line in _LINES for word in line.replace(" ", " \u2581").split()]
    teacher = Tokenizer(models.BPE())
    teacher.train_from_iterator(spaces, trainers.BpeTrainer(vocab_size=300, **_QUIET))
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    for name in sorted({*teacher.get_vocab(), "\u2581"}):
        vocabulary.setdefault(name, len(vocabulary))
    merges = [
        (name[:cut], name[cut:])
        for name in sorted(vocabulary, key=lambda name: (len(name), name))
        for cut in range(1, len(name))
        if name[:cut] in vocabulary and name[cut:] in vocabulary
    ]
    backend = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return TextTokenizer.from_backend(backend, None, None, None)


_QUIET = {"show_progress": False}
KINDS = {
    make.__name__: make
    for make in (
        word_piece,
        byte_level,
        single_digits,
        trimmed_offsets,
        metaspace,
        unigram,
        one_word,
    )
}


def _byte_level(backend):
    backend.decoder = decoders.ByteLevel()
    return _trained(
        backend, trainers.BpeTrainer(vocab_size=500, initial_alphabet=_ALPHABET, **_QUIET)
    )


def _trained(backend, trainer):
    backend.train_from_iterator(_LINES, trainer)
    return TextTokenizer.from_backend(backend, None, None, None)
