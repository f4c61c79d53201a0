"""The benchmark of real clips: its experiment files fit each other, and its figures have the twins they need."""

import json
import re
import sys
from pathlib import Path

import pytest

from affekt.data.settings import read_yaml
from affekt.finetune.probes.settings import ProbeSettings
from affekt.finetune.retrieval.settings import RetrievalSettings
from affekt.finetune.schema import Difference, Estimate, Results, System
from affekt.finetune.training.settings import FinetuneSettings
from affekt.pretrain.flops import training_flops
from affekt.pretrain.settings import PretrainSettings
from benchmarks import quality

LAUNCH = Path(quality.__file__).parents[1] / "launch"
GFLOP = 1e9


def experiment(name, kind):
    return kind.read(LAUNCH / f"{name}.yaml")


def test_from_scratch_takes_as_much_arithmetic_as_pretraining_and_finetuning():
    tuned, scratch = (experiment(name, FinetuneSettings) for name in ("speech_finetune", "speech_scratch"))
    differ = {"out", "title", "scratch", "train"}
    assert tuned.model_dump(exclude=differ) == scratch.model_dump(exclude=differ)
    assert tuned.train.model_copy(update={"steps": 0}) == scratch.train.model_copy(update={"steps": 0})
    pretrain = experiment("speech_audio", PretrainSettings)
    s = pretrain.model
    tokens, width = s.grid_audio[0] * s.grid_audio[1], s.embed_dim
    forward = s.depth * (24 * width**2 * tokens + 4 * width * tokens**2) + 2 * tokens * s.patch_size_audio**2 * width
    step = 3 * forward * tuned.train.global_batch
    before = training_flops(s) * pretrain.train.global_batch * pretrain.train.steps
    assert scratch.train.steps * step == pytest.approx(before + tuned.train.steps * step, rel=0.05)


def test_no_test_clip_is_learned_from_or_chosen_on():
    for name in ("speech_audio", "speech_audio_other", "grid_lips"):
        for corpus in experiment(name, PretrainSettings).data.parts:
            assert corpus.include == {"split": ["train"]} and corpus.held_out == {"split": ["val"]}, name
    parts = [p for name in ("speech_finetune", "speech_scratch") for p in experiment(name, FinetuneSettings).data.parts]
    probes = [experiment(name, ProbeSettings) for name in ("ravdess_audio_probe", "emodb_probe", "grid_lips_probe")]
    assert all(part.test == {"split": ["val"]} for part in [*parts, *probes])
    found = experiment("grid_retrieval", RetrievalSettings)
    assert (found.base, found.fit, found.first) == ({"split": ["val"]}, {"split": ["train"]}, 160)


def test_the_encoders_of_the_files_are_those_that_are_pretrained():
    for file in LAUNCH.glob("*.yaml"):
        encoder = read_yaml(file).get("encoder")
        run = re.fullmatch(r"runs/(\w+)/export", str(encoder))
        if run and file.stem in Path(quality.__file__).read_text():
            assert read_yaml(LAUNCH / f"{run[1]}.yaml")["out"] == f"runs/{run[1]}"


def system(name, scores, kind="other"):
    e = {score: Estimate(value=v, low=v, high=v, unit="clips", clusters=9) for score, v in scores.items()}
    return System(name=name, title=name, kind=kind, streams="both", clips=9, scores=e, by_seed=[scores] * 2)


def results(path, systems, differences=()):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Results(
        **{"title": path, "task": "single", "label": "label", "main_score": "uar", "clips": {}},
        systems=systems,
        differences=list(differences),
    ).write(Path(path))


def test_every_figure_has_its_twins(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    uar = {"uar": 0.5}
    gain = Difference(of="a", minus="b", score="uar", clips=9, estimate=system("a", uar).scores["uar"], p=0.01)
    for corpus, name in (("ravdess_audio", "ravdess"), ("emodb", "emodb")):
        rows = [f"{corpus}_probe_audio", f"{corpus}_probe_random_audio", "majority", "mel_svm"]
        rows += ["egemaps_svm", "compare_svm"]
        results(f"runs/quality/{name}_fixed/results.json", [system(f"{row}:dev-selected", uar) for row in rows])
        tuned = [system("speech_finetune", {"uar": 0.6}), system("speech_scratch", {"uar": 0.4})]
        results(f"runs/quality/{corpus}_finetune/results.json", tuned, [gain])
    recall = {f"{a}_to_{b}_recall_{k}": k / 20 for a, b in (("audio", "video"), ("video", "audio")) for k in (1, 5, 10)}
    names = ["pretrained_chosen", "pretrained_contrast", "random_chosen", "random_contrast", "statistics_chosen"]
    results("runs/grid_lips/retrieval/results.json", [system(name, recall) for name in names])
    names = [f"{f}_{s}" for f in ("pretrained", "random", "statistics") for s in ("audio", "video", "both")]
    results("runs/grid_lips/probe/results.json", [system(name, uar) for name in [*names, "pretrained_audio_plain"]])
    told = []
    monkeypatch.setattr(quality, "affekt", lambda *words, unless="": told.append(words))
    monkeypatch.setattr(sys, "argv", ["quality", "--only", "speech", "grid"])
    quality.main()
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]
    for name in ("ravdess_audio_probe_uar", "ravdess_audio_finetune_uar", "emodb_probe_uar", "emodb_finetune_uar"):
        assert {name, f"random_{name}", f"stats_{name}"} <= figures.keys()
    for name in ("grid_colour_probe_uar", "grid_a2v_recall1"):
        assert {name, f"random_{name}", f"stats_{name}"} <= figures.keys()
    assert figures["ravdess_audio_finetune_uar"] == 0.6 and figures["random_emodb_finetune_uar"] == 0.4
    assert figures["grid_a2v_recall1"] == 0.05 and figures["aligned_grid_v2a_recall10"] == 0.5
    named = {word for words in told for word in words if (LAUNCH / f"{word}.yaml").exists()}
    assert {"speech_audio", "speech_finetune", "speech_scratch", "grid_lips", "grid_retrieval"} <= named
