"""BEST-RQ pretraining (Chiu et al. 2022, arXiv:2202.01855).

For each masked frame, the model predicts the codes that a frozen random quantizer gives to its log-mel features. The
targets are not learned, so they cannot collapse. Several codebooks, each with its own output layer, are those of USM
(Zhang et al. 2023, arXiv:2303.01037). Masked frames are those of wav2vec 2.0: a mask embedding replaces their projected
features, where the paper puts noise into the input.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from w2vscale.config import HealthConfig, ModelConfig, RegularizationConfig
from w2vscale.data.inputs import AudioBatch, Utterance
from w2vscale.data.randomness import Generators
from w2vscale.errors import UserError
from w2vscale.models.layers import Linear
from w2vscale.models.lengths import hop
from w2vscale.models.wav2vec2 import Wav2Vec2Encoder, valid_mask
from w2vscale.objectives.base import Finding, Objective, Panel, TransformersHead
from w2vscale.objectives.details import Details, FramePredictions, attention_of_first, masked_details
from w2vscale.objectives.masking import masked_batch
from w2vscale.objectives.quantizer import collapse, perplexity
from w2vscale.objectives.settings import BestRqSettings

STACKED = 2
"""Mel frames that are stacked for each frame of the encoder."""

WINDOW = 2.5
"""Length of a mel frame in hops: 25 ms for a hop of 10 ms."""

FLOOR = 1e-10
"""Lowest mel energy, so that silence has a logarithm."""

EPSILON = 1e-5
"""Added to the variance of a feature, so that silence can be normalised."""


class BestRqInputs(NamedTuple):
    """B utterances with M masked frames in total, listed utterance by utterance."""

    audio: AudioBatch
    masked_B: Tensor  # number of masked frames of each utterance
    frame_M: Tensor  # index of the frame in its utterance
    masked: tuple[int, ...]  # masked_B as Python numbers, so that reading them does not synchronise the GPU

    @property
    def weights(self) -> tuple[int, ...]:
        """Number of masked frames of each micro-batch."""
        return self.audio.per_micro_batch(self.masked)


class BestRqSums(NamedTuple):
    """Sums over masked frames. Divide them by the number of masked frames of the update, over all ranks."""

    total: Tensor  # cross entropy in nats, averaged over the codebooks
    correct: Tensor  # correct predictions, averaged over the codebooks
    masked: Tensor  # masked frames
    code_counts_GV: Tensor  # how often each entry is the target


def check_log_mel(model: ModelConfig, advice: str) -> None:
    """Raise a UserError that ends with `advice` if a frame of the encoder is not a whole number of log-mel frames."""
    if hop(model) % STACKED:
        raise UserError(
            f"model.conv_layers: a frame of {hop(model)} samples is not {STACKED} frames of log-mel features; {advice}"
        )


class LogMel(nn.Module):
    """Log-mel features in fp32: windows of 25 ms every 10 ms at 16 kHz, two of them stacked for each encoder frame.

    The first window of frame t begins at sample t * hop, also in a model with `conv_padding`.
    """

    window_S: Tensor
    filters_FJ: Tensor

    def __init__(self, model: ModelConfig, bins: int) -> None:
        super().__init__()
        self.hop = hop(model) // STACKED
        size = round(WINDOW * self.hop)
        self.points = 2 ** math.ceil(math.log2(size))
        self.register_buffer("window_S", torch.hann_window(size, periodic=False), persistent=False)
        filters_FJ = mel_filters(self.points // 2 + 1, bins, model.sampling_rate)
        self.register_buffer("filters_FJ", filters_FJ, persistent=False)

    def forward(self, waveforms_BS: Tensor, frames: int) -> Tensor:
        """Compute features [B, frames, 2 * bins]. Samples after the end of a waveform count as zeros."""
        size = self.window_S.shape[0]
        samples = (STACKED * frames - 1) * self.hop + size
        padded_BS = F.pad(waveforms_BS.float(), (0, max(samples - waveforms_BS.shape[1], 0)))[:, :samples]
        windows_BNS = padded_BS.unfold(1, size, self.hop) * self.window_S
        power_BNF = torch.fft.rfft(windows_BNS, n=self.points).abs().square()
        mel_BNJ = (power_BNF @ self.filters_FJ).clamp(min=FLOOR).log()
        return mel_BNJ.unflatten(1, (frames, STACKED)).flatten(2)


def mel_filters(frequencies: int, bins: int, sampling_rate: int) -> Tensor:
    """Return triangular filters [frequencies, bins], equally spaced on the mel scale 2595 log10(1 + f / 700) of HTK."""
    highest = 2595.0 * math.log10(1.0 + sampling_rate / 2 / 700.0)
    edges = 700.0 * (10.0 ** (torch.linspace(0.0, highest, bins + 2, dtype=torch.float64) / 2595.0) - 1.0)
    hertz_F1 = torch.linspace(0.0, sampling_rate / 2, frequencies, dtype=torch.float64).unsqueeze(1)
    rising_FJ = (hertz_F1 - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling_FJ = (edges[2:] - hertz_F1) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising_FJ, falling_FJ).clamp(min=0.0).float()


class RandomQuantizer(nn.Module):
    """Frozen random projections and codebooks: buffers, drawn from the seed of the run.

    Projections are Xavier-uniform. Entries are drawn from N(0, 1), then scaled to length 1.
    """

    projection_GJD: Tensor
    codebook_GVD: Tensor

    def __init__(self, inputs: int, settings: BestRqSettings) -> None:
        super().__init__()
        books, entries, dim = settings.codebooks, settings.codebook_entries, settings.codebook_dim
        self.register_buffer("projection_GJD", torch.empty(books, inputs, dim))
        self.register_buffer("codebook_GVD", torch.empty(books, entries, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for projection_JD in self.projection_GJD:
            nn.init.xavier_uniform_(projection_JD)
        nn.init.normal_(self.codebook_GVD)
        self.codebook_GVD.copy_(F.normalize(self.codebook_GVD, dim=2))

    @torch.no_grad()
    def forward(self, features_MJ: Tensor) -> Tensor:
        """Return the nearest entry of each codebook to features [M, J], as codes [M, G]."""
        projected_GMD = F.normalize(features_MJ @ self.projection_GJD, dim=2)
        # All entries have length 1, so the nearest one has the largest product.
        return (projected_GMD @ self.codebook_GVD.transpose(1, 2)).argmax(dim=2).transpose(0, 1)


class Wav2Vec2ForBestRq(nn.Module):
    """The encoder, the frozen quantizer of its targets, and an output layer for each codebook."""

    def __init__(
        self,
        model: ModelConfig,
        regularization: RegularizationConfig,
        settings: BestRqSettings,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.compute_dtype = compute_dtype
        self.encoder = Wav2Vec2Encoder(model, regularization)
        self.log_mel = LogMel(model, settings.mel_bins)
        self.quantizer = RandomQuantizer(STACKED * settings.mel_bins, settings)
        self.head = Linear(model.dim, settings.codebooks * settings.codebook_entries)

    def forward(
        self, inputs: BestRqInputs, *, active: Sequence[bool] | None = None, detailed: bool = False
    ) -> BestRqSums | FramePredictions:
        """Compute the loss sums of the micro-batches in `inputs` or, if `detailed`, what each masked frame gets.

        `active` says which transformer blocks to compute.
        """
        audio = inputs.audio
        encoded = self.encoder(audio.waveforms_BS.to(self.compute_dtype), audio.lengths, audio.mask_BT, active=active)
        utterance_M = torch.repeat_interleave(inputs.masked_B, output_size=inputs.frame_M.shape[0])
        targets_MG = self.quantizer(self.features(audio)[utterance_M, inputs.frame_M])
        logits_MGV = self.head(encoded.context_BTD[utterance_M, inputs.frame_M]).float()
        logits_MGV = logits_MGV.unflatten(1, (self.settings.codebooks, self.settings.codebook_entries))
        correct_MG = logits_MGV.detach().argmax(dim=2) == targets_MG
        if detailed:
            return FramePredictions(correct_MG.float().mean(dim=1), targets_MG)
        loss = F.cross_entropy(logits_MGV.flatten(0, 1), targets_MG.flatten(), reduction="sum")
        counts_GV = logits_MGV.new_zeros(logits_MGV.shape[1:])
        counts_GV.scatter_add_(1, targets_MG.T, torch.ones_like(targets_MG.T, dtype=counts_GV.dtype))
        return BestRqSums(
            total=loss / self.settings.codebooks,
            correct=correct_MG.sum() / self.settings.codebooks,
            masked=torch.full_like(loss.detach(), float(sum(inputs.masked))),
            code_counts_GV=counts_GV,
        )

    @torch.no_grad()
    def features(self, audio: AudioBatch) -> Tensor:
        """Compute log-mel features [B, T, J]. Over an utterance, each dimension has mean 0 and variance 1."""
        return normalised(self.log_mel(audio.waveforms_BS, audio.mask_BT.shape[1]), audio.frames_B)


def normalised(features_BTJ: Tensor, frames_B: Tensor) -> Tensor:
    """Give each dimension mean 0 and variance 1 over the frames of an utterance; the frames after it become zero."""
    valid_BT1 = valid_mask(frames_B, features_BTJ.shape[1]).unsqueeze(2)
    count_B11 = frames_B.view(-1, 1, 1)
    features_BTJ = features_BTJ * valid_BT1
    centred_BTJ = (features_BTJ - features_BTJ.sum(dim=1, keepdim=True) / count_B11) * valid_BT1
    variance_B1J = centred_BTJ.square().sum(dim=1, keepdim=True) / count_B11
    return centred_BTJ * (variance_B1J + EPSILON).rsqrt()


class BestRq(Objective):
    """The objective of BEST-RQ pretraining."""

    Settings = BestRqSettings
    settings: BestRqSettings

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        check_log_mel(self.model, "choose strides with an even product")

    def build_model(self) -> Wav2Vec2ForBestRq:
        return Wav2Vec2ForBestRq(self.model, self.regularization, self.settings, self.compute_dtype)

    def make_inputs(self, utterances: Sequence[Utterance], *, rng: Generators, width: int = 0) -> BestRqInputs:
        audio, _ = masked_batch(utterances, self.model, self.settings, rng=rng, width=width)
        masked_B = audio.mask_BT.sum(dim=1)
        return BestRqInputs(audio, masked_B, audio.mask_BT.nonzero()[:, 1], tuple(masked_B.tolist()))

    def inspect(self, module: nn.Module, inputs: BestRqInputs, *, samples: int, blocks: Sequence[int]) -> Details:
        with attention_of_first(module, inputs.audio, blocks) as attention:
            predictions: FramePredictions = module(inputs, detailed=True)
        entries = self.settings.codebook_entries
        return masked_details(inputs, predictions, entries=entries, samples=samples, attention=attention)

    def metrics(self, sums: BestRqSums) -> dict[str, float]:
        """Compute metrics per masked frame; NaN if there is none.

        `loss` (nats) and `loss_bits` are averages over the codebooks. `most_frequent` is the accuracy of a model that
        always predicts the most frequent code. `code_perplexity_g` is the effective number of entries of codebook g
        among the targets.
        """
        frames = float(sums.masked) or math.nan
        loss = float(sums.total) / frames
        values = {
            "loss": loss,
            "loss_bits": loss / math.log(2),
            "accuracy": float(sums.correct) / frames,
            "most_frequent": float(sums.code_counts_GV.max(dim=1).values.double().mean()) / frames,
            "masked_frames": float(sums.masked),
        }
        perplexity_G = perplexity(sums.code_counts_GV.double() / frames)
        return values | {f"code_perplexity_{book}": float(value) for book, value in enumerate(perplexity_G)}

    def line(self, metrics: Mapping[str, float]) -> str:
        codes = "/".join(f"{metrics[f'code_perplexity_{one}']:.0f}" for one in range(self.settings.codebooks))
        return (
            f"loss {metrics['loss']:.3f} nats  accuracy {metrics['accuracy']:.4f} (most frequent code "
            f"{metrics['most_frequent']:.4f})  target perplexity {codes} of {self.settings.codebook_entries}"
        )

    def table(self, metrics: Mapping[str, float]) -> dict[str, str]:
        return {
            "cross entropy": f"{metrics['loss']:.4f} nats = {metrics['loss_bits']:.4f} bits",
            "accuracy": f"{metrics['accuracy']:.4f}",
            "accuracy of the most frequent code": f"{metrics['most_frequent']:.4f}",
            "masked frames": f"{int(metrics['masked_frames']):,}",
        }

    def findings(self, metrics: Mapping[str, float], limits: HealthConfig) -> list[Finding]:
        """A model has to be better than one that always predicts the most frequent code."""
        settings, accuracy, most_frequent = self.settings, metrics["accuracy"], metrics["most_frequent"]
        found = collapse(
            metrics, codebooks=settings.codebooks, entries=settings.codebook_entries, share=limits.min_codes,
            advice="these are the targets, which do not depend on the model: listen to data.train, it may be silent",
        )  # fmt: skip
        if accuracy <= most_frequent:
            found.append(
                Finding(
                    "chance",
                    f"accuracy {accuracy:.4f} is not above {most_frequent:.4f}, that of a model that always predicts "
                    "the most frequent code; use more audio per update (batch.micro_batches), a longer "
                    "schedule.warmup_updates, or another optim.lr",
                )
            )
        return found

    def panels(self) -> tuple[Panel, Panel, Panel]:
        entries = self.settings.codebook_entries
        codes = {f"code_perplexity_{book}": f"codebook {book}" for book in range(self.settings.codebooks)}
        return (
            Panel("bits", "cross entropy (bits)", {"loss_bits": ""}, chance=math.log2(entries)),
            Panel("accuracy", "accuracy of masked codes", {"accuracy": ""}, chance=1.0 / entries),
            Panel("codes", f"perplexity of the targets (of {entries})", codes),
        )

    def transformers_head(self) -> TransformersHead:
        """The encoder alone: Transformers has no such heads."""
        return TransformersHead(
            summary="A speech model pretrained on audio without transcripts, by predicting the codes of a "
            "random-projection quantizer (BEST-RQ, [Chiu et al. 2022](https://arxiv.org/abs/2202.01855)). It has no "
            "output layer for text: fine-tune it, or use its hidden states."
        )
