"""Text to tokens and back: the model's tokenizer and chat template, read from its folder."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer


class Chat:
    """Encodes chats as the model was tuned on them."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        self._template = environment.from_string((folder / "chat_template.jinja").read_text())
        self.end_token: int = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Token ids of a chat with the assistant's turn opened; a last message by the assistant is its start."""
        opening = ""
        if messages[-1]["role"] == "assistant":
            *messages, last = messages
            opening = last["content"]
        return self.tokens(self._template.render(messages=messages, add_generation_prompt=True) + opening)

    def tokens(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def token(self, token: int) -> str:
        """One token as it is, marks included."""
        return self._tokenizer.decode([token], skip_special_tokens=False)

    def text(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, end and turn marks left out."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)
