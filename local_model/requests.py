"""The bodies that the model server takes, in the forms of OpenAI and vLLM; what else is sent has no effect."""

from typing import Annotated, Any

import msgspec

Temperature = Annotated[float, msgspec.Meta(ge=0, le=10)]
# Divided by the least temperature there is, still a number.
Bias = Annotated[float, msgspec.Meta(ge=-1e100, le=1e100)]
Seed = Annotated[int, msgspec.Meta(ge=0)]
TokenId = Annotated[int, msgspec.Meta(ge=0)]


class Part(msgspec.Struct, tag="text", tag_field="type"):
    text: str


class Message(msgspec.Struct):
    role: str
    content: str | list[Part]


class ChatBody(msgspec.Struct, kw_only=True):
    """OpenAI's request. `logprobs` defaults to true, unlike there; `stop` never appears in the text."""

    model: str
    messages: Annotated[list[Message], msgspec.Meta(min_length=1)]
    temperature: Temperature = 1.0
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    max_completion_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    stop: str | list[str] | None = None
    seed: Seed | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=1)] = 1
    logprobs: bool | None = True
    stream: bool | None = False
    tools: list[Any] | None = None


class ChoiceBody(msgspec.Struct, kw_only=True):
    """`choices` continue the prompt as they stand: a word after "Kind:" carries its leading space."""

    model: str
    messages: Annotated[list[Message], msgspec.Meta(min_length=1)]
    choices: Annotated[list[Annotated[str, msgspec.Meta(min_length=1)]], msgspec.Meta(min_length=1, max_length=512)]
    bias: list[Bias] | None = None
    temperature: Temperature = 1.0
    seed: Seed | None = None


class TextBody(msgspec.Struct, kw_only=True):
    """vLLM's completion request as far as it asks how likely given tokens are behind prompts, all in token ids."""

    model: str
    prompt: Annotated[list[Annotated[list[TokenId], msgspec.Meta(min_length=1)]], msgspec.Meta(min_length=1)]
    logprob_token_ids: Annotated[list[TokenId], msgspec.Meta(min_length=1, max_length=512)]


class TokenizeBody(msgspec.Struct):
    """vLLM's: one of the two."""

    prompt: str | None = None
    messages: Annotated[list[Message], msgspec.Meta(min_length=1)] | None = None


class LoadBody(msgspec.Struct):
    lora_name: Annotated[str, msgspec.Meta(min_length=1)]
    lora_path: str


class UnloadBody(msgspec.Struct):
    lora_name: str
