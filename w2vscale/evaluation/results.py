"""Tables of results from the JSON files that `w2vscale evaluate --output` and `w2vscale probe` write."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import permutations
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NotRequired

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from w2vscale.checkpoint.reader import CheckpointReader
from w2vscale.errors import UserError, refused_value
from w2vscale.evaluation.bootstrap import describe_reduction
from w2vscale.files import nearest_path, regular
from w2vscale.interop.model_card import ErrorRates

BASELINES = ("_scratch", "_imported")  # the run NAME is compared with the runs NAME_scratch and NAME_imported
EDITS = ("substitutions", "deletions", "insertions")
Number = Annotated[float, Field(ge=0.0, le=1e15)]
Count = Annotated[int, Field(ge=0, le=10**15)]
Layer = Annotated[str, Field(pattern=r"^\d{1,4}$")]


class _Evaluation(TypedDict):
    update: Count
    weights: NotRequired[Literal["ema", "raw"]]
    utterances: Number
    table: dict[str, str]


class _Counts(TypedDict):
    reference: Count
    substitutions: Count
    deletions: Count
    insertions: Count


class _Utterance(TypedDict):
    utterance: str
    words: _Counts
    characters: _Counts
    speaker: NotRequired[str]
    reference: NotRequired[str]
    hypothesis: NotRequired[str]


class _Score(TypedDict):
    wer: Number
    cer: Number
    word_interval: Annotated[list[Number], Field(min_length=2, max_length=2)]
    character_interval: Annotated[list[Number], Field(min_length=2, max_length=2)]
    weights: NotRequired[Literal["ema", "raw"]]
    cuts: list[str]
    decoding: str
    utterances: Annotated[list[_Utterance], Field(min_length=1)]
    words: NotRequired[_Counts]
    characters: NotRequired[_Counts]
    speakers: NotRequired[dict[str, _Counts]]
    bad: NotRequired[list[Any]]


class _ProbedUtterance(TypedDict):
    utterance: str
    labels: Count
    errors: dict[str, Count]


class _LogMel(TypedDict):
    label_error_rate: Number
    ctc_loss: Number


class _Layers(TypedDict):
    label_error_rate: Annotated[dict[Layer, Number], Field(min_length=1)]
    ctc_loss: dict[Layer, Number]
    best_layer: Count


class _Probe(_Layers):
    checkpoint: str
    log_mel: NotRequired[_LogMel]
    random: NotRequired[_Layers]
    utterances: Annotated[list[_ProbedUtterance], Field(min_length=1)]


class Result(NamedTuple):
    """The metrics of one evaluation; `run` is the name of the folder that holds the file, or of the probed model."""

    run: str
    metrics: dict[str, Any]


def read_results(paths: Sequence[Path]) -> list[Result]:
    """Read files of `w2vscale evaluate` and `probe`. Raises UserError if one cannot be read or is something else."""
    return [_result(path, _read_json(path)) for path in paths]


def find_results(exp: Path) -> tuple[list[Path], list[Result], list[str]]:
    """Find the output files of `w2vscale evaluate` in the folder of a run, and in the folders in it.

    Returns their paths and contents, and a line for each file that is damaged. Other JSON files are passed over.
    """
    paths, results, damaged = [], [], []
    for path in [*sorted(exp.glob("*.json")), *sorted(exp.glob("*/*.json"))]:
        try:
            document = _read_json(path)
        except UserError:
            continue  # whatever it is
        if not isinstance(document, dict) or not ("wer" in document or {"update", "table"} <= document.keys()):
            continue
        try:
            results.append(_result(path, document))
            paths.append(path)
        except UserError as error:
            damaged.append(str(error))
    return paths, results, damaged


def _read_json(path: Path) -> Any:
    try:
        with open(path, encoding="utf-8", opener=regular) as file:
            return json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read: {reason}{nearest_path(path)}") from None


def _result(path: Path, document: Any) -> Result:
    keys = document.keys() if isinstance(document, dict) else ()
    kind = _Score if "wer" in keys else _Probe if "label_error_rate" in keys else _Evaluation
    try:
        TypeAdapter(kind).validate_python(document, strict=True)
    except ValidationError as error:
        command = "w2vscale probe" if kind is _Probe else "w2vscale evaluate --output"
        raise UserError(f"{path}: not written by {command}: {refused_value(error)}") from None
    if kind is not _Probe:
        return Result(path.resolve().parent.name, document)
    for measured in (document, document.get("random", document)):
        if missing := measured["label_error_rate"].keys() - measured["ctc_loss"].keys():
            raise UserError(f"{path}: the CTC loss of layer {min(missing)} is missing")
    needed = {key for key, _ in _compared(document)}
    for one in document["utterances"]:
        if missing := needed - one["errors"].keys():
            raise UserError(f"{path}: utterance {one['utterance']}: the errors of {min(missing)} are missing")
    return Result(Path(document["checkpoint"]).name, document)


def _compared(probe: dict[str, Any]) -> list[tuple[str, str]]:
    """The best layer of a probed model and its baselines: the key of its errors, and its name."""
    keys = [(str(probe["best_layer"]), f"layer {probe['best_layer']}")]
    if "log_mel" in probe:
        keys.append(("log_mel", "log-mel features"))
    if "random" in probe:
        best = probe["random"]["best_layer"]
        keys.append((f"random_{best}", f"random weights, layer {best}"))
    return keys


def error_rates_of(
    checkpoint: CheckpointReader,
    weights: str,
    *,
    files: Sequence[Path] | None,
    log: Callable[[str], None] = lambda text: None,
) -> list[ErrorRates]:
    """Return the error rates of a checkpoint for its model card, from files of `w2vscale evaluate --wer --output`.

    `weights`: "ema" or "raw". `files` is None: those in the folder of its run that are of these weights. Raises
    UserError if one of `files` cannot be read or is something else.
    """
    if files is not None:
        found = read_results(files)
        for path, result in zip(files, found, strict=True):
            if "wer" not in result.metrics:
                raise UserError(f"--results {path}: has no word error rate; evaluate the model with --wer --output")
            if (update := result.metrics.get("update", checkpoint.state.update)) != checkpoint.state.update:
                log(f"{path}: is of update {update}, and the exported checkpoint of update {checkpoint.state.update}")
            if (theirs := _weights(result)) != weights:
                log(f"{path}: is of --weights {theirs}, and --weights {weights} are exported")
        return [_error_rates(result) for result in found]
    run = checkpoint.path.parent.parent
    names = (run.name, "checkpoints", checkpoint.path.name)
    rates = []
    for path in sorted(run.glob("*.json")) if checkpoint.path.parent.name == "checkpoints" else []:
        with suppress(UserError):  # other files
            (result,) = read_results([path])
            metrics = result.metrics
            same = metrics.get("update") == checkpoint.state.update and _weights(result) == weights
            if same and "wer" in metrics and Path(metrics.get("checkpoint", "")).name in names:
                rates.append(_error_rates(result))
    return rates


def _weights(result: Result) -> str:
    """Which weights were evaluated. Versions that did not say so had no averaged ones."""
    return str(result.metrics.get("weights", "raw"))


def _error_rates(result: Result) -> ErrorRates:
    found = result.metrics
    return ErrorRates(
        ", ".join(found["cuts"]),
        found["decoding"],
        len(found["utterances"]),
        found["wer"],
        found["cer"],
        tuple(found["word_interval"]),
        tuple(found["character_interval"]),
    )


def results_page(results: Sequence[Result], title: str, baselines: Sequence[str] = ()) -> str:
    """Format results as Markdown: pretraining metrics, probes, error rates, and comparisons with baselines.

    A probe is compared with its baselines and with other probes. An error rate is compared with those of the runs that
    `baselines` names or, by default, with those of NAME_scratch and NAME_imported. Only evaluations with the same
    manifests and decoding are compared.
    """
    probes = [result for result in results if "label_error_rate" in result.metrics]
    scores = [result for result in results if "wer" in result.metrics]
    evaluations = [result for result in results if "table" in result.metrics]
    names = list(dict.fromkeys(name for result in evaluations for name in result.metrics["table"]))
    lines = [f"# {title}", ""]
    lines += _table(
        ("run", "update", "utterances", *names),
        [
            (run, f"{found['update']:,}", f"{found['utterances']:,.0f}", *(found["table"].get(n, "") for n in names))
            for run, found in evaluations
        ],
    )
    lines += _probe_table(probes) + _probe_comparisons(probes)
    lines += _table(
        ("fine-tuned", "test set", "decoding", "WER (95 %)", "CER (95 %)"),
        [
            (
                run,
                ", ".join(found["cuts"]),
                found["decoding"],
                _rate(found["wer"], *found["word_interval"]),
                _rate(found["cer"], *found["character_interval"]),
            )
            for run, found in scores
        ],
    )
    for result, other in permutations(scores, 2):
        comparable = all(result.metrics[key] == other.metrics[key] for key in ("cuts", "decoding"))
        named = baselines or [result.run + suffix for suffix in BASELINES]
        if comparable and other.run in named and result.run not in baselines:
            lines.append(_comparison(result, other))
    return "\n".join(lines).rstrip() + "\n"


def _probe_table(probes: Sequence[Result]) -> list[str]:
    """A row of label error rates and losses for each model and each baseline; the lowest rate of a row is bold."""
    rows: list[tuple[str, dict[str, Any]]] = []
    for run, found in probes:
        rows.append((run, found))
        if "random" in found:
            rows.append((f"{run}, random weights", found["random"]))
    layers = sorted({layer for _, measured in rows for layer in measured["label_error_rate"]}, key=int)
    log_mel = {tuple(found["log_mel"].values()): found["log_mel"] for _, found in probes if "log_mel" in found}
    for one in log_mel.values():  # one, on one test set
        rows.append(("log-mel features", {key: {layers[0]: value} for key, value in one.items()}))

    def cell(measured: dict[str, Any], layer: str) -> str:
        rates, losses = measured["label_error_rate"], measured["ctc_loss"]
        if layer not in rates:
            return ""
        rate = f"{rates[layer]:.1%}"
        return f"{f'**{rate}**' if rates[layer] == min(rates.values()) else rate}, {losses[layer]:.2f}"

    return _table(
        ("linear probe: label errors, CTC loss (nats per label)", *(f"layer {layer}" for layer in layers)),
        [(name, *(cell(measured, layer) for layer in layers)) for name, measured in rows],
    )


def _probe_comparisons(probes: Sequence[Result]) -> list[str]:
    lines = []
    for number, (run, found) in enumerate(probes):
        (key, layer), *baselines = _compared(found)
        others = [(name, _probe_errors(found, of_baseline)) for of_baseline, name in baselines]
        for other_number, (other, theirs) in enumerate(probes):
            their_key, their_layer = _compared(theirs)[0]
            if other_number != number:
                others.append((f"`{other}`, {their_layer}", _probe_errors(theirs, their_key)))
        for name, errors in others:
            with suppress(UserError):  # another test set
                reduction = describe_reduction("label errors", _probe_errors(found, key), errors)
                lines.append(f"- `{run}`, {layer}, against {name}: {reduction}, relative.")
    return [*lines, ""] if lines else []


def _probe_errors(probe: dict[str, Any], key: str) -> dict[str, tuple[float, int]]:
    """The number of errors of one probe, and of labels, in each utterance."""
    return {one["utterance"]: (one["errors"][key], one["labels"]) for one in probe["utterances"]}


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ("---",) * len(heading)
    return [*(f"| {' | '.join(row)} |" for row in (heading, rule, *rows)), ""] if rows else []


def _rate(rate: float, low: float, high: float) -> str:
    return f"{rate:.1%} ({low:.1%} to {high:.1%})"


def _comparison(result: Result, baseline: Result) -> str:
    parts = []
    for unit, name in (("words", "WER"), ("characters", "CER")):
        ours, theirs = _errors(result, unit), _errors(baseline, unit)
        parts.append(describe_reduction(name, ours, theirs))
    return (
        f"- `{result.run}` against `{baseline.run}` on {', '.join(result.metrics['cuts'])}, "
        f"{result.metrics['decoding']}: {', '.join(parts)}, relative."
    )


def _errors(result: Result, unit: str) -> dict[str, tuple[float, int]]:
    """The number of errors and the reference length of each utterance, in `words` or `characters`."""
    return {
        utterance["utterance"]: (sum(utterance[unit][kind] for kind in EDITS), utterance[unit]["reference"])
        for utterance in result.metrics["utterances"]
    }
