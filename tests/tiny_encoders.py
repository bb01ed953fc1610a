"""Small encoders with a tokenizer of bytes, as transformers saves them."""

from pathlib import Path
from typing import Any

from tiny import byte_tokenizer, tune

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}

OWN_SIZES = {
    "funnel": {"d_model": 64, "n_head": 4, "d_head": 16, "d_inner": 96, "block_sizes": [1, 1], "block_repeats": [1, 1]},
    "squeezebert": {**SIZES, "embedding_size": 64, "q_groups": 1, "k_groups": 1, "v_groups": 1},
    "xmod": {**SIZES, "default_language": "en_XX"},
}


def encoder_tokenizer() -> Any:
    """Bytes, with a token before and behind each text; the second text's tokens are of type 1."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<|endoftext|>", "cls_token": "<|im_start|>", "sep_token": "<|im_end|>"})
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        pair="<|im_start|> $A <|im_end|> $B:1 <|im_end|>:1",
        special_tokens=[("<|im_start|>", cls), ("<|im_end|>", sep)],
    )
    tokenizer.chat_template = None
    return tokenizer


def make_encoder(folder: Path, kind: str = "bert", head: bool | str = False, **more: Any) -> Path:
    """A model of this kind with random weights: the bare one, or one that scores texts, or ("tags") tokens."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification

    tokenizer = encoder_tokenizer()
    tokenizer.save_pretrained(folder)
    config = AutoConfig.for_model(
        kind, vocab_size=len(tokenizer), max_position_embeddings=130, **OWN_SIZES.get(kind, SIZES), **more
    )
    config.pad_token_id = tokenizer.pad_token_id
    config.architectures = ["FunnelModel"] if kind == "funnel" else None  # of two that transformers has
    torch.manual_seed(0)
    make = AutoModelForSequenceClassification if head else AutoModel
    make = AutoModelForTokenClassification if head == "tags" else make
    model = make.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.mul_(4)  # so that what differs shows
    model.save_pretrained(folder)
    return folder


def word_pieces() -> Any:
    """A tokenizer of BERT's kind, of few words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "un", "##believ", "##able", "##seen", "anna", "saw", "x"]
    tokenizer = Tokenizer(models.WordPiece({piece: n for n, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def with_head(source: Any) -> Any:
    """A stored model that has a task, in four bits and fp32, with adapters and a head that do something."""
    import torch

    from nybble.formats.quant_spec import BaseFormats
    from nybble.layers.trained import train_modules, trained_modules
    from nybble.sources.load import load_model

    model = tune(load_model(source, BaseFormats(), torch.float32), rank=4, std=0.1, alpha=8.0)
    train_modules(model, source.head_modules)
    for module in trained_modules(model).values():
        for parameter in module.trained.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return model
