"""The tokenizer of a base model."""

from __future__ import annotations

from typing import cast

from jinja2 import TemplateSyntaxError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from clusters.errors import first_line, request_error
from qlora_core.quiet import import_configurations
from qlora_core.training.dataset.chat import TEMPLATE_ERRORS


def load_tokenizer(model: str, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model's folder, padded on the right with its own pad or, failing that, its end token.

    Args:
        chat_template: in place of its own.

    Raises:
        RequestError: there is none, it has neither of these tokens, or the template is none.
    """
    import_configurations()
    try:
        tokenizer = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(model, trust_remote_code=False))
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise request_error(
            "model", model, f"its tokenizer cannot be loaded: {first_line(error)}", "Put tokenizer.json into the folder"
        ) from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise request_error(
                "model", model, "its tokenizer has neither a pad nor an end token", "Name them in tokenizer_config.json"
            )
        # No token attends to padding behind it, and none is learned there, so any token serves.
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    if chat_template is not None:
        tokenizer.chat_template = chat_template
        try:
            tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
        except TemplateSyntaxError as error:
            rule = f"it is no Jinja template: {error.message}, line {error.lineno}"
            raise request_error("data.chat_template", chat_template.split("\n")[0][:80], rule, "Correct it") from None
        except TEMPLATE_ERRORS:
            pass  # it refuses such a conversation
    return tokenizer
