"""Keys of TRL, transformers, ms-swift and verl, and what they are called in a run's file here."""

from __future__ import annotations

import re
from collections.abc import Mapping

from omni_grpo_core.errors import ConfigError

_NONE = "no such key here: "
_SAMPLED = _NONE + (
    "completions are sampled from the whole distribution at settings: temperature, as the "
    "policy's gradient assumes"
)
_STOP = (
    _NONE + "a completion ends at the checkpoint's own end tokens or at settings: max_new_tokens"
)
_LAUNCHER = _NONE + "processes and sharding are those of `accelerate launch`"
_ENTROPY = (
    _NONE + "there is no entropy bonus; entropy is logged, and guard: watches what is sampled"
)
_VLLM = "rollout: vllm, and the section vllm"
_HUB = _NONE + "nothing is uploaded; the model is written under out"
_LOADED = _NONE + "the checkpoint is read by its own config.json, in float32 or as trained_weights"
_LOGGED = _NONE + "every step is logged to log.jsonl under out, and to trackers"
_LOADER = _NONE + "rows are prepared in the step itself; their order follows from seed"
_NEVER_DROPPED = _NONE + "a row that does not fit is refused by name, never cut or dropped"
_LENGTHS = _NONE + "write a reward (rewards: module:function); TRL's can be named there"


def _each(sentence: str, keys: str) -> dict[str, str]:
    return dict.fromkeys(keys.split(), sentence)


FOREIGN_KEYS: Mapping[str, str] = {
    "use_cache": "no such key: generation always has its cache and scoring never; with gradient "
    "checkpointing, transformers 4.53 to 5.23 drops the cache and generates garbage",
    # prompts, completions and media
    "num_generations": "settings: group_size",
    "max_prompt_length": "settings: max_prompt_length",
    "max_completion_length": "settings: max_new_tokens",
    "max_length": "settings: max_prompt_length and max_new_tokens",
    "temperature": "settings: temperature",
    "system": _NONE + "the system prompt asks for context, think and answer, as the rewards do",
    **_each("settings: audio_in_video", "use_audio_in_video"),
    **_each("settings: media", "max_pixels fps fps_max_frames video_max_pixels"),
    **_each(_SAMPLED, "top_k top_p min_p repetition_penalty generation_kwargs do_sample"),
    **_each(_STOP, "stop stop_strings stop_words stop_token_ids eos_token"),
    **_each(_NEVER_DROPPED, "truncation_strategy overlong_filter"),
    "mask_truncated_completions": _NONE + "a completion that was cut off counts: without an answer "
    "it earns nothing, which is what teaches to end",
    # sizes
    "per_device_train_batch_size": "micro_batch_size, the completions of one scoring forward",
    "gradient_accumulation_steps": "batch_size, the completions of one optimizer step: it is split "
    "into micro-batches without changing the loss",
    **_each("batch_size, the completions of one optimizer step",
            "generation_batch_size steps_per_generation train_batch_size"),
    "num_iterations": "iterations",
    **_each("steps, the number of rollouts", "max_steps num_train_epochs total_training_steps"),
    "per_device_eval_batch_size": _NONE + "evaluation takes micro_batch_size too",
    "num_generations_eval": _NONE + "evaluation answers each row greedily and once sampled",
    # rewards
    "reward_funcs": "rewards",
    "reward_weights": "rewards: weight, of each by its name",
    **_each("rewards: module:function", "external_plugins custom_reward_function reward_model "
            "reward_model_plugin"),
    "scale_rewards": "scale",
    "multi_objective_aggregation": "aggregation",
    "dynamic_sample": "drop_zero_variance, which leaves such groups out; none is sampled again",
    **_each(_LENGTHS, "soft_max_length soft_cache_length cosine_max_len cosine_min_len_value_wrong "
            "repetition_n_grams repetition_max_penalty"),
    # the loss
    "beta": "loss: beta",
    "loss_type": "loss: loss_type",
    "epsilon": "loss: epsilon_low and epsilon_high",
    "epsilon_high": "loss: epsilon_high",
    "delta": "loss: delta",
    "importance_sampling_level": "loss: loss_type gspo or luspo, whose ratios are of sequences",
    "use_bias_correction_kl": "loss: kl_weighted",
    "off_policy_mask_threshold": "loss: off_policy_mask_threshold",
    **{key: f"loss: {key}" for key in (
        *("sapo_temperature_pos", "sapo_temperature_neg"),
        *("vespo_k_pos", "vespo_k_neg", "vespo_lambda_pos", "vespo_lambda_neg"),
    )},
    **_each("correction", "vllm_importance_sampling_correction rollout_importance_sampling_mode"),
    "vllm_importance_sampling_mode": "correction: level and mode; token_truncate is level: token, "
    "mode: truncate",
    **_each("correction: high", "vllm_importance_sampling_clip_max vllm_importance_sampling_cap "
            "rollout_importance_sampling_threshold"),
    "vllm_importance_sampling_clip_min": "correction: low",
    **_each(_ENTROPY, "entropy_coef entropy_coef_delta entropy_coef_max entropy_coef_min "
            "entropy_target use_adaptive_entropy top_entropy_quantile"),
    "router_aux_loss_coef": _NONE + "there is no loss that balances experts",
    **_each(_NONE + "the reference is the frozen start of the run",
            "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps ref_model"),
    # the optimizer
    "learning_rate": "optimizer: lr",
    "weight_decay": "optimizer: weight_decay",
    **_each("optimizer: betas", "adam_beta1 adam_beta2"),
    **_each(_NONE + "the optimizer is AdamW", "optim optim_args adam_epsilon"),
    "max_grad_norm": "optimizer: max_grad_norm",
    **_each("optimizer: schedule", "lr_scheduler_type lr_scheduler_kwargs"),
    **_each("optimizer: warmup_steps, a number of steps", "warmup_steps warmup_ratio"),
    # weights, precision and machine
    "model": "checkpoint",
    "model_name_or_path": "checkpoint",
    **_each(_LOADED, "model_init_kwargs trust_remote_code torch_dtype attn_impl model_type "
            "attn_implementation cast_lm_head_to_fp32"),
    **_each("precision: bfloat16, or float32", "bf16 fp16 tf32"),
    **_each("lora", "lora_rank lora_alpha target_modules train_type tuner_type peft_config "
            "use_peft lora_r lora_target_modules"),
    "lora_dropout": _NONE + "the policy that is scored must be the one that sampled",
    "disable_dropout": _NONE + "there is none: scoring runs in eval mode, as sampling does",
    **_each("freeze, of towers by modality", "freeze_vit freeze_llm freeze_aligner freeze_audio"),
    **_each("gradient_checkpointing", "gradient_checkpointing_kwargs"),
    "deepspeed": _NONE + "its engine updates the weights before the guard has seen the step; use "
    "FSDP version 2 by `accelerate launch`, which shards like ZeRO 3",
    **_each(_LAUNCHER, "fsdp fsdp_config ddp_find_unused_parameters ds3_gather_for_generation "
            "n_gpus_per_node nnodes local_rank parallelism_config"),
    **_each(_NONE + "the optimizer's state stays on the device, in eight bits with optimizer: "
            "name: adamw_8bit; gradients leave it with offload_gradients",
            "offload_optimizer optimizer_offload"),
    **_each("fast, the shared and compiled step", "torch_compile use_liger_kernel padding_free "
            "pad_to_multiple_of cache_implementation use_transformers_paged "
            "use_transformers_continuous_batching transformers_continuous_batching_config"),
    "use_cpu": "device: cpu",
    "use_vllm": _VLLM,
    **_each(_VLLM, "vllm_mode vllm_server_base_url vllm_server_host vllm_server_port "
            "vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization vllm_model_impl "
            "vllm_max_model_length vllm_tensor_parallel_size vllm_enable_sleep_mode "
            "vllm_structured_outputs_regex vllm_max_model_len sleep_level offload_model "
            "move_model_batches async_generate"),
    # data, output and progress
    **_each("data", "dataset train_dataset dataset_name train_files"),
    **_each("eval_data", "val_dataset eval_dataset val_files split_dataset_ratio"),
    **_each(_LOADER, "shuffle_dataset dataloader_num_workers dataloader_pin_memory "
            "dataset_num_proc remove_unused_columns data_seed"),
    "chat_template_kwargs": _NONE + "the checkpoint's own template is used as it is",
    **_each(_NONE + "there are no tools and no environments",
            "max_tool_calling_iterations multi_turn_scheduler tools"),
    "rlhf_type": _NONE + "this trainer does GRPO",
    "output_dir": "out",
    **_each("save_every", "save_steps save_strategy save_freq"),
    "save_total_limit": "keep",
    **_each("eval_every", "eval_steps eval_strategy test_freq"),
    **_each("trackers", "report_to logger project run_name"),
    **_each(_LOGGED, "logging_steps logging_dir log_completions num_completions_to_print "
            "log_multimodal log_unique_prompts log_completions_hub_repo"),
    "resume_from_checkpoint": _NONE + "a run with the same out goes on from its newest state",
    **_each(_HUB, "push_to_hub hub_model_id hub_token"),
    # verl's groups
    "actor_rollout_ref": "verl's group: rollout.n is settings: group_size, rollout.temperature "
    "settings: temperature, actor.ppo_mini_batch_size batch_size, actor.optim.lr optimizer: lr, "
    "actor.clip_ratio_high loss: epsilon_high, actor.kl_loss_coef loss: beta",
    "algorithm": "verl's group: adv_estimator grpo is what this trainer does, "
    "norm_adv_by_std_in_grpo is scale, kl_ctrl loss: beta",
    "trainer": "verl's group: total_training_steps is steps, save_freq save_every, test_freq "
    "eval_every, default_local_dir out, logger trackers",
    "critic": _NONE + "GRPO has no critic",
}  # fmt: skip
"""By key: the sentence that says what it is here. A key that is ours in another section is named
with it."""

_UNKNOWN = re.compile(r"unknown key '(.+)'")


def explained(error: ConfigError) -> ConfigError:
    """The error of an unknown key, in any section, with its sentence if another trainer has it."""
    found = _UNKNOWN.fullmatch(error.got)
    key = found[1] if found else ""
    if key not in FOREIGN_KEYS:
        return error
    return ConfigError(
        error.item,
        got=f"key {key!r}",
        want=FOREIGN_KEYS[key],
        fix="rename or remove it",
    )
