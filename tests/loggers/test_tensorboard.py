"""TensorBoard's own reader finds every point once, after any number of resumes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.helpers.logged import (
    SECONDS,
    TRAIN,
    UPDATES,
    VALIDATE_EVERY,
    expected,
    in_tensorboard,
    log_updates,
    opened,
    state,
)

ON = "logging.tensorboard=true"
LAYOUT = ("tensors", "custom_scalars__config__", 0)


def run(exp: Path, *parts: tuple[int, int]) -> None:
    """Log the updates of each part (after, up to). All but the last are cut off, as if the process were killed."""
    for first, last in parts:
        loggers = opened(exp, ON, at=state(first))
        log_updates(loggers, range(first + 1, last + 1))
    loggers.finish()
    loggers.close()


def by_update() -> Counter[tuple[str, str, int]]:
    texts = {(kind, f"{tag}/text_summary", step) for kind, tag, step in expected() if kind == "tensors"}
    return Counter([*(one for one in expected() if one[0] != "tensors"), *texts, LAYOUT])


@pytest.mark.parametrize(
    "parts",
    [[(0, UPDATES)], [(0, 7), (6, UPDATES)], [(0, 5), (4, 9), (4, 10), (8, UPDATES)], [(0, 2), (0, UPDATES)]],
    ids=["whole", "resumed", "resumed three times", "killed before the first checkpoint"],
)
def test_every_point_is_there_once(tmp_path: Path, parts: list[tuple[int, int]]) -> None:
    run(tmp_path, *parts)
    assert in_tensorboard(tmp_path / "tb") == by_update()
    hours = in_tensorboard(tmp_path / "tb" / "by_hours")
    keys = [key for key in TRAIN if key in ("loss", "contrastive_bits", "accuracy", "code_perplexity_0")]
    every = [
        *((key, "train", update) for key in keys for update in range(1, UPDATES + 1)),
        *((key, "validation", update) for key in ("loss", "accuracy") for update in range(4, 13, VALIDATE_EVERY)),
    ]
    assert hours == Counter(("scalars", f"by_hours/{key}/{split}", int(SECONDS * at)) for key, split, at in every)


def test_pictures_audio_texts_and_histograms_are_what_was_logged(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, (0, 5))
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    (image,), (audio,) = events.Images("samples/1_spectrogram"), events.Audio("samples/1_audio")
    assert image.encoded_image_string.startswith(b"\x89PNG") and (image.width, image.height) == (90, 90)
    assert audio.sample_rate == 16_000 and audio.length_frames == 1600
    (text,) = events.Tensors("run/health/text_summary")
    assert b"    the loss spikes: <b>it is 7</b>\n    the gradient" in text.tensor_proto.string_val[0]
    (histogram,) = events.Histograms("weights/head")
    assert list(histogram.histogram_value.bucket) == [3.0, 4.0] and histogram.histogram_value.num == 7.0


def test_hyper_parameters_begin_once_and_end_with_the_run(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    run(tmp_path, (0, 7), (6, UPDATES))
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    found = events.PluginTagToContent("hparams")
    assert set(found) == {f"_hparams_/{name}" for name in ("experiment", "session_start_info", "session_end_info")}
    session = HParamsPluginData.FromString(found["_hparams_/session_start_info"]).session_start_info
    assert session.hparams["optim.lr"].number_value == 1e-3
    assert session.hparams["model.norm_first"].bool_value is False
    experiment = HParamsPluginData.FromString(found["_hparams_/experiment"]).experiment
    assert {metric.name.tag for metric in experiment.metric_infos} >= {"loss/loss/train", "loss/loss/validation"}


def test_charts_and_hyper_parameters_have_all_validation_sets(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    sets = ("data.validation=a.jsonl", "data.validation_sets={far: b.jsonl}")
    loggers = opened(tmp_path, ON, *sets)
    loggers.close()
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    (event,) = events.Tensors("custom_scalars__config__")
    charts = Layout.FromString(event.tensor_proto.string_val[0]).category[0].chart
    assert list(charts[0].multiline.tag) == [
        f"loss/loss/{split}" for split in ("train", "validation", "validation_far")
    ]


def test_nothing_to_do_writes_nothing(tmp_path: Path) -> None:
    run(tmp_path, (0, UPDATES))
    before = sorted((tmp_path / "tb").rglob("events*"))
    run(tmp_path, (UPDATES, UPDATES))
    assert sorted((tmp_path / "tb").rglob("events*")) == before
