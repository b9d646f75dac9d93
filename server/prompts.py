"""From requests to prompts: templates, images, tokens."""

from collections.abc import Callable
from functools import partial
from typing import Any

from engine.chat_template import ChatTemplate
from engine.config import EngineConfig
from engine.grammar.structured_outputs import num_characters
from engine.input_processor import PreparedImage, ProcessedPrompt, load_tokenizer
from server.conversation import TemplateFields
from server.errors import bad_request, blaming
from server.protocol import ChatCompletionRequest
from server.state import ServerState
from server.tools import Tool

MAX_TEMPLATE_KWARGS = 64
TEMPLATE_SECONDS = 5.0
"""For a template that a client brings to be read and to render a conversation."""
TEMPLATES_AT_ONCE = 32
"""That clients bring: they are rendered one after the other."""


async def render(state: ServerState, body: TemplateFields, tools: list[dict[str, Any]] | None = None) -> list[int]:
    """The token ids of a conversation, one placeholder for each image.

    Raises:
        ValueError: the template refuses the conversation.
    """
    messages, options = await state.in_text_pool(_template_arguments, state, body, tools)
    if body.chat_template is None:
        text = await state.in_text_pool(partial(state.template.render, messages, **options))
    else:
        text = await _render_request_template(state, body.chat_template, messages, options)
    special = body.add_special_tokens is not False
    return await state.in_text_pool(partial(state.inputs.encode, text, add_special_tokens=special))


def _template_arguments(
    state: ServerState, body: TemplateFields, tools: list[dict[str, Any]] | None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Messages, without the data of their images, and options as `ChatTemplate.render` takes them."""
    body.check_template_fields()
    if body.chat_template is not None and not state.args.trust_request_chat_template:
        raise bad_request("chat_template is not allowed: the server trusts its own template only", "chat_template")
    beside = num_characters([tools, body.chat_template_kwargs])
    state.inputs.check_length(sum(message.num_characters for message in body.messages) + beside)
    continues = bool(body.continue_final_message)
    options = {
        "add_generation_prompt": not continues if body.add_generation_prompt is None else body.add_generation_prompt,
        "continue_final_message": continues,
        "tools": tools,
        **_checked_kwargs(body.chat_template_kwargs or {}),
    }
    return [message.plain() for message in body.messages], options


async def _render_request_template(
    state: ServerState, template: str, messages: list[dict[str, Any]], options: dict[str, Any]
) -> str:
    """By a template that a client brought."""
    try:
        return str(await state.request_templates.run(template, messages, options))
    except TimeoutError:
        message = f"chat_template takes longer than {TEMPLATE_SECONDS:g} s"
    except EOFError:
        message = "chat_template takes too much memory"
    raise bad_request(message, "chat_template")


def make_renderer(config: EngineConfig, image_token: str | None, most: int) -> Callable[..., str]:
    """The work of the process that renders clients' templates: at most so many characters."""
    tokenizer = load_tokenizer(config)

    def render(template: str, messages: list[dict[str, Any]], options: dict[str, Any]) -> str:
        text = ChatTemplate(tokenizer, template, image_token).render(messages, **options)
        if len(text) > most:
            raise ValueError(f"chat_template makes {len(text)} characters: the context cannot hold more than {most}")
        return text

    return render


def plain_tools(tools: list[Tool] | None) -> list[dict[str, Any]] | None:
    """As templates take them."""
    return None if tools is None else [tool.model_dump(exclude_none=True) for tool in tools]


def check_system_text(state: ServerState, field: str, text: str) -> None:
    """Refuse the image placeholder in a field of its own, which a chat would blame on its messages."""
    if state.inputs.image_token is not None and state.inputs.image_token in text:
        raise bad_request(
            f"{field} holds the text {state.inputs.image_token!r}, which stands for an image: leave it out", field
        )


async def chat_prompt(state: ServerState, body: ChatCompletionRequest) -> ProcessedPrompt:
    """Render a conversation and put its images in."""
    urls = body.image_urls()
    with blaming("messages"):
        state.inputs.check_image_count(len(urls))
        use_tools = body.tools and body.tool_choice != "none"
        token_ids = await render(state, body, plain_tools(body.tools) if use_tools else None)
        images = await state.load_images(urls, body.cache_salt)
        return await state.in_text_pool(_process, state, token_ids, images, body.truncate_prompt_tokens)


async def text_prompt(
    state: ServerState, prompt: str | list[int], *, add_special_tokens: bool, truncate: int | None, want_text: bool
) -> ProcessedPrompt:
    """A completion's prompt; `want_text` has its text filled in, for an echo."""

    def work() -> ProcessedPrompt:
        if isinstance(prompt, str):
            token_ids = state.inputs.encode(prompt, add_special_tokens=add_special_tokens)
        else:
            token_ids = prompt
        processed = _process(state, token_ids, [], truncate)
        if want_text:
            whole = isinstance(prompt, str) and len(processed.token_ids) == len(token_ids)
            processed.text = (
                str(prompt) if whole else state.inputs.decode(processed.token_ids, skip_special_tokens=True)
            )
        return processed

    with blaming("prompt"):
        return await state.in_text_pool(work)


def _process(
    state: ServerState, token_ids: list[int], images: list[PreparedImage], truncate: int | None
) -> ProcessedPrompt:
    return state.inputs.process(token_ids, images, truncate=truncate)


def _checked_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    reserved = {"self", "conversations",
                "chat_template", "tokenize", "tools", "documents", "conversation", "messages", "return_dict",
                "add_generation_prompt", "continue_final_message", "padding", "truncation", "max_length",
                "return_tensors", "return_assistant_tokens_mask", "tokenizer_kwargs"}  # fmt: skip
    for name in kwargs:
        if name in reserved:
            raise bad_request(f"chat_template_kwargs cannot set {name!r}", "chat_template_kwargs")
    if len(kwargs) > MAX_TEMPLATE_KWARGS:
        raise bad_request(f"chat_template_kwargs holds more than {MAX_TEMPLATE_KWARGS} names", "chat_template_kwargs")
    return kwargs
