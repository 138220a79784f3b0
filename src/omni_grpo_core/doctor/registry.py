"""Every look and every rule, by area: what a diagnosis goes through.

An area adds its own tuples here, one import line each.
"""

from __future__ import annotations

from omni_grpo_core.doctor.evidence import Look, Rule

LOOKS: tuple[Look, ...] = ()
"""In the order in which they run. A look never knows of causes."""

RULES: tuple[Rule, ...] = ()
"""Explain evidence; never make any."""
