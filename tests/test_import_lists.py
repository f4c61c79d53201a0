"""Lists of the field into manifests: HiCMAE and VideoMAE, EmoBox, Kaldi; folders of frames as the picture."""

import json

import numpy as np
import pytest
import simplejpeg
import soundfile

from affekt.data.corpora.importer import import_corpus
from affekt.data.errors import SettingsError
from affekt.data.manifest import Clip, describe, frame_files, read_source
from affekt.data.media.clip import prepare_clip
from affekt.data.media.container import MediaError
from affekt.data.media.streams import read_media
from affekt.data.prepare import PrepareSettings

AUTHORS = "/share/home/someone/AC/Dataset/CREMA-D"


@pytest.fixture
def media(tmp_path):
    """Frames of two clips, numbered without zeros, and their sounds, as HiCMAE's lists name them."""
    folder = tmp_path / "my data" / "CREMA-D"
    for name, count in (("1001_DFA_ANG_XX", 12), ("1019_DFA_SAD_XX", 12)):
        (folder / "face_aligned" / name).mkdir(parents=True)
        for number in range(1, count + 1):
            frame = np.full((32, 32, 3), number * 20, np.uint8)
            frame[:, : 2 * number] //= 2
            picture = simplejpeg.encode_jpeg(frame, quality=98)
            (folder / "face_aligned" / name / f"{number}.jpg").write_bytes(picture)
        (folder / "AudioWAV").mkdir(exist_ok=True)
        soundfile.write(folder / "AudioWAV" / f"{name}.wav", 0.1 * np.ones(19200), 16000)
    return folder


def line(name, label):
    return f"{AUTHORS}/face_aligned/{name} {AUTHORS}/AudioWAV/{name}.wav {label}\n"


@pytest.fixture
def lists(tmp_path):
    folder = tmp_path / "saved" / "crema-d"
    for fold, (train, test) in {
        1: ("1019_DFA_SAD_XX", "1001_DFA_ANG_XX"),
        2: ("1001_DFA_ANG_XX", "1019_DFA_SAD_XX"),
    }.items():
        (folder / f"split0{fold}").mkdir(parents=True)
        for part, name in (("train", train), ("test", test), ("val", test)):
            (folder / f"split0{fold}" / f"{part}.csv").write_text(line(name, 5 * ("SAD" in name)))
    return folder


def test_lists_with_their_authors_paths_become_one_manifest_with_folds(lists, media, tmp_path):
    summary = import_corpus("lists", lists, tmp_path / "m.csv", media=media)
    assert (summary["clips"], summary["folds"], summary["absent"]) == (2, {"1": 1, "2": 1}, [])
    first, second = read_source(tmp_path / "m.csv")
    assert first.id == "1001_DFA_ANG_XX" and first.meta == {"fold": "1", "label": "0"}
    assert first.video.resolve() == (media / "face_aligned/1001_DFA_ANG_XX").resolve()
    assert first.audio.resolve() == (media / "AudioWAV/1001_DFA_ANG_XX.wav").resolve()
    assert second.meta == {"fold": "2", "label": "5"}
    assert summary["notes"] == []
    (lists / "split02" / "test.csv").write_text(line("1001_DFA_ANG_XX", 0) + line("1019_DFA_SAD_XX", 5))
    summary = import_corpus("lists", lists, tmp_path / "m.csv", media=media, overwrite=True)
    assert summary["notes"] == ["1 clips are tested in several folds or in none, so they have no fold"]
    assert [clip.meta.get("fold") for clip in read_source(tmp_path / "m.csv")] == [None, "2"]


def test_one_fold_gives_a_split_and_one_list_neither(lists, media, tmp_path):
    import_corpus("lists", lists / "split01", tmp_path / "one.csv", media=media)
    assert [clip.meta["split"] for clip in read_source(tmp_path / "one.csv")] == ["test", "train"]
    import_corpus("lists", lists / "split01" / "train.csv", tmp_path / "train.csv", media=media)
    assert [clip.meta for clip in read_source(tmp_path / "train.csv")] == [{"label": "5", "split": "train"}]


def test_lists_name_what_is_not_there_and_where_they_disagree(lists, media, tmp_path):
    with pytest.raises(SettingsError, match=r"such as /share/home.*none is there, --media FOLDER says where to look"):
        import_corpus("lists", lists, tmp_path / "m.csv")
    (lists / "split01" / "train.csv").write_text(line("1019_DFA_SAD_XX", 4) + line("1020_gone", 0))
    with pytest.raises(SettingsError, match=r"split02/test.csv, line 1: the label is '5' here and '4' elsewhere"):
        import_corpus("lists", lists, tmp_path / "m.csv", media=media)
    (lists / "split01" / "train.csv").write_text("path,label\nface_aligned/1001_DFA_ANG_XX,0\n")
    with pytest.raises(SettingsError, match=r"train.csv, line 1: `path,label` has commas or semicolons"):
        import_corpus("lists", lists, tmp_path / "m.csv", media=media)
    (lists / "split01" / "train.csv").write_text("path label\n" + line("1019_DFA_SAD_XX", 5))
    with pytest.raises(SettingsError, match=r"train.csv, line 1: `path label` is a header"):
        import_corpus("lists", lists, tmp_path / "m.csv", media=media)
    (lists / "split01" / "train.csv").write_text("a b c d\n")
    with pytest.raises(SettingsError, match=r"train.csv, line 1: expected `path \[audio\] label`, found 4 words"):
        import_corpus("lists", lists, tmp_path / "m.csv", media=media)


def test_a_list_that_is_called_csv_is_read_without_an_import(media):
    name = "1001_DFA_ANG_XX"
    (media / "train.csv").write_text(f"face_aligned/{name} AudioWAV/{name}.wav 0\n'AudioWAV/{name}.wav' 1\n")
    both, sound = read_source(media / "train.csv")
    assert (both.video, both.audio) == (media / "face_aligned" / name, media / f"AudioWAV/{name}.wav")
    assert (sound.video, sound.audio, sound.meta) == (None, both.audio, {"label": "1"})


def test_emobox_and_kaldi(media, tmp_path):
    for fold, test in ((1, "1001_DFA_ANG_XX"), (2, "1019_DFA_SAD_XX")):
        folder = tmp_path / "EmoBox" / f"fold_{fold}"
        folder.mkdir(parents=True)
        for part in ("train", "test"):
            chosen = [n for n in ("1001_DFA_ANG_XX", "1019_DFA_SAD_XX") if (n == test) == (part == "test")]
            records = [
                {"key": f"cremad-{n}", "dataset": "cremad", "wav": f"downloads/cremad/AudioWAV/{n}.wav", "emo": n[9:12]}
                for n in chosen
            ]
            text = "".join(json.dumps(record) + "\n" for record in records)
            (folder / f"cremad_{part}_fold_{fold}.jsonl").write_text(text)
    import_corpus("emobox", tmp_path / "EmoBox", tmp_path / "e.csv", media=media)
    first, second = read_source(tmp_path / "e.csv")
    assert (first.id, first.meta) == ("cremad-1001_DFA_ANG_XX", {"fold": "1", "label": "ANG", "domain": "cremad"})
    assert (second.id, second.meta["fold"]) == ("cremad-1019_DFA_SAD_XX", "2")
    turn = {"key": "t1", "wav": "AudioWAV/1001_DFA_ANG_XX.wav", "emo": "sad", "start_time": 0.0, "end_time": 0.5}
    later = turn | {"key": "t2", "emo": "neu", "start_time": 0.5, "end_time": 1}
    (tmp_path / "turns.jsonl").write_text(f"{json.dumps(turn)}\n{json.dumps(later)}\n")
    import_corpus("emobox", tmp_path / "turns.jsonl", tmp_path / "t.csv", media=media)
    assert [(clip.start, clip.end) for clip in read_source(tmp_path / "t.csv")] == [(0.0, 0.5), (0.5, 1.0)]
    (tmp_path / "turns.jsonl").write_text('{"key": "t1"}\n')
    with pytest.raises(SettingsError, match=r"turns.jsonl, line 1: expected an object with key, wav and emo"):
        import_corpus("emobox", tmp_path / "turns.jsonl", tmp_path / "t.csv", media=media)

    kaldi = tmp_path / "kaldi"
    kaldi.mkdir()
    sound = media / "AudioWAV/1001_DFA_ANG_XX.wav"
    (kaldi / "wav.scp").write_text(f"rec1 {sound}\nrec2 sph2pipe -f wav a.sph |\nrec3 gone.wav\n")
    summary = import_corpus("kaldi", kaldi, tmp_path / "k.csv")
    assert (summary["left_out"], summary["absent"]) == ({"commands, which are not run": ["rec2"]}, ["gone.wav"])
    (kaldi / "segments").write_text("utt.1 rec1 0.25 1.0\nutt.2 rec2 0 1\n")
    (kaldi / "utt2spk").write_text("utt.1 anna\n")
    (kaldi / "spk2gender").write_text("anna f\n")
    (kaldi / "text").write_text("utt.1 don't forget a jacket\n")
    import_corpus("kaldi", kaldi, tmp_path / "k.csv", overwrite=True)
    (clip,) = read_source(tmp_path / "k.csv")
    assert (clip.id, clip.audio.resolve(), clip.start, clip.end) == ("utt_1", sound.resolve(), 0.25, 1.0)
    assert clip.meta == {"speaker": "anna", "sex": "F", "transcript": "don't forget a jacket"}


def test_kaldi_paths_may_be_absolute_here_or_on_another_machine(media, tmp_path):
    """Also behind a tab; commands stay out, and -1 as the end of a segment is that of its recording."""
    kaldi, names = tmp_path / "kaldi", ("1001_DFA_ANG_XX", "1019_DFA_SAD_XX")
    kaldi.mkdir()
    here, there = media / f"AudioWAV/{names[0]}.wav", f"{AUTHORS}/AudioWAV/{names[1]}.wav"
    commands = f"c cat {here} |\nd\tsox {here} -t wav - |\n"
    (kaldi / "wav.scp").write_text(f"a\t{here}\nb {there}\n{commands}")
    summary = import_corpus("kaldi", kaldi, tmp_path / "k.csv")
    assert (summary["clips"], summary["absent"]) == (1, [there])
    assert summary["left_out"] == {"commands, which are not run": ["c", "d"]}
    (kaldi / "segments").write_text("a1\ta 0.5 -1\nb1 b 0 1\n")
    import_corpus("kaldi", kaldi, tmp_path / "k.csv", media=media, overwrite=True)
    clips = read_source(tmp_path / "k.csv")
    assert [clip.audio.resolve() for clip in clips] == [here.resolve(), (media / f"AudioWAV/{names[1]}.wav").resolve()]
    assert [(clip.id, clip.start, clip.end) for clip in clips] == [("a1", 0.5, None), ("b1", 0.0, 1.0)]


def test_frames_are_in_the_order_of_their_numbers(media):
    folder = media / "face_aligned/1001_DFA_ANG_XX"
    assert [path.name for path in frame_files(folder)] == [f"{number}.jpg" for number in range(1, 13)]
    (folder / "film.mp4").write_bytes(b"x")
    assert frame_files(folder) == [] == frame_files(media / "nothing")


def test_frames_are_spread_over_their_sound(media):
    """12 frames over 1.2 s of sound: 10 a second; each tick of 25 shows the frame nearest to it."""
    folder, sound = media / "face_aligned/1001_DFA_ANG_XX", media / "AudioWAV/1001_DFA_ANG_XX.wav"
    read = read_media(folder, sound, fps=25)
    assert (len(read.frames), len(read.waveform), read.info["source_fps"]) == (30, 19200, 10.0)
    shown = [round(frame[0, -1].mean() / 20) for frame in read.frames]
    ticks = np.arange(30) / 25
    nearest = [int(np.argmin(np.abs(np.arange(12) / 10 - tick))) + 1 for tick in ticks]
    apart = [tick for tick, a, b in zip(ticks, shown, nearest) if a != b]
    assert all(abs(tick * 10 % 1 - 0.5) < 1e-6 for tick in apart)  # halfway between two frames either will do

    alone = read_media(folder, None, fps=25)
    assert alone.waveform is None and alone.info["source_duration"] == 0.48
    assert [round(frame[0, -1].mean() / 20) for frame in alone.frames] == list(range(1, 13))
    cut = read_media(folder, sound, 0.4, 0.8, fps=25)
    np.testing.assert_array_equal(cut.frames, read.frames[10:20])


def test_a_clip_of_frames_is_prepared_and_notices_a_changed_one(media):
    folder = media / "face_aligned/1001_DFA_ANG_XX"
    clip = Clip("a", folder, media / "AudioWAV/1001_DFA_ANG_XX.wav")
    settings = PrepareSettings(face="center", size=32)
    prepared = prepare_clip(clip, settings)
    assert (prepared.record["frames"], prepared.record["samples"]) == (30, 19200)
    described = describe([clip], media)
    assert described[0][1] == ["face_aligned/1001_DFA_ANG_XX", sum(path.stat().st_size for path in folder.iterdir())]
    (folder / "13.jpg").write_bytes((folder / "1.jpg").read_bytes())
    assert describe([clip], media) != described
    assert prepare_clip(clip, settings).record["source_sha256"] != prepared.record["source_sha256"]
    (folder / "13.jpg").write_bytes(b"no picture")
    with pytest.raises(MediaError, match=r"13\.jpg"):
        prepare_clip(clip, settings)
