"""Conversations to prompts, by the checkpoint's own Jinja template."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from engine.config import EngineConfig
from engine.errors import ModelLoadError

_LLAVA_TEMPLATE = Path(__file__).parent.parent / "templates" / "template_llava.jinja"
_PROBE = "content-style-probe"
_PROBE_TOOL = {"type": "function", "function": {"name": _PROBE, "description": "", "parameters": {"type": "object"}}}
IMAGE_TYPES = ("image", "image_url")
_JINJA = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])  # to look whether templates are valid


def find_template(config: EngineConfig, given: str | None, tokenizer: Any) -> str | None:
    """The template to use: what was given, else the checkpoint's, else LLaVA-1.5's for a LLaVA; None where there is
    none. Where a checkpoint has several, they come in the order in which transformers takes them: a vision model's
    processor in its older files first, a tokenizer in chat_template.jinja.

    Raises:
        ModelLoadError: the checkpoint's template cannot be read.
    """
    if given is not None:
        return given
    folder = config.model_path
    own: str | dict[str, str] | None = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    older = [_template_in(folder / "processor_config.json"), _template_in(folder / "chat_template.json")]
    newer = [_read(folder / "chat_template.jinja"), own]
    ordered = [*newer, *older] if config.vision is None else [*older, *newer]
    found = next((template for template in ordered if template is not None), None)
    return _LLAVA_TEMPLATE.read_text(encoding="utf-8") if found is None and config.vision is not None else found


def image_parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a message that are images, in order."""
    content = message.get("content")
    return [part for part in content if part.get("type") in IMAGE_TYPES] if isinstance(content, list) else []


class ChatTemplate:
    """Renders messages in sandboxed Jinja, whichever way the template wants their content: string or list of parts."""

    def __init__(self, tokenizer: Any, template: str | None, image_token: str | None) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._image_token = image_token
        self._takes_parts = template is not None and self._shows_parts()
        self._takes_strings = template is not None and _PROBE in self._probe(_PROBE)
        self._shows_tools = template is not None and _PROBE in self._probe(self._content("Hi"), [_PROBE_TOOL])
        self._knows_developer = self._shows_developer()
        self._joins_texts = {role: self._takes_parts and self._shows_both(role) for role in ("system", "assistant")}

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt of a conversation, one placeholder for each image part.

        Raises:
            ValueError: there is no template, it refuses the messages, or a text holds the image placeholder.
        """
        if self._template is None:
            raise ValueError("the model has no chat template: give one with --chat-template, or use completions")
        if tools and not self._shows_tools:
            messages, tools = _with_tools(messages, tools), None
        prepared = [self._prepare(message) for message in messages]
        try:
            rendered = self._tokenizer.apply_chat_template(
                prepared,
                tools=tools,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **kwargs,
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses the messages: {error}") from error
        except Exception as error:  # a template may fail in any way on what it was not written for
            raise ValueError(f"the chat template cannot render the messages: {error}") from error
        self._check_placeholders(str(rendered), sum(len(image_parts(message)) for message in messages))
        return str(rendered)

    def _check_placeholders(self, rendered: str, images: int) -> None:
        """Texts that a template joins must not make up a placeholder together."""
        if self._image_token is not None and (found := rendered.count(self._image_token)) != images:
            raise ValueError(f"the messages hold {images} images, but as a prompt {found} image placeholders")

    def _prepare(self, message: dict[str, Any]) -> dict[str, Any]:
        if message["role"] == "developer" and not self._knows_developer:
            message = {**message, "role": "system"}
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or [])
        texts = [part["text"] for part in parts if part.get("type") == "text"]
        if self._image_token is not None and any(self._image_token in text for text in texts):
            raise ValueError(f"a message holds the text {self._image_token!r}, which stands for an image: leave it out")
        if not self._joins_texts.get("system" if message["role"] == "developer" else message["role"], True):
            texts = ["\n".join(texts)]
            parts = [{"type": "text", "text": texts[0]}]
        if self._takes_strings and len(parts) == len(texts) == 1:
            # Templates that take both may take parts in the user's messages only.
            return {**message, "content": texts[0]}
        if self._takes_parts:
            shown = [{"type": "image"} if part.get("type") in IMAGE_TYPES else part for part in parts]
            return {**message, "content": shown}
        images = f"{self._image_token}\n" * len(image_parts(message))
        return {**message, "content": images + "\n".join(texts)}

    def _shows_parts(self) -> bool:
        """Whether the template renders a list of parts; one that does not prints it, fails on it or skips images."""
        parts = [{"type": "text", "text": _PROBE}]
        if self._image_token is not None:
            parts.insert(0, {"type": "image"})
        rendered = self._probe(parts)
        shown = self._image_token is None or self._image_token in rendered
        return shown and _PROBE in rendered and "'type'" not in rendered and '"type"' not in rendered

    def _shows_developer(self) -> bool:
        """Whether the template has a place for OpenAI's newer name of the system's role."""
        said = {"role": "developer", "content": self._content(_PROBE)}
        return _PROBE in self._probe_messages([said, {"role": "user", "content": self._content("Hi")}])

    def _content(self, text: str) -> Any:
        """A text in the form that the template takes."""
        return [{"type": "text", "text": text}] if self._takes_parts and not self._takes_strings else text

    def _shows_both(self, role: str) -> bool:
        """Whether the template renders two parts of a turn that is not the user's; some take one, or print the list."""
        words = [f"{_PROBE}-{number}" for number in (1, 2)]
        said = {"role": role, "content": [{"type": "text", "text": word} for word in words]}
        asked = {"role": "user", "content": [{"type": "text", "text": "Hi"}]}
        rendered = self._probe_messages([said, asked] if role == "system" else [asked, said])
        return all(word in rendered for word in words) and "'type'" not in rendered and '"type"' not in rendered

    def _probe(self, content: Any, tools: list[dict[str, Any]] | None = None) -> str:
        """A user's message as the template renders it; nothing where it fails."""
        return self._probe_messages([{"role": "user", "content": content}], tools)

    def _probe_messages(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str:
        try:
            rendered = self._tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=self._template, tokenize=False, add_generation_prompt=True
            )
        except Exception:  # a template may fail in any way on what it was not written for
            return ""
        return str(rendered)


def _with_tools(messages: Sequence[dict[str, Any]], tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tools told in the system's message, for a template that has no place for them."""
    functions = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    told = {"type": "text", "text": f"These functions can be called:\n{functions}"}
    first, *others = messages
    if first["role"] not in ("system", "developer"):
        return [{"role": "system", "content": [told]}, *messages]
    content = first.get("content") or []
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return [{**first, "content": [*parts, told]}, *others]


def read_template(given: str) -> str:
    """A template that is given as such or as a file; `ValueError` when it is neither, or no valid Jinja."""
    template = given
    if "{" not in given:
        try:
            template = Path(given).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ValueError(f"--chat-template {given!r} is neither a template nor a readable file") from error
    try:
        # The tag that marks what was generated is transformers' own, and means nothing to rendering.
        _JINJA.parse(re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template))
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"--chat-template is no valid Jinja: line {error.lineno}: {error.message}") from error
    return template


def _template_in(file: Path) -> str | None:
    """The template of checkpoints that keep it in a JSON file."""
    text = _read(file)
    try:
        template = None if text is None else json.loads(text).get("chat_template")
    except (ValueError, AttributeError) as error:
        raise ModelLoadError(f"{file} cannot be read: {error}") from error
    return template if isinstance(template, str) else None


def _read(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8") if file.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"{file} cannot be read: {error}") from error
