"""Small encoder-decoders with a tokenizer of bytes, as transformers saves them."""

from pathlib import Path
from typing import Any

from tiny import byte_tokenizer

T5 = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
BART = {
    **{f"{part}_layers": 2 for part in ("encoder", "decoder")},
    **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
    **{f"{part}_ffn_dim": 96 for part in ("encoder", "decoder")},
    **{"d_model": 64, "max_position_embeddings": 130},
}
_GEMMA = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
_GEMMA |= {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16}
OWN_SIZES = {
    "switch_transformers": {**T5, "num_decoder_layers": 2, "num_experts": 4},
    "prophetnet": {
        **{f"num_{part}_layers": 2 for part in ("encoder", "decoder")},
        **{f"num_{part}_attention_heads": 4 for part in ("encoder", "decoder")},
        **{f"{part}_ffn_dim": 96 for part in ("encoder", "decoder")},
        **{"hidden_size": 64, "max_position_embeddings": 130},
    },
}
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}  # T5 1.1, mT5, UMT5


def prompt_tokenizer() -> Any:
    """Bytes, with an end of sequence behind each text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<|endoftext|>"})
    ends = [("<|im_end|>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <|im_end|>", special_tokens=ends)
    tokenizer.chat_template = None
    return tokenizer


def make_seq2seq(folder: Path, kind: str = "t5", **more: Any) -> Path:
    """A model of this kind with random weights, biases of logits among them where it has some."""
    import torch
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    tokenizer = prompt_tokenizer()
    tokenizer.save_pretrained(folder)
    own = OWN_SIZES.get(kind, T5 if "t5" in kind else BART)
    own = own | (GATED if kind in ("mt5", "umt5") else {})
    own_head = (own | more).get("tie_word_embeddings") is False
    start = tokenizer.pad_token_id if "t5" in kind or kind == "switch_transformers" else tokenizer.eos_token_id
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    tokens |= {"decoder_start_token_id": start, "bos_token_id": None, "forced_eos_token_id": None}
    if kind == "t5gemma":
        part = _GEMMA | {"vocab_size": len(tokenizer)} | {"pad_token_id": start, "bos_token_id": start}
        part["eos_token_id"] = tokenizer.eos_token_id
        own = {"encoder": part, "decoder": part}
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **(own | tokens | more))
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            elif "embed" not in name and "shared" not in name:
                parameter.mul_(2)  # so that what differs shows
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_()
        if own_head:  # as of T5 1.1, whatever transformers makes of that config
            model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
            model.all_tied_weights_keys.pop("lm_head.weight", None)
    model.save_pretrained(folder)
    return folder
