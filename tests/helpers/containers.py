"""Audio in containers that FFmpeg writes through PyAV."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

FORMATS = {  # FFmpeg's format and encoder, by suffix
    ".m4a": ("mp4", "aac"),
    ".mp4": ("mp4", "alac"),
    ".webm": ("webm", "libopus"),
    ".mka": ("matroska", "flac"),
    ".wma": ("asf", "wmav2"),
    ".aac": ("adts", "aac"),
    ".ac3": ("ac3", "ac3"),
    ".wv": ("wv", "wavpack"),
    ".tta": ("tta", "tta"),
    ".avi": ("avi", "pcm_s16le"),
}


def write_container(path: Path, audio: NDArray[np.float32], *, rate: int = 48_000, index_first: bool = False) -> Path:
    """Write samples [S] or [S, channels] in the container that the suffix of `path` names.

    `index_first` puts the index of an .m4a before its audio, so that a file that ends early can be opened.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    form, encoder = FORMATS[path.suffix.lower()]
    channels = np.ascontiguousarray(audio.reshape(len(audio), -1).T)
    layout = "mono" if len(channels) == 1 else "stereo"
    with av.open(str(path), "w", format=form, options={"movflags": "faststart"} if index_first else {}) as container:
        stream: Any = container.add_stream(encoder, rate=rate)
        stream.layout = layout
        stream.bit_rate = 128_000
        whole = av.AudioFrame.from_ndarray(channels, format="fltp", layout=layout)
        whole.sample_rate, whole.pts = rate, 0
        size = {"aac": 1024, "libopus": 960, "wmav2": 2048, "ac3": 1536}.get(encoder, 4096)
        convert = av.AudioResampler(format=stream.codec_context.format, layout=layout, rate=rate, frame_size=size)
        for frame in [*convert.resample(whole), *convert.resample(None)]:
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
