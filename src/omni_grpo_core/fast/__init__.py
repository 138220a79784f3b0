"""The fast step: the plain one's inputs and outputs, with nothing computed more than once.

What the plain step repeats for each completion (towers, prompt, its keys and values) is shared by
the group here. :mod:`~omni_grpo_core.fast.scoring` scores a packed row, the prompt once and its
completions after it; :mod:`~omni_grpo_core.fast.rollout` decodes all groups together over one copy
of each prompt's keys and values; :class:`~omni_grpo_core.fast.step.FastStep` is both for a training
run, and :mod:`~omni_grpo_core.fast.support` tells what speaks against it. No layer is rewritten:
both go through transformers' text model with an attention function of their own.
"""
