"""Corpora into manifests: made-up trees of the documented shapes, what is missing, the same bytes."""

import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from affekt.cli import run
from affekt.data.corpora.emotions import COMMON, TO_COMMON
from affekt.data.corpora.importer import CORPORA, import_corpus, told
from affekt.data.errors import SettingsError
from affekt.data.manifest import read_source
from affekt.data.shards import ShardIndex

VOTES = '"","A","D","F","H","N","S","fileName"\n'
IEMOCAP = """% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]

[6.2901 - 8.2357]\tSes01F_impro01_F000\tneu\t[2.5000, 2.5000, 2.5000]
C-E2:\tNeutral;\t()
C-E3:\tAnger; Frustration;\t(curious; or not)
C-E4:\tNeutral;\t()
C-F1:\tSadness;\t()
A-E3:\tval 3; act 2; dom  2;\t()

[10.0100 - 11.3925]\tSes01F_impro01_M000\texc\t[4.5000, 3.5000, 2.0000]
C-E2:\tExcited;\t()
"""
MELD = "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID\n"

# Per corpus: the files of its tree (empty media, tables with their text), and the rows without domain and licence.
TREES = {
    "cremad": (
        {
            **dict.fromkeys(["VideoFlash/1001_DFA_ANG_XX.flv", "AudioWAV/1001_DFA_ANG_XX.wav"], ""),
            **dict.fromkeys(["AudioMP3/1091_IEO_NEU_HI.mp3", "AudioWAV/1091_IEO_NEU_HI.wav"], ""),
            **dict.fromkeys(["AudioWAV/1076_MTI_SAD_XX.wav", "AudioWAV/1001_DFA_XXX_XX.wav", "README.md"], ""),
            "VideoDemographics.csv": '"ActorID","Age","Sex"\n1001,51,"Male"\n1091,29,"Female"\n',
            "processedResults/tabulatedVotes.csv": VOTES
            + '"100001",1,2,3,4,5,6,"1001_DFA_ANG_XX"\n"200001",0,0,0,9,0,0,"1001_DFA_ANG_XX"\n'
            + '"300001",7,0,0,0,1,0,"1001_DFA_ANG_XX"\n"300002",7,0,0,0,1,0,"1002_IEO_SAD_LO"\n',
        },
        [
            {
                **{"id": "cremad_1001_DFA_ANG_XX", "video": "VideoFlash/1001_DFA_ANG_XX.flv", "speaker": "cremad_1001"},
                **{"sex": "M", "age": "51", "fold": "1", "label": "anger", "emotion": "angry", "sentence": "DFA"},
                **{"intensity": "unspecified"},
                "votes_voice": {"anger": 1, "disgust": 2, "fear": 3, "happy": 4, "neutral": 5, "sad": 6},
                "votes_face": {"anger": 0, "disgust": 0, "fear": 0, "happy": 9, "neutral": 0, "sad": 0},
                "votes": {"anger": 7, "disgust": 0, "fear": 0, "happy": 0, "neutral": 1, "sad": 0},
            },
            {
                **{"id": "cremad_1091_IEO_NEU_HI", "audio": "AudioWAV/1091_IEO_NEU_HI.wav", "speaker": "cremad_1091"},
                **{"sex": "F", "age": "29", "fold": "5", "label": "neutral", "emotion": "neutral", "sentence": "IEO"},
                **{"intensity": "high"},
            },
        ],
    ),
    "ravdess": (
        dict.fromkeys(
            [
                *("Actor_01/01-01-05-02-01-01-01.mp4", "Actor_01/02-01-05-02-01-01-01.mp4"),
                *("Audio_Speech/Actor_01/03-01-05-02-01-01-01.wav", "Actor_18/02-01-02-01-02-02-18.mp4"),
                *("Actor_18/03-01-02-01-02-02-18.wav", "Actor_24/03-02-08-01-01-02-24.wav"),
            ],
            "",
        ),
        [
            {
                **{"id": "ravdess_01-02-01-02-02-18", "video": "Actor_18/02-01-02-01-02-02-18.mp4", "label": "calm"},
                **{"audio": "Actor_18/03-01-02-01-02-02-18.wav", "speaker": "ravdess_18", "sex": "F", "fold": "5"},
                **{"intensity": "normal", "channel": "speech", "statement": "02", "repetition": "02"},
            },
            {
                **{"id": "ravdess_01-05-02-01-01-01", "video": "Actor_01/01-01-05-02-01-01-01.mp4", "label": "angry"},
                **{"speaker": "ravdess_01", "sex": "M", "fold": "1", "emotion": "angry", "intensity": "strong"},
                **{"channel": "speech", "statement": "01", "repetition": "01"},
            },
            {
                **{"id": "ravdess_02-08-01-01-02-24", "audio": "Actor_24/03-02-08-01-01-02-24.wav", "sex": "F"},
                **{"speaker": "ravdess_24", "fold": "6", "label": "surprised", "emotion": "surprised"},
                **{"intensity": "normal", "channel": "song", "statement": "01", "repetition": "02"},
            },
        ],
    ),
    "emodb": (
        dict.fromkeys(["wav/03a01Fa.wav", "wav/16b10Lb.wav", "wav/04a01Fa.wav", "lablaut/03a01Fa.lablaut"], ""),
        [
            {
                **{"id": "emodb_03a01Fa", "audio": "wav/03a01Fa.wav", "speaker": "emodb_03", "sex": "M", "age": "31"},
                **{"fold": "1", "label": "happiness", "emotion": "happy", "sentence": "a01"},
            },
            {
                **{"id": "emodb_16b10Lb", "audio": "wav/16b10Lb.wav", "speaker": "emodb_16", "sex": "F", "age": "31"},
                **{"fold": "10", "label": "boredom", "sentence": "b10"},
            },
        ],
    ),
    "grid": (
        dict.fromkeys(["s1/video/mpg_6000/bbaf2n.mpg", "s1/bbaf2n.wav", "s34/swwzzs.wav", "align/bbaf2n.align"], ""),
        [
            {
                **{"id": "grid_s1_bbaf2n", "video": "s1/video/mpg_6000/bbaf2n.mpg", "speaker": "grid_s1", "sex": "M"},
                **{"label": "blue", "command": "bin", "preposition": "at", "letter": "f", "digit": "2"},
                **{"adverb": "now"},
            },
            {
                **{"id": "grid_s34_swwzzs", "audio": "s34/swwzzs.wav", "speaker": "grid_s34", "sex": "F"},
                **{"label": "white", "command": "set", "preposition": "with", "letter": "z", "digit": "0"},
                **{"adverb": "soon"},
            },
        ],
    ),
    "mead": (
        dict.fromkeys(
            [
                *("M003/video/front/disgusted/level_3/007.mp4", "M003/video/left_30/disgusted/level_3/007.mp4"),
                *("M003/audio/disgusted/level_3/007.m4a", "W009/audio/neutral/level_1/001.m4a"),
            ],
            "",
        ),
        [
            *(
                {
                    "id": f"mead_M003_disgusted_3_007_{view}",
                    "video": f"M003/video/{view}/disgusted/level_3/007.mp4",
                    **{"audio": "M003/audio/disgusted/level_3/007.m4a", "speaker": "mead_M003", "sex": "M"},
                    **{"label": "disgusted", "emotion": "disgust", "intensity": "3", "view": view},
                    "utterance": "M003_disgusted_3_007",
                }
                for view in ("front", "left_30")
            ),
            {
                **{"id": "mead_W009_neutral_1_001", "audio": "W009/audio/neutral/level_1/001.m4a", "sex": "F"},
                **{"speaker": "mead_W009", "label": "neutral", "emotion": "neutral", "intensity": "1"},
                **{"utterance": "W009_neutral_1_001"},
            },
        ],
    ),
    "msp_improv": (
        {
            "Evalution.txt": "UTD-IMPROV-S01A-F01-P-FM01.avi; N; A:3.000000 ; V:3.500000; D:NaN; N:4.0;\n"
            "WORKER1; Neutral; Neutral,Happy; A:3.0; V:3.0; D:3.0; N:4.0;\n\n"
            "UTD-IMPROV-S20H-M06-R-MM02.avi; X; A:1.0; V:2.0; D:3.0; N:4.0;\n"
            "UTD-IMPROV-S20H-M06-S-MM03.avi; H; A:1.0; V:2.0; D:3.0; N:4.0;\n",
            **dict.fromkeys(["session1/S01A/P/MSP-IMPROV-S01A-F01-P-FM01.wav"], ""),
            **dict.fromkeys(["Video/session6/S20H/R/MSP-IMPROV-S20H-M06-R-MM02.avi"], ""),
            **dict.fromkeys(["Audio/session6/S20H/R/MSP-IMPROV-S20H-M06-R-MM02.wav"], ""),
        },
        [
            {
                "id": "msp_improv_S01A-F01-P-FM01",
                "audio": "session1/S01A/P/MSP-IMPROV-S01A-F01-P-FM01.wav",
                **{"speaker": "msp_improv_F01", "session": "msp_improv_1", "sex": "F", "fold": "1", "label": "neutral"},
                **{"emotion": "neutral", "arousal": 3.0, "valence": 3.5, "naturalness": "4.0", "condition": "natural"},
                **{"target": "angry", "sentence": "01"},
            },
            {
                "id": "msp_improv_S20H-M06-R-MM02",
                "video": "Video/session6/S20H/R/MSP-IMPROV-S20H-M06-R-MM02.avi",
                **{"speaker": "msp_improv_M06", "session": "msp_improv_6", "sex": "M", "fold": "6"},
                **{"label": "no agreement", "arousal": 1.0, "valence": 2.0, "dominance": 3.0, "naturalness": "4.0"},
                **{"condition": "target read", "target": "happy", "sentence": "20"},
            },
        ],
    ),
    "iemocap": (
        {
            "Session1/dialog/EmoEvaluation/Ses01F_impro01.txt": IEMOCAP,
            "Session1/dialog/EmoEvaluation/Categorical/Ses01F_impro01_e2_cat.txt": "Ses01F_impro01_F000 :Neutral; ()\n",
            "Session5/dialog/EmoEvaluation/Ses05M_script01_1b.txt": ""
            "[0.5 - 1.5]\tSes05M_script01_1b_F003\tfru\t"
            "[2.0000, 2.0000, 2.0000]\n[2.5 - 3.5]\tSes05M_script01_1b_M003\tang\t[2.0000, 2.0000, 2.0000]\n",
            "Session1/dialog/transcriptions/Ses01F_impro01.txt": ""
            "Ses01F_impro01_F000 [006.2901-008.2357]: Excuse me.\n",
            "Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav": "",
            "Session1/dialog/wav/Ses01F_impro01.wav": "",
            "Session1/dialog/avi/DivX/Ses01F_impro01.avi": "",
            "Session5/sentences/wav/Ses05M_script01_1b/Ses05M_script01_1b_F003.wav": "",
        },
        [
            {
                "id": "iemocap_Ses01F_impro01_F000",
                "audio": "Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav",
                **{"speaker": "iemocap_Ses01F", "session": "iemocap_Ses01", "sex": "F", "fold": "1"},
                **{"label": "neutral", "emotion": "neutral", "valence": 2.5, "arousal": 2.5, "dominance": 2.5},
                **{"votes": {"neutral": 2, "anger": 1, "frustration": 1}, "votes_self": {"sadness": 1}},
                **{"scenario": "improvised", "transcript": "Excuse me."},
            },
            {
                **{"id": "iemocap_Ses01F_impro01_M000", "audio": "Session1/dialog/wav/Ses01F_impro01.wav"},
                **{"start": 10.01, "end": 11.3925, "speaker": "iemocap_Ses01M", "session": "iemocap_Ses01"},
                **{"sex": "M", "fold": "1", "label": "excited", "emotion": "happy", "valence": 4.5, "arousal": 3.5},
                **{"dominance": 2.0, "votes": {"excited": 1}, "scenario": "improvised"},
            },
            {
                "id": "iemocap_Ses05M_script01_1b_F003",
                "audio": "Session5/sentences/wav/Ses05M_script01_1b/Ses05M_script01_1b_F003.wav",
                **{"speaker": "iemocap_Ses05F", "session": "iemocap_Ses05", "sex": "F", "fold": "5"},
                **{"label": "frustration", "valence": 2.0, "arousal": 2.0, "dominance": 2.0, "scenario": "script"},
            },
        ],
    ),
    "meld": (
        {
            "train/train_sent_emo.csv": MELD + '1,"Oh my God, he\x85s lost it.",Phoebe,sadness,negative,0,0\n'
            "2,What?,Monica,surprise,negative,125,3\n",
            "dev_sent_emo.csv": MELD + "1,Hey!,The Waiter,joy,positive,0,0\n2,Gone.,Joey,neutral,neutral,110,7\n",
            "train/train_splits/dia0_utt0.mp4": "",
            "train/train_splits/dia125_utt3.mp4": "",
            "dev_splits_complete/dia0_utt0.mp4": "",
            "dev_splits_complete/._dia0_utt0.mp4": "",
            "dev_splits_complete/final_videos_testdia0_utt0.mp4": "",
            "dev_splits_complete/dia9_utt9.mp4": "",
        },
        [
            {
                **{"id": "meld_train_dia0_utt0", "video": "train/train_splits/dia0_utt0.mp4", "split": "train"},
                **{"speaker": "meld_Phoebe", "session": "meld_train_dia0", "label": "sadness", "emotion": "sad"},
                **{"sentiment": "negative", "transcript": "Oh my God, he\x85s lost it."},
            },
            {
                **{"id": "meld_dev_dia0_utt0", "video": "dev_splits_complete/dia0_utt0.mp4", "split": "dev"},
                **{"speaker": "meld_The Waiter", "session": "meld_dev_dia0", "label": "joy", "emotion": "happy"},
                **{"sentiment": "positive", "transcript": "Hey!"},
            },
        ],
    ),
    "mafw": (
        {
            **{f"T & T/single/no_caption/set_{k}/train.txt": "00001.mp4 anger\n00002.mp4 anxiety\n" for k in (3, 4, 5)},
            "T & T/single/no_caption/set_1/train.txt": "00002.mp4 anxiety\n00003.mp4 fear\n",
            "T & T/single/no_caption/set_1/test.txt": "00001.mp4 anger\n",
            "T & T/single/no_caption/set_2/test.txt": "00002.mp4 anxiety\n",
            "T & T/compound/no_caption/set_2/test.txt": "00001.mp4 anger_fear\n",
            "data/clips/00001.mp4": "",
            **dict.fromkeys(["data/frames/00001/1.png", "data/frames/00002/1.png"], ""),
        },
        [
            {"id": "mafw_00001", "video": "data/clips/00001.mp4", "fold": "1", "label": "anger", "emotion": "angry"},
            {"id": "mafw_00002", "video": "data/frames/00002", "fold": "2", "label": "anxiety"},
        ],
    ),
    "dfew": (
        {
            "EmoLabel_DataSplit/train(single-labeled)/set_1.csv": "video_name,label\n2,7\n3,1\n",
            "EmoLabel_DataSplit/test(single-labeled)/set_1.csv": "video_name,label\n1,4\n",
            "EmoLabel_DataSplit/test(single-labeled)/set_5.csv": "video_name,label\n00002,7\n",
            "Clip/clip_224x224/00001/00001_00001.jpg": "",
            "Clip/clip_224x224_16f/00003/1.jpg": "",
            **dict.fromkeys(["Clip/original/1.mp4", "Clip/original/2.mp4", "Clip/original/16372.mp4"], ""),
        },
        [
            {
                **{"id": "dfew_00001", "video": "Clip/clip_224x224/00001", "audio": "Clip/original/1.mp4", "fold": "1"},
                **{"label": "angry", "emotion": "angry"},
            },
            {
                **{"id": "dfew_00002", "video": "Clip/original/2.mp4", "fold": "5"},
                **{"label": "fear", "emotion": "fearful"},
            },
        ],
    ),
    "mer2023": (
        {
            "mer2023train/train-label.csv": "name,discrete,valence\nsample_1,worried,-2.5\nsample_2,happy,3\n",
            "test-labels/test3-label.csv": "name,discrete\nsample_7,surprise\n",
            **dict.fromkeys(["mer2023train/train/sample_1.avi", "test3/sample_7.mp4", "test3/sample_8.mp4"], ""),
        },
        [
            {
                **{"id": "mer2023_train_sample_1", "video": "mer2023train/train/sample_1.avi", "split": "train"},
                **{"label": "worried", "valence": -2.5},
            },
            {
                **{"id": "mer2023_test3_sample_7", "video": "test3/sample_7.mp4", "split": "test3"},
                **{"label": "surprise", "emotion": "surprised"},
            },
        ],
    ),
    "voxceleb2": (
        {
            "vox2_meta.csv": "VoxCeleb2 ID ,VGGFace2 ID ,Gender ,Set \n"
            "id00012 ,n000012 ,m ,dev \nid00017 ,n000017 ,f ,test \n",
            "dev/mp4/id00012/21Uxsk56VDQ/00001.mp4": "",
            "dev/aac/id00012/21Uxsk56VDQ/00001.m4a": "",
            "aac/id00017/-_UxskVDQ_1/00012.m4a": "",
        },
        [
            {
                "id": "voxceleb2_id00012_21Uxsk56VDQ_00001",
                "video": "dev/mp4/id00012/21Uxsk56VDQ/00001.mp4",
                "audio": "dev/aac/id00012/21Uxsk56VDQ/00001.m4a",
                **{"speaker": "voxceleb2_id00012", "session": "voxceleb2_id00012_21Uxsk56VDQ", "sex": "M"},
                **{"split": "dev"},
            },
            {
                "id": "voxceleb2_id00017_-_UxskVDQ_1_00012",
                "audio": "aac/id00017/-_UxskVDQ_1/00012.m4a",
                **{"speaker": "voxceleb2_id00017", "session": "voxceleb2_id00017_-_UxskVDQ_1", "sex": "F"},
                **{"split": "test"},
            },
        ],
    ),
    "affectnet": (
        {
            "training.csv": "subDirectory_filePath,face_x,expression,valence,arousal\n1/a.jpg,7,0,0.5,-0.25\n"
            "1/b.jpg,7,8,-2,-2\n2/c.jpg,7,1,0,0\n",
            "validation.csv": "subDirectory_filePath,face_x,expression,valence,arousal\n9/d.png,7,7,-0.1,0.2\n",
            **dict.fromkeys([f"M/Manually_Annotated_Images/{name}" for name in ("1/a.jpg", "1/b.jpg", "9/d.png")], ""),
        },
        [
            {
                **{"id": "affectnet_1_a", "video": "M/Manually_Annotated_Images/1/a.jpg", "split": "train"},
                **{"label": "neutral", "emotion": "neutral", "valence": 0.5, "arousal": -0.25},
            },
            {
                **{"id": "affectnet_9_d", "video": "M/Manually_Annotated_Images/9/d.png", "split": "val"},
                **{"label": "contempt", "emotion": "contempt", "valence": -0.1, "arousal": 0.2},
            },
        ],
    ),
}


def plant(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def as_row(clip, root):
    """A clip of `read_source` as the tables above write it."""
    streams = {key: getattr(clip, key) for key in ("video", "audio")}
    paths = {key: path.resolve().relative_to(root.resolve()).as_posix() for key, path in streams.items() if path}
    times = {key: getattr(clip, key) for key in ("start", "end") if getattr(clip, key) is not None}
    meta = {key: value for key, value in clip.meta.items() if key not in ("domain", "licence")}
    return {"id": clip.id, **paths, **times, **meta}


def test_every_corpus_has_its_tree_here():
    assert set(TREES) == {name for name, corpus in CORPORA.items() if not corpus.is_list}


@pytest.mark.parametrize("name", TREES)
def test_a_tree_of_the_documented_shape_becomes_a_manifest_that_prepare_reads(name, tmp_path):
    files, expected = TREES[name]
    root = plant(tmp_path / "as downloaded", files)
    out = tmp_path / "manifests" / f"{name}.csv"
    summary = import_corpus(name, root, out)
    clips = read_source(out)
    assert [as_row(clip, root) for clip in clips] == expected
    assert {(clip.meta["domain"], clip.meta["licence"]) for clip in clips} == {
        (CORPORA[name].title, CORPORA[name].licence)
    }
    assert summary["clips"] == len(expected)
    before = out.read_bytes()
    assert import_corpus(name, root, out) == summary
    assert out.read_bytes() == before and not list(out.parent.glob(".*"))


def test_what_is_missing_and_what_is_left_out_is_told(tmp_path):
    reports = {}
    for name, (files, _) in TREES.items():
        reports[name] = import_corpus(name, plant(tmp_path / name, files), tmp_path / f"{name}.csv")
    left_out = {name: report["left_out"] for name, report in reports.items() if report["left_out"]}
    assert left_out == {
        "cremad": {"without sound": ["1076_MTI_SAD_XX"]},
        "meld": {
            "in none of the csv files": ["dev_dia9_utt9"],
            "the file has no index and cannot be read": ["train_dia125_utt3"],
        },
        "mer2023": {"without a label": ["test3/sample_8"]},
        "affectnet": {"labelled none": ["1/b.jpg"]},
    }
    absent = {name: report["absent"] for name, report in reports.items() if report["absent"]}
    assert absent == {
        "cremad": ["1002_IEO_SAD_LO"],
        "msp_improv": ["S20H-M06-S-MM03"],
        "iemocap": ["Ses05M_script01_1b_M003"],
        "meld": ["dev_dia110_utt7"],
        "mafw": ["00003"],
        "dfew": ["00003"],
        "mer2023": ["train/sample_2"],
        "affectnet": ["2/c.jpg"],
    }
    assert reports["cremad"]["published"] == {"clips": [7442, 2], "speaker": [91, 2]}
    assert reports["meld"]["notes"] == ["test_sent_emo.csv is not there, so the part test is left out"]
    text = told(reports["ravdess"])
    assert "channel=speech: 1,440 published, 2 here" in text and "CC BY-NC-SA 4.0" in text


def test_the_eight_class_form_of_affectnet(tmp_path):
    for number, (expression, valence) in enumerate([("6", "-0.5"), ("3", "0.25")]):
        plant(tmp_path, {f"val_set/images/{number}.jpg": ""})
        (tmp_path / "val_set/annotations").mkdir(exist_ok=True)
        np.save(tmp_path / f"val_set/annotations/{number}_exp.npy", expression)  # as text, as they are given out
        np.save(tmp_path / f"val_set/annotations/{number}_val.npy", np.float64(valence))
    plant(tmp_path, {"val_set/images/2.jpg": ""})
    summary = import_corpus("affectnet", tmp_path)
    assert summary["left_out"] == {"without annotations": ["val_set/images/2.jpg"]}
    assert [as_row(clip, tmp_path) for clip in read_source(tmp_path)] == [
        {
            **{"id": f"affectnet_val_{number}", "video": f"val_set/images/{number}.jpg", "split": "val"},
            **{"label": label, "emotion": emotion, "valence": valence},
        }
        for number, label, emotion, valence in ((0, "anger", "angry", -0.5), (1, "surprise", "surprised", 0.25))
    ]
    np.save(tmp_path / "val_set/annotations/0_exp.npy", np.array([{}], object))
    with pytest.raises(SettingsError, match=r"0_exp\.npy: not one number"):
        import_corpus("affectnet", tmp_path, overwrite=True)


def test_the_common_words_are_one_set():
    assert len(TO_COMMON) == sum(len(words) for words in COMMON.values())  # no word in two of them
    assert all(TO_COMMON[common] == common for common in COMMON)


@pytest.mark.parametrize(
    ("corpus", "files", "complaint"),
    [
        ("crema-d", {}, "did you mean `cremad`?"),
        (
            "ravdess",
            {"a.txt": "", "b/01-01-09-01-01-01-01.mp4": ""},
            "no clip of RAVDESS among 2 files; expected Actor_01",
        ),
        ("iemocap", {"Session1/sentences/wav/a/b.wav": ""}, "EmoEvaluation"),
        (
            "iemocap",
            {"Session1/dialog/EmoEvaluation/Ses01F_impro01.txt": IEMOCAP},
            "name 2 clips, such as Ses01F_impro01_F000",
        ),
        ("mafw", {"single/no_caption/set_1/test.txt": "1.mp4 rage\n"}, "set_1/test.txt, line 1: the label is 'rage'"),
        (
            "mafw",
            {f"single/no_caption/set_{k}/test.txt": "00001.mp4 fear\n" for k in (1, 2)},
            "set_2/test.txt, line 1: 00001 is tested in fold 1 too",
        ),
        ("meld", {"dev_sent_emo.csv": "Utterance,Speaker\n"}, "dev_sent_emo.csv: no column 'Emotion' (found Utterance"),
        (
            "msp_improv",
            {"Evalution.txt": "UTD-IMPROV-S01A-F01-P-FM01.avi; Q;\n"},
            "line 1: the label is 'Q', known are A",
        ),
        (
            "dfew",
            {"EmoLabel_DataSplit/test(single-labeled)/set_1.csv": "video_name,label\nx,8\n"},
            "row 2: the label is '8'",
        ),
    ],
)
def test_mistakes_are_told_with_their_place(corpus, files, complaint, tmp_path):
    plant(tmp_path, files)
    with pytest.raises(SettingsError) as error:
        import_corpus(corpus, tmp_path)
    assert complaint in str(error.value)
    assert not (tmp_path / "manifest.csv").exists()


@pytest.mark.parametrize("corpus", ["dfew", "iemocap", "mafw", "meld", "mer2023", "msp_improv"])
def test_a_folder_without_the_tables_of_its_corpus_says_where_to_get_them(corpus, tmp_path):
    plant(tmp_path, {"clips/00001.mp4": ""})
    with pytest.raises(SettingsError, match=r"which hold the labels of .*give the folder.* Where to get it: http"):
        import_corpus(corpus, tmp_path)


def test_a_manifest_with_other_content_is_only_replaced_when_asked(tmp_path):
    plant(tmp_path, {"wav/03a01Fa.wav": "", "manifest.csv": "video\nmine.mp4\n"})
    with pytest.raises(SettingsError, match=r"manifest\.csv: is there with other content.*--overwrite"):
        import_corpus("emodb", tmp_path)
    assert (tmp_path / "manifest.csv").read_text() == "video\nmine.mp4\n"
    import_corpus("emodb", tmp_path, overwrite=True)
    assert [clip.id for clip in read_source(tmp_path)] == ["emodb_03a01Fa"]
    with pytest.raises(SettingsError, match=r"give it the suffix \.csv"):
        import_corpus("emodb", tmp_path, tmp_path / "manifest.txt")
    with pytest.raises(SettingsError, match="--media is for lists"):
        import_corpus("emodb", tmp_path, media=tmp_path)


def test_import_and_prepare_as_processes(tmp_path):
    files, rows = TREES["cremad"]
    plant(tmp_path / "CREMA-D", {name: text for name, text in files.items() if not name.endswith(".flv")})
    for name in ("1001_DFA_ANG_XX", "1091_IEO_NEU_HI"):
        tone = 0.3 * np.sin(np.arange(16000) * 2 * np.pi * 200 / 16000)
        soundfile.write(tmp_path / f"CREMA-D/AudioWAV/{name}.wav", tone, 16000)

    def affekt(*arguments):
        command = [sys.executable, "-m", "affekt", *map(str, arguments), "--json"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    told_by_import = affekt("import", "cremad", "CREMA-D", "lists/cremad.csv")
    assert (told_by_import["clips"], told_by_import["speakers"]) == (2, 2)
    assert told_by_import["manifest"] == "lists/cremad.csv"
    summary = affekt("prepare", "lists/cremad.csv", "shards", "--workers", 1, "--where", "emotion=angry")
    assert (summary["prepared"], summary["quarantined"]) == (1, {})
    (sample,) = ShardIndex.open(tmp_path / "shards").samples
    expected = {key: value for key, value in rows[0].items() if key not in ("id", "video", "audio")}
    assert {key: sample.meta[key] for key in expected} == expected  # the votes of each condition among them


def test_the_command_lists_what_it_knows(capsys):
    assert run(["import", "--list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed and corpus.source in printed for name, corpus in CORPORA.items())
