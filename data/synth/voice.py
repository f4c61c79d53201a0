"""The voice: a glottal pulse train through moving formants, with noise for consonants, breath, room and microphone.

Source-filter synthesis after Fant (1960) and Klatt (1980): every glottal pulse excites the vocal tract as it stands at
that moment, so the response of each pulse is one row of a batched inverse FFT, laid down at its (fractional) place
in time. The same articulation that shapes the sound is returned for the lips.
"""

from dataclasses import dataclass

import numpy as np
from scipy.fft import irfft, rfft
from scipy.ndimage import gaussian_filter1d

from affekt.data.synth.plan import Strengths, blend

SAMPLE_RATE = 16000
HOP = 80  # samples between two points of the articulation: 5 ms
_BINS = 257  # of a 512-point FFT: 32 ms hold the decay of a 60 Hz wide formant down to -50 dB
_DELAY = 64  # samples; the spectral tilt is zero-phase, its response needs room before the pulse


@dataclass(frozen=True)
class Prosody:
    """How an emotion moves a voice, relative to the same speaker's neutral voice."""

    level: float = 0.0  # of F0, octaves
    movement: float = 1.0  # size of pitch accents, factor
    late: float = 0.0  # accents peak late (+1: rising voice) or early (-1: falling, stabbing voice)
    ending: float = -0.12  # pitch at the end of a phrase, octaves
    rate: float = 1.0  # syllables per second, factor
    energy: float = 0.0  # dB
    punch: float = 1.0  # contrast between stressed and other syllables, factor
    tilt: float = 0.0  # of the source spectrum above 500 Hz, dB per octave
    tremor: float = 0.0  # depth of a 6 Hz modulation of F0, octaves
    breath: float = 0.0  # aspiration, 0..1
    rough: float = 0.0  # jitter and shimmer, 0..1
    spread: float = 0.0  # lips: widened (+) or rounded (-), scales the upper formants
    attack: float = 0.0  # syllables start hard and die away (+1) or swell (-1)


# Happy, angry and fearful share their arousal, and so do sad, disgust and neutral: movement, not level, parts them.
PROSODY = {
    "neutral": Prosody(),
    "happy": Prosody(0.24, 2.0, 0.8, 0.12, 1.08, 3.0, 1.3, 1.5, 0.0, 0.05, 0.0, 1.2, -0.3),
    "sad": Prosody(-0.10, 0.40, 0.0, -0.10, 0.72, -3.0, 0.6, -2.2, 0.012, 0.55, 0.05, -0.3, -0.8),
    "angry": Prosody(0.18, 1.7, -0.8, -0.30, 1.10, 5.0, 1.7, 3.0, 0.0, 0.0, 0.5, 0.0, 1.0),
    "fearful": Prosody(0.28, 0.5, 0.2, 0.06, 1.30, 0.0, 0.8, 0.5, 0.07, 0.35, 0.15, 0.3, 0.0),
    "disgust": Prosody(-0.14, 1.1, -0.6, -0.36, 0.78, -0.5, 1.2, -0.5, 0.0, 0.05, 0.9, -0.8, 0.3),
}


@dataclass(frozen=True)
class VoiceTraits:
    """What stays the same in all clips of one speaker."""

    pitch: float  # Hz
    tract: float  # formant factor, 1 = adult male of 17 cm
    rate: float  # syllables per second
    liveliness: float  # size of pitch accents at rest, octaves
    tilt: float  # dB per octave
    breath: float
    vowels: np.ndarray  # (11, 3) own deviation of each vowel's formants, factor


@dataclass(frozen=True)
class Lips:
    """What the sound asks of the mouth, one value per video frame, each (T,)."""

    opening: np.ndarray  # 0 closed .. 1 wide open
    rounding: np.ndarray  # 0 spread .. 1 round
    stress: np.ndarray  # 0..1, accents that a head nods with


# F1, F2, F3 in Hz of an adult male; rounded figures in the range of the classic measurements (Peterson & Barney 1952).
_VOWELS = np.array(
    [
        (280, 2250, 2900),
        (400, 1950, 2550),
        (450, 2100, 2600),
        (550, 1800, 2500),
        (680, 1700, 2400),
        (720, 1100, 2450),
        (560, 850, 2400),
        (440, 1020, 2250),
        (310, 870, 2250),
        (630, 1200, 2400),
        (500, 1450, 2450),
    ],
    float,
)
_ROUNDING = np.array([0, 0.1, 0, 0.1, 0.1, 0.2, 0.8, 0.7, 1, 0.2, 0.3])

# kind, seconds, voiced level, noise level, noise centre and width in Hz, formants (None: the vowel's own), lip opening
_CONSONANTS = (
    ("stop", 0.070, 0.00, 0.50, 900, 1200, None, 0.0),
    ("stop", 0.060, 0.25, 0.30, 800, 1000, None, 0.0),
    ("stop", 0.070, 0.00, 0.70, 4500, 2200, (350, 1750, 2650), 0.2),
    ("stop", 0.060, 0.25, 0.40, 4000, 2200, (350, 1750, 2650), 0.2),
    ("stop", 0.075, 0.00, 0.60, 1900, 1100, (350, 1900, 2200), 0.3),
    ("glide", 0.110, 0.00, 0.55, 6000, 1500, (350, 1700, 2600), 0.15),
    ("glide", 0.110, 0.00, 0.55, 3300, 1400, (350, 1800, 2500), 0.2),
    ("glide", 0.090, 0.00, 0.18, 4800, 4000, (350, 1100, 2300), 0.08),
    ("glide", 0.080, 0.45, 0.25, 5500, 1800, (300, 1600, 2500), 0.15),
    ("glide", 0.080, 0.50, 0.00, 1000, 500, (250, 1050, 2200), 0.0),
    ("glide", 0.070, 0.50, 0.00, 1000, 500, (250, 1500, 2500), 0.2),
    ("glide", 0.070, 0.60, 0.00, 1000, 500, (350, 1100, 2700), 0.3),
    ("glide", 0.070, 0.60, 0.00, 1000, 500, (400, 1150, 1600), 0.25),
    ("glide", 0.070, 0.60, 0.00, 1000, 500, (300, 700, 2200), 0.12),
)


def draw_voice(rng: np.random.Generator, sex: str, youth: float, strengths: Strengths) -> VoiceTraits:
    """A speaker's voice; `youth` 0 (adult) .. 1 (child) raises pitch and shortens the vocal tract."""
    wide = strengths.speaker
    pitch, tract = (118.0, 1.0) if sex == "male" else (205.0, 1.16)
    return VoiceTraits(
        pitch=pitch * 2 ** (wide * rng.uniform(-0.38, 0.38) + 0.35 * youth),
        tract=tract * (1 + 0.12 * youth) * 2 ** (wide * rng.uniform(-0.12, 0.12)),
        rate=4.4 * 2 ** (wide * rng.uniform(-0.25, 0.25)),
        liveliness=0.16 * 2 ** (wide * rng.uniform(-0.5, 0.5)),
        tilt=wide * rng.uniform(-3.0, 3.0),
        breath=0.15 + 0.15 * wide * rng.uniform(-1, 1),
        vowels=2 ** (0.05 * wide * rng.standard_normal((len(_VOWELS), 3))),
    )


def speak(
    traits: VoiceTraits,
    emotion: str,
    intensity: float,
    seconds: float,
    fps: int,
    rng: np.random.Generator,
    strengths: Strengths,
) -> tuple[np.ndarray, Lips]:
    """One utterance of random syllables. Returns float32 (seconds * 16000,) in -1..1 and the lips that belong to it."""
    style = blend(PROSODY["neutral"], PROSODY[emotion], intensity * strengths.voice)
    track = _articulate(_text(traits, style, seconds, rng), seconds, rng)
    f0 = _pitch(traits, style, track, rng)
    level = (track["stress"] * 7.0 - 4.0) * style.punch / 20  # stressed syllables stand out, in powers of ten
    track["voice"] *= 10**level * np.clip(1 + 7.0 * style.tremor * np.sin(track["tremor_phase"]), 0.1, 2)
    track["voice"] *= 10 ** (0.35 * style.attack * track["fall"])
    speech = _phonate(traits, style, track, f0, rng)
    speech *= 0.06 * 10 ** (style.energy / 20) / max(_level(speech), 1e-6)
    sound = record(speech, rng, strengths)
    return sound, _lips(track, seconds, fps)


def _text(traits: VoiceTraits, style: Prosody, seconds: float, rng: np.random.Generator) -> list[tuple]:
    """Segments: (seconds, voiced, noise, centre, width, 3 formants, opening, rounding, stress, phrase) each."""
    pause = (0.0, 0.0, 1000.0, 500.0)
    rest = (*(_VOWELS[10] * traits.tract), 0.0, 0.3, 0.0)
    segments = [(rng.uniform(0.05, 0.3), *pause, *rest, 0.0)]
    total, phrase, left = segments[0][0], 1.0, int(rng.integers(3, 8))
    widen = np.array([1 + 0.02 * style.spread, 1 + 0.06 * style.spread, 1 + 0.04 * style.spread])
    while total < seconds:
        vowel, stress = int(rng.integers(len(_VOWELS))), float(rng.random() < 0.45)
        formants = _VOWELS[vowel] * traits.vowels[vowel] * traits.tract * widen
        kind, length, voiced, noise, centre, width, locus, opening = _CONSONANTS[int(rng.integers(len(_CONSONANTS)))]
        locus = formants * (0.6, 0.9, 1.0) if locus is None else np.array(locus) * traits.tract
        pace = traits.rate / 4.4 * style.rate * rng.uniform(0.85, 1.18)
        length, centre = length / pace**0.6, min(centre * traits.tract**0.5, 7200.0)
        tail = (*locus, opening, _ROUNDING[vowel], 0.3 * stress, phrase)
        if kind == "stop":
            segments.append((0.7 * length, 0.3 * voiced, 0.0, centre, width, *tail))
            segments.append((0.3 * length, voiced, noise, centre, width, *tail))
        else:
            segments.append((length, voiced, noise, centre, width, *tail))
        long = (0.11 + 0.06 * stress) * rng.uniform(0.75, 1.35) / pace
        wide_open = np.clip((_VOWELS[vowel][0] - 230) / 480, 0.12, 1.0)
        segments.append((long, 1.0, 0.0, 1000.0, 500.0, *formants, wide_open, _ROUNDING[vowel], stress, phrase))
        total += length + long
        left -= 1
        if left == 0:
            gap = rng.uniform(0.10, 0.35) / style.rate
            segments.append((gap, *pause, *rest, 0.0))
            total, phrase, left = total + gap, phrase + 1, int(rng.integers(3, 8))
    return segments


def _articulate(segments: list[tuple], seconds: float, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Segment targets as smooth tracks of 200 values per second; formants glide more slowly than levels change."""
    table = np.array(segments)
    points = round(seconds * SAMPLE_RATE / HOP)
    place = np.searchsorted(np.cumsum(table[:, 0]), np.arange(points) * HOP / SAMPLE_RATE, side="right")
    rows = table[np.minimum(place, len(table) - 1)]
    fade = np.clip((points - np.arange(points)) / 24.0, 0, 1)  # the last words are cut softly, not with a click
    return {
        "voice": gaussian_filter1d(rows[:, 1], 2.4) * fade,
        "noise": gaussian_filter1d(rows[:, 2], 1.5) * fade,
        "centre": rows[:, 3],
        "width": rows[:, 4],
        "formants": gaussian_filter1d(rows[:, 5:8], 5.0, axis=0),
        "opening": gaussian_filter1d(rows[:, 8] * fade, 6.0),
        "rounding": gaussian_filter1d(rows[:, 9], 8.0),
        "stress": gaussian_filter1d(rows[:, 10], 8.0),
        "fall": gaussian_filter1d(1 - 2 * _elapsed(place, table[:, 0]), 1.5),
        "phrase": rows[:, 11],
        "tremor_phase": 2 * np.pi * (5.5 + rng.uniform(-0.7, 0.7)) * np.arange(points) * HOP / SAMPLE_RATE
        + rng.uniform(0, 2 * np.pi),
    }


def _elapsed(place: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Share of its segment that has passed at each point, 0..1."""
    place = np.minimum(place, len(lengths) - 1)
    starts = np.cumsum(lengths) - lengths
    return np.clip((np.arange(len(place)) * HOP / SAMPLE_RATE - starts[place]) / lengths[place], 0, 1)


def _pitch(traits: VoiceTraits, style: Prosody, track: dict, rng: np.random.Generator) -> np.ndarray:
    """F0 in Hz (points,): accents on stressed syllables, declination and an ending per phrase, drift, tremor."""
    phrase, points = track["phrase"], len(track["phrase"])
    along = np.zeros(points)  # 0..1 within each phrase
    for number in np.unique(phrase[phrase > 0]):
        inside = np.flatnonzero(phrase == number)
        along[inside] = np.linspace(0, 1, len(inside))
    accent = np.roll(track["stress"], round(12 * style.late))  # 60 ms later or earlier than the syllable
    slope = np.gradient(accent) * 25 * style.late
    drift = gaussian_filter1d(rng.standard_normal(points), 40) * 6 * 0.25
    octaves = style.level + traits.liveliness * style.movement * (1.6 * (accent - 0.35) + slope + 0.5 * drift)
    octaves += style.ending * np.clip(along * 3 - 2, 0, 1) - 0.10 * along
    octaves += style.tremor * np.sin(track["tremor_phase"])
    octaves += 0.05 * rng.standard_normal()  # the day's voice
    return traits.pitch * 2 ** gaussian_filter1d(octaves, 3.0)


def _phonate(traits: VoiceTraits, style: Prosody, track: dict, f0: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Pulses and noise through the vocal tract: float64 (points * HOP,)."""
    points = len(f0)
    phase = np.cumsum(np.repeat(f0, HOP)) / SAMPLE_RATE
    beats = np.arange(1, int(phase[-1]))
    times = np.interp(beats, phase, np.arange(len(phase), dtype=float))
    rough = 0.004 + 0.035 * style.rough
    times = times + rng.standard_normal(len(times)) * rough * SAMPLE_RATE / traits.pitch
    times = np.clip(times, 0, points * HOP - 1)
    row = np.minimum((times / HOP).astype(int), points - 1)
    tilt = traits.tilt + style.tilt
    tract = _tract(track["formants"], tilt)  # (points, bins) complex
    level = track["voice"][row] * (1 + 1.5 * rough * rng.standard_normal(len(times)))
    whole = np.floor(times).astype(int)
    hertz = np.arange(_BINS) / (2 * (_BINS - 1))  # cycles per sample
    shift = np.exp(-2j * np.pi * np.outer(times - whole + _DELAY, hertz).astype(np.float32))
    # A pulse carries less energy per second the rarer it comes; sqrt(f0) keeps loudness independent of pitch.
    pulses = irfft(tract[row] * shift * (level / np.sqrt(f0[row]))[:, None], axis=1)
    out = np.zeros(points * HOP + 1024)
    for at, pulse in zip(whole, pulses):
        out[at : at + 512] += pulse
    breath = np.clip(traits.breath + style.breath, 0, 1)
    window = np.hanning(2 * HOP + 1)[:-1]
    bursts = rfft(rng.standard_normal((points, 2 * HOP)) * window, n=512, axis=1)
    band = np.exp(-0.5 * ((hertz * SAMPLE_RATE - track["centre"][:, None]) / (0.6 * track["width"][:, None])) ** 2)
    gains = tract * (0.010 * breath * track["voice"][:, None]) + band * (0.016 * track["noise"][:, None])
    for at, burst in enumerate(irfft(bursts * gains, axis=1)):
        out[at * HOP + _DELAY : at * HOP + _DELAY + 512] += burst
    return out[_DELAY : _DELAY + points * HOP]


def _tract(formants: np.ndarray, tilt: float) -> np.ndarray:
    """Transfer function of five formants in cascade with source tilt and lip radiation: complex64 (points, bins)."""
    hertz = np.arange(_BINS, dtype=np.float32) * (SAMPLE_RATE / 2 / (_BINS - 1))
    upper = formants[:, 2:] * np.array([1.36, 1.78])
    response = np.ones((len(formants), _BINS), np.complex64)
    for centre, width in zip(np.hstack([formants, upper]).T, (60, 90, 130, 200, 280)):
        square = (centre**2 + width**2 / 4).astype(np.float32)[:, None]
        response *= square / (square - hertz**2 + 1j * hertz * np.float32(width))
    # Glottal flow falls by 12 dB per octave above some 150 Hz, radiation at the lips rises by 6.
    source = hertz / (1 + (hertz / 150) ** 2) / 75
    source *= 10 ** (tilt / 20 * np.log2(np.maximum(hertz, 500) / 500))
    return response * source.astype(np.float32)


def record(speech: np.ndarray, rng: np.random.Generator, strengths: Strengths) -> np.ndarray:
    """What a microphone in a room makes of it: reverberation, equaliser, noise, gain; float32 in -1..1."""
    length = len(speech)
    size = length + 6000
    hertz = np.arange(size // 2 + 1) * SAMPLE_RATE / size
    knots = np.log2([60, 150, 400, 1000, 2500, 5000, 8000])
    octave = np.log2(np.maximum(hertz, 60))
    curve = np.interp(octave, knots, 5.0 * strengths.channel * rng.standard_normal(len(knots)))
    decay = rng.uniform(0.08, 0.4)
    tail = rng.standard_normal(6000) * np.exp(-6.9 * np.arange(6000) / SAMPLE_RATE / decay)
    tail *= strengths.channel * 10 ** (rng.uniform(-26, -10) / 20) / np.sqrt(np.sum(tail**2))
    tail[0] = 1.0
    spectrum = rfft(speech, size) * rfft(tail, size) * 10 ** (curve / 20)
    sound = irfft(spectrum, size)[:length]
    snr = rng.uniform(8, 35)
    noise = _noise(length, rng)
    sound = sound + noise * (strengths.noise * _level(sound) * 10 ** (-snr / 20))
    sound *= 10 ** (strengths.channel * rng.uniform(-12, 6) / 20)
    peak = np.abs(sound).max()
    return (sound * min(1.0, 0.97 / max(peak, 1e-9))).astype(np.float32)


def _noise(length: int, rng: np.random.Generator) -> np.ndarray:
    """A mixture of white noise, pink noise and mains hum with random shares, of unit level."""
    share = rng.dirichlet([0.6, 0.6, 0.4])
    white = rng.standard_normal(length)
    spectrum = rfft(rng.standard_normal(length))
    pink = irfft(spectrum / np.sqrt(np.maximum(np.arange(len(spectrum)), 40)), length)
    mains = rng.choice([50.0, 60.0])
    time = np.arange(length) / SAMPLE_RATE
    hum = sum(rng.uniform(0, 1 / k) * np.sin(2 * np.pi * k * mains * time + rng.uniform(0, 6.28)) for k in range(1, 9))
    mixed = sum(np.sqrt(part) * wave / np.sqrt(np.mean(wave**2)) for part, wave in zip(share, (white, pink, hum)))
    return mixed / np.sqrt(np.mean(mixed**2))


def _level(sound: np.ndarray) -> float:
    return float(np.sqrt(np.mean(sound**2)))


def _lips(track: dict, seconds: float, fps: int) -> Lips:
    """The articulation at the time of each video frame; a mouth opens for a vowel as far as it is loud."""
    at = np.arange(round(seconds * fps)) / fps
    points = np.arange(len(track["voice"])) * HOP / SAMPLE_RATE
    loud = gaussian_filter1d(np.minimum(track["voice"] + 0.3 * track["noise"], 1.3), 3.0)
    opening = np.clip(track["opening"] * (0.35 + 0.65 * loud / 1.0), 0, 1)
    return Lips(*(np.interp(at, points, values) for values in (opening, track["rounding"], track["stress"])))
