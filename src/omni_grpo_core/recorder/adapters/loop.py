"""Any object that holds a model and a processor, under the names that people give them."""

from omni_grpo_core.recorder.adapters.adapter import Adapter

LOOP = Adapter(
    name="a loop of its own",
    model=("model", "policy"),
    processor=("processor", "processing_class", "tokenizer"),
    reward_funcs=("reward_funcs", "reward_functions", "rewards"),
)
