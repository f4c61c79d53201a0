"""The protocols by which emotion recognition is measured, a row each: classes, folds, what must stay apart, main score.

Classes are words that corpora share (`affekt.data.corpora.emotions`); a clip's own word is one of them or has its
counterpart among them, and clips of other words are left out and counted. The folds of HiCMAE are those of its released
lists (repository sunlicai/HiCMAE, saved/data); its epoch was chosen on the test clips, which here is called
`test-selected` and is not the default. Sources of the others stand in their rows.
"""

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from affekt.data.corpora.emotions import TO_COMMON
from affekt.data.errors import SettingsError
from affekt.data.shards import ShardIndex
from affekt.finetune.folds import Column, Fixed, Fold, Group, Leave, Ranges, Split, deal, natural

SIX = ("angry", "disgust", "fearful", "happy", "neutral", "sad")
FOUR = ("angry", "happy", "neutral", "sad")
EIGHT = ("angry", "calm", "disgust", "fearful", "happy", "neutral", "sad", "surprised")
EMODB = ("angry", "boredom", "disgust", "fearful", "happy", "neutral", "sad")
SEVEN = ("angry", "disgust", "fearful", "happy", "neutral", "sad", "surprised")
MAFW = (*SEVEN, "contempt", "anxiety", "helplessness", "disappointment")
VAD = ("arousal", "valence", "dominance")
AVCAFFE = ("0", "1", "2", "3", "4")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One way to measure. `group` may never stand on two sides; `id` means that folds are by clip, because who is seen
    is not told. Without `classes` they are the labels there are. `tested` and `clips` are the published counts, for
    comparison; `only` takes clips by a column, where they have it; `pool_tokens` names how many tokens of a clip's name
    are those of the recording whose parts are judged together."""

    name: str
    title: str
    source: str
    group: Group
    split: Split
    classes: tuple[str, ...] = ()
    dimensions: tuple[str, ...] = ()
    main_score: str = "uar"
    label: str = "label"
    only: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    without: frozenset[str] = frozenset()
    clips: int | None = None
    tested: tuple[int, ...] = ()
    pool_tokens: int = 0
    own_folds: bool = True

    def class_of(self, word: str) -> str | None:
        """The class that a label's word means: itself, or its counterpart of the common set; None for another one."""
        word = str(word)
        if not self.classes or word in self.classes:
            return word
        common = TO_COMMON.get(word.lower(), word.lower())
        return next((name for name in self.classes if common in (name, TO_COMMON.get(name))), None)

    def clips_of(self, index: ShardIndex, among: Sequence[int] | None = None) -> tuple[list[int], dict[str, int]]:
        """Positions of the clips that the protocol is about, and how many others there are, by cause. Raises
        SettingsError when none is left."""
        taken, left_out = [], Counter()
        for p in range(len(index.samples)) if among is None else among:
            row = index.samples.row(p)
            meta = row["meta"]
            if any(name in meta and str(meta[name]) not in allowed for name, allowed in self.only.items()):
                left_out["of another kind"] += 1
            elif row["id"].endswith(tuple(self.without)):
                left_out["unusable by the corpus's own word"] += 1
            elif self.dimensions and any(meta.get(name) in (None, "") for name in self.dimensions):
                left_out["without a rating"] += 1
            elif not self.dimensions and meta.get(self.label) in (None, ""):
                left_out["without a label"] += 1
            elif not self.dimensions and self.class_of(meta[self.label]) is None:
                left_out[f"labelled {meta[self.label]}"] += 1
            else:
                taken.append(p)
        if not taken:
            found = ", ".join(f"{count} {cause}" for cause, count in left_out.items())
            raise SettingsError(f"{index.root}: no clip for the protocol {self.name} ({found})")
        return taken, dict(left_out)

    def folds(self, index: ShardIndex, positions: Sequence[int]) -> list[Fold]:
        """All folds on these clips, checked for leaks. Raises SettingsError as `affekt.finetune.folds.deal`."""
        return deal(index, positions, self.split, self.group, own=self.own_folds)

    def labels(self, index: ShardIndex, positions: Sequence[int]) -> tuple[list[str], list[str]]:
        """(the classes, the class of each clip)."""
        words = [self.class_of(index.samples.row(p)["meta"][self.label]) for p in positions]
        return list(self.classes) or sorted(set(words), key=natural), words

    def notes(self, folds: Sequence[Fold]) -> list[str]:
        """What a reader should know: counts that differ from the published ones, folds by clip."""
        notes = []
        if self.group == "id":
            notes.append("folds are by clip: the same person may be in training and test, as the corpus tells no names")
        here = [len(fold.test) for fold in folds]
        if self.tested and here != list(self.tested):
            notes.append(f"published test clips per fold: {', '.join(map(str, self.tested))}; here {here}")
        elif self.clips and not self.tested and sum(here) != self.clips and len(folds) > 1:
            notes.append(f"published: {self.clips} clips; here {sum(here)}")
        return notes


def _row(name: str, title: str, source: str, group: Group, split: Split, **rest) -> Protocol:
    return Protocol(name=name, title=title, source=source, group=group, split=split, **rest)


# The clips that the corpus's README calls unusable; one more of actors 1037 to 1054 is not in HiCMAE's lists.
CREMAD_FAULTS = frozenset({"1064_IEO_DIS_MD", "1064_TIE_SAD_XX", "1076_MTI_NEU_XX", "1076_MTI_SAD_XX"})
CREMAD = Ranges("speaker", ((1001, 1018), (1019, 1036), (1037, 1054), (1055, 1072), (1073, 1091)), dev=0.125)
FOURS = tuple((first, first + 3) for first in range(1, 25, 4))
SESSIONS = tuple((first, first + 5) for first in range(1, 31, 6))
SPEECH = {"channel": ("speech",)}
SENTIMENT = {"dimensions": ("sentiment",), "main_score": "pcc"}

ROWS = (
    _row(
        *("cremad6", "CREMA-D, 6 emotions, 5 folds by actor", "HiCMAE's lists", "speaker", CREMAD),
        **{"classes": SIX, "without": CREMAD_FAULTS, "clips": 7437, "tested": (1463, 1470, 1475, 1474, 1555)},
    ),
    _row(
        *("cremad4", "CREMA-D, 4 emotions, 5 folds by actor", "HiCMAE's folds, its 4 classes", "speaker", CREMAD),
        **{"classes": FOUR, "without": CREMAD_FAULTS},
    ),
    _row(
        *("ravdess", "RAVDESS speech, 6 folds of 4 actors", "HiCMAE's lists", "speaker", Ranges("speaker", FOURS)),
        **{"classes": EIGHT, "only": SPEECH, "clips": 1440, "tested": (240,) * 6},
    ),
    _row(
        *("ravdess20", "RAVDESS speech, actors 1-20, 4 left out at a time", "the first 20 actors of `ravdess`"),
        *("speaker", Ranges("speaker", FOURS[:5])),
        **{"classes": EIGHT, "only": SPEECH, "clips": 1200, "tested": (240,) * 5},
    ),
    _row(
        *("ravdess_fixed", "RAVDESS speech, actors 17-20, trained on 1-16", "actors 13-16 choose", "speaker"),
        Fixed("speaker", tuple(range(1, 13)), tuple(range(13, 17)), tuple(range(17, 21))),
        **{"classes": EIGHT, "only": SPEECH, "tested": (240,)},
    ),
    _row(
        *("emodb", "EMO-DB, one speaker left out at a time", "Burkhardt et al. 2005; the next two speakers choose"),
        *("speaker", Leave("speaker", together=2)),
        **{"classes": EMODB, "clips": 535},
    ),
    _row(
        *("emodb_fixed", "EMO-DB, speakers 13 and 14, trained on 03 and 08-12", "a woman and a man choose", "speaker"),
        Fixed("speaker", (3, 8, 10, 11), (9, 12), (13, 14)),
        **{"classes": EMODB},
    ),
    _row(
        *("iemocap4", "IEMOCAP, 4 emotions, 5 sessions", "Busso et al. 2008; excitement counts as happiness"),
        *("session", Leave("session")),
        **{"classes": FOUR, "clips": 5531},
    ),
    _row(
        *("msp_improv", "MSP-IMPROV, 4 emotions, 6 sessions", "HiCMAE's lists", "session", Leave("session")),
        **{"classes": FOUR, "clips": 7787, "tested": (916, 1328, 1622, 1044, 1407, 1470)},
    ),
    _row(
        *("mafw11", "MAFW, 11 single emotions, 5 official folds", "HiCMAE's lists", "id", Column()),
        **{"classes": MAFW, "clips": 9156, "tested": (1836, 1833, 1827, 1829, 1831)},
    ),
    _row(
        *("mafw43", "MAFW, 43 compound emotions, 5 official folds", "Liu et al. 2022", "id", Column()),
        **{"main_score": "war"},
    ),
    _row(
        *("dfew", "DFEW, 7 emotions, 5 official folds", "Jiang et al. 2020", "id", Column()),
        **{"classes": SEVEN, "clips": 11697},
    ),
    _row(
        *("werewolf", "Werewolf-XL, 3 dimensions, 5 folds of 6 sessions", "HiCMAE's lists", "session"),
        Ranges("session", SESSIONS, dev=0.125),
        **{"dimensions": VAD, "main_score": "ccc", "clips": 14457, "tested": (3346, 2747, 3066, 3527, 1771)},
    ),
    _row(
        *("mer2023", "MER2023-MULTI, 6 emotions", "Lian et al. 2023; a tenth of train chooses", "id"),
        Fixed("split", dev_values=(), test=("test1",), dev=0.1),
        **{"main_score": "weighted_f1", "tested": (411,)},
    ),
    _row(
        *("meld", "MELD, 7 emotions, the corpus's parts", "Poria et al. 2019; speakers are in all parts", "session"),
        Fixed("split"),
        **{"classes": SEVEN, "main_score": "weighted_f1", "tested": (2610,)},
    ),
    _row("mosi", "CMU-MOSI, sentiment, its parts", "Zadeh et al. 2016", "session", Fixed("split"), **SENTIMENT),
    _row(
        *("mosei", "CMU-MOSEI, sentiment, its parts", "Zadeh et al. 2018", "session", Fixed("split")),
        **SENTIMENT,
        tested=(4659,),
    ),
    *(
        _row(
            *(f"avcaffe_{what}", f"AVCAffe, 5 levels of {what}, its parts", "HiCMAE, which pools a task's parts"),
            *("speaker", Fixed("split")),
            **{"classes": AVCAFFE, "label": what, "main_score": "weighted_f1", "pool_tokens": 3},
        )
        for what in ("arousal", "valence")
    ),
    _row(
        *("affwild2", "Aff-Wild2, valence and arousal, its parts", "Kollias et al. 2023; a video is a session"),
        *("session", Fixed("split")),
        **{"dimensions": ("valence", "arousal"), "main_score": "ccc"},
    ),
)
PROTOCOLS: dict[str, Protocol] = {row.name: row for row in ROWS}
GENERIC = {
    "kfold:FIELD:K": "K folds of whole values of FIELD",
    "loso:FIELD": "one value of FIELD left out at a time, the next one chooses",
    "fixed:FIELD": "the values train, dev (or val) and test of FIELD, no speaker in two of them",
    "column:FIELD": "tested in the fold that FIELD names, no speaker in two of them",
    "cross:FIELD:A:B": "trained on A of FIELD, tested on B, by the classes of A",
}


def find_protocol(name: str) -> Protocol:
    """A row by its name, or a generic one, as `kfold:speaker:5`. Raises SettingsError that names what is near."""
    if name in PROTOCOLS:
        return PROTOCOLS[name]
    kind, *words = name.split(":")
    base = {"name": name, "source": "generic", "own_folds": False}
    match kind, words:
        case "kfold", ["speaker" | "session" | "id" as by, k] if k.isdigit():
            return Protocol(title=f"{k} folds by {by}", group=by, split=Leave(by, int(k)), **base)
        case "loso", ["speaker" | "session" as by]:
            return Protocol(title=f"one {by} left out at a time", group=by, split=Leave(by), **base)
        case "fixed", [by]:
            return Protocol(title=f"fixed parts by {by}", group="speaker", split=Fixed(by), **base)
        case "column", [by]:
            return Protocol(title=f"folds by {by}", group="speaker", split=Column(by, "next"), **base)
        case "cross", [by, one, other]:
            split = Fixed(by, (one,), (), (other,))
            title = f"trained on {one}, tested on {other}"
            return Protocol(title=title, group="speaker", split=split, **base)
    near = difflib.get_close_matches(name, PROTOCOLS, n=1)
    hint = f"did you mean `{near[0]}`?" if near else f"known are {', '.join([*PROTOCOLS, *GENERIC])}"
    raise SettingsError(f"`{name}` is no protocol; {hint}")


def cross_classes(protocol: Protocol, index: ShardIndex) -> Protocol:
    """A cross-corpus protocol with the classes of its training corpus, in common words; others are left out of its
    test clips, as nothing could have learned them. Where the test corpus lacks some of them, its UAR is over those it
    has (an answer of another class is wrong), and the scores gain those of present classes (NeuroGaze-Distill)."""
    by, (source,) = protocol.split.field, protocol.split.train
    words = {
        str(row["meta"][protocol.label])
        for row in index.samples.rows()
        if str(row["meta"].get(by)) == source and row["meta"].get(protocol.label)
    }
    return replace(protocol, classes=tuple(sorted({TO_COMMON.get(word, word) for word in words})))
