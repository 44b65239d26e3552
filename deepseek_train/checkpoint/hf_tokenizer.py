"""A tokenizer as transformers' AutoTokenizer loads it."""

import json

from deepseek_train.data.tokenizer import SPECIAL_TOKENS, TextTokenizer

TOKENIZER = "tokenizer.json"


def tokenizer_files(tokenizer: TextTokenizer, length: int) -> dict[str, bytes]:
    """The files of a folder for a model that reads ``length`` tokens at most."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{role}_token": SPECIAL_TOKENS[role] for role in ("bos", "eos", "pad")},
        "clean_up_tokenization_spaces": False,
        "model_max_length": length,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    return {TOKENIZER: tokenizer.json, "tokenizer_config.json": text.encode()}


def token_ids(tokenizer: TextTokenizer) -> dict[str, int]:
    """What config.json says of it."""
    special = tokenizer.special
    return {"bos_token_id": special.bos, "eos_token_id": special.eos, "pad_token_id": special.pad}
