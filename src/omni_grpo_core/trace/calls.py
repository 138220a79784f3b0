"""What a recorder saw in another trainer, call by call: the stage values of a recorded Trace.

Such a trainer passes nothing typed from stage to stage, so a recorder keeps the inputs and outputs
of each call. One optimizer step is one :class:`~omni_grpo_core.types.Trace` whose stage records
hold the values below, in the order in which the calls returned:

==============  ========================  ====================================================
stage           value                     the call
==============  ========================  ====================================================
sample          SamplesSeen               rows of the dataset, as the trainer drew them
text            TemplateCall              ``apply_chat_template``
batch           ProcessorCall             ``processor(...)``
completion      GenerateCall              ``model.generate(...)``
logits          ForwardCall               ``model(...)`` outside generate: a scoring forward
reward          RewardCall                one reward function on one batch of completions
advantage       AdvantageSeen             the advantages and the rewards they come from
loss            LossSeen                  the loss and its inputs
loss            LossGradient              the gradient of what was backpropagated, at the logits
gradient        StepSeen                  backward and optimizer step
==============  ========================  ====================================================

A stage may occur several times in a trace, or not at all if it was not seen: a diagnosis covers
only what was seen. A tensor too large to keep is missing from its mapping, or ``None``, and
described under its name in ``large``. Anything that looks like a secret is ``"<redacted>"``. Shape
letters as in :mod:`omni_grpo_core.types`; ``N`` is the number of rows of a call.

``digests``, of every floating-point input or output of a call, whether it was kept or not: int64,
one number per unit of content, by name. A unit is a patch of ``pixel_values`` and
``pixel_values_videos`` (patches,), a frame of ``input_features`` (n, T), a token of
``inputs_embeds`` (N, L). Under ``name@bfloat16`` and ``name@float16`` a producer also has those of
its cast, so that a consumer's can be matched. See :mod:`omni_grpo_core.trace.digest`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, get_args

from omni_grpo_core.types import Modality, Trace

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Modes:
    """The state in which a model was called.

    ``training``: some module with dropout or checkpointing was in train mode. ``checkpointing``:
    gradient checkpointing was active in the text model (enabled *and* in train mode).
    ``tower_checkpointing``: the same in a vision or audio tower. ``dtype``: of the text model's
    weights. ``autocast``: its dtype, or ``None``. ``adapter``: ``"on"``, ``"off"`` or ``None`` for
    a model without one. ``wrappers``: classes around the thinker, outermost first. ``dropout``: the
    largest probability of a dropout that acts in this call.
    """

    training: bool
    checkpointing: bool
    tower_checkpointing: bool
    grad_enabled: bool
    dtype: str
    autocast: str | None
    adapter: str | None
    wrappers: tuple[str, ...]
    dropout: float = 0.0


@dataclass(frozen=True, slots=True)
class TensorSeen:
    """A tensor too large to keep. ``low``, ``high``, ``mean``, ``std`` (population): of all its
    elements. ``samples``: 64 of them, in order, at ``trace.fingerprint.sample_places`` with seed
    0."""

    dtype: str
    shape: tuple[int, ...]
    low: float
    high: float
    mean: float
    std: float
    samples: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class SamplesSeen:
    """Rows of the dataset: ``rows`` as plain JSON values by column, one per prompt of the step
    (before it is repeated for the group). ``group_ids``: the trainer's own name of each row's
    group, if it has one."""

    stage: ClassVar[Literal["sample"]] = "sample"
    rows: tuple[Mapping[str, Any], ...]
    group_ids: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class TemplateCall:
    """One conversation rendered. ``messages``: role and content as given, media as the path or
    ``"<array>"``. ``keywords``: of the call, plain values. ``texts``: the result, as a tuple even
    for one conversation; ``nested``: the result was a list."""

    stage: ClassVar[Literal["text"]] = "text"
    messages: tuple[Any, ...]
    keywords: Mapping[str, Any]
    texts: tuple[str, ...]
    nested: bool


@dataclass(frozen=True, slots=True, eq=False)
class MediumSeen:
    """One image, clip or waveform as passed to a processor.

    ``values``: the array as a tensor (image (3, h, w) or (h, w, 3) as given; clip (T, …); audio
    (n,)) if it is small enough to keep, else ``None``. ``shape``, ``dtype``, ``sha256`` of its
    bytes, ``low``, ``high``, ``mean``, ``std`` describe it either way.
    """

    modality: Modality
    values: Tensor | None
    shape: tuple[int, ...]
    dtype: str
    sha256: str
    low: float
    high: float
    mean: float
    std: float


@dataclass(frozen=True, slots=True, eq=False)
class ProcessorCall:
    """One call of the processor.

    ``texts``: prompts as passed; ``nested``: they were passed as a list of lists. ``images``,
    ``videos``, ``audios``: in call order. ``keywords``: all others, plain values. ``ignored``:
    keywords that no part of the processor takes. ``warnings``: issued while it ran. ``outputs``:
    tensors by name. ``padding_side``: of the tokenizer. ``error``: the exception it raised.
    ``opened``: media files that were opened since the call before, in order, each once.
    """

    stage: ClassVar[Literal["batch"]] = "batch"
    texts: tuple[str, ...]
    nested: bool
    images: tuple[MediumSeen, ...]
    videos: tuple[MediumSeen, ...]
    audios: tuple[MediumSeen, ...]
    keywords: Mapping[str, Any]
    ignored: tuple[str, ...]
    warnings: tuple[str, ...]
    outputs: Mapping[str, Tensor]
    padding_side: str
    error: str | None
    large: Mapping[str, TensorSeen] = field(default_factory=dict)
    digests: Mapping[str, Tensor] = field(default_factory=dict)
    opened: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class GenerateCall:
    """One call of ``generate``.

    ``inputs``: tensors by keyword. ``keywords``: the others, plain values. ``config``: the
    generation settings in force (eos and pad ids, temperature, top_k, top_p, do_sample, use_cache,
    max_new_tokens, num_return_sequences, suppress_tokens, repetition_penalty …). ``sequences``:
    (N, L + C), as returned. ``position_ids``: (3, N, L) of the prompt's pass as the text model got
    them, ``inputs_embeds``: (N, L, H) likewise where small enough. ``rope_deltas``: (N,) after it.
    ``first_logits``: float32 (N, V) after the prompt. ``cached``: tokens before the newest one that
    the model could see at each later step, in the cache or passed again (0: the model saw no
    history; ``None``: unknown, since its cache has a non-standard name). ``step_positions``: the
    first row's time position at each later step. ``logprobs``: float32 (N, C) of the sampled tokens
    from generate's own scores at the sampling temperature, before any suppression or truncation
    (after suppression, where a CUDA graph hides the scores); ``None`` with beams. ``decoded``: the
    completions as text by the recorded processor's own tokenizer, up to and without the first eos:
    ``"kept"`` with special tokens, ``"skipped"`` without; empty where it has none. ``own``: the
    recorded model ran it, not another instance of its class, such as a copy for rollouts.
    ``apart``: share of sampled weights being trained that this other has not, at the lower of
    their precisions; ``None`` where they cannot be compared.
    """

    stage: ClassVar[Literal["completion"]] = "completion"
    inputs: Mapping[str, Tensor]
    keywords: Mapping[str, Any]
    config: Mapping[str, Any]
    modes: Modes
    sequences: Tensor | None
    position_ids: Tensor | None
    inputs_embeds: Tensor | None
    rope_deltas: Tensor | None
    first_logits: Tensor | None
    cached: tuple[int | None, ...]
    step_positions: tuple[float, ...]
    logprobs: Tensor | None
    warnings: tuple[str, ...]
    error: str | None
    large: Mapping[str, TensorSeen] = field(default_factory=dict)
    digests: Mapping[str, Tensor] = field(default_factory=dict)
    decoded: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    own: bool = True
    apart: float | None = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class ForwardCall:
    """One forward outside generate.

    ``inputs``, ``keywords``, ``position_ids``, ``inputs_embeds`` as in :class:`GenerateCall`, over
    prompt and completion. ``logprobs``: float32 (N, length - 1): of each given token after the
    first, at temperature 1, from the logits before any scaling; NaN where only the last logits
    were requested (``logits_to_keep``). ``logits_dtype``: as returned. ``own``: the recorded model
    ran it, not another instance of its class, such as a reference. ``sampling_logprobs``: as
    ``logprobs``, of the distribution that the latest generate sampled from, at its temperature and
    without the ids it suppressed; of a head that makes no logits, the ``log_probs`` it returns.
    """

    stage: ClassVar[Literal["logits"]] = "logits"
    inputs: Mapping[str, Tensor]
    keywords: Mapping[str, Any]
    modes: Modes
    position_ids: Tensor | None
    inputs_embeds: Tensor | None
    logprobs: Tensor | None
    logits_dtype: str
    warnings: tuple[str, ...]
    error: str | None
    large: Mapping[str, TensorSeen] = field(default_factory=dict)
    digests: Mapping[str, Tensor] = field(default_factory=dict)
    own: bool = True
    sampling_logprobs: Tensor | None = None


@dataclass(frozen=True, slots=True)
class RewardCall:
    """One reward function. ``prompts`` and ``completions`` as text; ``columns``: its other
    arguments, plain values. ``values``: ``None`` where it could not score. ``source``: module and
    name. ``probe``: its scores of completions whose correct score is known; empty if it was not
    probed. By case name a mapping: ``value`` (all cases in one call) and ``alone`` (in a separate
    call), a number, ``None``, or the error as text; ``role``, ``form``, ``swallowed``,
    ``completion``, ``solution``, ``problem_type``, see :mod:`omni_grpo_core.recorder.probe`.
    ``caught``: how often it caught which exception, in its first call, if it asks others."""

    stage: ClassVar[Literal["reward"]] = "reward"
    name: str
    source: str
    prompts: tuple[str, ...]
    completions: tuple[str, ...]
    columns: Mapping[str, Any]
    values: tuple[float | None, ...]
    probe: Mapping[str, Any]
    error: str | None
    caught: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class AdvantageSeen:
    """``rewards``: (N,), as summed by the trainer. ``group_ids``: the group of each completion,
    according to the trainer. ``advantages``: (N,) or (N, C). ``scale``: ``"group"``, ``"batch"``,
    ``"none"``, or ``""`` if unknown. ``weights``: of each reward, by name. ``spans``: token mask
    (N, C) of each partial reward, by name. ``partial``: (N,), what each adds to the advantages of
    the tokens in its mask; a trainer's partial rewards before that are its reward calls."""

    stage: ClassVar[Literal["advantage"]] = "advantage"
    rewards: Tensor
    group_ids: tuple[str, ...]
    advantages: Tensor
    scale: str
    weights: Mapping[str, float]
    spans: Mapping[str, Tensor]
    partial: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class LossSeen:
    """The inputs of one loss. ``completion_ids``, ``mask``: (N, C), the tokens that counted.
    ``logprobs``, ``old_logprobs``, ``ref_logprobs``: (N, C). ``advantages``: (N,) or (N, C).
    ``loss``: the value that was backpropagated. ``requires_grad``: of that tensor. ``settings``:
    loss_type, beta, epsilon, temperature, normaliser … as the trainer names them, plain values.
    ``metrics``: logged with it by the trainer."""

    stage: ClassVar[Literal["loss"]] = "loss"
    completion_ids: Tensor | None
    mask: Tensor | None
    logprobs: Tensor | None
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    advantages: Tensor | None
    loss: float
    requires_grad: bool
    settings: Mapping[str, Any]
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, eq=False)
class LossGradient:
    """What one backward did to the logits of one scoring forward.

    A loss that is any function of the chosen tokens' logprobs has, at the logits ``l`` of a
    position, the gradient ``g = (w / T) (e_y - softmax(l / T))``. K: the last positions of the
    forward that have logits; the one at ``k`` predicts the token after it.

    ``forward``: number of the ForwardCall among those of this step, in order of return. ``at``:
    ``"logits"``, or ``"hidden"`` where a fused head makes none and the gradient was read at the
    last hidden state. ``tokens``: int64 (N, K), y: -1 where the gradient is 0. ``weights``: float32
    (N, K), w, the derivative of the loss by the token's logprob at ``temperature``; 0 where the
    gradient is 0. ``temperature``: float32 (N, K), T; NaN where it cannot be told. ``residual``:
    float32 (N, K), the part of ``|g|`` that is left. NaN where the gradient is 0, as is
    ``temperature``. ``entropy``: float32 (N, K), the derivative of the loss by the entropy of the
    distribution, where that explains what no function of the chosen token's logprob does; else 0.
    Only where a backward reaches the forward is there a value, be it of zeros.
    """

    stage: ClassVar[Literal["loss"]] = "loss"
    forward: int
    at: Literal["logits", "hidden"]
    tokens: Tensor
    weights: Tensor
    temperature: Tensor
    residual: Tensor
    entropy: Tensor


@dataclass(frozen=True, slots=True)
class GradientSeen:
    """A gradient in a few numbers, over at most 2,048 elements of each parameter, the same ones
    every time. ``norm``: L2. ``sums``: two sums with fixed signs; being linear, they can be scaled,
    accumulated and averaged over ranks. ``top``: the largest magnitude."""

    norm: float
    sums: tuple[float, ...]
    top: float


@dataclass(frozen=True, slots=True)
class LayerSeen:
    """One layer at an optimizer step; with several ranks, this rank's share.

    ``name``: ``"text layer 3"``, ``"vision merger"``, ``"adapter of text layer 3"``,
    ``"embeddings"``, ``"head"``. ``part``: ``"text"``, ``"vision"``, ``"audio"``, ``"head"`` or
    ``"adapter"``. ``elements`` of its parameters; those that are ``trainable``, and ``held`` by the
    optimizer with a learning rate in ``rates`` (each once). ``dtype``: of its weights.

    ``stale``: L2 norm of the gradient that was there before the step's first backward (sampled).
    ``backward``: the gradient after the last backward; ``before``: just before the optimizer's
    step; ``None`` where no parameter has one. ``norm``: L2 of the latter over all elements.
    ``odd``: parameters whose gradient is not the one of backward times the step's ``factor``, and
    by what it was multiplied beyond that: 0 if it was zeroed, -1 if negated, NaN if it is no
    multiple.

    ``moved``: share of sampled weights that the step changed; ``change``: L2 of their change,
    relative to the weights; ``between``: share that had changed since the end of the step before,
    ``None`` at the first; ``undone``: of all sampled, those that were again as before that step.
    ``size``: number of sampled weights. ``updates``: how often its optimizer has updated it, by the
    optimizer's own count; 0 where that keeps none. ``weights``: the sampled ones after the step,
    summed with fixed signs. ``sharded``: whether other ranks hold a share.
    ``apart``, of joined ranks that each hold the whole layer: the largest difference of their
    gradients, relative to these, and of their ``weights`` after the step.
    """

    name: str
    part: str
    elements: int
    trainable: int
    held: int
    rates: tuple[float, ...]
    dtype: str
    stale: float
    backward: GradientSeen | None
    before: GradientSeen | None
    norm: float
    odd: Mapping[str, float]
    size: int
    moved: float
    change: float
    between: float | None
    updates: int = 0
    undone: float = 0.0
    weights: float = 0.0
    sharded: bool = False
    apart: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True, slots=True)
class StepSeen:
    """One optimizer step.

    ``outcome``: ``"stepped"``; ``"skipped"`` by a gradient scaler; ``"never"``: the recording ended
    after a backward and before an optimizer stepped. ``losses``: every scalar on which backward was
    called since the last step. ``factor``: what all gradients were multiplied by between the last
    backward and the step (clipping, unscaling); ``None`` where there is no gradient. ``scale``: of
    the gradient scaler. ``rates``: learning rate of every parameter group; ``planned``: the one
    that its scheduler starts from, for groups that have one. ``others``: elements that the
    optimizers hold and the model does not. ``settings``: accumulation, batch size, group size … as
    the trainer names them. ``warnings`` issued anywhere since the last step. ``downhill``: share of
    the sampled weights that moved against their gradient, where the optimizer had no momentum, so
    that nothing but the gradient decides. ``kl_gaps``: of each KL to a reference that a loss holds
    in the form ``exp(reference - logprob)``, the largest ``|reference - logprob|``. ``dropped``:
    backwards whose gradients were gone before the next one of the step. ``ratio_to_itself``:
    whether a loss holds the ratio of a tensor to itself, neither detached.
    """

    stage: ClassVar[Literal["gradient"]] = "gradient"
    step: int
    outcome: Literal["stepped", "skipped", "never"]
    layers: tuple[LayerSeen, ...]
    losses: tuple[float, ...]
    factor: float | None
    scale: float | None
    rates: tuple[float, ...]
    planned: tuple[float, ...]
    others: int
    settings: Mapping[str, Any]
    warnings: tuple[str, ...]
    downhill: float | None = None
    kl_gaps: tuple[float, ...] = ()
    dropped: int = 0
    ratio_to_itself: bool = False

    @property
    def trainable(self) -> dict[str, int]:
        """Trainable elements by part."""
        return self._by_part("trainable")

    @property
    def held(self) -> dict[str, int]:
        """Elements that the optimizers hold, by part."""
        return self._by_part("held")

    def _by_part(self, name: str) -> dict[str, int]:
        found: dict[str, int] = {}
        for layer in self.layers:
            count: int = getattr(layer, name)
            if count:
                found[layer.part] = found.get(layer.part, 0) + count
        return found

    @property
    def grad_norms(self) -> dict[str, float]:
        """L2 norm of the gradient before the step, by part; parts without any are missing."""
        squares: dict[str, float] = {}
        for layer in self.layers:
            if layer.before is not None:
                squares[layer.part] = squares.get(layer.part, 0.0) + layer.norm**2
        return {part: square**0.5 for part, square in squares.items()}

    @property
    def changed(self) -> dict[str, bool]:
        """Whether any sampled weight that is trainable or held moved, by part."""
        found: dict[str, bool] = {}
        for layer in self.layers:
            if layer.size and (layer.trainable or layer.held):
                found[layer.part] = found.get(layer.part, False) or layer.moved > 0
        return found


Call = (
    SamplesSeen
    | TemplateCall
    | ProcessorCall
    | GenerateCall
    | ForwardCall
    | RewardCall
    | AdvantageSeen
    | LossSeen
    | LossGradient
    | StepSeen
)
"""The value of a stage record in a recorded trace; each member has the ``stage`` it belongs to."""
CALLS: tuple[type[Call], ...] = get_args(Call)
CallT = TypeVar("CallT", bound=Call)


def calls_of(trace: Trace, kind: type[CallT]) -> tuple[CallT, ...]:
    """The calls of one kind, in order."""
    return tuple(r.value for r in trace.stages if isinstance(r.value, kind))
