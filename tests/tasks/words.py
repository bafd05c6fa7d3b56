"""A tokenizer of bytes with a chat template, and a model's configuration beside it."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3MoeConfig

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% if thinking %}<think>{% endif %}{% endif %}"
)
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = {token: i for i, token in enumerate(["<s>", "</s>", *BYTES])}  # 258 tokens


def save_words(folder: Path, *, template: str | None = TEMPLATE, **config) -> Path:
    """Write tokenizer, config.json and generation_config.json, without weights."""
    tokenizer = Tokenizer(models.BPE(VOCABULARY, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # Plain text begins with <s>, as with Llama's tokenizers; a template writes its own.
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", additional_special_tokens=["<s>"]
    )
    fast.chat_template = template
    fast.save_pretrained(folder)
    config = {"vocab_size": 260, "eos_token_id": 1} | config
    Qwen3MoeConfig(**config).save_pretrained(folder)
    GenerationConfig(eos_token_id=config["eos_token_id"]).save_pretrained(folder)
    return folder
