"""Small seeded random checkpoints in the layout of Hugging Face LLaVA, Llama and Mistral folders.

The weights mean nothing. They are scaled so that greedy decoding has clear margins and its text varies with the prompt
and with the image, which is what tests need of a model that is made in a second.
"""

import os
import tempfile
from pathlib import Path

from demo.checkpoint import write_configs, write_tokenizer, write_weights
from demo.checkpoint_spec import CheckpointSpec
from tests.random_tokenizer import build_tokenizer
from tests.random_weights import state_dict

__all__ = ["CheckpointSpec", "build_checkpoint"]

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- set content = message['content'] -%}
{%- if message['role'] != 'system' -%}{{- message['role'] | upper ~ ': ' -}}{%- endif -%}
{%- if content is string -%}
{{- content -}}
{%- else -%}
{{- '<image>\\n' * (content | selectattr('type', 'in', ['image', 'image_url']) | list | length) -}}
{{- content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join -}}
{%- endif -%}
{{- '</s>' if message['role'] == 'assistant' else ' ' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""


def build_checkpoint(folder: Path, spec: CheckpointSpec = CheckpointSpec()) -> Path:
    """Write a whole checkpoint to `folder` and return it.

    The folder appears complete or not at all. It must not exist yet, or be empty: nothing is overwritten.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as work:
        # One level deeper, because the temporary folder itself is closed to other users.
        draft = Path(work, folder.name)
        draft.mkdir()
        write_configs(draft, spec)
        write_tokenizer(draft, spec, build_tokenizer(), CHAT_TEMPLATE)
        write_weights(draft, state_dict(spec), spec.shards)
        os.replace(draft, folder)
    return folder
