"""Files in, arrays out: every format, the right audio, everything in the right order."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.Image
import pytest
import torch
from media_files import (
    SMALL,
    conversation,
    load_audio,
    load_image,
    load_video,
    loudest_hertz,
    numbered,
    numbers,
    refused,
    tone,
    write_media,
)
from qwen_omni_utils.v2_5 import vision_process

from omni_grpo_core.core.media import MediaConfig, decoder_version, load_media, probe
from omni_grpo_core.errors import MediaError
from omni_grpo_core.types import Media, MediaPart, MediaRef

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


@pytest.mark.parametrize("name", ["c.wav", "c.mkv", "c.mov"])
def test_sound_of_any_number_of_channels(tmp_path: Path, name: str) -> None:
    """Eight channels or more crashed the interpreter: PyAV reads planes beyond the eighth out of
    bounds."""
    loudness = np.linspace(-0.9, 0.9, 64, dtype=np.float32)[:, None]
    for count in range(1, 65):
        channels = loudness[:count] * tone(0.02, 16_000)
        write_media(tmp_path / name, None, channels, audio_codec="pcm_f32le", audio_rate=16_000)
        found = load_audio(tmp_path / name).numpy()
        # the mean, up to float32 rounding of a sum of 64 numbers below one
        np.testing.assert_allclose(found, channels.mean(axis=0), atol=1e-6)


def test_surround_of_a_clip(tmp_path: Path) -> None:
    sound = tone(1.0, 48_000, channels=8)
    clip = write_media(tmp_path / "c.mp4", numbered(8), sound)
    assert loudest_hertz(load_audio(clip)) == pytest.approx(440, abs=1)


def test_an_absurdly_low_sampling_rate_is_refused(tmp_path: Path) -> None:
    """A header that stated 1 Hz turned a second of sound into three gigabytes."""
    write_media(tmp_path / "c.wav", None, tone(2.0, 100), audio_codec="pcm_s16le", audio_rate=100)
    assert "100 samples a second" in refused(tmp_path / "c.wav", "audio")


def test_sound_whose_timestamps_begin_late(tmp_path: Path) -> None:
    """A first timestamp of weeks produced weeks of silence before the sound."""
    clip = tmp_path / "c.mkv"
    write_media(clip, numbered(8), tone(0.5, 48_000), audio_codec="flac", audio_starts=3_601)
    assert "3601 s without sound" in refused(clip, "audio")
    write_media(clip, numbered(8), tone(0.5, 48_000), audio_codec="flac", audio_starts=20)
    assert len(load_audio(clip)) == pytest.approx(20.5 * 16_000, abs=16)  # mkv rounds to 1 ms


def test_a_gap_in_the_timestamps_is_silence(tmp_path: Path) -> None:
    """Such a track, as voice recorders write it, was reported as truncated; a short pause was
    dropped, and all later sound came early."""
    rate, pause = 16_000, 2.0
    with av.open(str(tmp_path / "c.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=rate, layout="mono")
        for number in range(20):  # a tenth of a second each, first loud, then half as loud
            level = 16_000 if number < 10 else 8_000
            samples = np.full((1, rate // 10), level, np.int16)
            block = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            block.sample_rate, block.time_base = rate, Fraction(1, rate)
            block.pts = number * rate // 10 + (0 if number < 10 else round(pause * rate))
            container.mux(stream.encode(block))
        container.mux(stream.encode(None))
    found = load_audio(tmp_path / "c.mkv")
    assert len(found) == pytest.approx((2 + pause) * rate, abs=16)  # mkv rounds to 1 ms
    # the resampler affects 50 samples around each edge
    assert (found[: rate - 50] > 0.4).all()
    assert (found[rate + 50 : 3 * rate - 50] == 0).all()
    assert (found[3 * rate + 50 :] > 0.2).all()


def test_stretch_of_audio(tmp_path: Path) -> None:
    samples = np.linspace(-1, 1, 16_000, dtype=np.float32)[None]
    path = write_media(
        tmp_path / "r.wav", None, samples, audio_codec="pcm_f32le", audio_rate=16_000
    )
    assert load_audio(path).numpy().tolist() == samples[0].tolist()
    assert load_audio(path, start=0.25, end=0.5).tolist() == samples[0, 4_000:8_000].tolist()
    # an end slightly beyond the file is its end
    assert load_audio(path, start=0.75, end=1.04).tolist() == samples[0, 12_000:].tolist()


@pytest.mark.parametrize(
    ("stretch", "heard", "silent"),
    [
        # 4 s of pictures, 0.5 s of sound: one hears silence where the track has ended
        ({"start": 2.0, "end": 4.0}, 0, 32_000),
        ({"start": 3.95, "end": 4.0}, 0, 800),
        ({"start": 0.25, "end": 1.25}, 4_000, 12_000),
        ({"start": 0.25}, 4_000, 56_000),
        ({"end": 0.55}, 8_000, 0),  # less than a tenth of a second: rounding
        ({}, 8_000, 0),
    ],
)
def test_a_stretch_past_the_end_of_a_track_is_silent(
    tmp_path: Path, stretch: dict[str, float], heard: int, silent: int
) -> None:
    """A row's stretch of a clip whose sound ends earlier was refused for having no sound."""
    clip = write_media(
        tmp_path / "c.mkv", numbered(32), np.full((1, 8_000), 0.5, np.float32),
        audio_codec="pcm_f32le", audio_rate=16_000,
    )  # fmt: skip
    assert load_audio(clip, **stretch).tolist() == [0.5] * heard + [0.0] * silent


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

    monkeypatch.setattr("omni_grpo_core.core.decode.av.open", counting)
    ref = MediaRef("video", clip)
    media = load_media(conversation(ref, ref, audio_in_video="interleaved"), SMALL)
    assert len(opened) == 3  # inspection, frames, audio
    # held in memory once: a clip takes gigabytes
    assert media.videos[0].frames is media.videos[1].frames
    assert media.audios[0].samples.data_ptr() == media.audios[1].samples.data_ptr()
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


@pytest.mark.parametrize("name", ["i.png", "i.webp"])
def test_broken_metadata_do_not_make_a_picture_bad(tmp_path: Path, name: str) -> None:
    pixels = np.full((56, 84, 3), 200, np.uint8)
    image = PIL.Image.fromarray(pixels)
    image.save(tmp_path / name, exif=b"Exif\0\0junkjunkjunk", lossless=True)
    assert (load_image(tmp_path / name) == 200).all()


@pytest.mark.parametrize(("dtype", "words"), [("float32", "float"), ("int32", "32-bit")])
def test_pixels_without_a_stated_range_are_refused(tmp_path: Path, dtype: str, words: str) -> None:
    """Both were read as black pictures."""
    pixels = np.ones((56, 84), dtype)
    PIL.Image.fromarray(pixels).save(tmp_path / "i.tif")
    assert f"{words} pixels without a stated range" in refused(tmp_path / "i.tif", "image")


@pytest.mark.parametrize(
    ("orientation", "white"),  # the corner where the camera's upper left is shown
    [(1, "upper left"), (2, "upper right"), (3, "lower right"), (6, "upper right")],
)
def test_photographs_as_frames_are_upright(tmp_path: Path, orientation: int, white: str) -> None:
    """PyAV has no name for EXIF: a clip of a camera's photographs raised its ValueError."""
    pixels = np.zeros((56, 84, 3), np.uint8)
    pixels[:28, :42] = 255
    exif = PIL.Image.Exif()
    exif[0x010F], exif[0x0112] = "Camera", orientation
    jpeg = BytesIO()
    PIL.Image.fromarray(pixels).save(jpeg, "jpeg", exif=exif)
    with av.open(str(tmp_path / "c.mov"), "w") as container:
        stream = container.add_stream("mjpeg", rate=4)
        stream.height, stream.width, stream.pix_fmt = 56, 84, "yuvj420p"
        for number in range(4):
            packet = av.Packet(jpeg.getvalue())
            packet.stream, packet.is_keyframe = stream, True
            packet.pts = packet.dts = number
            packet.duration, packet.time_base = 1, Fraction(1, 4)
            container.mux(packet)
    frame = load_video(tmp_path / "c.mov").frames[0, 0]
    half, middle = frame.shape[0] // 2, frame.shape[1] // 2
    light = {
        "upper left": frame[:half, :middle],
        "upper right": frame[:half, middle:],
        "lower left": frame[half:, :middle],
        "lower right": frame[half:, middle:],
    }
    assert [name for name, corner in light.items() if corner.mean() > 127] == [white]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_is_white(tmp_path: Path, mode: str) -> None:
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


def test_cover_picture_is_not_a_video(tmp_path: Path) -> None:
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


# --------------------------------------------------------------------------- side effects


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
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
        patch.setattr(vision_process, "fetch_video", broken)
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
        assert one.audios[0].samples.equal(other.audios[0].samples)
