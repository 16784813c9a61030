"""Utterances of manifests whose transcript is not that of their audio."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from w2vscale.data.audio import AudioError
from w2vscale.data.manifest import Manifest
from w2vscale.data.transcripts import refuse_overhang


def overhanging(manifests: Sequence[Path]) -> dict[str, AudioError]:
    """Map names of utterances to the error of `refuse_overhang`, for those with text that is not in their audio.

    The names and the index of each manifest are those of `utterances_by_name`. Raises UserError if one is unusable.
    """
    found: dict[str, AudioError] = {}
    for manifest in map(Manifest, manifests):
        for cut in map(manifest.cut, range(len(manifest))):
            try:
                refuse_overhang(cut)
            except AudioError as error:
                found[os.path.normpath(cut.id)] = error
    return found
