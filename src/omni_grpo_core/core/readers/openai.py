"""OpenAI's rows: ``messages`` whose content is a list of typed parts with the media in them."""

from __future__ import annotations

from omni_grpo_core.core.readers.row import Format
from omni_grpo_core.core.readers.swift import has_parts, read

FORMAT = Format("openai", "OpenAI", (("messages",),), read, has_parts)
