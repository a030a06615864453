"""What the tests of hf-dialogue share: tokenizers of bytes, untrained models of any architecture, requests, and stock
lm-eval beside it."""

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from helpers.evaluate.hf_dialogue import HFDialogue

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}


def byte_tokenizer(bos: bool = False, eos: bool = True) -> PreTrainedTokenizerFast:
    """A token a byte; the beginning of text before every text if `bos`."""
    special = ["<s>", "</s>"]
    vocabulary = {c: n for n, c in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.add_special_tokens(special)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>" if eos else None, pad_token="<s>"
    )


def small(kind: str, tokenizer, **options):
    """An untrained model of an architecture: its greedy answers are gibberish, and as sensitive to a wrong mask as
    any."""
    torch.manual_seed(0)
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    given = {"vocab_size": len(tokenizer)} | special | SIZES | options
    config = AutoConfig.for_model(kind, **{key: value for key, value in given.items() if value is not None})
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():  # some architectures begin with zeros, or all alike
        if parameter.dim() < 2:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    return model


def requests(contexts: list[str], **kwargs) -> list[Instance]:
    arguments = {"until": ["\nQ:"], "max_gen_toks": 12, "do_sample": False} | kwargs
    return [Instance("generate_until", {}, (context, dict(arguments)), n) for n, context in enumerate(contexts)]


def choices(pairs: list[tuple[str, str]], kind: str = "loglikelihood") -> list[Instance]:
    return [Instance(kind, {}, pair, n) for n, pair in enumerate(pairs)]


def both(model, tokenizer, contexts: list[str], stock_batch: int = 1, options: dict | None = None, **kwargs):
    """Answers of stock lm-eval and of hf-dialogue, and hf-dialogue itself."""
    options = options or {}
    common = {k: options[k] for k in ("max_length", "truncation", "add_bos_token") if k in options}
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=stock_batch, **common)
    mine = HFDialogue(pretrained=model, tokenizer=tokenizer, **options)
    expected = stock.generate_until(requests(contexts, **kwargs), disable_tqdm=True)
    return expected, mine.generate_until(requests(contexts, **kwargs), disable_tqdm=True), mine


def conversation(turns: int, topic: str = "The cat sat on the mat and watched the rain. ") -> list[str]:
    """Prompts of a made-up dialogue, each the beginning of the next."""
    prompts, history = [], topic * 3 + "\n\n"
    for turn in range(turns):
        history += f"Q: What about {turn}?\n\nA:"
        prompts.append(history)
        history += f" the {turn}th thing\n\n"
    return prompts


HEADER = "Answer the question. " * 5
MIXED = conversation(5) + conversation(3, "Snow fell all night. ") + ["Nothing shared here.\n\nQ: Why?\n\nA:", "x"]
SHOTS = [f"{HEADER}Q: Why is {what} so {how}?\n\nA:" for what in ("ice", "a hot stone") for how in ("odd", "old", "it")]
