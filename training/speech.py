"""Speech to train on, and how far it opens a mouth.

The speech is espeak-ng's in many languages and voices, and formant synthesis of our own. The mouth
is a simple function of the sound: its opening follows the loudness, its width the brightness.
Imports no torch.
"""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import soxr

from worker.atomic_file import atomic_write
from worker.shapes import AUDIO_STATES_HZ, SAMPLE_RATE_HZ

Split = Literal["train", "held_out"]

FRAME_SAMPLES = 640  # 25 frames a second
STATE_SAMPLES = SAMPLE_RATE_HZ // AUDIO_STATES_HZ
WINDOW_SAMPLES = 1280  # 80 ms; the Hann window makes it as sharp as about 50 ms without one

FLOOR = 10 ** (-50 / 20)  # RMS below which nothing is speech
QUIETEST_REFERENCE = 10 ** (-38 / 20)  # so that what lies little above the floor opens little
RELATIVE_FLOOR = 10 ** (-22 / 20)  # of the reference: pauses with room noise stay closed
COMPRESSION = 0.7
LOWEST_HZ = 80.0  # below it lie hum and rumble
BRIGHT_HZ = 1800.0  # between the second formants of dark and of bright vowels
BRIGHT_CENTRE_DB = -12.0  # of the energy above BRIGHT_HZ to that below: a neutral mouth
BRIGHT_SCALE_DB = 9.0
WIDE_OPENING = 0.15  # from this opening on the width counts in full

SPEECH_RMS_DB = -24.0  # of the bank's utterances; a clip's gain goes 10 dB up or down from it
GAIN_DB = 10.0
SILENT_SHARE = 0.06
FORMANT_SHARE = 0.2
BANK_SECONDS: dict[Split, float] = {"train": 900.0, "held_out": 240.0}
BANK_SEEDS: dict[Split, int] = {"train": 11, "held_out": 12}
BANK_VERSION = 2

VOICES: dict[Split, tuple[str, ...]] = {
    "train": ("m1", "m2", "m3", "m4", "m5", "f1", "f2", "f3"),
    "held_out": ("m6", "m7", "f4"),
}

# For each language of espeak-ng who, what they do, with what, and when or where.
Words = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], tuple[str, ...]]
WORDS: dict[Split, dict[str, Words]] = {
    "train": {
        "en-gb": (
            ("my sister", "the old baker", "our neighbour", "a small boy", "she", "the teacher"),
            ("is looking for", "would like to buy", "has just found", "brings", "never forgets"),
            ("a blue umbrella", "fresh bread", "the keys to the house", "two cups of tea", "me"),
            ("every morning", "at the station", "before it rains", "near the river", "again"),
        ),
        "de": (
            ("meine Schwester", "der alte Bäcker", "unsere Nachbarin", "ein kleiner Junge", "sie"),
            ("sucht", "kauft", "findet", "bringt", "zeigt uns", "vergisst", "öffnet"),
            ("einen blauen Schirm", "frisches Brot", "die Schlüssel", "zwei Tassen Tee", "das Tor"),
            ("jeden Morgen", "am Bahnhof", "vor dem Regen", "unten am Fluss", "schon wieder"),
        ),
        "fr-fr": (
            ("ma soeur", "le vieux boulanger", "notre voisine", "un petit garçon", "la maîtresse"),
            ("cherche", "voudrait acheter", "a trouvé", "apporte", "n'oublie jamais"),
            ("un parapluie bleu", "du pain frais", "les clés de la maison", "deux tasses de thé"),
            ("tous les matins", "à la gare", "avant la pluie", "près de la rivière", "aujourd'hui"),
        ),
        "es": (
            ("mi hermana", "el viejo panadero", "nuestra vecina", "un niño pequeño", "ella"),
            ("busca", "quiere comprar", "ha encontrado", "trae", "nunca olvida"),
            ("un paraguas azul", "pan fresco", "las llaves de la casa", "dos tazas de té"),
            ("cada mañana", "en la estación", "antes de la lluvia", "cerca del río", "otra vez"),
        ),
        "it": (
            ("mia sorella", "il vecchio fornaio", "la nostra vicina", "un bambino", "lei"),
            ("cerca", "vorrebbe comprare", "ha trovato", "porta", "non dimentica mai"),
            ("un ombrello blu", "il pane fresco", "le chiavi di casa", "due tazze di tè"),
            ("ogni mattina", "alla stazione", "prima della pioggia", "vicino al fiume", "ancora"),
        ),
        "pt": (
            ("a minha irmã", "o velho padeiro", "a nossa vizinha", "um menino", "o professor"),
            ("procura", "quer comprar", "encontrou", "traz", "nunca esquece"),
            ("um guarda-chuva azul", "pão fresco", "as chaves da casa", "duas xícaras de chá"),
            ("todas as manhãs", "na estação", "antes da chuva", "perto do rio", "outra vez"),
        ),
        "nl": (
            ("mijn zus", "de oude bakker", "onze buurvrouw", "een kleine jongen", "zij"),
            ("zoekt", "koopt", "vindt", "brengt", "vergeet", "opent", "wil graag"),
            ("een blauwe paraplu", "vers brood", "de sleutels van het huis", "twee kopjes thee"),
            ("elke ochtend", "op het station", "voor de regen", "bij de rivier", "alweer"),
        ),
        "pl": (
            ("moja siostra", "stary piekarz", "nasza sąsiadka", "mały chłopiec", "ona"),
            ("szuka", "chce kupić", "znalazła", "przynosi", "nigdy nie zapomina"),
            ("niebieski parasol", "świeży chleb", "klucze do domu", "dwie filiżanki herbaty"),
            ("każdego ranka", "na dworcu", "przed deszczem", "nad rzeką", "znowu"),
        ),
        "sv": (
            ("min syster", "den gamla bagaren", "vår granne", "en liten pojke", "hon"),
            ("letar efter", "vill köpa", "har hittat", "kommer med", "glömmer aldrig"),
            ("ett blått paraply", "färskt bröd", "nycklarna till huset", "två koppar te"),
            ("varje morgon", "på stationen", "innan det regnar", "nere vid floden", "igen"),
        ),
    },
    "held_out": {
        "fi": (
            ("ystäväni", "vanha kalastaja", "tuo nainen", "nuori mies", "isoäiti"),
            ("laulaa", "kertoo", "kuuntelee", "muistaa", "kirjoittaa"),
            ("pitkän tarinan", "kauniin laulun", "uuden kirjeen", "monta kysymystä"),
            ("illalla", "meren rannalla", "talven jälkeen", "hiljaisessa huoneessa"),
        ),
        "ro": (
            ("prietenul meu", "bătrânul pescar", "femeia aceea", "un tânăr", "bunica"),
            ("cântă", "povestește", "ascultă", "scrie", "își amintește"),
            ("o poveste lungă", "un cântec frumos", "o scrisoare nouă", "multe întrebări"),
            ("seara", "pe malul mării", "după iarnă", "într-o cameră liniștită"),
        ),
        "en-us": (
            ("a good friend", "the young sailor", "that woman", "grandmother", "everybody here"),
            ("wrote down", "was telling", "listens to", "remembers", "will sing"),
            ("a very long story", "the most beautiful song", "seven questions", "your letter"),
            ("in the evening", "by the sea", "after the winter", "in a quiet room"),
        ),
    },
}

# First three formants in Hz and the loudness of vowels; then the centre in Hz of hisses.
VOWELS = (
    (730, 1150, 2500, 1.0),
    (550, 1850, 2500, 0.9),
    (290, 2300, 3000, 0.6),
    (540, 880, 2450, 0.85),
    (320, 780, 2300, 0.6),
    (500, 1450, 2450, 0.6),
    (660, 1700, 2450, 0.95),
    (290, 1900, 2250, 0.6),
)
HISSES_HZ = (2500.0, 3800.0, 5200.0, 6200.0)
CONTROL_SAMPLES = 80  # 5 ms: how often the synthesis moves its formants
SPECTRUM_SAMPLES = 512


class MouthTrack(NamedTuple):
    """What a mouth does, one value a frame."""

    opening: np.ndarray  # (F,) float32 in [0, 1], 0 closed
    width: np.ndarray  # (F,) float32 in [-1, 1], -1 round, 1 spread


def mouth_track(waveform: np.ndarray) -> MouthTrack:
    """The mouth at the middle of each 40 ms of (samples,) float32 speech at 16 kHz.

    The opening is the loudness beside the recording's own, so a quiet recording opens as far as a
    loud one; silence and faint noise stay 0. The width is 0 where the mouth is closed.
    """
    track = state_track(waveform)
    frames = len(waveform) // FRAME_SAMPLES
    return MouthTrack(*(values[1::2][:frames] for values in track))


def state_track(waveform: np.ndarray) -> MouthTrack:
    """The mouth at each multiple of 20 ms, where the speech encoder's states are centred.

    Frame f of `mouth_track` is value 2f + 1 of this.
    """
    power = _power_spectra(waveform)  # (N, bins)
    if len(power) == 0:
        return MouthTrack(np.zeros(0, np.float32), np.zeros(0, np.float32))
    hz = np.fft.rfftfreq(WINDOW_SAMPLES, 1 / SAMPLE_RATE_HZ)
    opening = _opening(np.sqrt(power[:, hz >= LOWEST_HZ].sum(1)))
    dark = power[:, (hz >= LOWEST_HZ) & (hz < BRIGHT_HZ)].sum(1)
    bright = power[:, hz >= BRIGHT_HZ].sum(1)
    contrast_db = 10 * np.log10((bright + 1e-12) / (dark + 1e-12))
    width = np.tanh((contrast_db - BRIGHT_CENTRE_DB) / BRIGHT_SCALE_DB)
    weights = opening + 1e-6  # a pause says nothing of the shape beside it
    width = _smooth(width * weights) / _smooth(weights)
    width *= np.minimum(opening / WIDE_OPENING, 1.0)
    return MouthTrack(opening.astype(np.float32), width.astype(np.float32))


def _power_spectra(waveform: np.ndarray) -> np.ndarray:
    """(N, bins): power around each multiple of 20 ms; a row's sum is the mean square there."""
    half = WINDOW_SAMPLES // 2
    padded = np.pad(waveform, half)
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW_SAMPLES)[::STATE_SAMPLES]
    window = np.hanning(WINDOW_SAMPLES + 1)[:-1].astype(np.float32)
    spectra = np.fft.rfft(windows[: len(waveform) // STATE_SAMPLES] * window)
    scale = 2 / (WINDOW_SAMPLES * (window**2).sum())  # 2: the negative frequencies
    power: np.ndarray = scale * (spectra.real**2 + spectra.imag**2)
    return power


def _opening(rms: np.ndarray) -> np.ndarray:
    """(N,) loudness → opening, beside the loudness of the recording's loud parts."""
    audible = rms[(rms > FLOOR) & (rms > 0.1 * rms.max(initial=0.0))]
    if len(audible) == 0:
        return np.zeros_like(rms)
    reference = max(float(np.percentile(audible, 95)), QUIETEST_REFERENCE)
    floor = max(FLOOR, RELATIVE_FLOOR * reference)
    opening: np.ndarray = np.clip((rms - floor) / (reference - floor), 0, 1) ** COMPRESSION
    return opening


def _smooth(values: np.ndarray) -> np.ndarray:
    return np.convolve(np.pad(values, 2, mode="edge"), np.array([1, 2, 3, 2, 1]) / 9, mode="valid")


class SpeechCorpus:
    """Endless speech clips, cut from a bank of utterances that is synthesised once.

    The two splits share no language, voice, sentence or seed.

    Raises:
        RuntimeError: the bank is not in `cache_dir` yet, and espeak-ng is not installed.
    """

    def __init__(self, split: Split, cache_dir: Path = Path(".cache/training")) -> None:
        path = cache_dir / f"speech-{split}-{BANK_VERSION}.npz"
        if not path.exists():
            _write_bank(split, path)
        with np.load(path) as bank:
            ends = np.cumsum(bank["lengths"])
            utterances = np.split(bank["samples"], ends[:-1])
            num_spoken = int(bank["num_spoken"])
        self._spoken = utterances[:num_spoken]
        self._formant = utterances[num_spoken:]

    def clip(self, rng: np.random.Generator, num_frames: int) -> np.ndarray:
        """(640 * num_frames,) float32: speech with pauses at some gain, at times only silence."""
        num_samples = num_frames * FRAME_SAMPLES
        if rng.random() < SILENT_SHARE:
            return _silence(rng, num_samples)
        utterances = self._formant if rng.random() < FORMANT_SHARE else self._spoken
        stretch = 2 ** rng.uniform(-0.2, 0.2) if rng.random() < 0.5 else 1.0
        speech = _excerpt(rng, utterances, int(num_samples * stretch) + 16)
        if stretch != 1:  # slower and deeper, or quicker and higher: another throat
            rate_hz = SAMPLE_RATE_HZ * stretch
            speech = soxr.resample(speech, rate_hz, SAMPLE_RATE_HZ, quality="LQ")
        speech = speech[:num_samples]
        if rng.random() < 0.6:
            speech = _equalized(rng, speech)
        speech = _with_silent_ends(rng, speech)
        gain_db = rng.uniform(-GAIN_DB, GAIN_DB)
        speech = speech * 10 ** (gain_db / 20)
        if rng.random() < 0.3:
            noise_db = SPEECH_RMS_DB + gain_db - rng.uniform(25, 45)
            speech = speech + _noise(rng, num_samples, noise_db)
        peak = np.abs(speech).max()
        within: np.ndarray = speech * min(1.0, 0.99 / (peak + 1e-9))
        return within.astype(np.float32)


def _silence(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    if rng.random() < 0.5:
        return np.zeros(num_samples, np.float32)
    return _noise(rng, num_samples, rng.uniform(-70, -55)).astype(np.float32)


def _excerpt(
    rng: np.random.Generator, utterances: list[np.ndarray], num_samples: int
) -> np.ndarray:
    """(num_samples,) utterances one after another from within the first, pauses between some."""
    first = _utterance(rng, utterances)
    parts = [first[rng.integers(len(first)) :]]
    while sum(map(len, parts)) < num_samples:
        parts.append(np.zeros(int(rng.uniform(0.05, 0.9) * SAMPLE_RATE_HZ), np.float32))
        parts.extend(_with_pause(rng, _utterance(rng, utterances)))
    return np.concatenate(parts)[:num_samples]


def _utterance(rng: np.random.Generator, utterances: list[np.ndarray]) -> np.ndarray:
    return utterances[rng.integers(len(utterances))] / np.float32(32768)


def _with_pause(rng: np.random.Generator, utterance: np.ndarray) -> list[np.ndarray]:
    """The utterance, now and then with 0.2 to 1 s of silence in it."""
    if rng.random() < 0.6:
        return [utterance]
    cut = int(rng.uniform(0.2, 0.8) * len(utterance))
    silence = np.zeros(int(rng.uniform(0.2, 1.0) * SAMPLE_RATE_HZ), np.float32)
    return [faded(utterance[:cut]), silence, faded(utterance[cut:])]


def faded(samples: np.ndarray) -> np.ndarray:
    """Both ends faded over 10 ms, so that a cut does not click."""
    num_samples = min(SAMPLE_RATE_HZ // 100, len(samples) // 2)
    ramp = np.linspace(0, 1, num_samples, dtype=np.float32)
    faded = samples.copy()
    faded[:num_samples] *= ramp
    faded[len(faded) - num_samples :] *= ramp[::-1]
    return faded


def _equalized(rng: np.random.Generator, speech: np.ndarray) -> np.ndarray:
    """The speech, equally loud, as another microphone and room would colour it."""
    knots_hz = np.geomspace(100, 8000, 7)
    gains_db = np.clip(rng.normal(0, 5, len(knots_hz)), -10, 10)
    hz = np.fft.rfftfreq(len(speech), 1 / SAMPLE_RATE_HZ)
    gain = 10 ** (np.interp(np.log(hz + 1), np.log(knots_hz), gains_db) / 20)
    equalized = np.fft.irfft(np.fft.rfft(speech) * gain, len(speech))
    power = (equalized**2).mean()
    scaled: np.ndarray = equalized * np.sqrt((speech**2).mean() / power if power > 0 else 1.0)
    return scaled


def _with_silent_ends(rng: np.random.Generator, speech: np.ndarray) -> np.ndarray:
    """The speech, at times with up to a third of it silent at either end."""
    third = len(speech) // 3
    start = int(rng.integers(third)) if rng.random() < 0.25 else 0
    end = len(speech) - (int(rng.integers(third)) if rng.random() < 0.25 else 0)
    framed = np.zeros_like(speech)
    framed[start:end] = faded(speech[start:end])
    return framed


def _noise(rng: np.random.Generator, num_samples: int, level_db: float) -> np.ndarray:
    """(num_samples,) white noise, reddish noise or mains hum of this RMS."""
    kind = rng.integers(3)
    if kind == 0:
        noise = rng.standard_normal(num_samples)
    elif kind == 1:
        noise = np.convolve(rng.standard_normal(num_samples + 31), np.ones(32) / 32, mode="valid")
    else:
        seconds = np.arange(num_samples) / SAMPLE_RATE_HZ
        mains_hz = rng.choice((50.0, 60.0))
        noise = sum(
            (rng.uniform(0.2, 1) * np.sin(2 * np.pi * (mains_hz * harmonic * seconds + phase)))
            for harmonic, phase in zip((1, 2, 3, 5), rng.random(4), strict=True)
        )
    return _levelled(np.asarray(noise), level_db)


def _levelled(samples: np.ndarray, level_db: float) -> np.ndarray:
    """The samples at this RMS in dB of full scale; of speech, pauses do not count."""
    blocks = samples[: len(samples) // 320 * 320].reshape(-1, 320)
    power = (blocks**2).mean(1) if len(blocks) else (samples**2).mean(keepdims=True)
    rms = np.sqrt(power[power > 1e-3 * power.max()].mean()) if power.max() > 0 else 1.0
    levelled: np.ndarray = samples * (10 ** (level_db / 20) / rms)
    return levelled


def _write_bank(split: Split, path: Path) -> None:
    """Synthesise the split's utterances as 16-bit samples: the spoken ones, then the formants'."""
    rng = np.random.default_rng(BANK_SEEDS[split])
    formant_seconds = FORMANT_SHARE * BANK_SECONDS[split]
    spoken = _collect(BANK_SECONDS[split] - formant_seconds, lambda: _espeak(rng, split))
    formant = _collect(
        formant_seconds, lambda: formant_speech(rng, int(rng.uniform(3, 10) * SAMPLE_RATE_HZ))
    )
    utterances = [
        (np.clip(_levelled(samples, SPEECH_RMS_DB), -1, 1) * 32767).astype(np.int16)
        for samples in (*spoken, *formant)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    # others may start beside us
    with atomic_write(path, shared=True) as part, part.open("wb") as file:
        np.savez_compressed(
            file,
            samples=np.concatenate(utterances),
            lengths=[len(samples) for samples in utterances],
            num_spoken=len(spoken),
        )


def _collect(seconds: float, synthesise: Callable[[], np.ndarray]) -> list[np.ndarray]:
    utterances: list[np.ndarray] = []
    while sum(map(len, utterances)) < seconds * SAMPLE_RATE_HZ:
        utterances.append(synthesise())
    return utterances


def _espeak(rng: np.random.Generator, split: Split) -> np.ndarray:
    """(samples,) one to three random sentences by a random voice of the split."""
    program = shutil.which("espeak-ng")
    if program is None:
        raise RuntimeError("espeak-ng is needed to synthesise the speech; install it")
    languages = list(WORDS[split])
    language = languages[rng.integers(len(languages))]
    voice = VOICES[split][rng.integers(len(VOICES[split]))]
    sentences = [sentence(rng, WORDS[split][language]) for _ in range(rng.integers(1, 4))]
    speed, pitch = rng.integers(120, 211), rng.integers(20, 81)
    options = ["-v", f"{language}+{voice}", "-s", str(speed), "-p", str(pitch), "--stdout"]
    spoken = subprocess.run(  # noqa: S603  # our own words
        [program, *options, " ".join(sentences)], capture_output=True, check=True
    ).stdout
    rate_hz = int.from_bytes(spoken[24:28], "little")  # of the WAV header, 44 bytes
    samples = np.frombuffer(spoken[44:], "<i2").astype(np.float32) / 32768
    resampled: np.ndarray = soxr.resample(samples, rate_hz, SAMPLE_RATE_HZ, quality="HQ")
    return resampled


def sentence(rng: np.random.Generator, words: Words) -> str:
    parts = [options[rng.integers(len(options))] for options in words]
    return " ".join(parts).capitalize() + "."


def formant_speech(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """(num_samples,) float32 babble: syllables of hisses and vowels, with pauses, by one voice."""
    steps = num_samples // CONTROL_SAMPLES + 1
    voiced, hissed = np.zeros(steps), np.zeros(steps)  # loudness
    formants_hz = np.tile(np.array(VOWELS[5][:3], float), (steps, 1))
    hiss_hz = np.full(steps, HISSES_HZ[1])
    step = int(rng.integers(40))
    while step < steps:
        for _ in range(rng.integers(2, 9)):
            if rng.random() < 0.45:
                length = int(rng.integers(8, 24))
                hissed[step : step + length] = rng.uniform(0.1, 0.5)
                hiss_hz[step : step + length] = rng.choice(HISSES_HZ)
                step += length
            elif rng.random() < 0.4:
                step += int(rng.integers(6, 14))  # a stop's closure
            length = int(rng.integers(14, 50))
            *vowel_hz, loudness = VOWELS[rng.integers(len(VOWELS))]
            voiced[step : step + length] = loudness * rng.uniform(0.5, 1.0)
            formants_hz[step : step + length + 24] = vowel_hz
            step += length
            if rng.random() < 0.2:
                length = int(rng.integers(8, 20))
                voiced[step : step + length] = 0.2  # a nasal
                formants_hz[step : step + length] = (250, 1100, 2200)
                step += length
        step += int(rng.uniform(0.15, 0.8) * SAMPLE_RATE_HZ / CONTROL_SAMPLES)

    size = rng.uniform(0.9, 1.2)  # of the voice's throat: a child's is short
    formants_hz = size * np.stack([_smoothed(track, 9) for track in formants_hz.T], axis=1)
    glottis = _glottal_pulses(rng, steps, 110 * size**3)[:num_samples]
    vowels = _filtered(glottis, _resonances(formants_hz) * _smoothed(voiced, 7)[:, None])
    hisses = _filtered(
        0.3 * rng.standard_normal(num_samples), _hiss_bands(hiss_hz) * _smoothed(hissed, 5)[:, None]
    )
    speech = _levelled(_levelled(vowels, SPEECH_RMS_DB) + hisses * 0.2, SPEECH_RMS_DB)
    return speech.astype(np.float32)


def _smoothed(track: np.ndarray, width: int) -> np.ndarray:
    """(steps,) the track without corners: a Hann window of this many steps over it."""
    window = np.hanning(width + 2)[1:-1]
    padded = np.pad(track, width // 2, mode="edge")
    smoothed: np.ndarray = np.convolve(padded, window / window.sum(), mode="valid")
    return smoothed


def _glottal_pulses(rng: np.random.Generator, steps: int, pitch_hz: float) -> np.ndarray:
    """(steps * 80,) a sawtooth whose pitch wanders by some semitones."""
    wander = np.convolve(rng.standard_normal(steps + 99), np.hanning(100), mode="valid")
    track_hz = rng.uniform(0.85, 1.3) * pitch_hz * 2 ** (0.03 * wander)
    per_sample_hz = np.repeat(track_hz, CONTROL_SAMPLES)
    phase = np.cumsum(per_sample_hz) / SAMPLE_RATE_HZ
    return 2 * (phase % 1.0) - 1


def _resonances(formants_hz: np.ndarray) -> np.ndarray:
    """(steps, bins) complex: the response of four resonators and the lips' radiation."""
    hz = np.fft.rfftfreq(2 * SPECTRUM_SAMPLES, 1 / SAMPLE_RATE_HZ)
    delay = np.exp(-2j * np.pi * hz / SAMPLE_RATE_HZ)
    response = np.broadcast_to((1 - 0.97 * delay).astype(np.complex64), (len(formants_hz), len(hz)))
    fourth_hz = formants_hz[:, 2] + 900
    for centres_hz, bandwidth_hz in zip(
        (*formants_hz.T, fourth_hz), (80, 110, 180, 250), strict=True
    ):
        radius = np.exp(-np.pi * bandwidth_hz / SAMPLE_RATE_HZ)
        cosine = np.cos(2 * np.pi * centres_hz / SAMPLE_RATE_HZ)[:, None]
        poles = 1 - 2 * radius * cosine * delay + radius**2 * delay**2
        at_zero = 1 - 2 * radius * cosine + radius**2
        response = response * (at_zero / poles)
    return response


def _hiss_bands(centres_hz: np.ndarray) -> np.ndarray:
    """(steps, bins): how much of the noise passes around each centre."""
    hz = np.fft.rfftfreq(2 * SPECTRUM_SAMPLES, 1 / SAMPLE_RATE_HZ)
    bands: np.ndarray = np.exp(-0.5 * ((hz - centres_hz[:, None]) / 900) ** 2)
    return bands


def _filtered(
    source: np.ndarray,  # (samples,)
    response: np.ndarray,  # (steps, bins), one each 5 ms
) -> np.ndarray:  # (samples,)
    """The source through a filter that moves, by overlapping windows of it."""
    hop = CONTROL_SAMPLES
    window = np.hanning(4 * hop + 1)[:-1] / 2  # overlapping at a quarter they sum to 1
    padded = np.pad(source, (2 * hop, 4 * hop))
    windows = np.lib.stride_tricks.sliding_window_view(padded, 4 * hop)[::hop]
    count = min(len(windows), len(response))
    spectra = np.fft.rfft(windows[:count] * window, 2 * SPECTRUM_SAMPLES)
    pieces = np.fft.irfft(spectra * response[:count])
    filtered = np.zeros((count - 1) * hop + 2 * SPECTRUM_SAMPLES)
    for index, piece in enumerate(pieces):
        filtered[index * hop : index * hop + len(piece)] += piece
    filtered = filtered[2 * hop : 2 * hop + len(source)]
    return np.pad(filtered, (0, len(source) - len(filtered)))
