"""Why two prompts differ: a change of one side's pieces that gives exactly the other side's ids."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, groupby

from omni_grpo_core.core.family import Family
from omni_grpo_core.parity.definition import CHUNK_SECONDS, ClipTokens, interleaved
from omni_grpo_core.parity.layout import Kind, Names, Piece, flat, parse
from omni_grpo_core.types import MODALITIES, Modality, Row

_MOST = 6_000
"""Combinations of two changes that are tried."""
_SECONDS = (1.0, 2.0, 0.5, 0.25, 4.0)
"""What libraries assume that a grid lasts: vLLM 1.0 and 2.0, transformers a pair of frames at 2 or
1 a second."""


_OWN = "as many placeholders as its own media need"

_CHUNKS = (1.0, 0.5, 4.0)
"""Other chunks that the frames and the sound of a clip are cut into."""


@dataclass(frozen=True, slots=True)
class Cause:
    """``name``: short, the same in every row. ``sentence``: what the second side did to what the
    first has, with its numbers."""

    name: str
    sentence: str


Pieces = tuple[Piece, ...]
Change = tuple[Cause, Pieces]


@dataclass(frozen=True, slots=True, eq=False)
class Prompts:
    """The two rows to be explained, and what their tokens mean."""

    a: Row
    b: Row
    names: Names
    family: Family
    merge: int


def explain_ids(prompts: Prompts, *, reworded: bool = False) -> tuple[Cause, ...]:
    """The change that makes ``a`` the ids of ``b``, and others that give the same here; else the
    two that do so one after the other; empty if none do, or the ids are equal. ``reworded``: of the
    media of ``a`` between the words of ``b``, where both have the same kinds of media in order."""
    want = tuple(prompts.b.input_ids.tolist())
    start: Pieces | None = parse(prompts.a.input_ids.tolist(), prompts.names)
    if reworded:
        start = _with_words_of(start or (), parse(want, prompts.names))
    return _explained(start, want, prompts) if start else ()


def _with_words_of(pieces: Pieces, others: Pieces) -> Pieces | None:
    """The media of one prompt between the words of another."""
    if [piece.kind for piece in pieces] != [piece.kind for piece in others]:
        return None
    return tuple(
        other if piece.kind == "text" else piece
        for piece, other in zip(pieces, others, strict=True)
    )


def _explained(start: Pieces, want: tuple[int, ...], prompts: Prompts) -> tuple[Cause, ...]:
    if tuple(flat(start)) == want:
        return ()
    first = list(_changes(start, prompts))
    alone: dict[str, Cause] = {}
    for cause, pieces in first:
        if _are(pieces, want):
            said = f"or, which gives the same here: {cause.sentence}" if alone else cause.sentence
            alone.setdefault(cause.name, replace(cause, sentence=said))
    if "media" in alone:  # it only follows from them; whatever else gives the same is chance
        return (replace(alone["media"], sentence=_OWN),)
    if alone:
        return tuple(alone.values())
    tried = 0
    for cause, pieces in first:
        for other, changed in _changes(pieces, prompts):
            tried += 1
            if _are(changed, want):
                return (cause, other)
            if tried > _MOST:
                return ()
    return ()


def _are(pieces: Pieces, want: tuple[int, ...]) -> bool:
    # the length first: thousands of combinations are tried
    length = sum(len(p.before) + len(p.body) + len(p.after) for p in pieces)
    return length == len(want) and tuple(flat(pieces)) == want


def _changes(pieces: Pieces, prompts: Prompts) -> Iterator[Change]:
    for make in (_laid_out, _as_item, _own_lengths, _dropped, _expanded, _marks, _moved, _cut):
        for cause, changed in make(pieces, prompts):
            if changed != pieces:
                yield cause, changed


def _each(
    pieces: Pieces, kinds: Iterable[Kind], change: Callable[[Piece], Iterable[Piece]]
) -> Pieces:
    chosen = set(kinds)
    return tuple(
        new for piece in pieces for new in (change(piece) if piece.kind in chosen else (piece,))
    )


# --------------------------------------------------------------------------- audio in video


def clips_of(row: Row, pieces: Sequence[Piece], names: Names, merge: int) -> list[ClipTokens]:
    """What each clip of a row consists of, by the row's own grids and seconds; audio tokens
    are counted in its piece. Empty where there are no grids for them."""
    grids = row.tensors.get("video_grid_thw")
    seconds = row.tensors.get("video_second_per_grid")
    videos = [piece for piece in pieces if piece.kind in ("video", "both")]
    if grids is None or len(grids) != len(videos):
        return []
    each = [1.0] * len(grids) if seconds is None else seconds.tolist()
    return [
        ClipTokens(
            time, high * wide // merge**2, lasts, piece.body.count(names.placeholder["audio"])
        )
        for (time, high, wide), lasts, piece in zip(grids.tolist(), each, videos, strict=True)
    ]


def _laid_out(pieces: Pieces, prompts: Prompts) -> Iterator[Change]:
    clips = clips_of(prompts.a, pieces, prompts.names, prompts.merge)
    if not clips or not any(piece.kind == "both" for piece in pieces):
        return
    true = ", ".join(dict.fromkeys(f"{clip.seconds:g}" for clip in clips))
    for seconds in _SECONDS:
        changed = _with_bodies(pieces, [_body(replace(c, seconds=seconds), prompts) for c in clips])
        yield (
            Cause(
                "seconds-per-grid",
                f"video and audio are ordered as if a grid lasted {seconds:g} s; it lasts {true} s",
            ),
            changed,
        )
    for chunk in _CHUNKS:
        cause = Cause("seconds-per-chunk", f"chunks of {chunk:g} s instead of {CHUNK_SECONDS:g} s")
        yield cause, _with_bodies(pieces, [_body(clip, prompts, chunk) for clip in clips])
    video, audio = (prompts.names.placeholder[kind] for kind in ("video", "audio"))
    for where, order in (("after", (video, audio)), ("before", (audio, video))):

        def sorted_by(piece: Piece, order: tuple[int, int] = order) -> list[Piece]:
            return [replace(piece, body=tuple(t for o in order for t in piece.body if t == o))]

        changed = _each(pieces, ["both"], sorted_by)
        name = f"the whole track is put {where} the frames instead of in between"
        yield Cause("audio-appended", name), changed


def _body(clip: ClipTokens, prompts: Prompts, chunk: float = CHUNK_SECONDS) -> tuple[int, ...]:
    if not clip.audio:
        return (prompts.names.placeholder["video"],) * (clip.grids * clip.per_grid)
    return tuple(
        token
        for kind, count in interleaved(clip, prompts.family, chunk)
        for token in (prompts.names.placeholder[kind],) * count
    )


def _with_bodies(pieces: Pieces, bodies: Sequence[tuple[int, ...]]) -> Pieces:
    """Pieces with these bodies for their clips, in order."""
    new = iter(bodies)
    return tuple(
        replace(piece, body=next(new)) if piece.kind in ("video", "both") else piece
        for piece in pieces
    )


def _as_item(pieces: Pieces, prompts: Prompts) -> Iterator[Change]:
    names = prompts.names

    def video(piece: Piece) -> Piece:
        return Piece(
            "video",
            tuple(t for t in piece.body if t == names.placeholder["video"]),
            tuple(t for t in piece.before if t not in names.audio),
            tuple(t for t in piece.after if t not in names.audio),
        )

    def sound(piece: Piece) -> Piece:
        body = tuple(t for t in piece.body if t == names.placeholder["audio"])
        return Piece("audio", body, names.audio[:1], names.audio[1:])

    yield (
        Cause("flag-lost", "the audio-in-video flag is lost: the track has no tokens"),
        _each(pieces, ["both"], lambda p: [video(p)]),
    )
    yield (
        Cause("audio-appended", "the track follows its video as an item instead of being inside"),
        _each(pieces, ["both"], lambda p: [video(p), sound(p)]),
    )
    yield (
        Cause("audio-appended", "the track stands before its video as an item"),
        _each(pieces, ["both"], lambda p: [sound(p), video(p)]),
    )


# --------------------------------------------------------------------------- numbers of tokens


def _own_lengths(pieces: Pieces, prompts: Prompts) -> Iterator[Change]:
    """As many tokens as the other side's own features need: the difference is in the media."""
    theirs, merge = prompts.b.tensors, prompts.merge
    counts: dict[Modality, list[int]] = {kind: [] for kind in MODALITIES}
    visual: tuple[Modality, ...] = ("image", "video")
    for kind in visual:
        grids = theirs.get(f"{kind}_grid_thw", ())
        counts[kind] = [int(grid.prod()) // merge**2 for grid in grids]
    if "feature_attention_mask" in theirs:
        frames = theirs["feature_attention_mask"].sum(-1).tolist()
        counts["audio"] = [prompts.family.audio_tokens(int(n)) for n in frames]
    needed = {
        kind: sum(piece.kind == kind or (piece.kind == "both" and kind != "image")
                  for piece in pieces)
        for kind in MODALITIES
    }  # fmt: skip
    if any(len(counts[kind]) != needed[kind] for kind in MODALITIES):
        return
    clips = clips_of(prompts.b, pieces, prompts.names, merge)
    taken = dict.fromkeys(MODALITIES, 0)
    changed: list[Piece] = []
    for piece in pieces:
        if piece.kind == "text":
            changed.append(piece)
            continue
        if piece.kind == "both":
            audio = counts["audio"][taken["audio"]]
            body = _body(replace(clips[taken["video"]], audio=audio), prompts)
            taken["audio"] += 1
            taken["video"] += 1
        else:
            body = (prompts.names.placeholder[piece.kind],) * counts[piece.kind][taken[piece.kind]]
            taken[piece.kind] += 1
        changed.append(replace(piece, body=body))
    yield Cause("media", _OWN), tuple(changed)


def _dropped(pieces: Pieces, prompts: Prompts) -> Iterator[Change]:
    present = sorted({piece.kind for piece in pieces} - {"text"})
    for size in range(1, len(present) + 1):
        for kinds in combinations(present, size):
            what = " and ".join("video with its track" if k == "both" else k for k in kinds)
            yield Cause("dropped", f"{what} dropped"), _each(pieces, kinds, lambda p: ())
            yield (
                Cause("dropped", f"placeholders of {what} dropped, their marks left"),
                _each(pieces, kinds, lambda p: [replace(p, body=())]),
            )
    media = [index for index, piece in enumerate(pieces) if piece.kind != "text"]
    for index in media if len(media) > 1 else ():
        kind = pieces[index].kind
        number = sum(piece.kind == kind for piece in pieces[:index])
        yield (
            Cause("dropped", f"{kind} item {number} dropped"),
            pieces[:index] + pieces[index + 1 :],
        )


def _expanded(pieces: Pieces, prompts: Prompts) -> Iterator[Change]:
    names = prompts.names
    kinds: list[tuple[str, tuple[Kind, ...]]] = [("", ("image", "video", "audio", "both"))]
    present = sorted({piece.kind for piece in pieces} - {"text"})
    kinds += [(f" of {kind}", (kind,)) for kind in present if len(present) > 1]
    for what, chosen in kinds:
        yield (
            Cause("not-expanded", f"placeholders{what} not expanded: one per item"),
            _each(pieces, chosen, lambda p: [replace(p, body=_first(p, names))]),
        )
        twice = Cause("expanded-twice", f"placeholders{what} expanded twice")
        for again in (_first_again, _left_behind, _left_inside):
            yield twice, _each(pieces, chosen, lambda p, again=again: [again(p, names)])  # type: ignore[misc]
        yield (
            twice,
            _each(pieces, chosen, lambda p: [replace(p, body=p.body * len(p.body))]),
        )
        yield twice, _each(pieces, chosen, lambda p: [replace(p, body=p.body * 2)])
        for name, said, change in _ON_RUNS:
            yield (
                Cause(name, f"placeholders{what} {said}"),
                _each(pieces, chosen, lambda p, change=change: [_by_run(p, change)]),  # type: ignore[misc]
            )
        for more, said in ((1, "one placeholder more"), (-1, "one placeholder less")):
            yield (
                Cause("off-by-one", f"{said} in every item{what}"),
                _each(
                    pieces,
                    chosen,
                    lambda p, more=more: [  # type: ignore[misc]
                        replace(p, body=p.body + p.body[-1:] if more > 0 else p.body[:-1])
                    ],
                ),
            )
    for old in MODALITIES:
        for new in MODALITIES:
            ids = {names.placeholder[old]: names.placeholder[new]}
            yield (
                Cause("wrong-placeholder", f"{new} placeholders where {old} belongs"),
                tuple(
                    replace(p, body=tuple(ids.get(t, t) for t in p.body)) if p.kind != "text" else p
                    for p in pieces
                ),
            )


def _first(piece: Piece, names: Names) -> tuple[int, ...]:
    modality: Modality = "video" if piece.kind == "both" else piece.kind  # type: ignore[assignment]
    return (names.placeholder[modality],)


_ON_RUNS: tuple[tuple[str, str, Callable[[int], int]], ...] = (
    ("not-expanded", "not expanded: one per run", lambda count: 1),
    ("expanded-twice", "expanded twice: the first of each run again", lambda count: 2 * count - 1),
    ("off-by-one", "one less in every run", lambda count: count - 1),
)
"""What happens to each run of frames or sound inside a clip, by the length that it has then."""


def _by_run(piece: Piece, length: Callable[[int], int]) -> Piece:
    runs = [(token, len(list(run))) for token, run in groupby(piece.body)]
    body = tuple(token for token, count in runs for _ in range(length(count)))
    return replace(piece, body=body) if piece.kind == "both" else piece


def _first_again(piece: Piece, names: Names) -> Piece:
    """The first placeholder of an expanded item taken for an unexpanded one and expanded."""
    inside, first = piece.body, _first(piece, names)[0]
    if first not in piece.body:
        return piece
    if piece.kind == "both":  # the marks of its sound come with the expansion
        inside = names.audio[:1] + piece.body + names.audio[1:]
    at = piece.body.index(first)
    return replace(piece, body=piece.body[:at] + inside + piece.body[at + 1 :])


def _left_behind(piece: Piece, names: Names) -> Piece:
    """A clip's own placeholders expanded by the sender, and the first again with its sound: the
    others are left behind the end of the sound."""
    first = _first(piece, names)[0]
    rest = (first,) * (piece.body.count(first) - 1)
    if piece.kind != "both" or piece.after[:1] != names.audio[1:]:
        return piece
    return replace(piece, after=piece.after[:1] + rest + piece.after[1:])


def _left_inside(piece: Piece, names: Names) -> Piece:
    """The same, left behind the last of its frames."""
    first = _first(piece, names)[0]
    if piece.kind != "both" or first not in piece.body:
        return piece
    end = len(piece.body) - piece.body[::-1].index(first)
    rest = (first,) * (piece.body.count(first) - 1)
    return replace(piece, body=piece.body[:end] + rest + piece.body[end:])


# --------------------------------------------------------------------------- marks, order, ends


def _marks(pieces: Pieces, prompts: Prompts) -> Iterator[Change]:
    names = prompts.names
    marks = {
        "begin of vision": names.vision[0], "end of vision": names.vision[1],
        "begin of audio": names.audio[0], "end of audio": names.audio[1],
    }  # fmt: skip
    for size in range(1, len(marks) + 1):
        for chosen in combinations(marks, size):
            ids = {marks[name] for name in chosen}
            cause = Cause("marks-dropped", f"{', '.join(chosen)} dropped")
            yield (
                cause,
                tuple(
                    replace(
                        p,
                        before=tuple(t for t in p.before if t not in ids),
                        after=tuple(t for t in p.after if t not in ids),
                        body=p.body if p.kind != "text" else tuple(
                            t for t in p.body if t not in ids
                        ),
                    )
                    for p in pieces
                ),
            )  # fmt: skip
    for twice in (lambda ids: ids * 2, lambda ids: tuple(t for t in ids for _ in range(2))):
        yield (
            Cause("marks-doubled", "the marks around media twice"),
            tuple(replace(p, before=twice(p.before), after=twice(p.after)) for p in pieces),
        )


def _moved(pieces: Pieces, prompts: Prompts) -> Iterator[Change]:
    media = [piece for piece in pieces if piece.kind != "text"]
    if len(media) > 1:
        order = iter(reversed(media))
        yield (
            Cause("reordered", "the media in reverse order"),
            tuple(next(order) if piece.kind != "text" else piece for piece in pieces),
        )


def _cut(pieces: Pieces, prompts: Prompts) -> Iterator[Change]:
    """What is not a matter of media: truncation and padding."""
    ids, want = flat(pieces), prompts.b.input_ids.tolist()
    lost = len(ids) - len(want)
    if lost > 0:
        for cut, end in ((ids[lost:], "first"), (ids[:-lost], "last")):
            yield (
                Cause("truncated", f"without its {end} {lost} tokens"),
                (Piece("text", tuple(cut)),),
            )
    if lost < 0:
        for padded, where in ((want[:-lost] + ids, "before"), (ids + want[lost:], "after")):
            around = want[:-lost] if where == "before" else want[lost:]
            if set(around) == {prompts.names.padding}:
                yield (
                    Cause("padded", f"{-lost} times the padding token {where} it, not masked"),
                    (Piece("text", tuple(padded)),),
                )
