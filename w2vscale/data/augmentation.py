"""Augmentation of training audio with Lhotse: speed, reverberation and noise.

All random choices are a function of (seed, micro-batch, position of the utterance in it).
"""

from __future__ import annotations

import numpy as np
from lhotse.audio.mixer import AudioMixer
from lhotse.augmentation import ReverbWithImpulseResponse, Speed
from numpy.typing import NDArray

from w2vscale.config.tree import AugmentConfig
from w2vscale.data.audio import AudioError, libsndfile_reason, read_audio
from w2vscale.data.manifest import Corpus, audio_path
from w2vscale.data.micro_batch import BadAudio
from w2vscale.data.randomness import Stream, generator
from w2vscale.data.resampling import at_rate


class Augmentation:
    """Augments training utterances.

    Args:
        config: which augmentations to apply, and how often.
        sampling_rate: sampling rate of the audio, in Hz.
        shortest: length of the shortest utterance that the objective can use, in samples.
        seed: seed of the run.

    Raises:
        UserError: a manifest of noises or impulse responses cannot be used.
    """

    def __init__(self, config: AugmentConfig, *, sampling_rate: int, shortest: int, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.rate = sampling_rate
        self.shortest = shortest
        self.noises = Corpus(self.config.noise, setting="augment.noise") if self.config.noise else None
        self.responses = Corpus(self.config.reverb, setting="augment.reverb") if self.config.reverb else None

    def __call__(
        self, audio: NDArray[np.float32], *, number: int, place: int
    ) -> tuple[NDArray[np.float32], list[BadAudio]]:
        """Augment utterance `place` of micro-batch `number`. Also return unusable noises and impulse responses.

        The result is not longer than `audio`, and is `audio` itself if nothing was changed.
        """
        draws = generator(self.seed, Stream.AUGMENTATION, number, place)
        bad: list[BadAudio] = []
        samples = unchanged = audio[None]
        # All draws are made for every utterance, so that one setting does not change the draws of another.
        factor = draws.choice(self.config.speed or [1.0])
        reverberate, add_noise = draws.random(2) < [self.config.reverb_probability, self.config.noise_probability]
        snr = draws.uniform(*self.config.noise_snr)
        which_response, which_noise, where = draws.random(3)
        if factor != 1.0 and audio.size / factor >= self.shortest:
            samples = Speed(float(factor))(samples, self.rate)[:, : audio.size]
        if self.responses is not None and reverberate:
            response = self.responses.cut(int(which_response * len(self.responses)))
            try:
                whole = round(response.duration * self.rate)
                read_audio(response, sampling_rate=self.rate, offset=0, length=whole, normalize=False)
                samples = ReverbWithImpulseResponse(rir=at_rate(response, self.rate))(samples, self.rate)
            except Exception as error:
                kind = error.kind if isinstance(error, AudioError) else "undecodable"
                bad.append(BadAudio(response.id, audio_path(response), kind, libsndfile_reason(error), left_out=False))
        if self.noises is not None and add_noise:
            noise = self.noises.cut(int(which_noise * len(self.noises)))
            length = round(noise.duration * self.rate)
            wanted = min(samples.shape[1], length)
            try:
                part = read_audio(
                    noise,
                    sampling_rate=self.rate,
                    offset=int(where * (length - wanted + 1)),
                    length=wanted,
                    normalize=False,
                )
            except AudioError as error:
                bad.append(BadAudio(noise.id, audio_path(noise), error.kind, str(error), left_out=False))
            else:
                mixer = AudioMixer(samples, self.rate)
                mixer.add_to_mix(np.resize(part, samples.shape), snr=float(snr))
                samples = mixer.mixed_mono_audio
        return audio if samples is unchanged else samples[0].astype(np.float32, copy=False), bad
