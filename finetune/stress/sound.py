"""What can happen to the sound of a clip on its way: noise, a telephone, a wrong gain, a bad microphone.

Each function maps the real samples of one view, float32 (S,) at 16 kHz, to as many, given the level and a generator of
the clip's own, which is the same at every level: what differs between two levels is the level alone.
"""

import numpy as np
from scipy import signal

RATE = 16000
PHONE_HZ = (300, 3400)
MU = 255


def tone(sound: np.ndarray, snr_db: float, rng: np.random.Generator) -> np.ndarray:
    """Plus a sine of 200 to 4,000 Hz."""
    hertz, phase = rng.uniform(200, 4000), rng.uniform(0, 2 * np.pi)
    return with_noise(sound, np.sin(2 * np.pi * hertz * np.arange(len(sound)) / RATE + phase), snr_db)


def white(sound: np.ndarray, snr_db: float, rng: np.random.Generator) -> np.ndarray:
    return with_noise(sound, rng.standard_normal(len(sound)), snr_db)


def pink(sound: np.ndarray, snr_db: float, rng: np.random.Generator) -> np.ndarray:
    """Plus noise whose power falls as 1 / f."""
    spectrum = np.fft.rfft(rng.standard_normal(len(sound)))
    spectrum /= np.sqrt(np.maximum(1, np.arange(len(spectrum))))
    return with_noise(sound, np.fft.irfft(spectrum, len(sound)), snr_db)


def with_noise(sound: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """Sound plus noise of as many samples, whose mean power is `snr_db` below that of the sound. Silence stays so."""
    power, unwanted = np.mean(np.square(sound, dtype=float)), np.mean(np.square(noise, dtype=float))
    if power == 0 or unwanted == 0:
        return sound
    return (sound + noise * np.sqrt(power / unwanted / 10 ** (snr_db / 10))).astype(np.float32)


def phone(sound: np.ndarray, level: float, rng: np.random.Generator) -> np.ndarray:
    """The band of a telephone, 300 to 3,400 Hz, in 8 bits of the mu-law (ITU-T G.711); level 0 leaves it as it is."""
    if not level:
        return sound
    band = _filtered(sound, PHONE_HZ, "bandpass").clip(-1, 1)
    companded = np.sign(band) * np.log1p(MU * np.abs(band)) / np.log1p(MU)
    companded = np.round(companded * 127) / 127
    return (np.sign(companded) * np.expm1(np.abs(companded) * np.log1p(MU)) / MU).astype(np.float32)


def low_pass(sound: np.ndarray, hertz: float, rng: np.random.Generator) -> np.ndarray:
    """Without what is above; 8,000 Hz, where the sound ends, leaves it as it is."""
    return sound if hertz >= RATE / 2 else _filtered(sound, hertz, "lowpass")


def high_pass(sound: np.ndarray, hertz: float, rng: np.random.Generator) -> np.ndarray:
    """Without what is below; 0 leaves it as it is."""
    return sound if hertz <= 0 else _filtered(sound, hertz, "highpass")


def gain(sound: np.ndarray, decibels: float, rng: np.random.Generator) -> np.ndarray:
    return sound * np.float32(10 ** (decibels / 20))


def clipping(sound: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """With this share of the samples, the loudest, cut to the largest of the others."""
    if share <= 0 or not len(sound):
        return sound
    limit = np.quantile(np.abs(sound), 1 - min(share, 1))
    return sound.clip(-limit, limit)


def _filtered(sound: np.ndarray, hertz: float | tuple[float, float], kind: str) -> np.ndarray:
    """Butterworth of order 8, in sections."""
    return signal.sosfilt(signal.butter(8, hertz, kind, fs=RATE, output="sos"), sound).astype(np.float32)
