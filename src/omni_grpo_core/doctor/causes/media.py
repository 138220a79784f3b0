"""Causes of faults in media on their way to the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from omni_grpo_core.doctor.evidence import Case, Evidence, Explanation, Rule
from omni_grpo_core.doctor.signatures import Signature, only_fits, reproduced, rule_of
from omni_grpo_core.pipeline.hints import FIXES

_INT16 = 32_000
"""Factors from which samples were never divided."""


def rule_missing(case: Case, evidence: Sequence[Evidence]) -> Iterator[Explanation]:
    """Media that never reach the processor."""
    lost = [e for e in evidence if e.fact == "media-missing" and e.origin != "inherited"]
    kinds = sorted({str(e.values["modality"]) for e in lost})
    if not kinds:
        return
    both = {"video", "audio"} <= set(kinds)
    yield Explanation(
        cause="media.images-only" if both else f"media.{kinds[0]}-dropped",
        stage="media",
        seen="; ".join(e.sentence for e in lost),
        harm="the model is asked about media that it does not get",
        fix=f"pass {' and '.join(kinds)} to the processor as well",
        confirm="compare the number of media in the messages and in the call",
        proof=lost[0].sentence,
        explains=tuple(lost),
    )


_TABLE = (
    Signature(
        cause="media.swapped",
        fact="media-swapped",
        harm="each question is asked about another sample's media: accuracy is at chance, and "
        "nothing is raised",
        fix="keep text and media of a sample together until the processor call; never sort or "
        "cache one without the other",
        confirm="print row {row}'s file name with its question: it should be {file}, it is {shown}",
    ),
    Signature(
        cause="media.fps-ignored",
        fact="rate-differs",
        harm="the clip seems to play at another speed: time positions of all frames are off, and "
        "an interleaved track is out of step with its frames",
        fix="pass the real sampling rate, fps={true:g}, to the processor (one number, not a list)",
        confirm="video_second_per_grid must be 2 / {true:g} s",
    ),
    Signature(
        cause="media.frames-clamped",
        fact="limit-ignored",
        harm="more frames than configured: longer prompts, more memory, and a frame rate other "
        "than expected",
        fix="pass max_frames to the reader that samples (the message, or process_mm_info), not to "
        "the processor, which gets {got} sampled frames",
        confirm="video_grid_thw[:, 0] * 2 must be at most {told}",
        when=lambda e: e.values["limit"] == "max_frames",
    ),
    Signature(
        cause="media.pixels-ignored",
        fact="limit-ignored",
        harm="frames are larger than configured: many times the tokens, and out of memory",
        fix="pass max_pixels to the reader that resizes (the message's own max_pixels), not to the "
        "processor, which gets frames of {got} pixels",
        confirm="the processor's frames must have at most {told} pixels",
        when=lambda e: e.values["limit"] == "max_pixels",
    ),
    Signature(
        cause="media.pixels-ignored",
        fact="picture-size",
        harm="the prompt has a different length than the settings give, with pictures at a size "
        "that the checkpoint was not configured for",
        fix="set the size where pictures are resized: the settings give {want}, the call got {got}",
        confirm="print the shape of what the reader returns",
        prove=only_fits,
    ),
    Signature(
        cause="media.blank",
        fact="medium-blank",
        harm="the model sees nothing and learns to guess",
        fix=FIXES["media.blank"],
        confirm="look at the frames: omni-grpo check --html shows them",
    ),
    Signature(
        cause="media.silent",
        fact="medium-silent",
        harm="the model hears nothing and learns to guess",
        fix=FIXES["media.silent"],
        confirm="listen to the samples that the reader returns",
    ),
    Signature(
        cause="media.channels-swapped",
        fact="content-changed",
        harm="red and blue are swapped: every answer about colour is wrong",
        fix="convert BGR to RGB after cv2: frame[:, :, ::-1]",
        confirm="with channels reversed the frames equal the file's",
        when=reproduced("channels-swapped"),
    ),
    Signature(
        cause="media.library-decoder",
        fact="frames-sampled",
        harm="the frames are earlier than qwen-omni-utils' by up to a frame interval, and the "
        "decoder is whichever is installed: torchcodec on the machine's FFmpeg, or another",
        fix="decode the clip yourself and pass frames (qwen-omni-utils, or PyAV), in training and "
        "evaluation alike; or evaluate through the processor too",
        confirm="the frames are those at k * total // n, not at linspace(0, total - 1, n)",
        when=lambda e: e.values["how"] == "library",
        prove=only_fits,
    ),
    Signature(
        cause="media.decoder-differs",
        fact="frames-sampled",
        harm="the frames are not from the times that the positions encode, and depend on the "
        "backend that a machine has installed",
        fix="pin the reader (FORCE_QWENVL_VIDEO_READER, or decode with PyAV yourself) and use the "
        "same in training and evaluation",
        confirm="decode {file} with both readers and subtract",
        when=lambda e: e.values["how"] == "one-before",
    ),
    Signature(
        cause="media.sampling-rate",
        fact="sound-changed",
        harm="the sound plays slower or faster by a factor of {factor:.2f}, and the track is "
        "longer or shorter than its video by as much",
        fix="resample to 16,000 Hz, for example librosa.load(path, sr=16000)",
        confirm="len(samples) / 16000 must be the length of {file} in seconds",
        when=reproduced("resampled"),
    ),
    Signature(
        cause="media.sampling-rate",
        fact="sound-length",
        harm="the sound plays slower or faster by a factor of {factor:.2f}, and the track is "
        "longer or shorter than its video by as much",
        fix="resample to 16,000 Hz, for example librosa.load(path, sr=16000)",
        confirm="len(samples) / 16000 must be the length of {file} in seconds",
        prove=only_fits,
    ),
    *(
        Signature(
            cause="media.never-divided",
            fact=fact,
            harm="every mel feature is louder than any sound that the model was trained on",
            fix="divide int16 samples by 32768, or read the file as float32",
            confirm="samples lie between -1 and 1",
            when=when,
        )
        for fact, when in (
            ("never-divided", lambda e: True),
            ("sound-changed", lambda e: abs(e.values.get("times", 1)) > _INT16),
        )
    ),
    Signature(
        cause="media.frames-order",
        fact="frames-order",
        harm="what moves left seems to move right, and nothing that happens in the clip has its "
        "order: positions tell the model that the first frame comes first",
        fix="pass the frames in the file's order: sort frame numbers before decoding, and look for "
        "a reversed or shuffled list on their way",
        confirm="the frames' numbers in the file rise: {numbers}",
        when=lambda e: not e.values.get("reproduced"),
    ),
    Signature(
        cause="media.frames-duplicated",
        fact="frames-repeated",
        harm="the clip jumps and stands still in turn, and shows half the moments, or fewer, that "
        "its tokens could",
        fix="read a frame for each number that was sampled; do not fill a clip up with copies "
        "where the file has more frames",
        confirm="the frames' numbers in the file rise: {numbers}",
    ),
    Signature(
        cause="media.frames-frozen",
        fact="frames-frozen",
        harm="the clip stands still: no question about motion can be answered",
        fix="read the frames at the numbers that were sampled, not the first one each time",
        confirm="two frames of the clip differ",
    ),
)

TABLES = (_TABLE,)
RULES: tuple[Rule, ...] = (
    rule_missing,
    rule_of("causes_in_media", _TABLE),
)
