"""Small tokenizers with the structures that are in use, trained on a few lines."""

from __future__ import annotations

import io
from collections.abc import Callable

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

LINES = [
    "in the beginning god created the heaven and the earth . and the earth was without form , and void",
    "the end of the beginning of the end: it's the KING's beginning, isn't it? I'll say they've 1234 5678 things",
    "\u0432 \u043d\u0430\u0447\u0430\u043b\u0435 \u0431\u044b\u043b\u043e \u0441\u043b\u043e\u0432\u043e "
    "\u0438 \u0441\u043b\u043e\u0432\u043e \u0431\u044b\u043b\u043e",
    "\u8d77\u521d\u3001\u795e\u521b\u9020\u5929\u5730\u3002\u5730\u662f\u7a7a\u865a\u6df7\u6c8c\u3002 "
    "\uac00\ub098 \ub2e4\ub77c \u65e5\u672c\u8a9e \u304b\u306a",
    "caf\u00e9 na\u00efve e\u0301 \ufb01n \u2167 ``quoted'' a_b-c  two   three\t\n\nnew\r\nline",
]
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"


def split(pattern: str, behavior: str = "isolated", *, invert: bool = False) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), behavior, invert=invert)


def byte_level(
    *before: pre_tokenizers.PreTokenizer, normalizer: normalizers.Normalizer | None = None, **options: bool
) -> Tokenizer:
    """A BPE of bytes: with GPT-2's own pattern, or with what stands before it."""
    tokenizer = Tokenizer(models.BPE())
    settings = {"add_prefix_space": False, "use_regex": not before} | options
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, pre_tokenizers.ByteLevel(**settings)])
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


def with_added_tokens(tokenizer: Tokenizer, *tokens: AddedToken) -> Tokenizer:
    tokenizer.add_tokens(list(tokens))
    return tokenizer


def word_piece(pre_tokenizer: pre_tokenizers.PreTokenizer, normalizer: normalizers.Normalizer) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return tokenizer


def unigram(pre_tokenizer: pre_tokenizers.PreTokenizer, *parts: normalizers.Normalizer) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizer
    if parts:
        tokenizer.normalizer = normalizers.Sequence(list(parts))
    trainer = trainers.UnigramTrainer(
        vocab_size=200, unk_token="<unk>", special_tokens=["<unk>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def characters_bpe(
    *,
    byte_fallback: bool = True,
    drop: str = "",
    pre_tokenizer: pre_tokenizers.PreTokenizer | None = None,
    normalizer: normalizers.Normalizer | None = None,
    **options: object,
) -> Tokenizer:
    """A BPE whose words are whole texts, trained on words; without the characters of `drop`."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    vocabulary = [token for token in trained.get_vocab() if not set(token) & set(drop)]
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256 if byte_fallback else 0))]
    ids = {token: index for index, token in enumerate([*specials, *sorted(vocabulary, key=trained.token_to_id)])}
    pairs = [
        (ids[token], (token[:cut], token[cut:]))
        for token in vocabulary
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    model = models.BPE(
        ids, [pair for _, pair in sorted(pairs)], unk_token="<unk>", byte_fallback=byte_fallback, **options
    )
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    return tokenizer


def charsmap() -> bytes:
    """sentencepiece's own table of `nmt_nfkc`: field 2 of field 3 of a trained model's protocol buffer."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e"] * 5),
        model_writer=model,
        vocab_size=12,
        model_type="bpe",
        minloglevel=2,
        normalization_rule_name="nmt_nfkc",
        hard_vocab_limit=False,
    )
    return _fields(_fields(model.getvalue())[3])[2]


def _fields(message: bytes) -> dict[int, bytes]:
    """The last value of each field that has a length, by its number."""
    found, position = {}, 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(message):
        key = varint()
        if key & 7 == 2:
            size = varint()
            found[key >> 3] = message[position : position + size]
            position += size
        elif key & 7 == 0:
            varint()
        else:
            position += 4 if key & 7 == 5 else 8
    return found


META = normalizers.Replace(" ", "\u2581")
PREPEND = normalizers.Prepend("\u2581")


def metaspace(scheme: str, *, split: bool = True) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)


def spaces() -> normalizers.Normalizer:
    return normalizers.Replace(Regex(" {2,}"), "\u2581")


SPLIT_SAFELY: dict[str, Callable[[], Tokenizer]] = {
    "GPT-2": byte_level,
    "GPT-2 with a prefix": lambda: byte_level(add_prefix_space=True),
    "GPT-2 as a pattern": lambda: byte_level(split(GPT2, "removed", invert=True)),
    "Llama 3": lambda: byte_level(split(LLAMA3)),
    "Qwen 2": lambda: byte_level(split(LLAMA3.replace("{1,3}", "")), normalizer=normalizers.NFC()),
    "GPT-4o": lambda: byte_level(split(O200K)),
    "Tekken": lambda: byte_level(split(O200K.replace(CONTRACTIONS + "?", "").replace("{1,3}", ""))),
    "SmolLM": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True), split(GPT2), add_prefix_space=True),
    "DeepSeek": lambda: byte_level(split(r"\p{N}{1,3}"), split(CJK), split(DEEPSEEK)),
    "StarCoder": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True), use_regex=True),
    "Digits, then a prefix": lambda: byte_level(pre_tokenizers.Digits(), use_regex=True, add_prefix_space=True),
    "Falcon": lambda: byte_level(pre_tokenizers.Punctuation("contiguous"), use_regex=True),
    "punctuation of the word before": lambda: byte_level(
        pre_tokenizers.Punctuation("merged_with_previous"), use_regex=True
    ),
    "NFD, lower case": lambda: byte_level(
        normalizer=normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase(), normalizers.StripAccents()])
    ),
    "NFKC, stripped": lambda: byte_level(
        normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()]), add_prefix_space=True
    ),
    "spaces alone": lambda: byte_level(pre_tokenizers.Split(" ", "merged_with_next"), use_regex=False),
    "GPT-NeoX": lambda: with_added_tokens(
        byte_level(normalizer=normalizers.NFC()), *(AddedToken(" " * count, normalized=True) for count in (2, 3, 4))
    ),
    "added tokens": lambda: with_added_tokens(
        byte_level(add_prefix_space=True),
        AddedToken("<tok>", lstrip=True, rstrip=True, normalized=False),
        AddedToken("beginning", single_word=True, normalized=False),
        AddedToken("king", normalized=True),
        AddedToken("end", lstrip=True, normalized=False),
        AddedToken("\n\n", rstrip=True, normalized=False),
    ),
    "BERT": lambda: word_piece(pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer()),
    "BERT, cased": lambda: word_piece(
        pre_tokenizers.WhitespaceSplit(), normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    ),
    "WordPiece of words": lambda: word_piece(pre_tokenizers.Whitespace(), normalizers.NFKD()),
    "unigram": lambda: unigram(metaspace("always")),
    "unigram, first": lambda: unigram(metaspace("first")),
    "unigram, never": lambda: unigram(metaspace("never")),
    "T5": lambda: unigram(
        metaspace("always"), normalizers.Precompiled(charsmap()), normalizers.Strip(left=False), spaces()
    ),
    "XLM-R": lambda: unigram(
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace("always")]),
        normalizers.Precompiled(charsmap()),
    ),
    "words, then first": lambda: unigram(
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace("first")])
    ),
    "ALBERT": lambda: unigram(
        metaspace("always"),
        normalizers.Replace("``", '"'),
        normalizers.Replace("''", '"'),
        normalizers.NFKD(),
        normalizers.StripAccents(),
        normalizers.Lowercase(),
        normalizers.Precompiled(charsmap()),
        normalizers.Replace(Regex(" {2,}"), " "),
    ),
    "unigram, added tokens": lambda: with_added_tokens(
        unigram(metaspace("always")), AddedToken("<tok>", normalized=False), AddedToken("king", normalized=True)
    ),
    "unigram, stripped": lambda: unigram(metaspace("always"), normalizers.Strip(), META, PREPEND),
    "Llama 2": lambda: characters_bpe(fuse_unk=True, normalizer=normalizers.Sequence([PREPEND, META])),
    "Llama 2, later": lambda: characters_bpe(fuse_unk=True, pre_tokenizer=metaspace("first", split=False)),
    "Mistral": lambda: characters_bpe(pre_tokenizer=metaspace("always", split=False)),
    "Gemma": lambda: characters_bpe(
        normalizer=META, pre_tokenizer=pre_tokenizers.Split(" ", "merged_with_previous"), fuse_unk=True
    ),
    "unknown characters": lambda: characters_bpe(
        byte_fallback=False, drop="etn\u5730\u0431", fuse_unk=True, normalizer=normalizers.Sequence([PREPEND, META])
    ),
    "unknown characters apart": lambda: characters_bpe(
        byte_fallback=False, drop="etn\u5730\u0431", normalizer=normalizers.Sequence([PREPEND, META])
    ),
}
"""Of these safe borders are known."""

ENCODED_WHOLE: dict[str, Callable[[], Tokenizer]] = {
    "another pattern": lambda: byte_level(split(r"\w+ \w+|.")),
    "a pattern with more": lambda: byte_level(split(LLAMA3 + r"|\p{L}+ (?=the)")),
    "words with the space behind": lambda: byte_level(pre_tokenizers.Split(" ", "merged_with_previous")),
    "a token over words": lambda: with_added_tokens(byte_level(), AddedToken("beginning of")),
    "a token that takes spaces": lambda: with_added_tokens(byte_level(), AddedToken("end", rstrip=True)),
    "a word that looks back": lambda: with_added_tokens(byte_level(), AddedToken(" end", single_word=True)),
    "a token that a normalizer lengthens": lambda: with_added_tokens(
        byte_level(normalizer=normalizers.Replace("~", "g o")), AddedToken("~", normalized=True)
    ),
    "no space is left": lambda: byte_level(normalizer=normalizers.Replace(" ", "")),
    "nothing at every place": lambda: byte_level(normalizer=normalizers.Replace("", "~")),
    "letters rewritten": lambda: byte_level(normalizer=normalizers.Replace("d", "d ")),
    "a prefix with tokens": lambda: with_added_tokens(
        unigram(metaspace("always"), normalizers.Prepend("x")), AddedToken("<tok>")
    ),
    "unigram without words": lambda: unigram(metaspace("always", split=False)),
    "texts in the vocabulary": lambda: characters_bpe(ignore_merges=True, normalizer=META),
    "BPE that draws lots": lambda: characters_bpe(dropout=0.1, normalizer=META),
    "BPE of normal forms": lambda: characters_bpe(normalizer=normalizers.NFKC()),
    "words after BERT's spaces": lambda: word_piece(
        pre_tokenizers.WhitespaceSplit(), normalizers.Sequence([normalizers.BertNormalizer(), META])
    ),
    "Chinese with spaces around": lambda: byte_level(normalizer=normalizers.BertNormalizer()),
}
"""Of these none is known."""
