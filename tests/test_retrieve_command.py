"""`affekt index`, `affekt retrieve` and `affekt recall` on real files, shards and exports."""

import json
import shutil

import av
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from affekt.cli import run
from affekt.data.errors import DataError
from affekt.data.media.clip import PrepareSettings
from affekt.data.prepare import prepare
from affekt.data.shard_writer import ShardWriter
from affekt.data.shards import ShardIndex
from affekt.finetune.retrieval import indexing
from affekt.finetune.retrieval.evaluate import recall
from affekt.finetune.retrieval.index import ClipIndex
from affekt.finetune.retrieval.settings import RetrievalSettings
from affekt.finetune.schema import Results
from affekt.pretrain.export import create_encoder, load_encoder, save_encoder
from affekt.pretrain.registry import model_settings

TINY = {"embed_dim": 24, "num_heads": 2, "depth": 2, "taps": (1, 2), "decoder_embed_dim": 16, "img_size": 32}
TINY |= {"num_frames": 4, "mel_frames": 64, "contrast_center": True, "projector_dim": 12, "contrast_weight": 1.0}
PREPARE = PrepareSettings(size=32, face="center").model_dump(mode="json")


def make_export(folder, seed=1, **seen):
    torch.manual_seed(seed)
    encoder = create_encoder(model_settings("hicmae_nano", **TINY), 4, PREPARE)
    before = {"ids": [], "speakers": [], "sources": [], "licences": ["CC-BY-4.0"], "data_sets": [], "prepare": PREPARE}
    save_encoder(encoder, folder, {"run": "test", "step": 1}, before | seen)
    return folder


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return make_export(tmp_path_factory.mktemp("export") / "export")


@pytest.fixture(scope="module")
def index(tiny_shards):
    return tiny_shards(48, size=32, seconds=1.0)


def write_film(path, number):
    """A second of a bar that moves at its own speed, and a tone of its own."""
    tone = (9000 * np.sin(np.arange(16_000) * 0.05 * (number + 1))).astype(np.int16)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25)
        video.width = video.height = 64
        video.pix_fmt = "yuv420p"
        audio = container.add_stream("aac", rate=16_000, layout="mono")
        for k in range(25):
            picture = np.full((64, 64, 3), 40 * number + 40, np.uint8)
            picture[:, (k * (number + 1)) % 58 :][:, :6] = 240
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode(None))
        frame = av.AudioFrame.from_ndarray(tone[None], format="s16", layout="mono")
        frame.sample_rate = 16_000
        container.mux(audio.encode(frame))
        container.mux(audio.encode(None))


@pytest.fixture(scope="module")
def films(tmp_path_factory, export):
    """Three films, their shards and an index of them."""
    folder = tmp_path_factory.mktemp("films")
    for number in range(3):
        write_film(folder / f"film{number}.mp4", number)
    rows = [f"film{n}.mp4,s{n},{'happy' if n else 'sad'}\n" for n in range(3)]
    (folder / "manifest.csv").write_text("path,speaker,label\n" + "".join(rows))
    prepare(folder, folder / "shards", PrepareSettings(size=32, face="center"), 1)
    assert run(["index", str(export), str(folder / "shards"), str(folder / "index"), "--windows", "1", "--json"]) == 0
    return folder


def asked(capsys, *arguments):
    capsys.readouterr()
    assert run([*map(str, arguments), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_a_film_finds_itself_and_without_it_the_others(films, capsys):
    ask = ("retrieve", films / "film1.mp4", films / "film2.mp4", "--index", films / "index")
    first, second = asked(capsys, *ask, "--keep-own")["queries"]
    assert first["answers"][0]["id"] == "film1" and second["answers"][0]["id"] == "film2"
    assert first["by"] == first["to"] == "both" and first["answers"][0]["score"] > 0.98
    assert first["answers"][0]["meta"]["label"] == "happy" and len(first["answers"]) == 3  # k is 10
    first, second = asked(capsys, *ask)["queries"]
    assert {a["id"] for a in first["answers"]} == {"film0", "film2"}  # the same file is left out
    (faces,) = asked(capsys, "retrieve", films / "film1.mp4", "--index", films / "index", "--to", "video", "-k", 1)[
        "queries"
    ]
    assert (faces["by"], faces["to"], len(faces["answers"])) == ("audio", "video", 1)
    assert run(["retrieve", str(films / "film0.mp4"), "--index", str(films / "index"), "--label", "speaker"]) == 0
    assert "film1" in capsys.readouterr().out
    assert run(["retrieve", str(films / "film0.mp4"), "--index", str(films / "index"), "--by", "both", "--to", "audio"])
    assert "`both` is compared with `both`" in capsys.readouterr().err


def test_other_weights_and_damage_are_refused(films, tmp_path, capsys):
    other = make_export(tmp_path / "other", seed=2)
    ask = ["retrieve", str(films / "film1.mp4"), "--index", str(films / "index")]
    assert run([*ask, "--encoder", str(other)]) == 3
    assert "other weights" in capsys.readouterr().err
    for name in ("vectors.safetensors", "clips.jsonl", "space.safetensors"):
        damaged = shutil.copytree(films / "index", tmp_path / name.partition(".")[0])
        content = bytearray((damaged / name).read_bytes())
        content[-3] ^= 1
        (damaged / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            ClipIndex.open(damaged)
    with pytest.raises(DataError, match="affekt index"):
        ClipIndex.open(tmp_path)
    assert run(["index", str(other), str(films / "shards"), str(films / "shards")]) == 1  # never over shards
    assert "holds shards" in capsys.readouterr().err


def test_a_clip_that_cannot_be_asked_with_costs_the_others_no_answer(films, capsys):
    (films / "words.mp4").write_text("no film")
    ask = ["retrieve", *(str(films / name) for name in ("words.mp4", "film1.mp4")), "--index", str(films / "index")]
    assert run([*ask, "--json"]) == 2
    out, err = capsys.readouterr()
    assert [query["clip"] for query in json.loads(out)["queries"]] == [str(films / "film1.mp4")]
    assert "words.mp4" in err and "1 of 2 clips could not be asked with; the others are answered" in err
    assert run([*ask, "--label", "mood"]) == 1 and "known: label, speaker" in capsys.readouterr().err


def test_what_an_index_may_replace_and_what_it_holds(export, tmp_path, encode_clip, capsys):
    """Two of four clips are damaged, one of them the only picture; titles have a line break that JSON leaves be."""
    clips = [encode_clip(f"clip{n}", None, np.full(16000, 0.1), title="a\u2028b", speaker="s") for n in range(3)]
    clips[1][1]["flac"] = b"noise"
    clips.append(encode_clip("clip3", np.zeros((25, 32, 32, 3), np.uint8), None, title="", speaker="s"))
    clips[3][1].update({name: bytes(len(data)) for name, data in clips[3][1].items()})
    writer = ShardWriter(tmp_path / "shards")
    writer.write_shard(0, clips)
    writer.finish({"size": 32, "fps": 25, "sample_rate": 16000, "picture": "mjpeg", "prepare": PREPARE})
    command = ["index", str(export), str(tmp_path / "shards"), str(tmp_path / "index"), "--windows", "1"]
    assert run([*command, "--stream", "vidoe"]) == 1 and "no stream is called vidoe" in capsys.readouterr().err
    assert not (tmp_path / "index").exists()
    assert run(command) == 0 and "2 clips could not be read and are not in it, first clip1" in capsys.readouterr().out
    opened = ClipIndex.open(tmp_path / "index")
    assert opened.about["unread"] == ["clip1", "clip3"]
    assert [clip["meta"]["title"] for clip in opened.clips[:3]] == ["a\u2028b"] * 3
    assert opened.rows["audio"].tolist() == [0, 2]
    (tmp_path / "index" / "answers.json").write_text("mine")
    assert run(command) == 1 and "other files beside the index (answers.json)" in capsys.readouterr().err
    (tmp_path / "index" / "answers.json").unlink()
    assert run(command) == 0


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_approximate_kinds_answer_from_their_files(kind, export, index, tmp_path, capsys):
    folders = {}
    for name in ("flat", kind):
        folders[name] = tmp_path / name
        told = asked(capsys, "index", export, index.root, folders[name], "--kind", name, "--windows", 1)
    assert set(told["tuned"]) == {"audio", "video", "both"} and told["tuned"]["audio"]["recall"] >= 0.95
    flat, other = (ClipIndex.open(folder) for folder in folders.values())
    assert [clip["id"] for clip in flat.clips] == sorted(clip["id"] for clip in flat.clips)
    stored = load_file(folders[kind] / "vectors.safetensors")["audio"]
    wanted, found = (opened.searches["audio"](stored, 3)[1] for opened in (flat, other))
    assert np.mean(wanted == found) > 0.9
    assert (wanted[:, 0] == np.arange(48) % 24).all()  # clips 24 on are copies of those before, and the first id wins
    (folders[kind] / "audio.faiss").write_bytes((folders[kind] / "video.faiss").read_bytes())
    with pytest.raises(DataError, match=r"audio\.faiss"):  # faiss never gets to see it
        ClipIndex.open(folders[kind])


def test_an_interrupted_index_goes_on_and_ends_the_same(export, index, tmp_path, monkeypatch):
    encoder, calls = load_encoder(export), []
    real = indexing.clip_features

    def counted(*arguments, **options):
        calls.append(len(arguments[2]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(indexing, "PER_PART", 5)
    monkeypatch.setattr(indexing, "clip_features", counted)
    how = {"windows": 1, "positions": range(12)}
    with pytest.raises(KeyboardInterrupt):
        indexing.write_clip_index(encoder, export, index, tmp_path / "index", **how)
    assert not (tmp_path / "index").exists()
    about = indexing.write_clip_index(encoder, export, index, tmp_path / "index", **how)
    assert calls == [5, 5, 2, 2]  # the last part alone was left
    straight = indexing.write_clip_index(encoder, export, index, tmp_path / "straight", **how)
    assert about["files"] == straight["files"] and about["clips"]["both"] == 12
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "straight"]  # nothing is left beside them


@pytest.fixture(scope="module")
def experiment(export, index, tmp_path_factory):
    def settings(**changes):
        values = {
            "shards": str(index.root),
            "encoder": str(export),
            "output": str(tmp_path_factory.mktemp("recall") / "out"),
            "base": {"split": ["test"]},
            "dev": {"split": ["dev"]},
            "fit": {"split": "train"},
            "label": "label",
            "apart": "source",
            "windows": 1,
            "random_seeds": [0],
            "bootstrap": 100,
        }
        return RetrievalSettings.parse(values | changes)

    return settings


def test_an_experiment_writes_what_was_found(experiment, tmp_path, capsys):
    settings = experiment()
    results = recall(settings)
    assert Results.read(settings.output / "results.json") == results
    names = [system.name for system in results.systems]
    assert names == [
        "pretrained_contrast",
        "pretrained_chosen",
        "statistics_chosen",
        "random_contrast",
        "random_chosen",
    ]
    assert results.systems[2].kind == "statistics"
    for system in results.systems:
        assert 0 <= system.scores["video_to_audio_recall_1"].low <= system.scores["video_to_audio_recall_1"].high <= 1
    gaps = {(d.minus, d.score): d for d in results.differences}
    assert {minus for minus, _ in gaps} == {"random_chosen", "statistics_chosen", "pretrained_contrast"}
    values = {s.name: s.scores["video_to_audio_map"].value for s in results.systems}
    gap = gaps["statistics_chosen", "video_to_audio_map"].estimate
    assert gap.value == pytest.approx(values["pretrained_chosen"] - values["statistics_chosen"])
    assert gap.low <= gap.value <= gap.high and 0 < gaps["statistics_chosen", "video_to_audio_map"].p <= 1
    (table,) = results.tables
    chance = {row[1]: row for row in table.rows if row[0] == "Chance"}
    assert chance["audio_to_video"][5] == f"{100 / 12:.1f}" and chance["audio_to_video"][8] == "6.5"
    assert results.clips == {"base": 12, "dev": 12, "fit": 24, "unread": []} and results.licences == [
        "CC-BY-4.0",
        "CC0",
    ]
    (tmp_path / "again.yaml").write_text((settings.output / "settings.yaml").read_text())
    where = ["output=" + str(tmp_path / "again"), "random_seeds=[]", "dev={}", "label=null"]
    assert run(["recall", str(tmp_path / "again.yaml"), *where]) == 0
    assert "audio to video, 12 queries among 12" in capsys.readouterr().out
    again = Results.read(tmp_path / "again" / "results.json")
    assert [system.name for system in again.systems] == ["pretrained_contrast"]
    both = [r.systems[0].scores["audio_to_video_map"] for r in (results, again)]
    assert both[0] == both[1]
    space = settings.output / "space-audio_to_video.safetensors"
    shards = settings.shards
    chosen = ["index", str(settings.encoder), str(shards), str(tmp_path / "index"), "--space", str(space)]
    assert run([*chosen, "--where", "split=test", "--windows", "1", "--json"]) == 0
    assert len(ClipIndex.open(tmp_path / "index").clips) == 12
    chosen[1] = str(make_export(tmp_path / "other", seed=2))
    assert run(chosen) == 1 and "chosen for another encoder" in capsys.readouterr().err


def test_leaks_and_empty_parts_are_refused(experiment, index, tmp_path):
    test = ShardIndex.open(index.root).samples[-1].id
    leaked = make_export(tmp_path / "leaked", ids=[test])
    with pytest.raises(Exception, match="pre-training has seen"):
        recall(experiment(encoder=str(leaked)))
    transductive = recall(experiment(encoder=str(leaked), transductive=True, dev={}, random_seeds=[]))
    assert "(transductive)" in transductive.systems[0].title
    with pytest.raises(Exception, match="no clip left for `dev`"):
        recall(experiment(dev={"split": "test"}))
    with pytest.raises(Exception, match=r"no clip left for `base`.*in these shards split is dev, test, train"):
        recall(experiment(base={"split": "validation"}))
    with pytest.raises(Exception, match="no clip left for `base`: say which"):
        recall(experiment(base={}))
    with pytest.raises(Exception, match="no `session`"):
        recall(experiment(group="session", dev={}, fit={}))
    with pytest.raises(Exception, match="stand on both sides"):
        recall(experiment(base={"label": "happy"}, dev={"label": "sad"}))
