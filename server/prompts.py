"""From requests to prompts: templates, images, tokens."""

from typing import Any

from engine.chat_template import ChatTemplate
from engine.input_processor import PreparedImage, ProcessedPrompt
from server.errors import bad_request, blaming
from server.protocol import ChatCompletionRequest, TemplateFields
from server.state import ServerState

MAX_TEMPLATE_KWARGS = 64


def render(state: ServerState, body: TemplateFields, tools: list[dict[str, Any]] | None = None) -> list[int]:
    """The token ids of a conversation, one placeholder for each image. For the text pool.

    Raises:
        ValueError: the template refuses the conversation.
    """
    body.check_template_fields()
    state.inputs.check_length(sum(message.num_characters for message in body.messages))
    template = state.template
    if body.chat_template is not None:
        if not state.args.trust_request_chat_template:
            raise bad_request("chat_template is not allowed: the server trusts its own template only", "chat_template")
        template = ChatTemplate(state.inputs.tokenizer, body.chat_template, state.inputs.image_token)
    continues = bool(body.continue_final_message)
    kwargs = _checked_kwargs(body.chat_template_kwargs or {})
    text = template.render(
        [message.plain() for message in body.messages],
        add_generation_prompt=not continues if body.add_generation_prompt is None else body.add_generation_prompt,
        continue_final_message=continues,
        tools=tools,
        **kwargs,
    )
    return state.inputs.encode(text, add_special_tokens=body.add_special_tokens is not False)


def check_system_text(state: ServerState, field: str, text: str) -> None:
    """Refuse the image placeholder in a field of its own, which a chat would blame on its messages."""
    if state.inputs.image_token is not None and state.inputs.image_token in text:
        raise bad_request(f"{field} holds the text {state.inputs.image_token!r}, which stands for an image", field)


async def chat_prompt(state: ServerState, body: ChatCompletionRequest) -> ProcessedPrompt:
    """Render a conversation and put its images in."""
    urls = body.image_urls()
    with blaming("messages"):
        state.inputs.check_image_count(len(urls))
        token_ids = await state.in_text_pool(render, state, body)
        images = await state.load_images(urls)
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
