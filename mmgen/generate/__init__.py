"""Generates text and images from prompts: many requests share one batched backbone."""

from __future__ import annotations

from mmgen.generate.decoder import Decoder
from mmgen.generate.request import Event, Inpaint, Request, Result

__all__ = ["Decoder", "Event", "Inpaint", "Request", "Result"]
