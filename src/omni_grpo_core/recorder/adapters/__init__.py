"""The trainers that ``attach`` knows, one short file each; a new one is a file and a place in
:data:`ADAPTERS`."""

from omni_grpo_core.recorder.adapters.adapter import Adapter
from omni_grpo_core.recorder.adapters.loop import LOOP
from omni_grpo_core.recorder.adapters.open_r1 import OPEN_R1, R1_V
from omni_grpo_core.recorder.adapters.swift import SWIFT
from omni_grpo_core.recorder.adapters.trl import TRL

ADAPTERS: tuple[Adapter, ...] = (SWIFT, TRL, OPEN_R1, R1_V, LOOP)
"""The first that fits a trainer is used: those that ask for more come first."""
