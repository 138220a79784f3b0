"""Two paths' traces, row by row: where they first differ, why, and who is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from omni_grpo_core.errors import ConfigError
from omni_grpo_core.golden.results import PromptTokens, Tokens
from omni_grpo_core.parity.given import Given, Setup
from omni_grpo_core.parity.ids_causes import Cause, Prompts, explain_ids
from omni_grpo_core.parity.layout import Names, described, names_of, parse
from omni_grpo_core.parity.media_causes import alike, explain_media
from omni_grpo_core.parity.results import FirstToken, ParityReport, RowResult, RowVerdict
from omni_grpo_core.parity.right import position_ids, right_order, right_positions
from omni_grpo_core.parity.text_causes import UNNAMED, explain_text
from omni_grpo_core.tolerances import FEATURES, Tolerances
from omni_grpo_core.trace.compare import compare
from omni_grpo_core.trace.divergence import Difference, StageComparison
from omni_grpo_core.trace.store import value_at
from omni_grpo_core.types import Prompt, Row, StageRecord, Trace

_TOLERANCES = Tolerances({"float32": FEATURES})
_SHOWN = 6
"""Tokens decoded from the first difference on."""
Givens = Callable[[int], Given | None]
"""The row of a number, for media that are read again."""


def compare_paths(
    a: Sequence[Trace],
    b: Sequence[Trace],
    setup: Setup,
    givens: Givens = lambda number: None,
) -> ParityReport:
    """Raises :class:`~omni_grpo_core.errors.ConfigError` if the traces are not of the same rows."""
    ids = [[trace.header["sample_id"] for trace in side] for side in (a, b)]
    if ids[0] != ids[1] or not a:
        odd = next(((x, y) for x, y in zip(*ids, strict=False) if x != y), None)
        raise ConfigError(
            "input paths",
            got=f"row {odd[1]} where the first has {odd[0]}" if odd
            else f"{len(b)} rows where the first has {len(a)}",
            want="the same rows, at least one",
            fix="make both from the same --data and --limit",
        )  # fmt: skip
    rows = tuple(
        _row(one, other, (a, b), setup, lambda number=number: givens(number))  # type: ignore[misc]
        for number, (one, other) in enumerate(zip(a, b, strict=True))
    )
    return ParityReport(
        a[0].header["path"], b[0].header["path"], _header(a[0]), _header(b[0]), rows
    )


def _header(trace: Trace) -> dict[str, str]:
    own = ("sample_id", "shows", "error", "path")
    return {key: value for key, value in trace.header.items() if key not in own}


def _row(
    a: Trace,
    b: Trace,
    every: tuple[Sequence[Trace], Sequence[Trace]],
    setup: Setup,
    given: Callable[[], Given | None],
) -> RowResult:
    """``every``: all rows of both sides, of which a row may be another."""
    sample = a.header["sample_id"]
    names = names_of(setup.processor)
    errors = {side: trace.header["error"] for side, trace in (("a", a), ("b", b))
              if "error" in trace.header}  # fmt: skip
    media = [
        "" if "error" in trace.header
        else described(value_at(trace, "batch", Row).input_ids.tolist(), names)
        for trace in (a, b)
    ]  # fmt: skip
    if errors:
        side, error = next(iter(errors.items()))
        path = (a if side == "a" else b).header["path"]
        both = "; the other too" if len(errors) == 2 else ""
        if error == "StopIteration":  # all that transformers' omni processors say of it
            error += ": media and placeholders disagree in number"
        cause = Cause("raised", f"{path} raised {error}{both}")
        return RowResult(sample, "failed", "batch", cause.sentence, (cause,), media[0], media[1])
    one, other = _comparable(a, b)
    stages = compare(one, other, _TOLERANCES, setup.policy.decode).stages
    first = next((stage for stage in stages if stage.verdict == "differs"), None)
    rows = value_at(a, "batch", Row), value_at(b, "batch", Row)
    result = RowResult(
        sample,
        _verdict(stages),
        first.stage if first else "",
        _differing(first)[0].sentence if first else "",
        (),
        media[0],
        media[1],
        stages,
    )
    if first is None:
        return result
    right, why = right_order(rows, names, setup)
    if first.stage == "positions":
        right, why = right_positions(one, other, rows[0], names, setup)
    if b.header["path"] == "ours" != a.header["path"]:  # a mistake is a change of the sound side
        sides, seen = (other, one, every[1]), (rows[1], rows[0])
        found = [
            replace(cause, sentence=f"with the two exchanged: {cause.sentence}")
            for cause in _causes(*sides, stages, seen, names, setup, given)
        ]
    else:
        found = list(_causes(one, other, every[0], stages, rows, names, setup, given))
    # placeholders follow from the media: said where nothing else is
    beside = tuple(cause for cause in found if cause.name != "media")
    return replace(
        result,
        causes=beside or tuple(found),
        token=_first_token(rows, setup),
        right=right,
        why=why,
        prompt=PromptTokens(sample, *(_tokens(row, setup) for row in rows)),
    )


def _verdict(stages: Sequence[StageComparison]) -> RowVerdict:
    verdicts = {stage.verdict for stage in stages}
    return "differs" if "differs" in verdicts else "within" if "within" in verdicts else "equal"


def _comparable(a: Trace, b: Trace) -> tuple[Trace, Trace]:
    """What both sides show: a running engine has only ids; positions may be unknown; a waveform is
    seen where a feature extractor heard it."""
    ids_only = "ids" in (a.header["shows"], b.header["shows"])
    both = {record.stage for record in a.stages} & {record.stage for record in b.stages}

    def kept(trace: Trace, other: Trace) -> Trace:
        records: list[StageRecord[object]] = []
        for record in trace.stages:
            if record.stage not in both:
                continue
            value = record.value
            if isinstance(value, Row) and ids_only:
                value = replace(value, spans=(), tensors={}, audio_in_video="off")
            elif record.stage == "media" and isinstance(value, dict):
                value = _heard_by_both(value, other)
            checks = () if ids_only else record.checks
            records.append(StageRecord(record.stage, value, checks, 0.0))
        return Trace(trace.header, tuple(records))

    return kept(a, b), kept(b, a)


def _heard_by_both(items: Mapping[str, Tensor], other: Trace) -> dict[str, Tensor]:
    unheard = "input_features" in value_at(other, "batch", Row).tensors and not any(
        name.startswith("audio") for name in _items(other)
    )
    return {
        name: value for name, value in items.items()
        if not (unheard and name.startswith("audio"))
    }  # fmt: skip


def _items(trace: Trace) -> Mapping[str, Tensor]:
    found = next((record.value for record in trace.stages if record.stage == "media"), {})
    return found if isinstance(found, dict) else {}


def _differing(stage: StageComparison) -> list[Difference]:
    return [d for d in stage.differences if d.verdict == "differs"]


def _tokens(row: Row, setup: Setup) -> Tokens:
    ids = tuple(row.input_ids.tolist())
    return Tokens(ids, tuple(setup.policy.decode([token]) for token in ids), row.spans)


def _first_token(rows: tuple[Row, Row], setup: Setup) -> FirstToken | None:
    was, now = (row.input_ids.tolist() for row in rows)
    if was == now:
        return None
    short = min(len(was), len(now))
    index = next((n for n in range(short) if was[n] != now[n]), short)
    shown = (setup.policy.decode(side[index : index + _SHOWN]) for side in (was, now))
    return FirstToken(index, *shown)


# --------------------------------------------------------------------------- causes


def _causes(
    a: Trace,
    b: Trace,
    every: Sequence[Trace],
    stages: Sequence[StageComparison],
    rows: tuple[Row, Row],
    names: Names,
    setup: Setup,
    given: Callable[[], Given | None],
) -> Iterator[Cause]:
    differs: dict[str, StageComparison] = {
        stage.stage: stage for stage in stages if stage.verdict == "differs"
    }
    own = a.header["sample_id"]
    rest = [t for t in every if t.header["sample_id"] != own and "error" not in t.header]
    # rows on other media can have the same ids
    for trace in () if torch.equal(rows[0].input_ids, rows[1].input_ids) else rest:
        if torch.equal(value_at(trace, "batch", Row).input_ids, rows[1].input_ids):
            yield Cause("another-row", f"the ids are those of row {trace.header['sample_id']}")
            return
    yield from _prompts(a, b, rows, differs, names, setup)
    if "media" in differs:
        others = {
            f"{item} of row {trace.header['sample_id']}": value
            for trace in rest
            for item, value in _items(trace).items()
        }
        yield from explain_media(_items(a), _items(b), given(), setup, others)
    if "batch" in differs:
        yield from _tensors(rows, differs)
    if "positions" in differs and torch.equal(rows[0].input_ids, rows[1].input_ids):
        yield from _positions(a, b, rows[0], names)


def _prompts(
    a: Trace,
    b: Trace,
    rows: tuple[Row, Row],
    differs: Mapping[str, StageComparison],
    names: Names,
    setup: Setup,
) -> Iterator[Cause]:
    """Differences of texts and ids. A text that is only shown gives way to a named change of ids:
    the ids are all that is known, and the text is read from them."""
    texts = (
        list(explain_text(value_at(a, "text", Prompt).text, value_at(b, "text", Prompt).text))
        if "text" in differs
        else []
    )
    named = [cause for cause in texts if cause.name != UNNAMED]
    merge = int(setup.processor.image_processor.merge_size)
    prompts = Prompts(*rows, names, setup.policy.family, merge)
    tokens = [] if texts else list(_other_tokens(rows, names, setup))
    explained = tokens or (texts and named == texts)
    alone = () if explained else explain_ids(prompts)
    yield from tokens
    yield from named if alone else texts
    yield from alone or explain_ids(prompts, reworded=True)


def _other_tokens(rows: tuple[Row, Row], names: Names, setup: Setup) -> Iterator[Cause]:
    """The same text as other tokens."""
    pieces = [parse(row.input_ids.tolist(), names) for row in rows]
    for mine, theirs in zip(*pieces, strict=False):
        if mine != theirs and mine.kind == theirs.kind == "text":
            whole = [setup.policy.decode(piece.body) for piece in (mine, theirs)]
            if whole[0] == whole[1]:
                said = f"the same text as {len(theirs.body)} tokens instead of {len(mine.body)}"
                yield Cause("tokenized-in-parts", f"{said}: {whole[0][-60:]!r}")
                return


def _tensors(rows: tuple[Row, Row], differs: Mapping[str, StageComparison]) -> Iterator[Cause]:
    """Differences of what the model gets besides ids that no medium explains."""
    was, now = (row.tensors for row in rows)
    missing = sorted(was.keys() - now.keys())
    if missing:
        yield Cause("features-missing", f"no {', '.join(missing)}")
    key = "video_second_per_grid"
    if key in was and key in now and not torch.allclose(was[key], now[key], rtol=1e-4):
        first, second = (_few(side[key].tolist()) for side in (was, now))
        yield Cause("frame-rate", f"a grid lasts {second} s to it, where the first has {first} s")
    if "input_features" in was and "input_features" in now and "media" not in differs:
        yield from _mel(was, now)


def _mel(was: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> Iterator[Cause]:
    """Mel features of the same waveforms."""
    mask = "feature_attention_mask"
    if mask in was and mask in now:
        mine, theirs = (side[mask].sum(-1).tolist() for side in (was, now))
        if mine != theirs:
            said = f"{_few(theirs)} mel frames count as sound, where the first has {_few(mine)}"
            yield Cause("mel-frames", said)
            return
    key = "input_features"
    frames = min(side[key].shape[-1] for side in (was, now))
    items = [
        {f"audio_{n}": mel for n, mel in enumerate(side[key][..., :frames])} for side in (was, now)
    ]
    if alike(*(side[key][..., :frames] for side in (was, now))):
        return
    yield from (replace(c, name=f"mel-{c.name}") for c in explain_media(items[0], items[1]))


def _few(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)


def _positions(a: Trace, b: Trace, row: Row, names: Names) -> Iterator[Cause]:
    was, now = (position_ids(side) for side in (a, b))
    if was.shape != now.shape:
        return
    whole = was.trunc() if was.is_floating_point() else was
    if not torch.equal(whole, was) and torch.equal(*(_columns(side) for side in (whole, now))):
        order = "" if torch.equal(whole, now) else ", and so laid out for another order of tokens"
        yield Cause("positions-cut", f"fractions of time positions are cut off{order}")
        return
    if torch.equal(now, torch.arange(now.shape[-1]).to(now.dtype).expand_as(now)):
        said = "counted 0 1 2 … alike in time, height and width, as for text alone"
        yield Cause("positions-text-only", said)
        return
    start = 0
    for piece in parse(row.input_ids.tolist(), names):
        first, length = start + len(piece.before), len(piece.body)
        start += len(piece.ids)
        if piece.kind != "both" or torch.equal(was[:, :start], now[:, :start]):
            continue
        if torch.equal(was[:, first : first + length], now[:, first - 1 : first - 1 + length]):
            yield Cause(
                "positions-one-early",
                "in audio in video each token has the position that belongs to the one after it: "
                "counting begins at the begin-of-audio mark",
            )
        return
    apart = {float(one) for one in (now - was).flatten()}
    if len(apart) == 1:
        yield Cause("positions-shifted", f"every position is {apart.pop():+g}")


def _columns(positions: Tensor) -> Tensor:
    """The positions of all tokens, (3, L), without their order."""
    return torch.stack(sorted(positions.T, key=lambda token: token.tolist()))
