"""Augmentation of training audio with Lhotse: speed, reverberation and noise.

All random choices are a function of (seed, micro-batch, position of the utterance in it).
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
from lhotse.audio.mixer import AudioMixer
from lhotse.augmentation import ReverbWithImpulseResponse, Speed
from lhotse.cut import Cut

from w2vscale.config.tree import AugmentConfig
from w2vscale.data.audio import fetched, own_decoders, read_audio
from w2vscale.data.cuts import FILES, NotACut
from w2vscale.data.decoding import AudioError, reason_of
from w2vscale.data.manifest import Corpus
from w2vscale.data.micro_batch import BadAudio
from w2vscale.data.randomness import Stream, generator
from w2vscale.data.resampling import Samples, at_rate
from w2vscale.errors import UserError


class Augmentation:
    """Augments utterances, which keep at least `shortest` samples. Raises UserError if a manifest cannot be used.

    `schemes`: the setting `data.url_schemes`.
    """

    def __init__(
        self,
        config: AugmentConfig,
        *,
        sampling_rate: int,
        shortest: int,
        seed: int,
        schemes: Collection[str] = FILES,
    ) -> None:
        self.config = config
        self.seed = seed
        self.rate = sampling_rate
        self.shortest = shortest
        self.noises = Corpus(config.noise, setting="augment.noise", schemes=schemes) if config.noise else None
        self.responses = Corpus(config.reverb, setting="augment.reverb", schemes=schemes) if config.reverb else None

    def __call__(self, audio: Samples, *, number: int, place: int) -> tuple[Samples, list[BadAudio]]:
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
            changed = _mixed(self.responses, which_response, bad, lambda cut: self._reverberated(samples, cut))
            samples = samples if changed is None else changed
        if self.noises is not None and add_noise:
            changed = _mixed(self.noises, which_noise, bad, lambda cut: self._noisy(samples, cut, where, snr))
            samples = samples if changed is None else changed
        return audio if samples is unchanged else samples[0].astype(np.float32, copy=False), bad

    def _reverberated(self, samples: Samples, response: Cut) -> Samples:
        response = fetched(response)
        read_audio(response, sampling_rate=self.rate)  # Lhotse would not check it
        with own_decoders():
            found: Samples = ReverbWithImpulseResponse(rir=at_rate(response, self.rate))(samples, self.rate)
        return found

    def _noisy(self, samples: Samples, noise: Cut, where: float, snr: float) -> Samples:
        """Add a part of a noise, which begins at the fraction `where` of what can be left out of it."""
        whole = round(noise.duration * self.rate)
        length = min(samples.shape[1], whole)
        offset = int(where * (whole - length + 1))
        part = read_audio(noise, sampling_rate=self.rate, offset=offset, length=length)
        mixer = AudioMixer(samples, self.rate)
        mixer.add_to_mix(np.resize(part, samples.shape), snr=float(snr))
        mixed: Samples = mixer.mixed_mono_audio
        return mixed


def _mixed(corpus: Corpus, draw: float, bad: list[BadAudio], mix: Callable[[Cut], Samples]) -> Samples | None:
    """Mix with the utterance that `draw`, from 0 to 1, chooses. Adds it to `bad` if it cannot be used."""
    number = int(draw * len(corpus))
    try:
        cut = corpus.cut(number)
    except NotACut as error:
        bad.append(BadAudio.of_line(number, error, left_out=False))
        return None
    try:
        return mix(cut)
    except UserError:  # a store that cannot be used
        raise
    except Exception as error:  # Lhotse raises many types of errors
        problem = error if isinstance(error, AudioError) else AudioError("undecodable", reason_of(error))
        bad.append(BadAudio.of(cut, problem, left_out=False))
        return None
