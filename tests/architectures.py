"""Tiny encoders of the real ones' architectures, built on the spot with random weights.

The tokenizers are trained on a handful of multilingual sentences, in the three ways the real ones
are made: byte-level BPE (Qwen3), Unigram (XLM-R), BPE with byte fallback (Gemma).
"""

import json

import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

SENTENCES = {
    "en": "The patient was admitted on Monday with chest pain. The court heard her on Friday! "
    "Nobody knows why the river runs so slowly through the old city.",
    "de": "Der Fluß fließt langsam durch die alte Stadt. Die Bank überwies 1.250,75 € an Frau "
    "Müller, aber niemand wusste warum.",
    "fr": "L'été dernier, le médecin a vu l'enfant à l'hôpital. Où est la clé de la maison ?",
    "es": "¿Dónde está la llave de la casa? El niño corre por la calle mientras llueve.",
    "ru": "Пациент поступил в понедельник с болью в груди. Суд выслушал её в пятницу.",
    "zh": "病人星期一因胸痛入院。法院星期五听取了她的陈述！河水缓缓流过古老的城市。",
    "ja": "患者は月曜日に胸の痛みで入院した。裁判所は金曜日に彼女の話を聞いた。",
    "ko": "환자는 월요일에 가슴 통증으로 입원했다. 법원은 금요일에 그녀의 말을 들었다.",
    "ar": "أُدخل المريض يوم الاثنين بسبب ألم في الصدر. استمعت إليها المحكمة يوم الجمعة.",
    "hi": "मरीज़ को सोमवार को सीने में दर्द के साथ भर्ती किया गया। अदालत ने शुक्रवार को उसे सुना।",
    "pt": "O médico viu a criança no hospital. Ninguém sabe por que o rio corre tão devagar.",
    "emoji": "Nice 😀 work 👩‍👩‍👧 today 🇩🇪! Café or cafe\u0301?",
}
TEXTS = list(SENTENCES.values())


def qwen_tokenizer():
    """Byte-level BPE; pads on the left with the token that ends a text; no mask token."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 2, trainer)
    end = backend.token_to_id("<|endoftext|>")
    backend.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", end)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        model_max_length=64,
    )


def xlmr_tokenizer():
    """Unigram behind a metaspace, NFKC; a mask token, and an unknown one for rare characters."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC()])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=600, special_tokens=specials, unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(TEXTS * 2, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[(name, backend.token_to_id(name)) for name in ("<s>", "</s>")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        cls_token="<s>",
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token="<mask>",
        model_max_length=64,
    )


def gemma_tokenizer():
    """BPE over text with ▁ for spaces and bytes for what it lacks; a mask token, unused."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[*specials, *(f"<0x{byte:02X}>" for byte in range(256))],
        limit_alphabet=200,
        show_progress=False,
    )
    backend.train_from_iterator([text.replace(" ", "▁ ") for text in TEXTS * 2], trainer)
    # The trainer makes every extra token special; the real tokenizer's bytes are plain ones
    definition = json.loads(backend.to_str())
    definition["added_tokens"] = [t for t in definition["added_tokens"] if t["content"] in specials]
    backend = Tokenizer.from_str(json.dumps(definition))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>",
        special_tokens=[(name, backend.token_to_id(name)) for name in ("<bos>", "<eos>")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token="<mask>",
        model_max_length=64,
    )


TOKENIZERS = {"qwen3": qwen_tokenizer, "xlm-r": xlmr_tokenizer, "gemma3": gemma_tokenizer}


def _network(name, tokenizer):
    import transformers

    sizes = {
        "vocab_size": len(tokenizer) + 7,  # tables are larger than vocabularies, as the real ones
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    wide = {"num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 128}
    if name == "qwen3":
        return transformers.Qwen3Model(transformers.Qwen3Config(**sizes, **wide))
    if name == "gemma3":
        config = transformers.Gemma3TextConfig(**sizes, **wide, use_bidirectional_attention=True)
        return transformers.Gemma3TextModel(config)
    config = transformers.XLMRobertaConfig(**sizes, max_position_embeddings=130, type_vocab_size=1)
    return transformers.XLMRobertaModel(config)


def build(name, folder):
    """Save a tiny encoder as a sentence-transformers folder; returns its path.

    qwen3: last token, a prompt for queries only. xlm-r: mean. gemma3: mean, two dense layers, a
    prompt for documents.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import (
        Dense,
        Normalize,
        Pooling,
        Transformer,
    )

    tokenizer = TOKENIZERS[name]()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = _network(name, tokenizer)
        _enlarge(network)
        network.save_pretrained(folder / "network")
        tokenizer.save_pretrained(folder / "network")
        transformer = Transformer(str(folder / "network"), max_seq_length=48)
        mode = "lasttoken" if name == "qwen3" else "mean"
        modules = [transformer, Pooling(32, pooling_mode=mode)]
        if name == "gemma3":
            plain = {"bias": False, "activation_function": torch.nn.Identity()}
            modules += [Dense(32, 48, **plain), Dense(48, 32, **plain)]
        modules.append(Normalize())
    prompts = {
        "qwen3": {"query": "Instruct: find\nQuery:", "document": ""},
        "xlm-r": {},
        "gemma3": {"query": "task: search | query: ", "document": "title: none | text: "},
    }[name]
    model = SentenceTransformer(modules=modules, prompts=prompts, device="cpu")
    model.save(str(folder / "model"), create_model_card=False)
    return folder / "model"


def _enlarge(network):
    """Random weights of a trained network's scale, so that vectors depend on the words."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8.0)
