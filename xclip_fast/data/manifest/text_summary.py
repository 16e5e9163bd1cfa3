"""A manifest as a few lines of text for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from ...console import plain
from ..decode.video import Video, video_name
from .manifest import Manifest


def summary(manifest: Manifest) -> str:
    """A few lines about a manifest."""
    good = [video for video in manifest.videos if video.error is None]
    seconds = sum(video.duration for video in good)
    total, bad = len(manifest.videos), len(manifest.videos) - len(good)
    hours, rest = divmod(round(seconds), 3600)
    lines = [
        f"{total} videos, {len(manifest.classes)} classes, in {plain(str(manifest.root))}",
        f"{len(good)} usable: {sum(video.frames for video in good)} frames, {hours} h {rest // 60} min {rest % 60} s",
    ]
    if good:
        lines.append(f"codecs: {_counts(f'{video.codec} {video.pix_fmt}' for video in good)}")
        lines.append(f"sizes: {_counts(f'{video.width}x{video.height}' for video in good)}")
        lines.append(_on_the_cpu(good))
    unlabeled = sum(video.label is None for video in manifest.videos)
    if manifest.classes and unlabeled:
        lines.append(f"without a label: {unlabeled}")
    used = {video.label for video in good}
    empty = [name for number, name in enumerate(manifest.classes) if number not in used]
    if empty:
        lines.append(f"classes without a usable video: {len(empty)} ({_some(empty)})")
    if bad:
        lines.append(f"{bad} cannot be used:")
        by_reason: dict[str, list[str]] = {}
        for video in manifest.videos:
            if video.error is not None:
                by_reason.setdefault(video.error, []).append(video_name(video))
        for reason, names in sorted(by_reason.items(), key=lambda item: -len(item[1]))[:20]:
            lines.append(f"  {len(names)} x {reason}: {_some(names)}")
        if len(by_reason) > 20:
            lines.append(f"  ... and {len(by_reason) - 20} other reasons")
    return "\n".join(lines)


def _on_the_cpu(videos: Sequence[Video]) -> str:
    """The share of videos that a GPU can decode, and why not the others. Counts at most 5000 random videos."""
    from ..decode.dali_support import supported

    chosen = np.random.default_rng(0).permutation(len(videos))[:5000]
    reasons = Counter(reason.split(":")[0] for row in chosen if (reason := supported(videos[row])) is not None)
    shares = ", ".join(f"{reason} {count / len(chosen):.1%}" for reason, count in reasons.most_common())
    if not shares:
        return "a GPU with NVIDIA DALI can decode all of them"
    about = "about " if len(chosen) < len(videos) else ""
    total = reasons.total() / len(chosen)
    return f"a GPU with NVIDIA DALI can decode {about}{1 - total:.1%}; the CPU decodes the rest ({shares})"


def _counts(things: Iterable[str]) -> str:
    counts = Counter(things).most_common()
    more = f", {len(counts) - 5} others" if len(counts) > 5 else ""
    return ", ".join(f"{count} x {thing}" for thing, count in counts[:5]) + more


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(plain, names[:3])) + (", ..." if len(names) > 3 else "")
