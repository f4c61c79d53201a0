"""Sources of clips: folders, manifests, lists, and mistakes told with their line."""

import json
import re
from pathlib import Path

import pytest

from affekt.data.errors import SettingsError
from affekt.data.manifest import Clip, clip_of_file, describe, list_media, read_source, safe_id

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture
def folder(tmp_path):
    for name in ("a.mp4", "b.wav", "deep/c.MKV", "deep/d.jpg", "notes.txt", ".hidden.mp4", ".git/e.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def test_a_folder_gives_its_media_in_one_order(folder):
    clips = read_source(folder)
    assert clips == [
        Clip("a", video=folder / "a.mp4"),
        Clip("b", audio=folder / "b.wav"),
        Clip("deep_c", video=folder / "deep/c.MKV"),
        Clip("deep_d", video=folder / "deep/d.jpg"),
    ]
    assert list_media(folder)[1] == 1  # notes.txt


def test_files_that_differ_in_suffix_only_are_two_clips(folder):
    (folder / "a.wav").write_bytes(b"x")
    (folder / "a.b.mp4").write_bytes(b"x")
    assert [clip.id for clip in read_source(folder)] == ["a_b", "a_mp4", "a_wav", "b", "deep_c", "deep_d"]
    (folder / "deep_c.mkv").write_bytes(b"x")  # against deep/c.MKV
    with pytest.raises(SettingsError, match=r"deep_c_mkv.*taken already"):
        read_source(folder)


def test_an_empty_folder_and_a_missing_source_are_errors(tmp_path):
    (tmp_path / "readme.md").write_text("nothing here")
    with pytest.raises(SettingsError, match=r"no media file.*1 other files.*\.mp4"):
        read_source(tmp_path)
    with pytest.raises(SettingsError, match="is not there"):
        read_source(tmp_path / "gone")
    with pytest.raises(SettingsError, match="not a folder, a media file or a manifest"):
        read_source(tmp_path / "readme.md")


def test_csv_columns_become_fields_and_meta(folder):
    (folder / "m.csv").write_text(
        "\ufeffid,video,audio,start,end,speaker,label,votes,valence,caption,weather\n"
        'one,a.mp4,b.wav,0.5,2,s1,happy,"{""happy"": 7, ""sad"": 2.5}",-0.25,"warm, ""dry""",\n'
        "two,,b.wav,,,s2,,,,,rain\n",
        encoding="utf-8",
    )
    one, two = read_source(folder / "m.csv")
    meta = {"speaker": "s1", "label": "happy", "votes": {"happy": 7, "sad": 2.5}, "valence": -0.25}
    meta["caption"] = 'warm, "dry"'
    assert one == Clip("one", folder / "a.mp4", folder / "b.wav", 0.5, 2.0, meta, 2)
    assert two == Clip("two", None, folder / "b.wav", meta={"speaker": "s2", "weather": "rain"}, line=3)


def test_json_lines_and_lists_say_the_same_as_csv(folder):
    rows = [{"video": "a.mp4", "label": 3, "speaker": "s"}, {"path": "b.wav", "label": "3"}]
    (folder / "m.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (folder / "m.lst").write_text("# comment\na.mp4 3\n'b.wav' 3\na.mp4 b.wav 3\n")
    assert read_source(folder / "m.jsonl") == [
        Clip("a", video=folder / "a.mp4", meta={"label": "3", "speaker": "s"}, line=1),
        Clip("b", audio=folder / "b.wav", meta={"label": "3"}, line=2),
    ]
    with pytest.raises(SettingsError, match=r"line 4: the id `a` is taken already \(line 2\)"):
        read_source(folder / "m.lst")
    (folder / "m.lst").write_text("a.mp4 b.wav 3\ndeep/c.MKV\n")
    pair, bare = read_source(folder / "m.lst")
    assert (pair.video, pair.audio, pair.meta) == (folder / "a.mp4", folder / "b.wav", {"label": "3"})
    assert (bare.id, bare.video, bare.meta) == ("deep_c", folder / "deep/c.MKV", {})


def test_path_and_actor_are_aliases(folder):
    (folder / "m.csv").write_text("path,actor,split\nb.wav,x,train\ndeep/c.MKV,y,val\n")
    first, second = read_source(folder / "m.csv")
    assert first.audio and not first.video and second.video and not second.audio
    assert (first.id, second.id) == ("b", "deep_c")
    assert second.meta == {"speaker": "y", "split": "val"}


def test_a_folder_with_a_manifest_is_read_through_it(folder):
    (folder / "manifest.csv").write_text("video,label\na.mp4,calm\n")
    assert [(clip.id, clip.meta) for clip in read_source(folder)] == [("a", {"label": "calm"})]


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("id,label\nx,happy\n", "line 1: no column `video`, `audio` or `path` (found id, label)"),
        ("id,video,id\nx,a.mp4,y\n", "line 1: a column name stands twice"),
        ("id,video\nx,a.mp4\nx,deep/c.MKV\n", "line 3: the id `x` is taken already (line 2)"),
        ("id,video\nx,a.mp4\ny,gone.mp4\n", "line 3: the file {folder}/gone.mp4 is not there"),
        ("id,video\nx,http://host/a.mp4\n", "line 2: the file {folder}/http:/host/a.mp4 is not there"),
        ("id,video\nx,deep\n", "line 2: the file {folder}/deep is not there"),
        ("id,video,start\nx,a.mp4,soon\n", "line 2: start is 'soon', expected a number"),
        ("id,video,valence\nx,a.mp4,nan\n", "line 2: valence is 'nan', expected a number"),
        ("id,video,start,end\nx,a.mp4,2,2\n", "line 2: start 2.0 and end 2.0 do not make an interval"),
        ("id,video,start\nx,a.mp4,-1\n", "line 2: start -1.0 and end None do not make an interval"),
        ("id,video,votes\nx,a.mp4,many\n", "line 2: votes is 'many', expected a JSON object"),
        ('id,video,votes\nx,a.mp4,"{""a"": -1}"\n', "line 2: votes is"),
        ("id,video\nx/y,a.mp4\n", "line 2: the id 'x/y' may only hold letters, digits, `_` and `-`; try `x_y`"),
        ("id,video\nx,\n", "line 2: neither `video` nor `audio` names a file"),
        ("id,video,path\nx,a.mp4,b.wav\n", "line 2: `path` beside `video` or `audio`"),
        ("id,video\nx,a.mp4,more\n", "line 2: not as many values as the header has columns (2)"),
        ('id,video\nx,"a.mp4\ny,deep/c.MKV\nz,a.mp4\n', "line 2: unexpected end of data; a quote is not closed"),
        ('id,video\nx,a.mp4\n"y"1,a.mp4\n', "line 3: ',' expected after '\"'; a quote is not closed, or stands within"),
        ('id,video\nx,"a.mp4\ny,deep/c.MKV"\n', "line 2: the file {folder}/a.mp4\ny,deep/c.MKV is not there"),
        ('id,video\n"x\ny",a.mp4,"more"\n', "columns (2); a quoted value goes on to line 3: is its quote closed too"),
        (
            "a.mp4,calm\nb.wav,happy\n",
            "line 1: no column `video`, `audio` or `path` (found a.mp4, calm); the first line",
        ),
        ("path;label\na.mp4;calm\n", "(found path;label); the first line names the columns, as in `path,label`"),
        ("path label\na.mp4 calm\n", "line 1: `path label` is a header, and a list has none; remove this line"),
        ("id,video\n", "it names no clip"),
        ("", "line 1: no column `video`, `audio` or `path` (found nothing)"),
    ],
)
def test_mistakes_in_csv_name_file_and_line(folder, text, complaint):
    (folder / "m.csv").write_text(text)
    with pytest.raises(SettingsError) as error:
        read_source(folder / "m.csv")
    assert str(error.value).startswith(f"{folder}/m.csv")
    assert complaint.format(folder=folder) in str(error.value)


def test_mistakes_in_other_manifests_name_file_and_line(folder):
    cases = {
        "m.jsonl": ('{"video": "a.mp4"}\n{"video": \n', "line 2: not valid JSON"),
        "n.jsonl": ("[1]\n", "line 1: expected an object"),
        "m.lst": ("a.mp4 b.wav label and more\n", "line 1: expected `path [audio] label`, found 5 words"),
        "n.lst": ("a.mp4 'open\n", "line 1: No closing quotation"),
        "a.lst": (
            "a.mp4 3\ndeep/c.MKV,calm\n",
            "line 2: `deep/c.MKV,calm` has commas or semicolons between its fields",
        ),
        "b.txt": ("a.mp4, calm\n", "line 1: `a.mp4, calm` has commas"),
        "c.txt": (
            "path;label\na.mp4;calm\n",
            "with spaces; a CSV manifest, which `affekt prepare` reads, ends in .csv",
        ),
        "d.txt": ("frames,3\n", "line 1: `frames,3` has commas"),
        "e.lst": ("Video audio label\na.mp4 b.wav 3\n", "line 1: `Video audio label` is a header"),
    }
    for name, (text, complaint) in cases.items():
        (folder / name).write_text(text)
        with pytest.raises(SettingsError, match=re.escape(complaint)):
            read_source(folder / name)
    (folder / "latin.csv").write_bytes("video\nm\xfcll.mp4\n".encode("latin-1"))
    with pytest.raises(SettingsError, match="cannot be read as UTF-8"):
        read_source(folder / "latin.csv")


def test_names_with_commas_and_labels_like_headers_are_read_in_lists(folder):
    for name in ("a,b.mp4", "a.mp4,b.mp4"):
        (folder / name).write_bytes(b"x")
    (folder / "m.lst").write_text("a,b.mp4 sad,calm\n'a.mp4,b.mp4' 3\nb.wav label\n")
    named = [((clip.video or clip.audio).name, clip.meta["label"]) for clip in read_source(folder / "m.lst")]
    assert named == [("a,b.mp4", "sad,calm"), ("a.mp4,b.mp4", "3"), ("b.wav", "label")]
    (folder / "m.csv").write_text('"a.mp4" 3\n"b.wav" 4\n')  # a list, and no CSV of one column
    assert [clip.meta["label"] for clip in read_source(folder / "m.csv")] == ["3", "4"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_row_is_told_by_the_line_it_begins_in(folder, end):
    lines = ["video,caption", 'a.mp4,"two', 'lines"', "", 'gone.mp4,"x', 'y"']
    (folder / "m.csv").write_bytes(end.join(lines).encode())
    with pytest.raises(SettingsError, match="line 5: the file"):
        read_source(folder / "m.csv")
    (folder / "m.csv").write_bytes(end.join(lines[:4]).encode())
    assert [(clip.line, clip.meta["caption"]) for clip in read_source(folder / "m.csv")] == [(2, f"two{end}lines")]


def test_ids_are_safe_names():
    for text in (
        "../../etc/passwd",
        "a\nb",
        "-rf",
        "x" * 400,
        "ü" * 150,
        "",
        "a.tar.gz",
        "\udcff",
        "名前 1",
        "a\x1b[31m",
    ):
        name = safe_id(text)
        assert name == safe_id(name) and 0 < len(name.encode()) <= 180
        assert not set(name) & set("./\\\n\x1b \udcff") and not name.startswith("-")
    assert safe_id("名前 1") == "名前_1"
    assert clip_of_file("dir/x.y.flac").id == "x_y"


def test_describe_notices_every_kind_of_change(folder):
    clip = Clip("a", folder / "a.mp4", None, 0.0, 1.0, {"label": "x"})
    same = describe([clip], folder)
    moved = folder / "elsewhere"
    moved.mkdir()
    (moved / "a.mp4").write_bytes(b"x")
    assert describe([Clip("a", moved / "a.mp4", None, 0.0, 1.0, {"label": "x"}, 7)], moved) == same
    others = [Clip("b", *_rest(clip)), Clip("a", folder / "a.mp4", None, 0.0, 2.0, {"label": "x"})]
    others.append(Clip("a", folder / "a.mp4", None, 0.0, 1.0, {"label": "y"}))
    assert all(describe([other], folder) != same for other in others)
    (folder / "a.mp4").write_bytes(b"longer")
    assert describe([clip], folder) != same


def _rest(clip):
    return clip.video, clip.audio, clip.start, clip.end, clip.meta


@pytest.mark.skipif(not REAL.is_dir(), reason="the folder of real clips beside the checkout is not there")
def test_the_manifest_of_the_real_clips_is_read():
    clips = read_source(REAL / "manifest.csv")
    grid = next(clip for clip in clips if clip.meta["data_set"] == "GRID")
    assert len(clips) > 2000 and grid.video and grid.audio is None
    assert {"speaker", "label", "split", "licence"} <= set(grid.meta)
    assert sum(clip.audio is not None for clip in clips) > 1500
