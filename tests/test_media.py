"""Files in, arrays out: the right frames, the right sound, in the right order, or a MediaError."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.Image
import pytest
import torch
from media_files import conversation, lossless, numbered, numbers, tone, write_media
from qwen_omni_utils.v2_5 import vision_process
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

from omni_grpo_core import _qwen_utils
from omni_grpo_core.errors import ConfigError, MediaError
from omni_grpo_core.media import MediaConfig, decoder_version, load_media, probe
from omni_grpo_core.types import Audio, Media, MediaPart, MediaRef, Video

SMALL = MediaConfig(max_pixels=56 * 84, image_max_pixels=56 * 84)

CLIPS: dict[str, dict[str, Any]] = {
    "clip.mp4": {},
    "clip.mov": {"audio_rate": 44_100},
    "clip.mkv": {"video_codec": "mpeg4", "audio_codec": "flac"},
    "clip.webm": {"video_codec": "libvpx-vp9", "audio_codec": "libopus"},
    "clip.ts": {},
}
SOUNDS: dict[str, dict[str, Any]] = {
    "tone.wav": {"audio_codec": "pcm_s16le"},
    "tone-float.wav": {"audio_codec": "pcm_f32le", "audio_rate": 44_100},
    "tone.flac": {"audio_codec": "flac", "audio_rate": 44_100},
    "tone.mp3": {"audio_codec": "libmp3lame", "audio_rate": 44_100},
    "tone.m4a": {},
    "tone.ogg": {"audio_codec": "libopus"},
}


def load_video(path: Path, config: MediaConfig = SMALL, **stretch: float) -> Video:
    media = load_media(conversation(MediaRef("video", str(path), **stretch)), config)
    assert not media.images
    assert not media.audios
    return media.videos[0]


def load_audio(path: Path, **stretch: float) -> torch.Tensor:
    media = load_media(conversation(MediaRef("audio", str(path), **stretch)), SMALL)
    assert media.audios[0].from_video is None
    samples = media.audios[0].samples
    assert samples.dtype == torch.float32
    assert samples.ndim == 1
    return samples


def load_image(path: Path, config: MediaConfig = SMALL) -> torch.Tensor:
    pixels = load_media(conversation(MediaRef("image", str(path))), config).images[0].pixels
    assert pixels.dtype == torch.uint8
    return pixels


def loudest_hertz(samples: torch.Tensor) -> float:
    spectrum = torch.fft.rfft(samples).abs()
    return float(spectrum[1:].argmax() + 1) * 16_000 / len(samples)


# --------------------------------------------------------------------------- formats


@pytest.mark.parametrize("name", CLIPS)
def test_clip_formats(tmp_path: Path, name: str) -> None:
    options = CLIPS[name]
    rate = options.get("audio_rate", 48_000)
    clip = write_media(tmp_path / name, numbered(16), tone(2.0, rate, channels=2), **options)
    ref = MediaRef("video", str(clip))
    media = load_media(conversation(ref, audio_in_video="interleaved"), SMALL)
    (video,), (audio,) = media.videos, media.audios
    assert video.frames.shape == (4, 3, 56, 84)
    assert video.frames.dtype == torch.float32
    assert numbers(video.frames) == [0, 5, 10, 15]  # linspace(0, 15, 4)
    assert (video.sample_fps, video.source_fps, video.duration) == (2.0, 8.0, 2.0)
    assert audio.from_video == 0
    # codecs with blocks pad the last one: at most one block of 2,048 at 44.1 kHz
    assert 0 <= len(audio.samples) - 32_000 <= 800
    assert loudest_hertz(audio.samples) == pytest.approx(440, abs=1)  # bins are half a hertz wide
    # a sine of amplitude one half; lossy codecs move the energy by a few percent
    assert audio.samples[4_000:28_000].std() == pytest.approx(0.5 / math.sqrt(2), rel=0.05)


@pytest.mark.parametrize("name", SOUNDS)
def test_sound_formats(tmp_path: Path, name: str) -> None:
    options = SOUNDS[name]
    rate = options.get("audio_rate", 48_000)
    path = write_media(tmp_path / name, None, tone(1.0, rate, channels=2), **options)
    found = probe(path)
    assert (found.has_video, found.has_audio) == (False, True)
    assert found.duration == pytest.approx(1.0, abs=0.06)  # mp3 and aac pad to whole blocks
    samples = load_audio(path)
    assert -20 <= len(samples) - 16_000 <= 900
    assert loudest_hertz(samples) == pytest.approx(440, abs=2)


@pytest.mark.parametrize("name", ["page.png", "page.jpg", "page.webp"])
def test_image_formats(tmp_path: Path, name: str) -> None:
    pixels = np.full((56, 84, 3), (200, 100, 50), np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / name)
    found = load_image(tmp_path / name)
    assert found.shape == (3, 56, 84)
    # jpg and webp are lossy, by a level or two on a plain colour
    assert (found.float() - torch.tensor([200.0, 100.0, 50.0])[:, None, None]).abs().max() <= 3


def test_decoder_is_named(tmp_path: Path) -> None:
    media = load_media(conversation(), SMALL)
    assert media.decoder == decoder_version()
    assert media.decoder.startswith(f"pyav {av.__version__}, libavcodec ")


# --------------------------------------------------------------------------- frames


@pytest.mark.parametrize(("height", "width"), [(56, 84), (37, 53), (61, 45), (100, 31)])
def test_frames_are_those_of_a_plain_resize(tmp_path: Path, height: int, width: int) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (8, height, width, 3), np.uint8)
    clip = lossless(tmp_path / "clip.mkv", frames)
    video = load_video(clip, MediaConfig())
    size = vision_process.smart_resize(height, width, 28, 128 * 28 * 28, 768 * 28 * 28)
    wanted = resize(
        torch.from_numpy(frames).permute(0, 3, 1, 2)[[0, 2, 5, 7]],
        list(size),
        interpolation=InterpolationMode.BICUBIC,
        antialias=True,
    )
    assert video.frames.equal(wanted.float())


def test_same_frames_whatever_the_threads(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (16, 56, 84, 3), np.uint8)
    clip = write_media(tmp_path / "clip.mp4", frames)
    with av.open(str(clip)) as container:
        container.streams.video[0].thread_type = "NONE"
        container.streams.video[0].codec_context.thread_count = 1
        alone = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    video = load_video(clip, MediaConfig(fps=8, max_pixels=56 * 84))
    wanted = torch.from_numpy(np.stack(alone)).permute(0, 3, 1, 2)
    assert video.frames.equal(wanted.float())  # 56 x 84 stays as it is


@pytest.mark.parametrize(
    ("count", "config", "chosen", "sample_fps"),
    [
        # half the frames of two seconds at 8 fps
        (16, MediaConfig(fps=4, max_pixels=4704), [0, 2, 4, 6, 9, 11, 13, 15], 4.0),
        # more than there are: all of them, at the clip's own rate
        (16, MediaConfig(fps=60, max_pixels=4704), list(range(16)), 8.0),
        # two wanted by fps, four by min_frames
        (8, MediaConfig(max_pixels=4704), [0, 2, 5, 7], 4.0),
        # four wanted by fps, two allowed
        (16, MediaConfig(min_frames=2, max_frames=2, max_pixels=4704), [0, 15], 1.0),
        # an odd count gives up a frame: frames enter the model in pairs
        (3, MediaConfig(max_pixels=4704), [0, 2], 2 / 3 * 8),
        # a single frame is shown twice: sixteen frames a second of an eighth of a second
        (1, MediaConfig(max_pixels=4704), [0, 0], 16.0),
    ],
)
def test_number_of_frames_and_true_rate(
    tmp_path: Path, count: int, config: MediaConfig, chosen: list[int], sample_fps: float
) -> None:
    video = load_video(lossless(tmp_path / "clip.mkv", numbered(count)), config)
    assert numbers(video.frames) == chosen
    assert video.sample_fps == pytest.approx(sample_fps)
    assert len(video.frames) / video.sample_fps == pytest.approx(count / 8)
    assert video.duration == pytest.approx(count / 8)


def test_uneven_frames_are_chosen_by_time(tmp_path: Path) -> None:
    # five frames in the first half second, then one that stays for another two
    times = [0, 100, 200, 300, 400, 500, 2_500]
    clip = lossless(tmp_path / "clip.mkv", numbered(7), times_ms=times)
    video = load_video(clip, MediaConfig(fps=2.0, max_pixels=4704))
    # by number it would be 0, 2, 4, 6: the still two seconds would be a quarter of the clip
    assert numbers(video.frames) == [0, 5, 5, 5]
    assert len(video.frames) / video.sample_fps == pytest.approx(video.duration)
    assert video.duration == pytest.approx(2.5, abs=0.2)  # the last frame's length is not stored


def test_rates_of_rounded_timestamps_are_exact(tmp_path: Path) -> None:
    """Matroska rounds 1/30 s to 33 ms; the rate is still 30."""
    video = load_video(lossless(tmp_path / "clip.mkv", numbered(20), fps=30))
    assert video.source_fps == 30.0


def test_frames_whose_packets_have_no_time_of_display(tmp_path: Path) -> None:
    """AVI has no timestamps: frames stored out of order (B-frames) come with wrong ones."""
    clip = write_media(tmp_path / "clip.avi", numbered(16))
    with av.open(str(clip)) as container:
        times = [frame.time for frame in container.decode(video=0)]
    assert times != sorted(times)
    video = load_video(clip)
    assert numbers(video.frames) == [0, 5, 10, 15]
    assert (video.sample_fps, video.duration) == (2.0, 2.0)


def test_stretch_of_a_video(tmp_path: Path) -> None:
    clip = lossless(
        tmp_path / "clip.mkv", numbered(24), audio=tone(3.0, 48_000), audio_codec="flac"
    )
    video = load_video(clip, MediaConfig(fps=8, max_pixels=4704), start=1.0, end=2.0)
    # of the nine frames from 8 to 16 (the one that appears at the end is in) eight evenly
    assert numbers(video.frames) == [8, 9, 10, 11, 13, 14, 15, 16]
    assert video.duration == pytest.approx(9 / 8)
    assert numbers(load_video(clip, start=2.5).frames) == [20, 21, 22, 23]
    assert numbers(load_video(clip, end=0.4).frames) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("degrees", "hflip"), [(90, False), (180, False), (270, False), (0, True), (90, True)]
)
def test_rotation_is_applied(tmp_path: Path, degrees: int, hflip: bool) -> None:
    frames = np.zeros((4, 56, 84, 3), np.uint8)
    frames[:, :28, :42] = 250  # bright top left
    clip = write_media(tmp_path / "clip.mp4", frames, rotation=degrees, hflip=hflip)
    video = load_video(clip)
    upright = np.rot90(frames[0], degrees // 90)
    if hflip:
        upright = upright[:, ::-1]
    assert video.frames.shape[2:] == upright.shape[:2]
    bright = video.frames[0].mean(0) > 125
    # the edge of the bright corner is blurred by the codec: a few pixels of 4,704 may tip over
    assert (bright != torch.from_numpy(upright[:, :, 0] > 125)).sum() < 100


def test_crooked_display_matrix_is_refused(tmp_path: Path) -> None:
    clip = write_media(tmp_path / "clip.mp4", numbered(4), rotation=45)
    with pytest.raises(MediaError, match=r"display matrix of -?45"):
        load_video(clip)


def test_size_limits(tmp_path: Path) -> None:
    clip = lossless(tmp_path / "clip.mkv", numbered(4, 120, 160))
    assert load_video(clip, MediaConfig()).frames.shape[2:] == (280, 392)  # ≥ 128 tokens of 28 x 28
    assert load_video(clip, MediaConfig(max_pixels=80 * 80)).frames.shape[2:] == (56, 84)
    assert load_video(clip, MediaConfig(min_pixels=400_000)).frames.shape[2:] == (560, 756)
    fixed = MediaConfig(min_pixels=56 * 56, max_pixels=56 * 56)
    square = lossless(tmp_path / "square.mkv", numbered(4, 56, 56))
    assert load_video(square, fixed).frames.shape[2:] == (56, 56)


@pytest.mark.parametrize(
    "limits",
    [
        {"fps": 0.0},
        {"fps": math.nan},
        {"fps": math.inf},
        {"min_frames": 1},
        {"min_frames": 8, "max_frames": 4},
        {"max_pixels": 100},
        {"min_pixels": 10_000, "max_pixels": 5_000},
        {"image_min_pixels": 0},
    ],
)
def test_limits_that_cannot_work(limits: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="media "):
        MediaConfig(**limits)


# --------------------------------------------------------------------------- audio and order


@pytest.mark.parametrize(("seconds", "samples"), [(2.5, 40_000), (0.5, 8_000)])
def test_track_longer_or_shorter_than_its_video_is_kept(
    tmp_path: Path, seconds: float, samples: int
) -> None:
    clip = write_media(
        tmp_path / "clip.mkv", numbered(8), tone(seconds, 48_000), audio_codec="flac"
    )
    media = load_media(
        conversation(MediaRef("video", str(clip)), audio_in_video="interleaved"), SMALL
    )
    assert media.audios[0].samples.shape == (samples,)
    assert media.videos[0].duration == 1.0
    assert probe(clip).duration == pytest.approx(max(seconds, 1.0), abs=0.01)


def test_late_track_keeps_its_time(tmp_path: Path) -> None:
    clip = write_media(
        tmp_path / "clip.mkv",
        numbered(8),
        tone(0.5, 48_000),
        audio_codec="flac",
        audio_starts=0.25,
    )
    samples = load_audio(clip)
    assert len(samples) == pytest.approx(12_000, abs=16)  # 0.25 + 0.5 s; mkv rounds to 1 ms
    assert not samples[:3_980].any()
    assert samples[4_020:4_100].abs().max() > 0.4


def test_resampling_keeps_the_moment(tmp_path: Path) -> None:
    click = np.zeros((1, 44_100), np.float32)
    click[0, 22_050] = 1.0
    path = write_media(tmp_path / "c.wav", None, click, audio_codec="pcm_f32le", audio_rate=44_100)
    assert int(load_audio(path).abs().argmax()) == 8_000


def test_stereo_becomes_the_mean_of_its_channels(tmp_path: Path) -> None:
    left, right = tone(0.1, 16_000, hertz=500)[0], tone(0.1, 16_000, hertz=900)[0]
    path = write_media(
        tmp_path / "c.wav",
        None,
        np.stack([left, right]),
        audio_codec="pcm_f32le",
        audio_rate=16_000,
    )
    # float32 rounding of the mixing gains
    np.testing.assert_allclose(load_audio(path).numpy(), (left + right) / 2, atol=1e-6)


def test_stretch_of_audio(tmp_path: Path) -> None:
    samples = np.linspace(-1, 1, 16_000, dtype=np.float32)[None]
    path = write_media(
        tmp_path / "r.wav", None, samples, audio_codec="pcm_f32le", audio_rate=16_000
    )
    assert load_audio(path).numpy().tolist() == samples[0].tolist()
    assert load_audio(path, start=0.25, end=0.5).tolist() == samples[0, 4_000:8_000].tolist()
    # an end slightly beyond the file is its end
    assert load_audio(path, start=0.75, end=1.04).tolist() == samples[0, 12_000:].tolist()


def test_order_of_media(tmp_path: Path) -> None:
    first = write_media(tmp_path / "1.mp4", numbered(8), tone(1.0, 48_000, hertz=300))
    second = write_media(tmp_path / "2.mp4", numbered(8) + 9, tone(1.0, 48_000, hertz=900))
    sound = write_media(tmp_path / "3.wav", None, tone(1.0, 48_000, hertz=600), audio_codec="flac")
    PIL.Image.new("RGB", (56, 56), (1, 2, 3)).save(tmp_path / "4.png")
    media = load_media(
        conversation(
            MediaRef("video", str(first)),
            MediaRef("audio", str(sound)),
            MediaRef("image", str(tmp_path / "4.png")),
            MediaRef("video", str(second)),
            audio_in_video="interleaved",
        ),
        SMALL,
    )
    assert [audio.from_video for audio in media.audios] == [0, None, 1]
    assert [round(loudest_hertz(a.samples), -2) for a in media.audios] == [300, 600, 900]
    assert [float(v.frames[0].mean().round()) for v in media.videos] == [0.0, 9.0]
    assert media.images[0].pixels[:, 0, 0].tolist() == [1, 2, 3]
    assert media.sample_id == "sample"


def test_separate_track_is_an_audio_item_of_its_own(tmp_path: Path) -> None:
    clip = str(write_media(tmp_path / "c.mp4", numbered(16), tone(2.0, 48_000)))
    track = MediaPart(MediaRef("audio", clip, start=0.5, end=1.0), from_video=True)
    media = load_media(
        conversation(MediaRef("video", clip, 0.5, 1.0), track, audio_in_video="separate"), SMALL
    )
    assert [audio.from_video for audio in media.audios] == [None]
    assert media.audios[0].samples.shape == (8_000,)
    assert numbers(media.videos[0].frames) == [4, 5, 7, 8]


def test_off_reads_no_track(tmp_path: Path) -> None:
    clip = write_media(tmp_path / "c.mp4", numbered(8), tone(1.0, 48_000))
    assert load_media(conversation(MediaRef("video", str(clip))), SMALL).audios == ()


def test_text_only() -> None:
    media = load_media(conversation())
    assert (media.images, media.videos, media.audios) == ((), (), ())


def test_a_file_used_twice_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = str(write_media(tmp_path / "c.mp4", numbered(8), tone(1.0, 48_000)))
    opened = []
    plain_open = av.open

    def counting(*args: Any, **kwargs: Any) -> Any:
        opened.append(args)
        return plain_open(*args, **kwargs)

    monkeypatch.setattr("omni_grpo_core._decode.av.open", counting)
    ref = MediaRef("video", clip)
    media = load_media(conversation(ref, ref, audio_in_video="interleaved"), SMALL)
    assert len(opened) == 3  # looked into, frames, sound
    assert media.videos[0].frames.equal(media.videos[1].frames)
    assert media.audios[0].samples.equal(media.audios[1].samples)
    assert [audio.from_video for audio in media.audios] == [0, 1]


# --------------------------------------------------------------------------- images


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    pixels = np.zeros((56, 84, 3), np.uint8)
    pixels[:28, :42] = 255
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    PIL.Image.fromarray(pixels).save(tmp_path / "i.png", exif=exif)
    wanted = np.rot90(pixels, 3)
    assert load_image(tmp_path / "i.png").numpy().transpose(1, 2, 0).tolist() == wanted.tolist()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_lies_on_white(tmp_path: Path, mode: str) -> None:
    rgba = np.zeros((56, 56, 4), np.uint8)
    rgba[28:, :, 3] = 255  # upper half transparent black, lower half black
    image = PIL.Image.fromarray(rgba)
    name = "i.png"
    if mode == "PA":
        image, name = image.convert("RGB").quantize(2), "i.gif"
        image.putpixel((0, 0), 1)
        image.putpalette([0, 0, 0, 255, 0, 0])
        image.info["transparency"] = 1
        image.save(tmp_path / name, transparency=1)
        assert load_image(tmp_path / name)[:, 0, 0].tolist() == [255, 255, 255]
        return
    image.convert(mode).save(tmp_path / name)
    pixels = load_image(tmp_path / name)
    assert (pixels[:, 0] == 255).all()
    assert (pixels[:, -1] == 0).all()


def test_sixteen_bit_grey_is_scaled(tmp_path: Path) -> None:
    grey = np.full((56, 56), 128 * 256, np.uint16)
    PIL.Image.fromarray(grey).save(tmp_path / "i.png")
    assert (load_image(tmp_path / "i.png") == 128).all()


def test_image_limits(tmp_path: Path) -> None:
    PIL.Image.new("RGB", (300, 200)).save(tmp_path / "i.png")
    assert load_image(tmp_path / "i.png", MediaConfig()).shape == (3, 196, 308)
    assert load_image(tmp_path / "i.png", MediaConfig(image_max_pixels=2_000)).shape == (3, 28, 28)


# --------------------------------------------------------------------------- probe


def test_probe(tmp_path: Path) -> None:
    both = write_media(tmp_path / "both.mp4", numbered(8), tone(1.5, 48_000))
    mute = write_media(tmp_path / "mute.mp4", numbered(8))
    assert (probe(both).has_video, probe(both).has_audio) == (True, True)
    assert probe(both).duration == pytest.approx(1.5, abs=0.01)
    assert (probe(mute).has_video, probe(mute).has_audio) == (True, False)
    assert probe(mute).duration == 1.0


def test_cover_picture_is_no_video(tmp_path: Path) -> None:
    song = tmp_path / "song.mp3"
    with av.open(str(song), "w") as container:
        sound = container.add_stream("libmp3lame", rate=44_100, layout="mono")
        cover = container.add_stream("png", rate=1)
        cover.width = cover.height = 56
        cover.pix_fmt = "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        picture = av.VideoFrame.from_ndarray(numbered(1, 56, 56)[0], format="rgb24")
        container.mux(cover.encode(picture))
        container.mux(cover.encode(None))
        for start in range(0, 44_100, 1_152):
            block = av.AudioFrame.from_ndarray(
                tone(1_152 / 44_100, 44_100), format="fltp", layout="mono"
            )
            block.sample_rate, block.pts = 44_100, start
            container.mux(sound.encode(block))
        container.mux(sound.encode(None))
    assert not probe(song).has_video
    with pytest.raises(MediaError, match=r"song\.mp3: found a file without video"):
        load_video(song)


# --------------------------------------------------------------------------- bad input


def refused(path: Path | str, modality: Any, **stretch: float) -> str:
    """The message with which every way of reading this file refuses it."""
    with pytest.raises(MediaError) as caught:
        load_media(conversation(MediaRef(modality, str(path), **stretch)), SMALL)
    message = str(caught.value)
    assert message.startswith(f"media: {path}: found ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("modality", ["image", "video", "audio"])
def test_no_file_directory_empty_text(tmp_path: Path, modality: str) -> None:
    assert "no such file" in refused(tmp_path / "nothing.mp4", modality)
    assert "a directory" in refused(tmp_path, modality)
    empty, text = tmp_path / "empty.mp4", tmp_path / "text.mp4"
    empty.touch()
    assert "0 bytes" in refused(empty, modality)
    text.write_text("This is not a clip.\n" * 100)
    assert "cannot read" in refused(text, modality)


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = write_media(tmp_path / "c.mp4", numbered(4))
    plain_open = Path.open

    # root reads whatever its permissions say, so the system's answer is given here
    def denied(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self == clip:
            raise PermissionError(13, "Permission denied")
        return plain_open(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", denied)
    assert "Permission denied" in refused(clip, "video")


def test_index_missing(tmp_path: Path) -> None:
    """The index of an mp4 stands at its end: an aborted download has none."""
    whole = write_media(tmp_path / "w.mp4", numbered(16), tone(2.0, 48_000)).read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole[: len(whole) // 2])
    for modality in ("video", "audio"):
        assert "cannot read" in refused(cut, modality)
    with pytest.raises(MediaError):
        probe(cut)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("clip.mp4", {"options": {"movflags": "faststart"}}),
        ("clip.mkv", {"audio_codec": "flac"}),
        ("clip.webm", {"video_codec": "libvpx-vp9", "audio_codec": "libopus"}),
        ("clip.wav", {"audio_codec": "pcm_s16le"}),
        ("clip.flac", {"audio_codec": "flac"}),
    ],
)
def test_cut_off_in_the_middle(
    tmp_path: Path, name: str, options: dict[str, Any], share: float
) -> None:
    """libav reads such a file without a word and delivers fewer frames."""
    clip = tmp_path / name
    frames = None if name.endswith(("wav", "flac")) else numbered(16)
    whole = write_media(clip, frames, tone(2.0, 48_000), **options).read_bytes()
    clip.write_bytes(whole[: int(share * len(whole))])
    assert "cut off or broken" in refused(clip, "audio")
    if frames is not None:
        assert "cut off or broken" in refused(clip, "video")
    with pytest.raises(MediaError):
        probe(clip)


def test_damaged_in_the_middle(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (16, 56, 84, 3), np.uint8)
    clip = write_media(tmp_path / "c.mp4", frames, options={"movflags": "faststart"})
    data = bytearray(clip.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 4_000] = bytes(4_000)
    clip.write_bytes(data)
    refused(clip, "video")


def test_listed_as_what_it_is_not(tmp_path: Path) -> None:
    mute = write_media(tmp_path / "mute.mp4", numbered(8))
    sound = write_media(tmp_path / "s.wav", None, tone(1.0, 16_000), audio_codec="pcm_s16le")
    image = tmp_path / "i.png"
    PIL.Image.new("RGB", (56, 56)).save(image)
    assert "without video" in refused(sound, "video")
    assert "no audio track" in refused(mute, "audio")
    assert "cannot read as an image" in refused(mute, "image")
    assert "cannot read as an image" in refused(sound, "image")
    assert "not a clip or a recording" in refused(image, "video")
    assert "not a clip or a recording" in refused(image, "audio")


def test_terminal_art_is_no_clip(tmp_path: Path) -> None:
    """libav plays any .txt as a video of a terminal."""
    notes = tmp_path / "notes.txt"
    notes.write_text("a note\n" * 50)
    refused(notes, "video")


def test_interleaved_without_a_track(tmp_path: Path) -> None:
    mute = write_media(tmp_path / "mute.mp4", numbered(8))
    with pytest.raises(MediaError, match="no audio track"):
        load_media(conversation(MediaRef("video", str(mute)), audio_in_video="interleaved"), SMALL)


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (0.5, 0.5),
        (0.8, 0.2),
        (-0.1, 0.5),
        (1.0, 2.0),
        (5.0, 6.0),
        (0.0, 1.2),
        (math.nan, 1.0),
        (0.0, math.nan),
        (0.0, math.inf),
        (0.0, 0.0),
    ],
)
@pytest.mark.parametrize("modality", ["video", "audio"])
def test_stretch_outside_the_file(tmp_path: Path, modality: str, start: float, end: float) -> None:
    clip = write_media(tmp_path / "c.mkv", numbered(8), tone(1.0, 48_000), audio_codec="flac")
    assert "the stretch from" in refused(clip, modality, start=start, end=end)


def test_stretch_in_which_there_is_nothing(tmp_path: Path) -> None:
    clip = write_media(tmp_path / "c.mkv", numbered(8), tone(3.0, 48_000), audio_codec="flac")
    assert "no frame from 2.0 to 2.5" in refused(clip, "video", start=2.0, end=2.5)
    assert load_audio(clip, start=2.0, end=2.5).shape == (8_000,)
    short = write_media(tmp_path / "d.mkv", numbered(8), tone(0.5, 48_000), audio_codec="flac")
    assert "no sound from 0.7 to 0.9" in refused(short, "audio", start=0.7, end=0.9)


def test_image_with_a_stretch(tmp_path: Path) -> None:
    PIL.Image.new("RGB", (56, 56)).save(tmp_path / "i.png")
    assert "without start and end" in refused(tmp_path / "i.png", "image", end=1.0)


def test_image_bomb(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.png"
    PIL.Image.new("1", (20_000, 20_000)).save(bomb)
    assert "absurd size" in refused(bomb, "image")
    PIL.Image.new("1", (9_000, 8_000)).save(bomb)  # below Pillow's own limit
    assert "9000 x 8000 pixels" in refused(bomb, "image")


def test_slivers(tmp_path: Path) -> None:
    PIL.Image.new("RGB", (2_010, 10)).save(tmp_path / "i.png")
    assert "2010 x 10 pixels" in refused(tmp_path / "i.png", "image")
    PIL.Image.new("RGB", (1_900, 10)).save(tmp_path / "j.png")
    # within the library's ratio, but nothing of ten pixels is left within 4,704
    assert "1900 x 10 pixels" in refused(tmp_path / "j.png", "image")
    clip = lossless(tmp_path / "c.mkv", numbered(4, 2, 500))
    assert "500 x 2 pixels" in refused(clip, "video")


def test_cut_off_image(tmp_path: Path) -> None:
    image = tmp_path / "i.png"
    noise = np.random.default_rng(0).integers(0, 256, (56, 56, 3), np.uint8)
    PIL.Image.fromarray(noise).save(image)
    image.write_bytes(image.read_bytes()[:2_000])
    assert "cannot read as an image" in refused(image, "image")


def test_samples_that_are_no_numbers(tmp_path: Path) -> None:
    wave = tone(0.1, 16_000)
    wave[0, 100] = np.nan
    path = write_media(tmp_path / "n.wav", None, wave, audio_codec="pcm_f32le", audio_rate=16_000)
    assert "NaN" in refused(path, "audio")


def test_odd_names_are_only_names(tmp_path: Path) -> None:
    for name in ("a:b.mp4", "50%d off.mp4", "-i.mp4", "клип 1.mp4", "pipe:0.mp4"):
        clip = write_media(tmp_path / "c.mp4", numbered(4)).rename(tmp_path / name)
        assert load_video(clip).frames.shape[0] == 4


def test_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_media(tmp_path / "c.mp4", numbered(4))
    monkeypatch.chdir(tmp_path)
    assert load_video(Path("c.mp4")).frames.shape[0] == 4


# --------------------------------------------------------------------------- manners


def test_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    clip = write_media(tmp_path / "c.mp4", numbered(8), tone(1.0, 48_000))
    PIL.Image.new("RGB", (300, 200)).save(tmp_path / "i.png")
    broken = tmp_path / "b.mp4"
    broken.write_bytes(clip.read_bytes()[:900])
    load_media(
        conversation(
            MediaRef("video", str(clip)),
            MediaRef("image", str(tmp_path / "i.png")),
            audio_in_video="interleaved",
        ),
        MediaConfig(fps=30, max_pixels=10_000_000),
    )
    refused(broken, "video")
    assert capfd.readouterr() == ("", "")


def test_library_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def state() -> tuple[Any, ...]:
        return (
            vision_process.get_video_reader_backend,
            dict(vision_process.VIDEO_READER_BACKENDS),
            vision_process.logger.level,
        )

    before = state()
    load_video(write_media(tmp_path / "c.mp4", numbered(4)))
    assert state() == before
    clip = write_media(tmp_path / "d.mp4", numbered(4))
    media = conversation(MediaRef("video", str(clip)))

    def broken(*_: Any, **__: Any) -> None:
        assert state() != before
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(_qwen_utils, "process_mm_info", broken)
        with pytest.raises(ZeroDivisionError):
            load_media(media, SMALL)
    assert state() == before


def test_many_at_once(tmp_path: Path) -> None:
    clips = [
        write_media(tmp_path / f"{i}.mp4", numbered(8) + 3 * i, tone(1.0, 48_000)) for i in range(6)
    ]

    def load(clip: Path) -> Media:
        ref = MediaRef("video", str(clip))
        return load_media(conversation(ref, audio_in_video="interleaved"), SMALL)

    alone = [load(clip) for clip in clips]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(load, clips))
    for one, other in zip(alone, together, strict=True):
        assert one.videos[0].frames.equal(other.videos[0].frames)
        assert same_sound(one.audios[0], other.audios[0])


def same_sound(one: Audio, other: Audio) -> bool:
    return one.samples.equal(other.samples)
